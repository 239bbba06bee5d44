"""Figures of chapters on pages that do not execute: taken from the stored outputs, so the two cannot differ.

`taken_figures` in the configuration maps NAME to the notebook and the name of the figure; the picture is written to
book/_generated/NAME.png before the pages are read.
"""

import base64
import json
from pathlib import Path

from sphinx.errors import ConfigError


def write(app):
    folder = Path(app.srcdir) / "book" / "_generated"
    folder.mkdir(exist_ok=True)
    for name, (notebook, figure) in app.config.taken_figures.items():
        (folder / f"{name}.png").write_bytes(picture(Path(app.srcdir) / notebook, figure))


def picture(notebook, figure):
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") == figure:
            for output in cell["outputs"]:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output["data"]["image/png"])
    raise ConfigError(f"taken_figures: {notebook} has no picture in a figure named {figure}")


def setup(app):
    app.add_config_value("taken_figures", {}, "env")
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
