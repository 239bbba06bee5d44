"""Colours of figures are readable and distinct on both grounds: on paper, and on a dark page, where they are turned."""

import itertools
import re

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from tokcx_lib import plots
from tokcx_lib.studies.sparse.figures import SCHEME_LOOKS
from tools.notebooks import ROOT

PAPER, NIGHT = (1.0, 1.0, 1.0), to_rgb("#121212")  # the grounds of the theme's pages
# hue-rotate(180deg) in sRGB, from the specification of CSS filters.
TURN = np.array([[-0.574, 1.43, 0.144], [0.426, 0.43, 0.144], [0.426, 1.43, -0.856]])
# What those see who lack the medium or the long cones (Machado, Oliveira and Fernandes 2009), in linear RGB.
SIGHT = {
    "all cones": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
CONES = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
CONES = np.array([*CONES, [0.0883024619, 0.2817188376, 0.6299787005]])
OKLAB = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099]]
OKLAB = np.array([*OKLAB, [0.0259040371, 0.7827717662, -0.808675766]])


def linear(colour) -> np.ndarray:
    colour = np.asarray(colour, dtype=float)
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """The contrast ratio of WCAG, from 1 to 21."""
    a, b = (linear(colour) @ (0.2126, 0.7152, 0.0722) + 0.05 for colour in (one, other))
    return np.maximum(a, b) / np.minimum(a, b)


def turned(colour) -> np.ndarray:
    """What the style sheet makes of a colour on a dark page."""
    return np.clip((1 - np.asarray(colour, dtype=float)) @ TURN.T, 0, 1)


def oklab(colour, sight) -> np.ndarray:
    return np.cbrt(np.clip(linear(colour) @ np.array(sight).T, 0, 1) @ CONES.T) @ OKLAB.T


def faint(colours) -> list[str]:
    """Colours that are no text, below 4.5 to 1, on paper or on a dark page."""
    pages = (lambda c: contrast(c, PAPER)), (lambda c: contrast(turned(c), NIGHT))
    return [colour for colour in colours if min(page(to_rgb(colour)) for page in pages) < 4.5]


def alike(colours, least: float) -> list[tuple]:
    """Pairs of colours that are nearer than `least` in OKLab, on one of the pages, to one kind of eyes."""
    found = []
    for a, b in itertools.combinations(colours, 2):
        for page, (eyes, sight) in itertools.product((np.asarray, turned), SIGHT.items()):
            if np.linalg.norm(oklab(page(to_rgb(a)), sight) - oklab(page(to_rgb(b)), sight)) < least:
                found.append((a, b, page.__name__, eyes))
    return found


def test_the_style_sheet_turns_figures_as_computed_here():
    sheet = (ROOT / "book" / "_static" / "tokcx.css").read_text(encoding="utf-8")
    assert re.findall(r"^ *filter: (.*);$", sheet, re.M) == ["invert(1) hue-rotate(180deg)"]
    assert turned(to_rgb(plots.INK)) == pytest.approx(1)


def test_every_colour_is_readable_on_both_pages():
    assert faint([*plots.PALETTE, plots.INK, plots.FAINT]) == []
    assert faint(colour for colour, _ in SCHEME_LOOKS.values()) == []


def test_series_have_distinct_colours_on_both_pages():
    assert alike([*plots.PALETTE, plots.INK], 0.08) == []
    schemes = [colour for colour, _ in SCHEME_LOOKS.values()]
    assert len(set(schemes)) == len(schemes) and alike(schemes, 0.06) == []  # with a grey among them


def test_rooms_that_draw_have_no_colours_of_their_own():
    for file in sorted((ROOT / "tokcx_lib" / "studies").rglob("*.py")):
        if file.name != "figures.py" or file.parent.name != "sparse":  # whose seven schemes are tested above
            assert not re.search(r'"#[0-9A-Fa-f]{6}"', file.read_text(encoding="utf-8")), file


def test_colours_that_do_not_serve_are_seen():
    """The usual palette for the colour-blind is too light for text, and its blues change places on a dark page."""
    usual = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
    assert set(faint(usual)) == set(usual[1:])
    assert alike(usual, 0.08)
    assert np.abs(turned(to_rgb(usual[0])) - to_rgb(usual[4])).max() < 0.1
    assert {eyes for *_, eyes in alike(["#A03C00", "#946800"], 0.08)} == {"deuteranopia"}


def numbers_on(colours) -> float:
    """The least contrast of numbers in a heat map: white on its first half, black on the second, on both pages."""
    dark, light = np.array_split(np.asarray(colours)[:, :3], 2)
    pairs = [(dark, PAPER), (light, (0.0, 0.0, 0.0))]
    return min(min(contrast(c, n).min(), contrast(turned(c), turned(n)).min()) for c, n in pairs)


def test_numbers_in_heat_maps_are_readable_on_both_pages():
    shades = plots.map_colours()(np.arange(1, 256, 2))
    assert numbers_on(shades) > 4.5
    assert numbers_on(mpl.colormaps["cividis"](np.arange(256))) < 4
    steps = np.linalg.norm(np.diff(oklab(shades[:, :3], np.eye(3)), axis=0), axis=1)
    assert (np.diff(linear(shades[:, :3]) @ (0.2126, 0.7152, 0.0722)) > 0).all() and steps.max() < 0.1
