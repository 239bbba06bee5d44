"""A directive that shows a record on a page that does not execute: the mean of its columns in each group of its rows.

    ```{record-means} NAME
    :by: column Header, column Header
    :means: column Header, column Header
    ```

A column of True and False shows the share of True. Means have three decimals. The table of the record is read as it is
stored, and checked against the checksum in its JSON.
"""

from docutils import nodes
from docutils.statemachine import StringList
from record_table import RecordDirective


class RecordMeans(RecordDirective):
    option_spec = {"by": str, "means": str}

    def render(self, rows, meta):
        by, means = (columns(self.options[key]) for key in ("by", "means"))
        lines = [[*by.values(), *means.values()], *group_means(rows, list(by), list(means))]
        marks = ["---"] * len(by) + ["--:"] * len(means)
        text = ["| " + " | ".join(line) + " |" for line in (lines[0], marks, *lines[1:])]
        box = nodes.container()
        self.state.nested_parse(StringList(text, meta["name"]), self.content_offset, box)
        return box.children


def columns(option):
    """{column: header} of `column Header, column Header`."""
    return dict(part.split(maxsplit=1) for part in option.replace("\n", " ").split(","))


def group_means(rows, by, means):
    """Rows of text: the columns `by` of each group, in order of appearance, and the means."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return [
        [*key, *(f"{sum(number(row[name]) for row in group) / len(group):.3f}" for name in means)]
        for key, group in groups.items()
    ]


def number(text):
    return float(text == "True") if text in ("True", "False") else float(text)


def setup(app):
    app.add_directive("record-means", RecordMeans)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
