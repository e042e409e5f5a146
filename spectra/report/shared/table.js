// ── the table: filter and sort ───────────────────────────────────────────────────────────────────────────────────
const body = $("table").tBodies[0];
const lines = [...body.rows];
const lineOf = new Map(lines.map((line) => [Number(line.dataset.row), line]));
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
