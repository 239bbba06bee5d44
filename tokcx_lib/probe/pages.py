"""What the pages of all probes share: their templates, numbers as readers want them, figures inside the page.

A page asks no other host for anything and runs no script; its figures are inside it, for light and for dark screens.
Templates escape what they are given, names of models and texts among it; HTML of this library is Markup, and what is
formatted into that is escaped too.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from tokcx_lib import plots

LIGHT_INK = "#dfe3e7"  # of maps on a dark screen
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


# ---- figures ----


class Picture(NamedTuple):
    """A figure of a probe: what it shows in words, what draws it of a table and its meta, and whether it is a map."""

    alt: str
    draw: Callable[[pd.DataFrame, dict], Figure]
    map: bool = False


def drawn(picture: Picture, table: pd.DataFrame, meta: dict, ground: str = "none", ink: str = plots.INK) -> bytes:
    """One figure as PNG, with text and axes of some ink."""
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with mpl.rc_context():
        plots.use_style()
        mpl.rcParams.update(dict.fromkeys(parts, ink))
        figure = picture.draw(table, meta)
        content = BytesIO()
        figure.savefig(content, format="png", facecolor=ground)
    return content.getvalue()


def inside(picture: Picture, table: pd.DataFrame, meta: dict) -> dict[str, str]:
    """A figure for a page: `alt`, its image for light screens and, of a map, that for dark ones."""
    found = {"alt": picture.alt, "light": _data(drawn(picture, table, meta)), "dark": ""}
    if picture.map:
        # Turned around, the colours of a map would say the opposite: only its text turns light.
        found["dark"] = _data(drawn(picture, table, meta, ink=LIGHT_INK))
    return found


def _data(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


# ---- numbers and names ----


def number(value: float) -> str:
    """Three digits, as HTML: 0.341, 12.3, 1,230, 4.56 × 10¹² (not broken); a dash where there is none."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if value == 0 or 1e-4 <= abs(value) < 9_995_000:
        rounded = float(f"{value:.3g}")
        return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{value:#.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return Markup("{}&nbsp;×&nbsp;10<sup>{}</sup>").format(digits, int(exponent)).replace("-", "−")


def heads(table: pd.DataFrame) -> str:
    """How many heads, in which layers: 270, in layers 0–29."""
    layers = sorted(table["layer"].unique())
    run = 1 < len(layers) == layers[-1] - layers[0] + 1
    span = f"{layers[0]}–{layers[-1]}" if run else ", ".join(map(str, layers))
    return f"{len(table):,}, in {'layers' if len(layers) > 1 else 'layer'} {span}"


def made(meta: dict) -> str:
    """When a probe was made, and with which versions."""
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return meta["created"].replace("T", " ").replace("+00:00", " UTC") + " with " + versions


def with_checksums(facts: dict[str, str], meta: dict) -> dict[str, tuple[str, str]]:
    """Facts, each with the beginning of its checksum (meta NAME_sha256), where one is known."""
    return {name: (value, (meta.get(f"{name}_sha256") or "")[:12]) for name, value in facts.items()}
