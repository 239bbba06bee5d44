/* The figure of book/teaching/interactive.md: the exact law of attention over n standard normal tokens, and its picture.

   The mathematics is that of tokcx_lib/softmax_law.py, in the same order and to the same accuracy (chapter 9 derives it).
   With phi(l) = E exp(-l e^{ty}), a[q] = E[q(y) e^{ty} exp(-l e^{ty})] and b[q] = E[q(y) e^{2ty} exp(-l e^{ty})],

     E Gamma_n            = n int a[y] phi^(n-1) dl
     E sum_j w_j^2        = n int l b[1] phi^(n-1) dl
     E (Gamma_n - t)^2    = int l { n b[(y-t)^2] phi^(n-1) + n (n-1) a[y-t]^2 phi^(n-2) } dl,

   each a trapezoidal sum in x = log l. The averages over one token depend on the load t only: one table a load. */
(() => {
  "use strict";

  // ------------------------------------------------------------------ the law

  const STEP = 0.25; // of the rule in x
  const LOG_MOST = 75; // a table serves n up to e^75 = 4e32
  const SPARE = 46; // e^-46 = 1e-20: what may be left out
  const tables = new Map();

  /* log phi, and l a[y], l a[y-t] (without the factor exp(logA)) and l^2 b[1], l^2 b[(y-t)^2] (without exp(logB)) at the
     points x. The nodes y are such that x + ty runs through one list of points u: its exponentials are taken once. */
  function makeTable(t) {
    const z = Math.sqrt(2 * (LOG_MOST + SPARE)); // no token beyond z
    const lowest = t > z ? -t * z : -(t * t + z * z) / 2;
    const first = Math.floor(lowest / STEP);
    const size = Math.ceil((9.5 * t + 4.5) / STEP) - first + 1;
    const stride = Math.max(1, Math.ceil(0.5 / t)); // steps of u in one of x: those of y are at most 1/2
    const h = STEP / stride;
    const high = Math.max(10, Math.min(2 * t + 10, (5 - lowest) / t));
    const from = -Math.ceil((10 * t) / h);
    const count = Math.ceil((high * t) / h) - from + 1;
    const y = Float64Array.from({ length: count }, (_, m) => ((from + m) * h) / t);
    const u = Float64Array.from({ length: (size - 1) * stride + count }, (_, i) => (first * stride + from + i) * h);
    const e = u.map((v) => Math.exp(Math.min(v, 700)));

    const density = (tilt) => y.map((v) => (h / t / Math.sqrt(2 * Math.PI)) * Math.exp(-((v - tilt) ** 2) / 2));
    const live = u.findLastIndex((v) => v < 6.7) + 1; // beyond it exp(-e) is zero
    const average = (f, kernel, end = live) => {
      const result = new Float64Array(size);
      for (let i = 0; i < size; i++) {
        const start = i * stride;
        const stop = Math.min(count, end - start);
        let sum = 0;
        for (let m = 0; m < stop; m++) sum += f[start + m] * kernel[m];
        result[i] = sum;
      }
      return result;
    };

    const x = Float64Array.from({ length: size }, (_, i) => (first + i) * STEP);
    const normal = density(0);
    const phi = average(e.map((v) => Math.exp(-v)), normal);
    const rest = average(e.map((v) => -Math.expm1(-v)), normal, u.length);
    const logPhi = phi.map((p, i) => (rest[i] < 0.5 ? Math.log1p(-rest[i]) : Math.log(Math.max(p, 1e-300))));

    // The factor e^{kty} goes into the Gaussian, as far as y < z: nothing under- or overflows.
    const tilted = (k, ...powers) => {
      const tilt = Math.min(k * t, z);
      const share = tilt / t;
      const kernel = density(tilt);
      const weight = u.map((v, i) => Math.exp((k - share) * v - e[i]));
      const part = (power) => average(weight, kernel.map((v, m) => v * power(y[m])));
      return [...powers.map(part), x.map((v) => share * v + (tilt * tilt) / 2)];
    };
    const [aMean, logA] = tilted(1, (v) => v);
    const [bOne, bOff, logB] = tilted(2, () => 1, (v) => (v - t) ** 2);
    return { size, logPhi, aMean, logA, bOne, bOff, logB };
  }

  function tableOf(load) {
    if (!(load > 0 && load <= 40)) throw new RangeError(`load: expected a number above 0, at most 40, got ${load}`);
    if (!tables.has(load)) {
      if (tables.size >= 64) tables.clear();
      tables.set(load, makeTable(load));
    }
    return tables.get(load);
  }

  function checkTokens(n) {
    if (!(n >= 1 && Math.log(n) <= LOG_MOST)) throw new RangeError(`n: expected a number from 1 to 3e32, got ${n}`);
  }

  /* The sum over x of n phi^(n-1) exp(log factor) part. */
  function alone(table, n, part, logFactor) {
    const base = Math.log(n * STEP);
    let sum = 0;
    for (let i = 0; i < table.size; i++) sum += part[i] * Math.exp(base + (n - 1) * table.logPhi[i] + logFactor[i]);
    return sum;
  }

  function mean(load, n) {
    checkTokens(n);
    const table = tableOf(load);
    return alone(table, n, table.aMean, table.logA);
  }

  function participation(load, n) {
    checkTokens(n);
    const table = tableOf(load);
    return alone(table, n, table.bOne, table.logB);
  }

  function errorOf(table, load, n) {
    let square = alone(table, n, table.bOff, table.logB);
    if (n > 1) {
      const base = Math.log(n * STEP) + Math.log(n - 1);
      for (let i = 0; i < table.size; i++) {
        // By parts, the mean of (y - load) e^{ty} e^{-l e^{ty}} is -load l b_0, which does not cancel.
        square += (load * table.bOne[i]) ** 2 * Math.exp(base + (n - 2) * table.logPhi[i] + 2 * table.logB[i]);
      }
    }
    return Math.sqrt(square) / load;
  }

  /* sqrt(E (Gamma_n - s)^2) / s */
  function relativeError(load, n) {
    checkTokens(n);
    return errorOf(tableOf(load), load, n);
  }

  function invert(table, load, error) {
    let [low, high] = [0, LOG_MOST - 1e-9];
    if (errorOf(table, load, 1) <= error) return 1;
    if (errorOf(table, load, Math.exp(high)) > error) return Infinity;
    while (high - low > 1e-12) {
      const middle = (low + high) / 2;
      if (middle === low || middle === high) break;
      if (errorOf(table, load, Math.exp(middle)) > error) low = middle;
      else high = middle;
    }
    const n = Math.exp(high);
    return n < 1e15 ? Math.ceil(n - 1e-9 * n) : n;
  }

  /* The smallest n with a relative error of at most `error`; Infinity beyond what a table serves. */
  function sampleComplexity(load, error) {
    if (!(error > 0)) throw new RangeError(`error: expected a number above 0, got ${error}`);
    return invert(tableOf(load), load, error);
  }

  const firstOrder = (load, n) => Math.sqrt((1 + load * load) / n) * Math.exp((load * load) / 2) / load;
  const reducedLoad = (load, n) => load / Math.sqrt(2 * Math.log(n));

  window.tokcx = { relativeError, participation, mean, sampleComplexity };

  // ------------------------------------------------------------------ words

  const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  const power = (k) => "10" + (k < 0 ? "⁻" : "") + String(Math.abs(k)).replace(/\d/g, (d) => SUPERSCRIPTS[d]);

  /* A number with so many significant digits: 1,903 or 3.9 × 10⁵⁵. */
  function number(value, digits = 3) {
    if (!Number.isFinite(value)) return "more than " + power(32);
    if (value >= 1e7) {
      const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
      return `${mantissa} × ${power(Number(exponent))}`;
    }
    return Number(value.toPrecision(digits)) >= 10 ** (digits - 1)
      ? Number(value.toPrecision(digits)).toLocaleString("en-US")
      : value.toPrecision(digits);
  }

  const tokens = (n) => (n < 1e15 ? n.toLocaleString("en-US") : number(n)) + " tokens";
  const budget = (n) => (n < 1e7 ? tokens(Number.isInteger(n) ? n : Number(n.toPrecision(3))) : number(n) + " tokens");

  function percent(value) {
    const part = 100 * value;
    if (part >= 1e6) return number(part, 2) + "%";
    const rounded = Number(part.toPrecision(part >= 100 ? 3 : 2));
    return rounded.toLocaleString("en-US", { maximumSignificantDigits: 3 }) + "%";
  }

  const PHASES = [
    { name: "averaging", label: "errors like 1/√n", words: "the typical error falls like 1/√n" },
    { name: "middle", label: "few tokens decide", words: "a few tokens decide" },
    { name: "frozen", label: "frozen", words: "the query is frozen" },
  ];
  const phaseOf = (sigma) => PHASES[sigma < 0.5 ? 0 : sigma < 1 ? 1 : 2];

  // ------------------------------------------------------------------ pictures

  const SVG = "http://www.w3.org/2000/svg";
  const LOADS = [0.1, 8];
  const TOKENS = [10, 1e9];
  const ERRORS = [4e-5, 5];

  function make(parent, tag, attributes = {}, text = "") {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text) element.textContent = text;
    parent.append(element);
    return element;
  }

  /* Two lists of numbers as the `d` of a path. */
  const pathOf = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");

  const geometric = ([low, high], count) =>
    Array.from({ length: count }, (_, i) => low * (high / low) ** (i / (count - 1)));

  /* A pair of logarithmic axes in an <svg>: what does not move, drawn anew when the size of the window changes. */
  class Picture {
    constructor(svg, axes) {
      Object.assign(this, { svg, axes });
      this.ground = make(svg, "g");
      this.fixed = make(svg, "g");
      this.moving = make(svg, "g");
      const clip = make(make(svg, "defs"), "clipPath", { id: svg.id + "-clip" });
      this.window = make(clip, "rect");
      this.clip = { "clip-path": `url(#${svg.id}-clip)` };
    }

    layout() {
      const { svg, axes } = this;
      const width = Math.max(240, Math.floor(svg.parentNode.clientWidth));
      const height = Math.round(Math.min(400, Math.max(270, 0.78 * width)));
      this.box = { left: axes.margin, right: width - 10, top: 26, bottom: height - 44 };
      const { left, right, top, bottom } = this.box;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.setAttribute("width", width);
      svg.setAttribute("height", height);
      for (const [name, value] of Object.entries({ x: left, y: top, width: right - left, height: bottom - top })) {
        this.window.setAttribute(name, value);
      }
      this.fixed.replaceChildren();
      for (const { value, label } of axes.x.ticks) {
        const x = this.x(value);
        make(this.fixed, "line", { class: "grid", "data-x": value, x1: x, x2: x, y1: top, y2: bottom });
        if (label) make(this.fixed, "text", { x, y: bottom + 18, "text-anchor": "middle" }, label);
      }
      for (const { value, label } of axes.y.ticks) {
        const y = this.y(value);
        make(this.fixed, "line", { class: "grid", "data-y": value, x1: left, x2: right, y1: y, y2: y });
        if (label) make(this.fixed, "text", { x: left - 7, y: y + 4, "text-anchor": "end" }, label);
      }
      make(this.fixed, "path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` });
      make(this.fixed, "text", { class: "name", x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, axes.x.name);
      make(this.fixed, "text", { class: "name", x: 0, y: 14 }, axes.y.name);
    }

    x(value) {
      const [low, high] = this.axes.x.range;
      return this.box.left + ((this.box.right - this.box.left) * Math.log(value / low)) / Math.log(high / low);
    }

    y(value) {
      const [low, high] = this.axes.y.range;
      return this.box.bottom - ((this.box.bottom - this.box.top) * Math.log(value / low)) / Math.log(high / low);
    }

    path(parent, name, xs, ys) {
      return make(parent, "path", { class: name, d: pathOf(xs.map((x, i) => [this.x(x), this.y(ys[i])])), ...this.clip });
    }

    point(name, x, y, data) {
      const attributes = Object.fromEntries(Object.entries(data).map(([key, value]) => ["data-" + key, value]));
      return make(this.moving, "circle", { class: name, cx: this.x(x), cy: this.y(y), r: 6.5, ...attributes });
    }
  }

  const decades = (from, to, label) =>
    Array.from({ length: to - from + 1 }, (_, i) => ({ value: 10 ** (from + i), label: label(from + i) }));
  const everyOther = (k) => (k === 1 ? "10" : k % 2 ? power(k) : "");
  const tokenAxis = { name: "tokens n", range: TOKENS, ticks: decades(1, 9, everyOther) };

  function start() {
    const app = document.getElementById("tokcx-figure");
    if (!app) return;
    const part = (name) => app.querySelector(`[data-part="${name}"]`);
    app.hidden = false;

    const curve = new Picture(document.getElementById("tokcx-curve"), {
      margin: 54,
      x: tokenAxis,
      y: {
        name: "relative error",
        range: ERRORS,
        ticks: decades(-4, 0, (k) => `${Number((100 * 10 ** k).toPrecision(1))}%`),
      },
    });
    const map = new Picture(document.getElementById("tokcx-phases"), {
      margin: 42,
      x: {
        name: "load s = H",
        range: LOADS,
        ticks: [0.1, 0.2, 0.5, 1, 2, 5, 8].map((value) => ({ value, label: String(value) })),
      },
      y: { ...tokenAxis, ticks: decades(1, 9, everyOther) },
    });

    // ---- sliders: positions in lists of round numbers, close to evenly spaced in the logarithm

    const between = (from, to, step) => {
      const list = [];
      for (let k = Math.round(from / step); k < Math.round(to / step); k++) list.push(k * step);
      return list;
    };
    const spread = (mantissas, scales, [low, high]) =>
      scales
        .flatMap((scale) => mantissas.map((m) => Number((m * scale).toPrecision(4))))
        .filter((value) => value >= low && value <= high);
    const fine = [...between(1, 2, 0.05), ...between(2, 4, 0.1), ...between(4, 10, 0.2)];
    const coarse = [...between(1, 2, 0.1), ...between(2, 4, 0.2), ...between(4, 10, 0.5)];
    const sliders = {
      horizon: {
        values: spread(fine, [0.1, 1], LOADS),
        pages: [0.1, 0.2, 0.5, 1, 2, 5, 8],
        text: (value) => String(value),
        words: (value) => `horizon ${value}`,
      },
      tokens: {
        values: spread(coarse, [10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9], TOKENS),
        pages: decades(1, 9, () => "").map((tick) => tick.value),
        text: (value) => value.toLocaleString("en-US"),
        words: tokens,
      },
    };
    for (const [name, slider] of Object.entries(sliders)) {
      const input = (slider.input = part(name));
      const nearest = (value) =>
        slider.values.reduce((best, v, i) => (Math.abs(Math.log(v / value)) < Math.abs(Math.log(slider.values[best] / value)) ? i : best), 0);
      input.min = 0;
      input.max = slider.values.length - 1;
      input.step = 1;
      input.value = nearest(Number(input.dataset.start));
      input.addEventListener("input", update);
      // Page up and page down go to the next round number: 1, 2, 5, 10 or a power of ten.
      input.addEventListener("keydown", (event) => {
        const now = slider.values[input.value];
        const next = {
          PageUp: slider.pages.find((value) => value > now),
          PageDown: slider.pages.findLast((value) => value < now),
        };
        if (!(event.key in next)) return;
        event.preventDefault();
        if (next[event.key] === undefined) return;
        input.value = nearest(next[event.key]);
        update();
      });
    }

    // ---- what does not depend on the sliders

    const phaseLoads = geometric(LOADS, 160);
    const clampTokens = (n) => Math.min(TOKENS[1], Math.max(TOKENS[0], n));
    const edges = [(s) => Math.exp((s * s) / 2), (s) => Math.exp(2 * s * s)]; // of the phases: typical error
    const squareEdge = (s) => Math.exp(1.5 * s * s); // beyond it the mean square error falls like 1/n
    const contour = [];

    function drawMap() {
      map.ground.replaceChildren();
      const upper = edges.map((edge) => phaseLoads.map((s) => [map.x(s), map.y(clampTokens(edge(s)))]));
      const { left, right, top, bottom } = map.box;
      const backwards = (points) => pathOf([...points].reverse()).replace("M", "L");
      const region = (phase, d) => make(map.ground, "path", { class: "tint " + phase.name, d });
      region(PHASES[0], `${pathOf(upper[1])}L${right} ${top}H${left}Z`);
      region(PHASES[1], `${pathOf(upper[0])}${backwards(upper[1])}Z`);
      region(PHASES[2], `M${left} ${bottom}${pathOf(upper[0]).replace("M", "L")}L${right} ${bottom}Z`);
      for (const [name, edge] of [["square", squareEdge], ...edges.map((edge) => ["budget", edge])]) {
        const loads = phaseLoads.filter((s) => edge(s) <= 2 * TOKENS[1]);
        map.path(map.ground, name, loads, loads.map(edge));
      }
      if (contour.length) {
        map.path(map.ground, "contour", contour.map(([s]) => s), contour.map(([, n]) => n));
        const [s, n] = contour[Math.floor(contour.length / 12)];
        make(map.ground, "text", { x: map.x(s), y: map.y(n) - 9 }, "10% error");
      }
      const words = (text, load, n) =>
        make(map.ground, "text", { x: map.x(load), y: map.y(n), "text-anchor": "middle" }, text);
      words(PHASES[0].label, 0.45, 4e7);
      // Between the budgets of the mean square and of thawing, where the contour does not pass.
      PHASES[1].label.split(" ").forEach((word, i) => words(word, 1.12 * Math.sqrt(Math.log(900 / 3.5 ** i)), 900 / 3.5 ** i));
      words(PHASES[2].label, 4.8, 60);
    }

    /* The contour takes some tenths of a second: a load at a time, whenever the page has nothing else to do. */
    function traceContour(loads) {
      const later = window.requestIdleCallback || ((call) => setTimeout(call, 30));
      const next = () => {
        if (!loads.length) return drawMap();
        const load = loads.shift();
        contour.push([load, invert(makeTable(load), load, 0.1)]);
        later(next);
      };
      later(next);
    }

    // ---- what does

    const curveTokens = geometric(TOKENS, 81);
    let known = { load: NaN };

    function ofLoad(load) {
      if (known.load !== load) {
        known = {
          load,
          errors: curveTokens.map((n) => relativeError(load, n)),
          needed: sampleComplexity(load, 0.1),
          budgets: edges.map((edge) => edge(load)),
          square: squareEdge(load),
        };
      }
      return known;
    }

    function drawCurve(load, n, error) {
      const { errors, needed, budgets, square } = ofLoad(load);
      const { top, bottom, right } = curve.box;
      curve.ground.replaceChildren();
      curve.moving.replaceChildren();
      const cuts = [TOKENS[0], ...budgets.map(clampTokens), TOKENS[1]].map((cut) => curve.x(cut));
      [PHASES[2], PHASES[1], PHASES[0]].forEach((phase, i) => {
        const width = cuts[i + 1] - cuts[i];
        if (width <= 0) return;
        make(curve.ground, "rect", { class: "tint " + phase.name, x: cuts[i], y: top, width, height: bottom - top });
        if (width > 7.2 * phase.label.length) {
          make(curve.ground, "text", { x: cuts[i] + width / 2, y: top + 17, "text-anchor": "middle" }, phase.label);
        }
      });
      for (const cut of cuts.slice(1, 3)) {
        if (cut > cuts[0] && cut < right) make(curve.ground, "path", { class: "budget", d: `M${cut} ${top}V${bottom}` });
      }
      if (square > TOKENS[0] && square < TOKENS[1]) {
        make(curve.ground, "path", { class: "square", d: `M${curve.x(square)} ${top}V${bottom}` });
      }
      curve.path(curve.moving, "guide", TOKENS, TOKENS.map((m) => firstOrder(load, m)));
      curve.path(curve.moving, "curve", curveTokens, errors);
      if (needed >= TOKENS[0] && needed <= TOKENS[1]) {
        const [x, y] = [curve.x(needed), curve.y(0.1)];
        make(curve.moving, "path", { class: "drop", d: `M${curve.box.left} ${y}H${x}V${bottom}` });
      }
      curve.point("point", n, error, { load, n, error });
    }

    function drawPoint(load, n) {
      map.moving.replaceChildren();
      const x = map.x(load);
      make(map.moving, "path", { class: "drop", d: `M${x} ${map.box.bottom}V${map.box.top}` });
      map.point("point", load, n, { load, n });
    }

    let timer = 0;

    function update() {
      const [load, n] = ["horizon", "tokens"].map((name) => {
        const { input, values, text, words } = sliders[name];
        const value = values[input.value];
        input.setAttribute("aria-valuetext", words(value));
        part(name + "-value").textContent = text(value);
        return value;
      });
      const [error, share, report] = [relativeError(load, n), participation(load, n), mean(load, n)];
      const { needed, budgets, square } = ofLoad(load);
      const sigma = reducedLoad(load, n);
      const phase = phaseOf(sigma);
      const exponent = Math.min(0.5, 1 / (1 + load * load));

      drawCurve(load, n, error);
      drawPoint(load, n);

      const show = (name, text) => (part(name).textContent = text);
      show("at-tokens", n.toLocaleString("en-US"));
      show("at-load", String(load));
      show("error", percent(error));
      show("guide", percent(firstOrder(load, n)));
      show("mean", `${number(report, 4)} of ${load}`);
      show("effective", number(1 / share));
      show("sigma", `${number(sigma, 2)}: ${phase.label}`);
      show("unfrozen", budget(budgets[0]));
      show("mean-square", budget(square));
      show("clt", budget(budgets[1]));
      show("needed", budget(needed));
      show("exponent", String(Number(exponent.toPrecision(3))));

      const atPoint = `relative error ${percent(error)} at ${tokens(n)}`;
      show("curve-desc", `Relative error against the number of tokens, logarithmic axes, for a query of load ${load}: it falls from ` +
        `${percent(known.errors[0])} at 10 tokens to ${percent(known.errors.at(-1))} at a billion. Marked: ${atPoint}.`);
      show("phases-desc", `Load against number of tokens, logarithmic axes, in three regions: errors like 1/√n at the left, ` +
        `few tokens decide between the two budgets, frozen at the lower right. The point, load ${load} and ${tokens(n)}, lies in ` +
        `the region "${phase.label}".`);

      // Said once the sliders rest, so that a screen reader is not flooded.
      clearTimeout(timer);
      timer = setTimeout(() => show("sentence",
        `At ${tokens(n)} a query of load ${load} has a relative error of ${percent(error)} (root mean square). Its reduced load is ` +
        `${number(sigma, 2)}: ${phase.words}. It rests on ${number(1 / share)} tokens in effect, and a relative error ` +
        `of 10% takes ${budget(needed)}.`), 200);
    }

    function layout() {
      curve.layout();
      map.layout();
      drawMap();
      update();
    }

    let width = app.clientWidth;
    new ResizeObserver(() => {
      if (app.clientWidth === width) return;
      width = app.clientWidth;
      layout();
    }).observe(app);
    layout();
    traceContour(geometric([LOADS[0], 6.6], 49));
  }

  start();
})();
