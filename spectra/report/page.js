// The page's one script: sorts and filters the table, opens a tensor's panel, draws its two plots. It reads the data
// block of this page, sets text as text and never as markup, and asks nothing of any network.
(() => {
  "use strict";
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const MARKS = [8, 16, 64];
  const NINETY = Math.sqrt(0.1); // the error at which 90 % of the squared norm is kept
  const $ = (id) => document.getElementById(id);
  const body = $("table").tBodies[0];
  const lines = [...body.rows];
  const lineOf = new Map(lines.map((line) => [Number(line.dataset.row), line]));

  // ── numbers as text, as the Python side writes them ──────────────────────────────────────────────────────────────
  const SUPER = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  const raised = (n) => [...String(n)].map((c) => SUPER[c]).join("");
  function significant(x, digits) {
    if (x === 0) return "0";
    const size = Math.abs(x);
    if (size >= 1e-3 && size < 1e5) {
      return x.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
    }
    const [mantissa, exponent] = x.toExponential(digits - 1).split("e");
    return `${mantissa}×10${raised(Number(exponent))}`;
  }
  function number(x, digits = 3) {
    return Number.isInteger(x) && Math.abs(x) < 1e5 ? String(x) : significant(x, digits);
  }
  const percent = (x) => (x >= 0.995 && x < 1 ? "over 99" : significant(100 * x, 2)) + "\u00a0%";
  function value(held, kind) {
    const one = kind === "trace" ? trace : kind === "share" ? percent : (x) => number(x >= 100 && x < 1e5 ? Math.round(x) : x);
    if (!Array.isArray(held)) return one(held);
    const [low, high] = held.map(one);
    return low === high ? low : `${low.replace("\u00a0%", "")}–${high}`;
  }
  const trace = (x) => (x > 0 && x < 1e-4 ? "<\u00a00.01\u00a0%" : percent(x));
  const middle = (held) => (Array.isArray(held) ? (held[0] + held[1]) / 2 : held);

  // ── elements ─────────────────────────────────────────────────────────────────────────────────────────────────────
  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, given] of Object.entries(attributes)) made.setAttribute(name, given);
    made.append(...children);
    return made;
  }
  function shape(parent, tag, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, given] of Object.entries(attributes)) made.setAttribute(name, given);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  // ── the table: filter and sort ───────────────────────────────────────────────────────────────────────────────────
  let only = null; // a flag's rows, when "Show in table" was pressed
  function filter() {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = $("status").value;
    let shown = 0;
    for (const line of lines) {
      const position = Number(line.dataset.row);
      const row = DATA.rows[position];
      const name = row.name.toLowerCase();
      const fits = words.every((word) => name.includes(word)) && (!status || row.status === status)
        && (!only || only.has(position));
      line.hidden = !fits;
      shown += fits;
    }
    const whole = shown === lines.length;
    $("count").textContent = whole ? `${shown} tensors` : `${shown} of ${lines.length} tensors`;
    $("nothing").hidden = shown > 0;
    $("reset").hidden = whole;
  }
  function showOnly(positions) {
    only = positions;
    $("filter").value = "";
    $("status").value = "";
    filter();
  }
  const sortKeys = {
    name: (row) => row.name,
    status: (row) => row.status,
    layer: (row) => row.layer,
    shape: (row) => row.shape.reduce((a, b) => a * b, 1),
  };
  function sortBy(button) {
    const header = button.closest("th");
    const key = button.dataset.key;
    const read = sortKeys[key] || ((row) => middle(row.numbers[key]));
    const textual = key === "name" || key === "status";
    // Numbers start with the largest, words with the first; a second press turns the order round.
    const first = textual || key === "layer" ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = header.ariaSort === first ? other : first;
    for (const th of header.parentElement.cells) th.ariaSort = "none";
    header.ariaSort = order;
    const sign = order === "ascending" ? 1 : -1;
    const keyed = lines.map((line) => [read(DATA.rows[Number(line.dataset.row)]), Number(line.dataset.row), line]);
    keyed.sort(([a, i], [b, j]) => {
      const [lacksA, lacksB] = [a ?? null, b ?? null].map((x) => x === null);
      if (lacksA || lacksB) return lacksA - lacksB || i - j; // what has no number stands last, either way
      return sign * (a < b ? -1 : a > b ? 1 : 0) || i - j;
    });
    body.append(...keyed.map(([, , line]) => line));
  }
  const shownLines = () => [...body.rows].filter((line) => !line.hidden);

  // ── one tensor's panel ───────────────────────────────────────────────────────────────────────────────────────────
  let current = null;
  let opener = null;
  let logarithmic = true;
  function open(position, from) {
    const row = DATA.rows[position];
    if (from) opener = from;
    lineOf.get(current)?.classList.remove("current");
    current = position;
    lineOf.get(position).classList.add("current");
    $("panel-title").textContent = row.name;
    $("panel-body").replaceChildren(...content(row));
    const order = shownLines().map((line) => Number(line.dataset.row));
    const place = order.indexOf(position);
    $("panel-place").textContent = place < 0 ? "" : `${place + 1} of ${order.length}`;
    $("previous").disabled = place <= 0;
    $("next").disabled = place < 0 || place === order.length - 1;
    const hidden = $("panel").hidden;
    $("panel").hidden = false;
    $("panel").scrollTop = 0;
    if (hidden || from) $("panel").focus({ preventScroll: true });
  }
  function close() {
    if (current === null) return;
    $("panel").hidden = true;
    lineOf.get(current).classList.remove("current");
    current = null;
    opener?.focus({ preventScroll: true });
  }
  function step(by) {
    const order = shownLines().map((line) => Number(line.dataset.row));
    const next = order[order.indexOf(current) + by];
    if (order.includes(current) && next !== undefined) open(next);
  }
  function content(row) {
    const parts = [summary(row)];
    if (row.noisy) {
      parts.push(element("p", { class: "warn" }, "Mostly storage rounding: its effective ranks count rounding. "
        + "Read the directions above the floor."));
    }
    if (row.curve) {
      const spectrum = element("div", { id: "spectrum-plot" });
      const toggle = element("button", { type: "button", class: "toggle", id: "scale" });
      const draw = () => {
        toggle.textContent = logarithmic ? "linear index" : "logarithmic index";
        spectrum.replaceChildren(spectrumPlot(row));
      };
      toggle.addEventListener("click", () => { logarithmic = !logarithmic; draw(); });
      draw();
      parts.push(element("h3", {}, "Spectrum", toggle), spectrum);
      parts.push(element("h3", {}, "What rank r would leave out"), errorPlot(row));
    }
    if (row.certificate) {
      parts.push(element("h3", {}, "Certificate"), element("p", { class: "certificate" }, row.certificate));
    }
    const known = DATA.terms.filter((term) => row.numbers[term.key] !== undefined);
    if (known.length) parts.push(element("h3", {}, "Numbers"), numbers(row, known));
    return parts;
  }
  function summary(row) {
    const facts = [];
    if (row.shape.length) facts.push(row.shape.join(" × "));
    const dtypes = [...new Set(row.dtypes.filter(Boolean))];
    if (dtypes.length) facts.push(dtypes.join(" → "));
    facts.push(row.layer === null ? "outside layers" : `layer ${row.layer}`, row.status);
    const made = element("p", { class: "sub" }, facts.join(" · "));
    if (row.reason) made.append(element("br"), element("bdi", {}, row.reason));
    return made;
  }
  function numbers(row, known) {
    const rows = known.map((term) => {
      let text = value(row.numbers[term.key], term.kind);
      if (/rank(_|$)|participation|^rank_\d/.test(term.key) && row.limit) text += ` of ${row.limit}`;
      return element("tr", {}, element("th", { scope: "row" }, term.label), element("td", { class: "value" }, text),
        element("td", { class: "said" }, term.reading));
    });
    return element("table", { class: "numbers" }, element("tbody", {}, ...rows));
  }

  // ── plots ────────────────────────────────────────────────────────────────────────────────────────────────────────
  const FRAME = { width: 640, height: 300, left: 62, right: 16, top: 14, bottom: 44 };
  function frame(label) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [name, given] of Object.entries({ viewBox: `0 0 ${FRAME.width} ${FRAME.height}`, class: "plot",
      role: "img", "aria-label": label })) svg.setAttribute(name, given);
    return svg;
  }
  function scale(low, high, from, to, log) {
    const at = log ? Math.log10 : (x) => x;
    return (x) => from + ((at(x) - at(low)) / ((at(high) - at(low)) || 1)) * (to - from);
  }
  const xScale = (low, high, log) => scale(low, high, FRAME.left, FRAME.width - FRAME.right, log);
  const yScale = (low, high, log) => scale(low, high, FRAME.height - FRAME.bottom, FRAME.top, log);
  function decades(low, high) {
    const ticks = [];
    for (let k = Math.ceil(Math.log10(low) - 1e-9); k <= Math.log10(high) + 1e-9; k += 1) ticks.push(10 ** k);
    if (ticks.length >= 3) {
      const every = Math.ceil(ticks.length / 7);
      return ticks.filter((_, i) => i % every === 0);
    }
    const fine = [];
    for (let k = Math.floor(Math.log10(low)); k <= Math.log10(high); k += 1) {
      for (const m of [1, 2, 5]) if (m * 10 ** k >= low && m * 10 ** k <= high) fine.push(m * 10 ** k);
    }
    return fine;
  }
  function even(low, high) {
    const rough = (high - low) / 5;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= rough);
    const ticks = [];
    for (let x = Math.ceil(low / step) * step; x <= high; x += step) ticks.push(x);
    return ticks;
  }
  const powers = (high) => Array.from({ length: Math.floor(Math.log2(high)) + 1 }, (_, i) => 2 ** i);
  function tickText(x) {
    const exponent = Math.round(Math.log10(x));
    const round = x > 0 && Math.abs(x / 10 ** exponent - 1) < 1e-9;
    return round && (exponent < 0 || exponent > 4) ? `10${raised(exponent)}` : String(Number(x.toPrecision(3)));
  }
  function axes(svg, x, y, xs, ys, xLabel, yLabel) {
    const bottom = FRAME.height - FRAME.bottom;
    for (const tick of ys) {
      shape(svg, "line", { x1: FRAME.left, x2: FRAME.width - FRAME.right, y1: y(tick), y2: y(tick), class: "tick" });
      shape(svg, "text", { x: FRAME.left - 8, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick));
    }
    for (const tick of xs) {
      shape(svg, "line", { x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4, class: "axis" });
      shape(svg, "text", { x: x(tick), y: bottom + 18, "text-anchor": "middle" }, tickText(tick));
    }
    shape(svg, "path", { d: `M${FRAME.left} ${FRAME.top}V${bottom}H${FRAME.width - FRAME.right}`, class: "axis" });
    shape(svg, "text", { x: (FRAME.left + FRAME.width - FRAME.right) / 2, y: FRAME.height - 6, "text-anchor": "middle" },
      xLabel);
    shape(svg, "text", { transform: `translate(14 ${(FRAME.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" },
      yLabel);
  }
  const path = (xs, ys, x, y) => "M" + xs.map((at, i) => `${x(at).toFixed(1)} ${y(ys[i]).toFixed(1)}`).join("L");
  function band(svg, xs, low, high, x, y) {
    const back = path([...xs].reverse(), [...low].reverse(), x, y).slice(1);
    shape(svg, "path", { d: `${path(xs, high, x, y)}L${back}Z`, class: "band" });
  }
  // A falling curve leaves room at the top right and at the bottom left: a level's label stands where its line is free.
  function level(svg, y, kind, text, below) {
    if (!(y >= FRAME.top && y <= FRAME.height - FRAME.bottom)) return;
    const left = y > (FRAME.top + FRAME.height - FRAME.bottom) / 2;
    shape(svg, "line", { x1: FRAME.left, x2: FRAME.width - FRAME.right, y1: y, y2: y, class: kind });
    shape(svg, "text", { x: left ? FRAME.left + 8 : FRAME.width - FRAME.right - 4, y: y + (below ? 14 : -5),
      "text-anchor": left ? "start" : "end", class: `${kind}-text` }, text);
  }
  // A vertical line that follows the pointer, with the values it stands on.
  function follow(svg, xs, x, words) {
    const cursor = shape(svg, "line", { y1: FRAME.top, y2: FRAME.height - FRAME.bottom, class: "cursor",
      visibility: "hidden" });
    const reading = shape(svg, "text", { x: FRAME.width - FRAME.right, y: FRAME.top + 4, "text-anchor": "end",
      class: "reading" }, "");
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * FRAME.width;
      let best = 0;
      xs.forEach((each, i) => { if (Math.abs(x(each) - at) < Math.abs(x(xs[best]) - at)) best = i; });
      cursor.setAttribute("x1", x(xs[best]));
      cursor.setAttribute("x2", x(xs[best]));
      cursor.setAttribute("visibility", "visible");
      reading.textContent = words(best);
    });
    svg.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      reading.textContent = "";
    });
  }
  function spectrumPlot(row) {
    const curve = row.curve;
    const kept = DATA.grids[curve.grid].map((_, i) => i).filter((i) => curve.values[i] > 0);
    const xs = kept.map((i) => DATA.grids[curve.grid][i]);
    const values = kept.map((i) => curve.values[i]);
    const high = curve.high ? kept.map((i) => curve.high[i]) : values;
    const floor = row.numbers.storage_floor;
    const edge = row.numbers.mp_edge;
    const told = [floor, edge].filter((v) => v > 0);
    const top = Math.max(...high, ...told) * 1.25;
    // A floor far beneath every value would flatten the curve: two decades down, it is told in words alone.
    const bottom = Math.min(...values, ...told.filter((v) => v > Math.min(...values) / 100)) / 1.4;
    const end = Math.max(xs.at(-1), 2);
    const x = logarithmic ? xScale(1, end, true) : xScale(0, end, false);
    const y = yScale(bottom, top, true);
    const svg = frame(`Singular values of ${row.name}`);
    axes(svg, x, y, logarithmic ? decades(1, end) : even(0, end), decades(bottom, top), "index i", "singular value σᵢ");
    if (curve.high) band(svg, xs, values, high, x, y);
    shape(svg, "path", { d: path(xs, values, x, y), class: "line" });
    if (xs.length <= 32) xs.forEach((at, i) => shape(svg, "circle", { cx: x(at), cy: y(values[i]), r: 3, class: "dot" }));
    const near = floor > 0 && edge > 0 && Math.abs(y(floor) - y(edge)) < 18;
    if (floor > 0) level(svg, y(floor), "floor", "storage rounding floor", near && floor < edge);
    if (edge > 0) level(svg, y(edge), "edge", "Marchenko–Pastur edge", near && edge <= floor);
    if (floor > 0 && floor < bottom) {
      shape(svg, "text", { x: FRAME.left + 8, y: FRAME.height - FRAME.bottom - 8, class: "floor-text" },
        `storage rounding floor far below, at ${number(floor)}`);
    }
    follow(svg, xs, x, (i) => `σ${raisedLow(xs[i])} = ${number(values[i], 4)}`
      + (curve.high ? ` to ${number(high[i], 4)}` : ""));
    return svg;
  }
  const raisedLow = (n) => [...String(n)].map((c) => "₀₁₂₃₄₅₆₇₈₉"[c]).join("");
  function errorPlot(row) {
    const curve = row.curve;
    const xs = DATA.grids[curve.grid];
    const x = xScale(1, Math.max(xs.at(-1), 2), true);
    const y = yScale(0, 1, false);
    const svg = frame(`Truncation error of ${row.name}`);
    axes(svg, x, y, powers(xs.at(-1)), [0, 0.2, 0.4, 0.6, 0.8, 1], "rank r kept", "‖Δ − Δᵣ‖ / ‖Δ‖");
    level(svg, y(NINETY), "guide", "90 % of the squared norm kept below", true);
    if (curve.low) band(svg, xs, curve.low, curve.error, x, y);
    shape(svg, "path", { d: path(xs, curve.error, x, y), class: "line" });
    for (const mark of MARKS) {
      const i = xs.indexOf(mark);
      if (i < 0) continue;
      shape(svg, "circle", { cx: x(mark), cy: y(curve.error[i]), r: 3.5, class: "dot" });
      // The middle label stands below the curve and the others above, so that flat curves keep them apart.
      const above = mark !== 16;
      const right = above && x(mark) < FRAME.width - FRAME.right - 90;
      shape(svg, "text", { x: x(mark) + (right ? 7 : -5), y: y(curve.error[i]) + (above ? -8 : 17), class: "mark",
        "text-anchor": right ? "start" : "end" }, `r = ${mark}: ${percent(curve.error[i])}`);
    }
    follow(svg, xs, x, (i) => `r = ${xs[i]}: ${curve.low ? percent(curve.low[i]) + " to " : ""}${percent(curve.error[i])}`);
    return svg;
  }

  // ── what the reader does ─────────────────────────────────────────────────────────────────────────────────────────
  $("filter").addEventListener("input", filter);
  $("status").addEventListener("change", filter);
  $("reset").addEventListener("click", () => showOnly(null));
  for (const button of document.querySelectorAll(".sort")) button.addEventListener("click", () => sortBy(button));
  body.addEventListener("click", (event) => {
    const line = event.target.closest("tr");
    if (String(document.getSelection())) return; // a name being selected for copying opens nothing
    open(Number(line.dataset.row), line.querySelector(".open"));
  });
  for (const cell of document.querySelectorAll(".cell")) {
    cell.addEventListener("click", () => open(Number(cell.dataset.row), cell));
  }
  for (const button of document.querySelectorAll(".show")) {
    button.addEventListener("click", () => {
      showOnly(new Set(button.dataset.rows.split(",").map(Number)));
      $("tensors").scrollIntoView();
    });
  }
  $("close").addEventListener("click", close);
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") close();
    const typing = event.target.matches("input, select");
    if (!$("panel").hidden && !typing && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
      event.preventDefault();
      step(event.key === "ArrowLeft" ? -1 : 1);
    }
    if (event.target.matches(".open") && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
      event.preventDefault();
      const order = shownLines();
      const at = order.indexOf(event.target.closest("tr")) + (event.key === "ArrowUp" ? -1 : 1);
      order[at]?.querySelector(".open").focus();
    }
  });
  const root = document.documentElement;
  const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const nameTheme = () => { $("theme").textContent = isDark() ? "Light" : "Dark"; };
  $("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark"; // kept in this page's memory alone
    nameTheme();
  });
  systemDark.addEventListener("change", nameTheme);
  nameTheme();
})();
