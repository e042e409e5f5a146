// ── one tensor's panel ───────────────────────────────────────────────────────────────────────────────────────────
let current = null;
let opener = null;
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
