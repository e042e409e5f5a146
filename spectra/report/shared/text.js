// The beginning of every page's script: its data, numbers as text, elements. The script reads the data block of its
// page, sets text as text and never as markup, and asks nothing of any network.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// ── numbers as text, as the Python side writes them ──────────────────────────────────────────────────────────────
const SUPER = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const raised = (n) => [...String(n)].map((c) => SUPER[c]).join("");
const raisedLow = (n) => [...String(n)].map((c) => "₀₁₂₃₄₅₆₇₈₉"[c]).join("");
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
