"""A book of one chapter, for the tests of the tools; the packaged models and the fixed text, read once."""

import functools
import hashlib
import shutil
from pathlib import Path

import pytest

from tools import notebooks

CHAPTER = """\
---
jupytext:
  formats: ipynb,md:myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A small chapter

```{code-cell} python3
from myst_nb import glue
from tokcx_lib import near

print("device: cpu, profile: quick")
print("value", near.VALUE)
```

```{code-cell} python3
from IPython.display import Image, Math

glue("answer", 42, display=False)
Math("x^2")
```

```{code-cell} python3
---
mystnb:
  figure:
    caption: One dot.
  image:
    alt: A dot.
---
dot = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk"
    "YPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
Image(data=__import__("base64").b64decode(dot), format="png")
```
"""


def lay_out(root: Path) -> None:
    """Write the sources of the small book: `near` imports `far`, and nothing imports `apart`."""
    for folder in ("chapters", "tokcx_lib", "book/records"):
        (root / folder).mkdir(parents=True)
    (root / "chapters" / "01_small.md").write_text(CHAPTER, encoding="utf-8")
    (root / "_toc.yml").write_text("chapters:\n  - file: chapters/01_small.ipynb\n", encoding="utf-8")
    (root / "requirements.txt").write_text("numpy==2.0.0\npandas==1.0\n", encoding="utf-8")
    modules = {"__init__": "", "near": "from .far import VALUE\n", "far": "VALUE = 1\n", "apart": "VALUE = 2\n"}
    for name, code in modules.items():
        (root / "tokcx_lib" / f"{name}.py").write_text(code, encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def fixed_text():
    """The docstrings of scipy are read once, for all tests, and only if one asks.

    With another scipy than the book's (`make check-lowest`) they are the fixed text, for the tests.
    """
    import scipy

    from tokcx_lib.models import corpora

    corpora.scipy_articles = functools.cache(corpora.scipy_articles)
    if scipy.__version__ not in corpora.SCIPY_DOCS_SHA256:
        lines = [line for article in corpora.scipy_articles() for line in article.paragraphs]
        text = "\n".join(lines) + "\n"
        corpora.SCIPY_DOCS_SHA256[scipy.__version__] = hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="session")
def minilm():
    """The embedded model, loaded once; a test that changes it changes it back."""
    from tokcx_lib.models import loading

    return loading.load_model("minilm")


@pytest.fixture(scope="session")
def smollm2():
    """The language model, likewise."""
    from tokcx_lib.models import loading

    return loading.load_model("smollm2")


@pytest.fixture(scope="session")
def executed_book(tmp_path_factory):
    """The small book, executed once for all tests; not to be written to."""
    root = tmp_path_factory.mktemp("book")
    lay_out(root)
    assert notebooks.main(["--root", str(root), "run"]) == 0
    return root


@pytest.fixture
def small_book(executed_book, tmp_path):
    """A copy of the small book to spoil."""
    return Path(shutil.copytree(executed_book, tmp_path / "book"))
