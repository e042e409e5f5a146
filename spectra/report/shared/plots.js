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
