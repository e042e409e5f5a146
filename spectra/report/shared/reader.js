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
