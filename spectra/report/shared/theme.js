// ── light or dark ────────────────────────────────────────────────────────────────────────────────────────────────
const themeButton = document.getElementById("theme");
const root = document.documentElement;
const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
const nameTheme = () => { themeButton.textContent = isDark() ? "Light" : "Dark"; };
themeButton.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark"; // kept in this page's memory alone
  nameTheme();
});
systemDark.addEventListener("change", nameTheme);
nameTheme();
