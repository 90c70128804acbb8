// Light or dark: as the system says, or as the reader chooses.

const STORED = "gateway-theme";
export const THEMES = ["system", "light", "dark"];

export function theme() {
  const stored = localStorage.getItem(STORED);
  return THEMES.includes(stored) ? stored : "system";
}

export function chooseTheme(name) {
  localStorage.setItem(STORED, name);
  apply();
  dispatchEvent(new Event("themechange"));
}

function apply() {
  document.documentElement.dataset.theme = theme();
}

apply();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("themechange")));
