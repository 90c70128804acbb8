// The page's language: English or Korean.

import { en } from "./en.js";
import { ko } from "./ko.js";

const STORED = "gateway-language";
export const LANGUAGES = { en: "English", ko: "한국어" };
const MESSAGES = { en, ko };

function chosen() {
  const stored = localStorage.getItem(STORED);
  if (Object.hasOwn(LANGUAGES, stored)) return stored;
  return (navigator.languages ?? []).map((name) => name.slice(0, 2)).find((name) => Object.hasOwn(LANGUAGES, name)) ?? "en";
}

export const language = chosen();
document.documentElement.lang = language;

/** Choose another language. The page starts anew. */
export function choose(name) {
  localStorage.setItem(STORED, name);
  location.reload();
}

/** The text of a key, with `{name}` replaced by the parameters. */
export function t(key, params = {}) {
  const text = MESSAGES[language][key] ?? en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in params ? String(params[name]) : whole));
}
