// What the report on two or more updates draws: the choice of a pair, and a matrix's panel with its overlaps, captured
// shares, spectra, angles and new directions. `shared/` holds the rest of the page's script.
const RANKS = DATA.ranks;
const DASH = ["", "dashed", "dotted", "dashdot", "long", "dashed", "dotted"];
const SIDES = [["left", "output side"], ["right", "input side"]];
let pair = DATA.pairs[0] ?? null;
let above = true;
let turned = false;

// ── which two updates are shown ──────────────────────────────────────────────────────────────────────────────────
const held = (row) => (pair && row.pairs ? row.pairs[pair.key] : undefined);
function choose(key) {
  pair = DATA.pairs.find((each) => each.key === key) ?? null;
  for (const row of DATA.rows) row.numbers = held(row)?.numbers ?? {};
  for (const part of document.querySelectorAll("[data-pair]")) part.hidden = part.dataset.pair !== key;
  for (const button of document.querySelectorAll(".choose")) button.ariaPressed = String(button.dataset.choose === key);
  if ($("pair")) $("pair").value = key;
  DATA.columns.forEach((column, i) => {
    const button = document.querySelector(`.sort[data-key="${column.key}"]`);
    if (button) button.textContent = pair.heads[i];
    for (const line of lines) {
      const x = DATA.rows[Number(line.dataset.row)].numbers[column.key];
      line.cells[4 + i].textContent = x === undefined ? "" : value(x, column.kind);
    }
  });
  if (current !== null) open(current);
}

// ── a matrix's panel ─────────────────────────────────────────────────────────────────────────────────────────────
function content(row) {
  const found = held(row);
  const parts = [summary(row)];
  if (found) {
    const [a, b] = [row.updates[pair.a], row.updates[pair.b]];
    if (pair.rank && pair.rank > Math.min(a.resolved, b.resolved) && pair.rank <= Math.min(a.held, b.held)) {
      parts.push(element("p", { class: "warn" }, `Rounding or a small gap leaves the leading ${pair.rank} directions `
        + "unresolved: they may be turned by 30° or more. Hatched overlaps are uncertain."));
    }
    parts.push(...overlapPart(row, found), ...capturePart(row, found));
  }
  const present = (row.updates ?? []).map((update, i) => [update, i]).filter(([update]) => update);
  if (present.some(([update]) => update.values.length)) parts.push(element("h3", {}, "Spectra"), ...spectraPlot(row, present));
  if (found && found.left.angles.length) parts.push(element("h3", {}, "Principal angles"), ...anglePlot(row, found));
  if (present.some(([update]) => update.cosines.length)) {
    parts.push(element("h3", {}, "New directions"), ...intruderPlot(row, present));
  }
  if (present.some(([update]) => update.amplification.length)) {
    parts.push(element("h3", {}, "Amplification"), ...amplificationPlot(row, present));
  }
  if (found) parts.push(element("h3", {}, "Numbers of the pair"), numbers(found));
  if (present.length) parts.push(element("h3", {}, "Numbers of each update"), eachNumbers(present));
  return parts;
}
function summary(row) {
  const facts = [];
  if (row.shape.length) facts.push(row.shape.join(" × "));
  if (row.dtype) facts.push(row.dtype);
  facts.push(row.layer === null ? "outside layers" : `layer ${row.layer}`, row.status);
  if (held(row)) facts.push(`${DATA.labels[pair.a]} and ${DATA.labels[pair.b]}`);
  const made = element("p", { class: "sub" }, facts.join(" · "));
  if (row.reason) made.append(element("br"), element("bdi", {}, row.reason));
  return made;
}
function numbers(found) {
  const known = DATA.terms.filter((term) => found.numbers[term.key] !== undefined);
  const rows = known.map((term) => element("tr", {}, element("th", { scope: "row" }, pair.named[term.key] ?? term.label),
    element("td", { class: "value" }, value(found.numbers[term.key], term.kind)),
    element("td", { class: "said" }, term.reading)));
  return element("table", { class: "numbers" }, element("tbody", {}, ...rows));
}
function eachNumbers(present) {
  const head = element("tr", {}, element("th", {}, ""),
    ...present.map(([, i]) => element("th", { scope: "col" }, element("bdi", {}, DATA.labels[i]))));
  const rows = DATA.updateTerms.filter((term) => present.some(([update]) => update.numbers[term.key] !== undefined))
    .map((term) => element("tr", {}, element("th", { scope: "row" }, term.label),
      ...present.map(([update]) => element("td", {}, eachNumber(update, term)))));
  const rank = present.map(([update]) => element("td", {}, update.kind === "factors"
    ? `adapter of rank ${update.limit}` : `dense, ${update.held} of ${update.limit} directions`));
  rows.unshift(element("tr", {}, element("th", { scope: "row" }, "kind"), ...rank));
  return element("div", { class: "scroll", tabindex: "0" },
    element("table", { class: "pairs-of" }, element("thead", {}, head), element("tbody", {}, ...rows)));
}
function eachNumber(update, term) {
  const x = update.numbers[term.key];
  if (x === undefined) return "–";
  const text = value(x, term.kind);
  if (term.key.startsWith("intruder")) return `${text} of ${update.cosines.length}`;
  if (term.key.startsWith("resolved")) return `${text} of ${update.held}`;
  return term.key === "amplification" && update.random.length ? `${text} (${value(update.random.at(-1), term.kind)})` : text;
}

// ── overlaps ─────────────────────────────────────────────────────────────────────────────────────────────────────
function overlapPart(row, found) {
  if (!found.left.overlap.length) return [];
  const grids = element("div", { class: "grids" });
  const reads = element("output", { class: "reads", "aria-live": "polite" });
  const toggle = element("button", { type: "button", class: "toggle", id: "chance" });
  const [a, b] = [row.updates[pair.a], row.updates[pair.b]];
  const hatched = found.left.overlap.length && (RANKS[found.left.overlap.length - 1] > a.resolved
    || RANKS[found.left.overlap[0].length - 1] > b.resolved);
  const draw = () => {
    toggle.textContent = above ? "show raw overlap" : "show above chance";
    reads.textContent = `In per cent${above ? ", above chance" : ""}.${hatched ? " Hatched: beyond what is resolved." : ""}`;
    grids.replaceChildren(...SIDES.map(([side, said], i) => grid(row, found[side].overlap, row.shape[i], said, reads)));
  };
  toggle.addEventListener("click", () => { above = !above; draw(); });
  draw();
  const caption = `Rows: the leading i directions of ${DATA.labels[pair.a]}; columns: the leading j of ${DATA.labels[pair.b]}.`;
  return [element("h3", {}, "Shared directions", toggle), element("p", { class: "sub" }, caption), grids, reads];
}
function grid(row, table, dimension, said, reads) {
  const [a, b] = [row.updates[pair.a], row.updates[pair.b]];
  const head = element("tr", {}, element("td", {}),
    ...table[0].map((_, j) => element("th", { scope: "col" }, String(RANKS[j]))));
  const body = table.map((cells, i) => element("tr", {}, element("th", { scope: "row" }, String(RANKS[i])),
    ...cells.map((held, j) => {
      const raw = held / 1000;
      const mean = Math.max(RANKS[i], RANKS[j]) / dimension;
      const over = mean < 1 ? Math.max((raw - mean) / (1 - mean), 0) : null;
      const shown = above ? over : raw;
      const dim = RANKS[i] > a.resolved || RANKS[j] > b.resolved;
      const error = Math.min((a.sines[i] ?? 1) + (b.sines[j] ?? 1), 1);
      const words = `i = ${RANKS[i]}, j = ${RANKS[j]}: overlap ${percent(raw)}, random ${percent(mean)}`
        + (over === null ? "" : `, above chance ${percent(over)}`)
        + (error >= 1 ? ", not resolved" : error > 0.0005 ? `, within ${percent(error)}` : "");
      const cell = element("td", { class: `${shown === null ? "hx" : `h${Math.round(32 * Math.min(shown, 1))}`}${dim ? " dim" : ""}`,
        tabindex: i + j ? "-1" : "0", title: words }, shown === null ? "" : String(Math.round(100 * shown)));
      for (const kind of ["pointerenter", "focus"]) cell.addEventListener(kind, () => { reads.textContent = words; });
      return cell;
    })));
  const made = element("table", { class: "grid" }, element("caption", {}, said), element("thead", {}, head),
    element("tbody", {}, ...body));
  made.addEventListener("keydown", walk);
  return made;
}
// Arrow keys walk over the cells of a grid, and do not turn to the next tensor.
function walk(event) {
  const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const cell = event.target.closest("td");
  if (!by || !cell) return;
  event.preventDefault();
  event.stopPropagation();
  const next = cell.parentElement.parentElement.rows[cell.parentElement.sectionRowIndex + by[0]]?.cells[cell.cellIndex + by[1]];
  if (next?.tagName !== "TD") return;
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// ── lines and their keys ─────────────────────────────────────────────────────────────────────────────────────────
const series = (i) => `series s${i % 7} ${DASH[i % 7]}`;
function keys(entries) {
  return element("p", { class: "keys" }, ...entries.map(([kind, text]) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 30 10");
    svg.setAttribute("aria-hidden", "true");
    shape(svg, "path", { d: "M0 6H30", class: kind });
    return element("span", {}, svg, element("bdi", {}, text));
  }));
}
function curve(svg, xs, ys, x, y, kind, dots) {
  const at = xs.map((_, i) => i).filter((i) => ys[i] !== null && ys[i] !== undefined);
  if (!at.length) return;
  shape(svg, "path", { d: path(at.map((i) => xs[i]), at.map((i) => ys[i]), x, y), class: kind });
  if (dots || at.length === 1) {
    for (const i of at) {
      shape(svg, "circle", { cx: x(xs[i]).toFixed(1), cy: y(ys[i]).toFixed(1), r: 3, class: `point ${kind.replace(/^.*\bs(\d).*$/, "p$1")}` });
    }
  }
}
function capturePart(row, found) {
  const box = element("div", {});
  const toggle = element("button", { type: "button", class: "toggle", id: "turn" });
  const draw = () => {
    const [caught, net] = turned ? [pair.b, pair.a] : [pair.a, pair.b];
    toggle.textContent = `show ${DATA.labels[net]} in ${DATA.labels[caught]}`;
    box.replaceChildren(...capturePlot(row, found.capture[turned ? "b_in_a" : "a_in_b"], caught, net));
  };
  toggle.addEventListener("click", () => { turned = !turned; draw(); });
  draw();
  return [element("h3", {}, "What one holds of the other", toggle), box];
}
function capturePlot(row, held, caught, net) {
  const limit = row.updates[net].held;
  const kept = RANKS.map((_, i) => i).filter((i) => RANKS[i] <= limit);
  const [xs, pick] = [kept.map((i) => RANKS[i]), (ys) => kept.map((i) => ys[i])];
  const both = pick(held.both);
  const optimum = pick(row.updates[caught].optimum);
  const chance = xs.map((r) => (r * r) / (row.shape[0] * row.shape[1]));
  const x = xScale(1, Math.max(xs.at(-1), 2), true);
  const y = yScale(0, 1, false);
  const svg = frame(`Share of ${DATA.labels[caught]} that ${DATA.labels[net]} holds, ${row.name}`);
  axes(svg, x, y, powers(Math.max(xs.at(-1), 2)), [0, 0.2, 0.4, 0.6, 0.8, 1], "leading directions r", "share of ‖Δ‖²");
  const own = `s${caught % 7}`;
  curve(svg, xs, chance, x, y, "series thin grey dotted");
  curve(svg, xs, optimum, x, y, "series thin grey dashed");
  curve(svg, xs, pick(held.left), x, y, `series thin ${own} dotted`);
  curve(svg, xs, pick(held.right), x, y, `series thin ${own} dashdot`);
  curve(svg, xs, both, x, y, `series ${own}`, true);
  follow(svg, xs, x, (i) => `r = ${xs[i]}: ${percent(both[i])}, best ${percent(optimum[i])}, random ${percent(chance[i])}`);
  return [element("p", { class: "sub" }, element("bdi", {}, DATA.labels[caught]), " inside ",
    element("bdi", {}, DATA.labels[net])), keys([[`series ${own}`, "both sides"], [`series thin ${own} dotted`, "output side alone"],
    [`series thin ${own} dashdot`, "input side alone"], ["series thin grey dashed", "best possible"],
    ["series thin grey dotted", "random"]]), svg];
}
function spectraPlot(row, present) {
  const shown = present.filter(([update]) => update.values.length);
  const values = shown.map(([update]) => update.values.filter((v) => v > 0));
  const floors = shown.map(([update]) => update.numbers.storage_floor ?? 0);
  const least = Math.min(...values.flat());
  const top = Math.max(...values.flat(), ...floors) * 1.25;
  const bottom = Math.max(Math.min(least, ...floors.filter((f) => f > least / 100)) / 1.4, top / 1e6);
  const end = Math.max(2, ...values.map((each) => each.length));
  const [x, y] = [xScale(1, end, true), yScale(bottom, top, true)];
  const svg = frame(`Singular values of every update of ${row.name}`);
  axes(svg, x, y, decades(1, end), decades(bottom, top), "index i", "singular value σᵢ");
  const entries = [];
  shown.forEach(([, i], k) => {
    const seen = values[k].filter((v) => v >= bottom);
    curve(svg, seen.map((_, j) => j + 1), seen, x, y, series(i), seen.length <= 32);
    entries.push([series(i), DATA.labels[i]]);
    if (floors[k] >= bottom) {
      shape(svg, "line", { x1: FRAME.left, x2: FRAME.width - FRAME.right, y1: y(floors[k]), y2: y(floors[k]), class: `series thin s${i % 7} long` });
      entries.push([`series thin s${i % 7} long`, `storage floor of ${DATA.labels[i]}`]);
    }
  });
  const below = floors.filter((floor) => floor > 0 && floor < bottom);
  if (below.length) {
    const [least, most] = [Math.min(...below), Math.max(...below)].map((floor) => number(floor, 2));
    entries.push(["series thin grey long", `storage rounding far below, at ${least === most ? least : `${least} to ${most}`}`]);
  }
  const xs = Array.from({ length: end }, (_, i) => i + 1);
  follow(svg, xs, x, (i) => `σ${raisedLow(xs[i])}: ` + shown.filter((_, k) => values[k][i] !== undefined)
    .map(([, at]) => `${DATA.labels[at]} ${number(present.find(([, n]) => n === at)[0].values[i])}`).join(", "));
  return [keys(entries), svg];
}
function anglePlot(row, found) {
  const [left, right] = [found.left.angles, found.right.angles];
  const xs = left.map((_, i) => i + 1);
  const [x, y] = [xScale(xs.length > 1 ? 1 : 0, Math.max(xs.length, 2), false), yScale(0, 90, false)];
  const svg = frame(`Principal angles of the leading subspaces, ${row.name}`);
  const ticks = xs.length > 6 ? even(1, xs.length).filter(Number.isInteger) : xs;
  axes(svg, x, y, ticks, [0, 15, 30, 45, 60, 75, 90], "place", "angle, degrees");
  curve(svg, xs, left, x, y, "series s0", xs.length <= 32);
  curve(svg, xs, right, x, y, "series s1 dashed", xs.length <= 32);
  follow(svg, xs, x, (i) => `θ${raisedLow(xs[i])}: output ${number(left[i])}°, input ${number(right[i])}°`);
  const [q, p] = found.angleRanks;
  return [element("p", { class: "sub" }, `Between the leading ${q} directions of ${DATA.labels[pair.a]} and the leading ${p} `
    + `of ${DATA.labels[pair.b]}, as far as they are known and resolved. 0° is a direction in common.`),
    keys([["series s0", "output side"], ["series s1 dashed", "input side"]]), svg];
}
function intruderPlot(row, present) {
  const shown = present.filter(([update]) => update.cosines.length);
  const [x, y] = [xScale(0, 1, false), yScale(0, DATA.top, false)];
  const svg = frame(`Leading directions that resemble none of the base, ${row.name}`);
  axes(svg, x, y, [0, 0.2, 0.4, 0.6, 0.8, 1], [0, 2, 4, 6, 8, 10].filter((n) => n <= DATA.top), "threshold ε on |cos|",
    `intruders of ${DATA.top}`);
  const chance = row.chance === undefined ? null : DATA.chances[row.chance];
  if (chance) curve(svg, DATA.epsilons, chance, x, y, "series thin grey dotted");
  const entries = [];
  for (const [update, i] of shown) {
    const sorted = [...update.cosines].sort((one, other) => one - other);
    let drawn = `M${x(0).toFixed(1)} ${y(0).toFixed(1)}`;
    sorted.forEach((cosine, n) => { drawn += `H${x(cosine).toFixed(1)}V${y(n + 1).toFixed(1)}`; });
    shape(svg, "path", { d: `${drawn}H${x(1).toFixed(1)}`, class: series(i) });
    entries.push([series(i), `${DATA.labels[i]}, ${update.clear.filter(Boolean).length} of ${update.clear.length} directions resolved`]);
  }
  if (chance) entries.push(["series thin grey dotted", "random directions"]);
  follow(svg, DATA.epsilons, x, (i) => `ε = ${DATA.epsilons[i]}: ` + shown.map(([update, k]) =>
    `${DATA.labels[k]} ${update.cosines.filter((c) => c < DATA.epsilons[i]).length}`).join(", ")
    + (chance ? `, random ${number(chance[i], 2)}` : ""));
  return [keys(entries), svg];
}
function amplificationPlot(row, present) {
  const shown = present.filter(([update]) => update.amplification.length);
  const all = shown.flatMap(([update]) => [...update.amplification, ...update.random]).filter((v) => v > 0);
  const end = Math.max(2, ...shown.map(([update]) => RANKS[update.amplification.length - 1]));
  const [low, high] = [Math.min(...all) / 1.3, Math.max(...all) * 1.3];
  const [x, y] = [xScale(1, end, true), yScale(low, high, true)];
  const svg = frame(`Amplification by every update of ${row.name}`);
  axes(svg, x, y, powers(end), decades(low, high), "leading directions r", "‖Δ‖ / ‖UᵀWV‖");
  const entries = [];
  for (const [update, i] of shown) {
    curve(svg, RANKS, update.amplification, x, y, series(i), true);
    curve(svg, RANKS, update.random, x, y, `series thin s${i % 7} dotted`);
    entries.push([series(i), DATA.labels[i]]);
  }
  entries.push(["series thin grey dotted", "thin: random directions of the same ranks"]);
  const xs = RANKS.filter((r) => r <= end);
  follow(svg, xs, x, (i) => `r = ${xs[i]}: ` + shown.filter(([update]) => i < update.amplification.length)
    .map(([update, k]) => `${DATA.labels[k]} ${number(update.amplification[i])} (random ${number(update.random[i])})`).join(", "));
  return [keys(entries), svg];
}

for (const row of DATA.rows) row.numbers = held(row)?.numbers ?? {};
$("pair")?.addEventListener("change", () => choose($("pair").value));
for (const button of document.querySelectorAll(".choose")) {
  button.ariaPressed = String(button.dataset.choose === pair?.key);
  button.addEventListener("click", () => choose(button.dataset.choose));
}
