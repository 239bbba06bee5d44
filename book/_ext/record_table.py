"""Tables of records on pages that do not execute: made from the record when the book is built, never typed.

    ```{record-table} benchmarks
    :where: part=moments; quantity=time
    :rows: variant, setting
    :columns: size
    :caption: What the table shows.
    ```

shows the column `value` of the rows that match, one row for each combination of `rows`, one column for each value of
`columns`; `{record-source} benchmarks` says what produced the record. A record whose table was changed is refused.
Neither needs more than Python's own library: the book builds without pandas and torch.

A record NAME_cuda, of the same experiment on a GPU, is shown after that of the CPU where there is one: the table again,
and what produced it. In a chapter a note follows the cell that loads NAME. Where there is none, nothing is said.
"""

import csv
import gzip
import hashlib
import json
import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

GPU = "_cuda"  # ends the names of records made on a GPU
LOADED = re.compile(r"""records\.load\(\s*["']([A-Za-z0-9_-]+)["']""")
EXPONENTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def load(folder, name):
    """Rows (as text) and meta data of a record, after its checksum."""
    meta = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    path = next(p for suffix in (".csv", ".csv.gz") if (p := folder / (name + suffix)).is_file())
    stored = path.read_bytes()
    if hashlib.sha256(stored).hexdigest() != meta["sha256"]:
        raise ValueError(f"{path.name} is not the table that {name}.json describes")
    text = (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode()
    return list(csv.DictReader(text.splitlines())), meta


def matching(rows, where):
    """The rows that have one of the given values, `a=1|2; b=3`, in each of the columns."""
    for condition in filter(None, (part.strip() for part in where.split(";"))):
        column, _, values = (part.strip() for part in condition.partition("="))
        accepted = {value.strip() for value in values.split("|")}
        if missing := accepted - {row[column] for row in rows}:
            raise ValueError(f"no row has {column} = {', '.join(sorted(missing))}")
        rows = [row for row in rows if row[column] in accepted]
    return rows


def shown(text, digits):
    """A number with so many digits; anything else as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}"
    if abs(number) >= 10**digits:
        return f"{float(f'{number:.{digits}g}'):,.0f}"
    if abs(number) >= 1e-3:
        return f"{number:#.{digits}g}".rstrip(".")
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    return f"{mantissa} · 10{str(int(exponent)).translate(EXPONENTS)}"


class RecordDirective(SphinxDirective):
    required_arguments = 1
    beside = False  # whether a GPU's record is shown as well

    def run(self):
        folder = Path(self.env.srcdir) / "book" / "records"
        for path in folder.glob(f"{self.arguments[0]}.*"):
            self.env.note_dependency(str(path))
        names = [self.arguments[0]]
        if self.beside and (folder / f"{names[0]}{GPU}.json").is_file():
            names.append(names[0] + GPU)
        found = []
        for name in names:
            try:
                found += self.render(*load(folder, name))
            except (OSError, StopIteration, KeyError, ValueError) as error:
                raise self.error(f"record {name}: {error!r}") from error
        return found


class RecordTable(RecordDirective):
    beside = True
    option_spec = {
        "where": directives.unchanged,
        "rows": directives.unchanged_required,
        "columns": directives.unchanged,
        "headings": directives.unchanged,
        "value": directives.unchanged,
        "digits": directives.positive_int,
        "caption": directives.unchanged_required,
        "name": directives.unchanged,
    }

    def render(self, rows, meta):
        on_gpu = meta["name"].endswith(GPU)
        try:
            rows = matching(rows, self.options.get("where", ""))
        except ValueError:
            if on_gpu:
                return []  # a part that a GPU alone does not have, such as two ranks
            raise
        keys = [key.strip() for key in self.options["rows"].split(",")]
        across, value = self.options.get("columns"), self.options.get("value", "value")
        digits = self.options.get("digits", 3)
        cells = {}
        for row in rows:
            place = tuple(row[key] for key in keys), row[across] if across else value
            if place in cells:
                raise ValueError(f"more than one row for {place}")
            cells[place] = row[value]
        lines, columns = (list(dict.fromkeys(places)) for places in zip(*cells))
        headings = [part.strip() for part in self.options.get("headings", ", ".join(keys)).split(",")]
        body = [[*headings, *(shown(column, digits) for column in columns)]]
        for line in lines:
            texts = [*line, *(cells.get((line, column), "") for column in columns)]
            body.append([shown(text, digits) for text in texts])
        return [self.table(body, len(keys), meta["device"] if on_gpu else "")]

    def table(self, body, headed, device):
        caption = f"{self.options['caption']} On {device}." if device else self.options["caption"]
        texts, _ = self.state.inline_text(caption, self.lineno)
        table = nodes.table("", nodes.title(caption, "", *texts))
        group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in body[0]), cols=len(body[0]))
        table += group
        for part, lines in ((nodes.thead(), body[:1]), (nodes.tbody(), body[1:])):
            for line in lines:
                entries = (
                    nodes.entry("", nodes.paragraph("", text), classes=[] if i < headed else ["text-right"])
                    for i, text in enumerate(line)
                )
                part += nodes.row("", *entries)
            group += part
        self.set_source_info(table)
        if not device:
            self.add_name(table)
        return table


class RecordSource(RecordDirective):
    beside = True

    def render(self, rows, meta):
        parts = [f"Record {meta['name']}", meta.get("processor"), f"device: {meta['device']}", meta.get("instructions")]
        parts += [f"{package} {version}" for package, version in meta["versions"].items()]
        parts += [meta["created"][:10], f"commit {meta['commit'][:10]}"]
        text = ", ".join(filter(None, parts)) + "."
        later = [
            f"Measured again: {part} ({made['created'][:10]}, commit {made['commit'][:10]})."
            for part, made in meta.get("renewed", {}).items()
        ]
        return [nodes.paragraph("", " ".join([text, *later, *meta.get("notes", [])]))]


def gpu_notes(folder, name):
    """What a chapter that loads a record says of the runs on a GPU: sentences, one text for each of their records.

    Those of the record itself, NAME_cuda, and of others of its name, NAME_long_cuda, unless another of the book's
    records has more of that name.
    """
    found = []
    others = [path.stem for path in folder.glob(f"{name}_*.json") if not path.stem.endswith(GPU)]
    for path in sorted(folder.glob(f"{name}*{GPU}.json")):
        own = path.stem.removesuffix(GPU)
        if own != name and (not own.startswith(f"{name}_") or any(f"{own}_".startswith(f"{x}_") for x in others)):
            continue
        _, meta = load(folder, path.stem)
        text = f"The same on {meta['device']}" if own == name else f"More on {meta['device']}"
        text += f": record {path.stem}, {meta['rows']:,} rows"
        if "replicates" in meta:
            text += f", {meta['replicates']} replicates"
        if "wall_seconds" in meta:
            text += f", {meta['wall_seconds'] / 60:.1f} min"
        text += f", {meta['created'][:10]}, commit {meta['commit'][:10]}."
        if beside := meta.get("beside"):
            text += (
                f" Of {beside['exponents']} exponents {beside['within']} lie within the intervals of the record here; "
            )
            text += f"the largest gap is {beside['largest']:.2g}."
        found.append(text)
    return found


def add_gpu_notes(app, doctree):
    """After each cell that loads a record, a note on its runs on a GPU, if there are any."""
    folder = Path(app.env.srcdir) / "book" / "records"
    for block in list(doctree.findall(nodes.literal_block)):
        for name in dict.fromkeys(LOADED.findall(block.astext())):
            place = block
            while place.parent is not None and not isinstance(place.parent, nodes.section | nodes.document):
                place = place.parent
            for path in folder.glob(f"{name}*{GPU}.json"):
                app.env.note_dependency(str(path))
            for text in reversed(gpu_notes(folder, name)):
                note = nodes.admonition("", nodes.title("", "On a GPU"), nodes.paragraph("", text), classes=["note"])
                place.parent.insert(place.parent.index(place) + 1, note)


def setup(app):
    app.add_directive("record-table", RecordTable)
    app.add_directive("record-source", RecordSource)
    app.connect("doctree-read", add_gpu_notes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
