// What the report on one update draws: a tensor's panel, its spectrum, and what a low rank would leave out. `shared/`
// holds the rest of the page's script.
const MARKS = [8, 16, 64];
const NINETY = Math.sqrt(0.1); // the error at which 90 % of the squared norm is kept
let logarithmic = true;

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
  if (row.advice) parts.push(element("h3", {}, "How many directions"), advice(row));
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

// What each criterion says, with its place between 1 and all directions: where the marks lie apart, criteria disagree.
function advice(row) {
  const held = row.advice;
  const lines = DATA.criteria.map((label, i) => {
    const band = held.bands[i];
    const known = band !== null;
    const told = known ? value(band, "number") : "–";
    const mark = known ? strip(band, row.limit) : element("span", { class: "lacking" }, held.lacking[i] ?? "");
    return element("tr", {}, element("th", { scope: "row" }, label), element("td", { class: "value" }, told),
      element("td", { class: "place" }, mark));
  });
  const foot = element("p", { class: "scale-note" }, `0 and 1 at the left, all ${row.limit} at the right; logarithmic`);
  return element("div", { id: "advice" }, element("p", { class: "certificate" }, held.said),
    element("table", { class: "numbers advice" }, element("tbody", {}, ...lines)), foot);
}
function strip(band, limit) {
  const [low, high] = Array.isArray(band) ? band : [band, band];
  const x = scale(1, Math.max(limit, 2), 6, 234, true);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, given] of Object.entries({ viewBox: "0 0 240 14", class: "strip", "aria-hidden": "true" })) {
    svg.setAttribute(name, given);
  }
  shape(svg, "line", { x1: 6, x2: 234, y1: 7, y2: 7, class: "track" });
  const [from, to] = [low, high].map((at) => x(Math.max(at, 1)).toFixed(1));
  if (from !== to) shape(svg, "line", { x1: from, x2: to, y1: 7, y2: 7, class: "reach" });
  for (const at of new Set([from, to])) shape(svg, "circle", { cx: at, cy: 7, r: 4, class: high < 1 ? "none" : "dot" });
  return svg;
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
