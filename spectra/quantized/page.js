// What the page on a quantized model draws: a matrix's panel, the spectrum of its error, and what low rank holds of it.
let chosen = DATA.lead;

function content(row) {
  const parts = [summary(row)];
  if (!row.schemes) return parts;
  const drawn = element("div");
  const pick = element("select", { id: "scheme", autocomplete: "off" },
    ...DATA.schemes.map((scheme, i) => element("option", { value: i }, scheme)));
  const draw = () => drawn.replaceChildren(...scheme(row, row.schemes[chosen]));
  pick.value = String(chosen);
  pick.addEventListener("change", () => { chosen = Number(pick.value); draw(); });
  draw();
  return [...parts, element("label", { class: "pick" }, "Scheme ", pick), drawn];
}
function summary(row) {
  const facts = [row.shape.join(" × "), row.dtype, row.layer === null ? "outside layers" : `layer ${row.layer}`, row.status];
  if (row.turned) facts.push("stored (in, out), turned");
  const made = element("p", { class: "sub" }, facts.filter(Boolean).join(" · "));
  if (row.reason) made.append(element("br"), element("bdi", {}, row.reason));
  return made;
}
function scheme(row, held) {
  const parts = [];
  if (held.curve) {
    parts.push(element("h3", {}, "Spectrum of the error"), spectrumPlot(row, held));
    parts.push(element("h3", {}, "What rank r takes back"), heldPlot(row, held));
  }
  const shares = DATA.shares.filter((term) => held.shares[term.key]);
  if (shares.length) parts.push(element("h3", {}, "Shares by rank"), shareTable(held, shares));
  parts.push(element("h3", {}, "Numbers"), numbers(held));
  return parts;
}
function numbers(held) {
  const known = DATA.terms.filter((term) => held.numbers[term.key] !== undefined);
  const rows = known.map((term) => element("tr", {}, element("th", { scope: "row" }, term.label),
    element("td", { class: "value" }, value(held.numbers[term.key], term.kind))));
  return element("table", { class: "numbers" }, element("tbody", {}, ...rows));
}
function shareTable(held, shares) {
  const head = element("tr", {}, element("th", { scope: "col", class: "word" }, "share"),
    ...DATA.ranks.map((rank) => element("th", { scope: "col" }, `r = ${rank}`)));
  const rows = shares.map((term) => element("tr", {}, element("th", { scope: "row", class: "word" }, term.label),
    ...held.shares[term.key].map((share) => element("td", {}, share === null ? "–" : signed(share)))));
  const table = element("table", { class: "groups" }, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", { class: "scroll" }, table);
}
const signed = (share) => (share < 0 ? "−" : "") + percent(Math.abs(share));

function spectrumPlot(row, held) {
  const noise = DATA.noise[row.noise];
  const top = Math.max(1.15, held.curve[0] * 1.05);
  const x = xScale(0, 1, false);
  const y = yScale(0, top, false);
  const svg = frame(`Singular values of the error of ${row.name}`);
  axes(svg, x, y, even(0, 1), even(0, top), "index over p", "σᵢ over the noise edge");
  level(svg, y(1), "edge", "Marchenko–Pastur edge");
  shape(svg, "path", { d: path(noise.at, noise.values, x, y), class: "noise" });
  shape(svg, "path", { d: path(noise.at, held.curve, x, y), class: "line" });
  follow(svg, noise.at, x, (i) => `${number(held.curve[i])}, noise ${number(noise.values[i])}`);
  return svg;
}
function heldPlot(row, held) {
  const xs = DATA.fractions;
  const x = xScale(xs[0], 1, true);
  const y = yScale(0, 1, false);
  const svg = frame(`Share of the error of ${row.name} in its leading directions`);
  const ticks = xs.filter((_, i) => (xs.length - 1 - i) % 4 === 0);
  axes(svg, x, y, [], [0, 0.2, 0.4, 0.6, 0.8, 1], "r/p", "share of ‖E‖²");
  const bottom = FRAME.height - FRAME.bottom;
  for (const tick of ticks) {
    shape(svg, "line", { x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4, class: "axis" });
    shape(svg, "text", { x: x(tick), y: bottom + 18, "text-anchor": "middle" },
      tick === 1 ? "1" : `1/${Math.round(1 / tick)}`);
  }
  shape(svg, "path", { d: path(xs, row.heldNoise, x, y), class: "noise" });
  shape(svg, "path", { d: path(xs, held.held, x, y), class: "line" });
  shape(svg, "text", { x: FRAME.left + 8, y: FRAME.top + 14, class: "noise-text" }, "dashed: noise of this shape");
  follow(svg, xs, x, (i) => `${percent(held.held[i])}, noise ${percent(row.heldNoise[i])}`);
  return svg;
}
