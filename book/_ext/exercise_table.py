"""The index of exercises, read from the chapters at build time: `{exercise-table}` is a table for each chapter."""

import re
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

EXERCISE = re.compile(
    r"^```\{exercise-start\} (?P<title>[^\n]+)\n:label: (?P<label>\S+)\n```\n\*\((?P<head>[^)]+)\)\*", re.M
)
HEAD = re.compile(
    r"(?P<kind>[a-z ]+), (?P<minutes>\d+) minutes, objective (?P<objective>\d)(?P<stretching>, stretching)?"
)


class Exercise(NamedTuple):
    number: str
    label: str
    title: str
    kind: str
    minutes: int
    objective: str
    stretching: bool


def exercises(path: Path) -> list[Exercise]:
    """The exercises of a chapter, in its order. ValueError if one does not say kind, minutes and objective."""
    found, chapter = [], int(path.stem[:2])
    for i, at in enumerate(EXERCISE.finditer(path.read_text(encoding="utf-8")), start=1):
        head = HEAD.fullmatch(at["head"])
        if not head:
            raise ValueError(f"{path.name}: exercise {at['label']} opens with {at['head']!r}")
        kind, minutes, stretching = head["kind"], int(head["minutes"]), bool(head["stretching"])
        objective = f"{chapter}.{head['objective']}"
        found.append(Exercise(f"{chapter}.{i}", at["label"], at["title"], kind, minutes, objective, stretching))
    return found


class ExerciseTable(SphinxDirective):
    def run(self):
        lines = []
        for path in sorted((Path(self.env.srcdir) / "chapters").glob("[0-9][0-9]_*.md")):
            self.env.note_dependency(str(path))
            text = path.read_text(encoding="utf-8")
            label, title = re.search(r"^\((ch-[\w-]+)\)=\n# ([^\n]+)$", text, flags=re.M).groups()
            try:
                found = exercises(path)
            except ValueError as error:
                raise self.error(str(error)) from error
            total = sum(exercise.minutes for exercise in found)
            lines += ["", f"**{{ref}}`{title} <{label}>`**, {total} minutes in all", ""]
            lines += ["| | exercise | label | kind | minutes | objective |", "|---|---|---|---|---:|---:|"]
            for exercise in found:
                kind = exercise.kind + (", stretching" if exercise.stretching else "")
                row = (
                    exercise.number,
                    f"{{ref}}`{exercise.title} <{exercise.label}>`",
                    f"`{exercise.label}`",
                    kind,
                    exercise.minutes,
                    exercise.objective,
                )
                lines.append("| " + " | ".join(map(str, row)) + " |")
        holder = nodes.container()
        self.state.nested_parse(StringList(lines, source=self.env.docname), self.content_offset, holder)
        return holder.children


def setup(app):
    app.add_directive("exercise-table", ExerciseTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
