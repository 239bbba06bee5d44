"""A directive that shows a record on a page that does not execute: the mean of its columns in each group of its rows.

    ```{record-means} NAME
    :by: column Header, column Header
    :means: column Header, column Header
    ```

A column of True and False shows the share of True. Means have three decimals. The table of the record is read as it is
stored, and checked against the checksum in its JSON.
"""

import csv
import hashlib
import json
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective


class RecordMeans(SphinxDirective):
    required_arguments = 1
    option_spec = {"by": str, "means": str}

    def run(self):
        source = Path(self.env.app.srcdir) / "book" / "records" / f"{self.arguments[0]}.csv"
        self.env.note_dependency(str(source))
        try:
            by, means = (columns(self.options[key]) for key in ("by", "means"))
            rows = [[*by.values(), *means.values()], *group_means(source, list(by), list(means))]
        except (OSError, KeyError, ValueError) as error:
            raise self.error(f"record-means: {error!r}")
        marks = ["---"] * len(by) + ["--:"] * len(means)
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], marks, *rows[1:])]
        box = nodes.container()
        self.state.nested_parse(StringList(lines, str(source)), self.content_offset, box)
        return box.children


def columns(option):
    """{column: header} of `column Header, column Header`."""
    return dict(part.split(maxsplit=1) for part in option.replace("\n", " ").split(","))


def group_means(source, by, means):
    """Rows of text: the columns `by` of each group, in order of appearance, and the means."""
    content = source.read_bytes()
    if hashlib.sha256(content).hexdigest() != json.loads(source.with_suffix(".json").read_text())["sha256"]:
        raise ValueError(f"{source.name} is not the table that its JSON describes")
    groups = {}
    for row in csv.DictReader(content.decode().splitlines()):
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return [
        [*key, *(f"{sum(number(row[name]) for row in rows) / len(rows):.3f}" for name in means)]
        for key, rows in groups.items()
    ]


def number(text):
    return float(text == "True") if text in ("True", "False") else float(text)


def setup(app):
    app.add_directive("record-means", RecordMeans)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
