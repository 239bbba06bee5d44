"""The interactive page, in a browser: numbers are the library's, points lie where the axes say, the keyboard works."""

import math
import re
import time

import numpy as np
import pytest
from browser import network, typeset

from tokcx_lib.theory import budgets, softmax_law

PAGE = "book/teaching/interactive.html"
# Positions of the sliders, as fractions of their ranges: corners and what lies between.
POSITIONS = [(0, 0), (0, 1), (1, 0), (1, 1), (0.2, 0.5), (0.5, 0.1), (0.5, 0.9), (0.7, 0.45), (0.8, 0.7), (0.9, 0.3)]
CLOSE = 1e-9

# What the page shows: its numbers, and in each figure the marked point, the grid lines and the curves.
STATE = """
const centre = (e) => { const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; };
const figure = (name) => {
    const svg = document.getElementById(name), point = svg.querySelector("circle.point");
    return {
        point: centre(point), data: {...point.dataset},
        x: [...svg.querySelectorAll(".grid[data-x]")].map((e) => [Number(e.dataset.x), centre(e)[0]]),
        y: [...svg.querySelectorAll(".grid[data-y]")].map((e) => [Number(e.dataset.y), centre(e)[1]]),
        paths: Object.fromEntries([...svg.querySelectorAll("path")].map((e) => [e.className.baseVal,
        e.getAttribute("d")])), origin: [svg.getBoundingClientRect().x, svg.getBoundingClientRect().y],
        role: svg.getAttribute("role"), desc: svg.querySelector("desc").textContent,
    };
};
return {
    curve: figure("tokcx-curve"), phases: figure("tokcx-phases"),
    parts: Object.fromEntries([...document.querySelectorAll("#tokcx-figure [data-part]")].map((e) => [e.dataset.part,
    e.textContent])), words: ["horizon", "tokens"].map((name) => document.getElementById("tokcx-" +
    name).getAttribute("aria-valuetext")),
}
"""
MOVE = """
for (const [name, share] of [["horizon", arguments[0]], ["tokens", arguments[1]]]) {
    const input = document.getElementById("tokcx-" + name);
    input.value = Math.round(share * input.max);
    input.dispatchEvent(new Event("input", {bubbles: true}));
}
"""


@pytest.fixture(scope="module")
def session(browser, html, address):
    with browser() as session:
        session.open("about:blank")
        list(session.requests())
        session.open(address + PAGE)
        assert typeset(session)
        yield session


@pytest.fixture(scope="module")
def states(session):
    """The page at ten positions of its sliders."""
    found = []
    for position in POSITIONS:
        session.run(MOVE, *position)
        found.append(session.run(STATE))
    return found


def where(state) -> tuple[float, float]:
    """Load and number of tokens, as the marked point says."""
    return float(state["curve"]["data"]["load"]), float(state["curve"]["data"]["n"])


def place(ticks, value: float) -> float:
    """Where a logarithmic axis with these grid lines has the value, in pixels."""
    (low, start), (high, end) = ticks[0], ticks[-1]
    return start + (end - start) * math.log(value / low) / math.log(high / low)


def corners(path: str) -> np.ndarray:
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML](\S+) ([\d.-]+)", path)])


def read(text: str) -> float:
    """The number in 7.39 tokens, 3,104 tokens, 2.5%, 1.999 of 2 or 3.90 × 10⁵⁵ tokens."""
    digits = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    number, power = re.match(r"([\d.,]+)(?: × 10([⁰¹²³⁴⁵⁶⁷⁸⁹]+))?", text).groups()
    return float(number.replace(",", "")) * 10.0 ** int((power or "0").translate(digits))


def test_ten_different_points_over_the_whole_range(states):
    points = {where(state) for state in states}
    assert len(points) == len(POSITIONS)
    assert {(0.1, 10.0), (0.1, 1e9), (8.0, 10.0), (8.0, 1e9)} <= points


def test_numbers_are_those_of_the_library(session, states):
    points = [where(state) for state in states] + [(1.37, 12345), (3.3, 1), (0.02, 50), (20, 1e20)]
    for load, n in points:
        law = softmax_law.softmax_moments(n, load)
        expected = [budgets.relative_error(n, load), law.participation, law.mean]
        names = ["relativeError", "participation", "mean"]
        found = [session.run(f"return tokcx.{name}(...arguments)", load, n) for name in names]
        # The mean alone may be nearly zero, where a single token is read.
        np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=1e-12, err_msg=f"load {load}, n {n}")


@pytest.mark.parametrize("load", [0.1, 0.5, 1, 2, 3, 4.4, 6, 8])
@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_sample_complexity(session, load, error):
    found = session.run("return tokcx.sampleComplexity(...arguments)", load, error)
    assert found == pytest.approx(budgets.sample_complexity(load, error), rel=CLOSE)


def test_values_without_a_meaning_are_refused(session):
    for call in ("relativeError(0, 10)", "mean(2, 0.5)", "participation(NaN, 10)", "sampleComplexity(2, 0)"):
        with pytest.raises(RuntimeError, match="expected a number"):
            session.run(f"return tokcx.{call}")


def test_shown_numbers(states):
    for state in states:
        load, n = where(state)
        law, budget = softmax_law.softmax_moments(n, load), budgets.token_budget(load)
        guide = math.sqrt((1 + load**2) * math.exp(load**2) / n) / load
        expected = {
            "horizon-value": load,
            "tokens-value": n,
            "error": 100 * budgets.relative_error(n, load),
            "guide": 100 * guide,
            "mean": law.mean,
            "effective": 1 / law.participation,
            "sigma": load / math.sqrt(2 * math.log(n)),
            "unfrozen": budget.unfrozen,
            "mean-square": budget.mean_square,
            "clt": budget.clt,
            "needed": budgets.sample_complexity(load, 0.1),
            "exponent": min(0.5, 1 / (1 + load**2)),
        }
        for name, value in expected.items():
            assert read(state["parts"][name]) == pytest.approx(value, rel=0.05), (load, n, name, state["parts"][name])
        words = ["errors like 1/√n", "few tokens decide", "frozen"][
            (expected["sigma"] >= 0.5) + (expected["sigma"] >= 1)
        ]
        assert state["parts"]["sigma"].endswith(words)
        assert state["words"] == [f"horizon {load:g}", f"{n:,.0f} tokens"]


def test_points_lie_where_the_axes_say(states):
    for state in states:
        load, n = where(state)
        curve, phases = state["curve"], state["phases"]
        error = float(budgets.relative_error(n, load))
        for figure, x, y in ((curve, n, error), (phases, load, n)):
            expected = place(figure["x"], x), place(figure["y"], y)
            assert np.abs(np.subtract(figure["point"], expected)).max() < 1, (load, n)
        assert float(phases["data"]["load"]) == load and float(phases["data"]["n"]) == n


def test_curves_are_the_exact_law(states):
    for state in states:
        load, _ = where(state)
        curve, phases = state["curve"], state["phases"]
        tokens = np.geomspace(10, 1e9, 81)[::8]
        laws = {"curve": budgets.relative_error(tokens, load)}
        ends = np.array([10, 1e9])
        laws["guide"] = np.sqrt((1 + load**2) * math.exp(load**2) / ends) / load
        for name, values in laws.items():
            drawn = corners(curve["paths"][name])
            drawn = drawn[:: (len(drawn) - 1) // (len(values) - 1)] + curve["origin"]
            at = tokens if name == "curve" else ends
            expected = [[place(curve["x"], n), place(curve["y"], float(y))] for n, y in zip(at, values)]
            assert np.abs(drawn - expected).max() < 1, (load, name)
        # The last dashed line drawn is e^{2 s^2}, the dotted one e^{3 s^2/2}.
        for line, factor in (("budget", 2), ("square", 1.5)):
            for x, y in corners(phases["paths"][line])[::20] + phases["origin"]:
                (low, start), (high, end) = phases["x"][0], phases["x"][-1]
                s = low * (high / low) ** ((x - start) / (end - start))
                assert abs(place(phases["y"], math.exp(factor * s**2)) - y) < 1.5


def test_contour_of_ten_per_cent(session):
    end = time.monotonic() + 20
    while not (path := session.run(STATE)["phases"]["paths"].get("contour")):
        assert time.monotonic() < end, "the contour was never drawn"
        time.sleep(0.1)
    figure = session.run(STATE)["phases"]
    for x, y in corners(path)[::6] + figure["origin"]:
        (low, start), (high, last) = figure["x"][0], figure["x"][-1]
        load = low * (high / low) ** ((x - start) / (last - start))
        assert abs(place(figure["y"], budgets.sample_complexity(load, 0.1)) - y) < 1.5


KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "PageUp": 33, "PageDown": 34, "Home": 36, "End": 35, "Tab": 9}


def press(session, key: str) -> dict:
    """The state after a key, once the sentence has settled."""
    for kind in ("rawKeyDown", "keyUp"):
        session.command("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])
    time.sleep(0.4)
    return session.run(STATE)


def test_the_keyboard_moves_the_sliders(session):
    session.run(MOVE, 0.5, 0.5)
    session.run('document.getElementById("tokcx-horizon").focus()')
    time.sleep(0.4)
    before = session.run(STATE)
    after = press(session, "ArrowRight")
    assert where(after)[0] > where(before)[0] and where(after)[1] == where(before)[1]
    assert after["words"][0] == f"horizon {where(after)[0]:g}" != before["words"][0]
    for figure in ("curve", "phases"):
        assert after[figure]["point"] != before[figure]["point"]
        assert after[figure]["desc"] != before[figure]["desc"]
        assert after[figure]["role"] == "img"
    assert after["curve"]["paths"]["curve"] != before["curve"]["paths"]["curve"]
    sentence = after["parts"]["sentence"]
    assert sentence != before["parts"]["sentence"]
    load, n = where(after)
    assert sentence.startswith(f"At {n:,.0f} tokens a query of load {load:g} has a relative error of ")
    assert where(press(session, "ArrowLeft")) == where(before)

    assert [where(press(session, key))[0] for key in ("Home", "PageUp", "PageUp", "PageUp")] == [0.1, 0.2, 0.5, 1]
    press(session, "Tab")
    outline = session.run('return getComputedStyle(document.getElementById("tokcx-tokens")).outlineStyle')
    assert outline == "solid", "the slider that has the focus does not show it"
    tokens = [
        where(press(session, key))[1] for key in ("Home", "PageUp", "PageUp", "ArrowRight", "PageDown", "End", "PageUp")
    ]
    assert tokens == [10, 100, 1000, 1100, 1000, 1e9, 1e9]


def test_the_sentence_is_announced_and_the_sliders_have_labels(session):
    assert session.run('return document.querySelector("[data-part=sentence]").getAttribute("aria-live")') == "polite"
    labels = session.run(
        'return [...document.querySelectorAll("input[type=range]")].map((e) => e.labels[0].textContent)'
    )
    assert labels == ["Horizon H, and load s of the query", "Number of tokens n"]


def test_a_narrow_window_stacks_the_figures(session):
    session.command("Emulation.setDeviceMetricsOverride", width=420, height=900, deviceScaleFactor=1, mobile=False)
    time.sleep(0.5)
    try:
        state, width = session.run(STATE), session.run("return document.documentElement.scrollWidth")
        assert state["phases"]["origin"][1] > state["curve"]["origin"][1] + 200
        assert width <= 420, "the page is wider than the window"
        load, n = where(state)
        expected = place(state["phases"]["x"], load), place(state["phases"]["y"], n)
        assert np.abs(np.subtract(state["phases"]["point"], expected)).max() < 1
    finally:
        session.command("Emulation.clearDeviceMetricsOverride")


def test_an_update_is_quick(session):
    """Moving the horizon makes a new table: some ten milliseconds; the bound leaves room for a busy machine."""
    took = session.run(
        """
        const input = document.getElementById("tokcx-horizon"), took = [];
        for (let i = 0; i <= input.max; i += 5) {
            input.value = i;
            const start = performance.now();
            input.dispatchEvent(new Event("input"));
            took.push(performance.now() - start);
        }
        return took"""
    )
    assert np.median(took) < 100


def test_scripts_stay_on_their_page(html):
    users = [
        path.relative_to(html).as_posix()
        for path in html.rglob("*.html")
        if "interactive.js" in path.read_text(encoding="utf-8")
    ]
    assert users == [PAGE]
    without = re.search(r"<noscript>.*?href=\"([^\"]+)\"", (html / PAGE).read_text(encoding="utf-8"), flags=re.S)
    assert (html / PAGE).parent.joinpath(without[1]).exists()


def test_quiet(session, address):
    """Last: nothing above wrote an error to the console or asked another host."""
    assert [
        entry["message"]
        for entry in session.log("browser")
        if entry["level"] == "SEVERE" and "expected a number" not in entry["message"]
    ] == []
    assert list(network(session, address)) == []
