"""Number figures, equations, theorems and exercises by chapter: the first figure of chapters/07_… is 7.1.

Sphinx takes the first number from a numbered table of contents, where the seventh chapter is only the seventh once
the six before it are written. Here it is that of the file. Other pages count on from page to page: 1, 2, 3.
"""

import re
from collections import Counter


def renumber(app, env):
    others = Counter()
    for page, kinds in env.toc_fignumbers.items():
        chapter = re.match(r"chapters/(\d+)_", page)
        for kind, numbers in kinds.items():
            for count, name in enumerate(numbers, start=1):
                others[kind] += not chapter
                numbers[name] = (int(chapter[1]), count) if chapter else (others[kind],)
    return []


def setup(app):
    # After Sphinx's own numbering, which has the default priority, 500.
    app.connect("env-get-updated", renumber, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
