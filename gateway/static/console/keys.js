// Client keys and what they used, where the gateway has keys or keeps their usage.

import { call, reason } from "./api.js";
import { h, setText } from "./dom.js";
import { count } from "./format.js";
import { t } from "./i18n.js";

const EVERY = 10_000;
const USED = ["requests", "refused", "prompt_tokens", "completion_tokens", "cached_tokens", "images"];

export class KeysView {
  constructor() {
    this.note = h("p", { class: "muted", role: "status", text: t("loading") });
    this.tables = h("div", { class: "stack" });
    this.node = h("div", {}, h("h2", { text: t("view.keys") }), this.note, this.tables);
  }

  enter() {
    this.load();
    this.timer = setInterval(() => this.load(), EVERY);
  }

  leave() {
    clearInterval(this.timer);
  }

  update() {}

  async load() {
    const [keys, usage] = await Promise.allSettled([call("GET", "ops/keys"), call("GET", "ops/usage?by=key")]);
    if (keys.status === "rejected" && usage.status === "rejected") {
      setText(this.note, t("failed.reason", { reason: reason(keys.reason) }));
      return;
    }
    const rows = usage.status === "fulfilled" ? usage.value.rows : [];
    const signature = JSON.stringify([keys.value, rows]);
    if (signature === this.signature) return;
    this.signature = signature;
    setText(this.note, "");
    const sections = [];
    if (keys.status === "fulfilled") sections.push(section(t("keys.limits"), keyTable(keys.value.keys ?? [])));
    if (usage.status === "fulfilled") sections.push(section(t("keys.usage"), usageTable(rows)));
    this.tables.replaceChildren(...sections);
  }
}

function section(title, content) {
  return h("section", { class: "card", "aria-label": title }, h("h3", { text: title }), content);
}

function table(label, columns, rows) {
  if (rows.length === 0) return h("p", { class: "empty", text: t("keys.none") });
  return h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": label },
    h("table", {}, h("thead", {}, h("tr", {}, ...columns.map((text) => h("th", { scope: "col", text })))),
      h("tbody", {}, ...rows.map(([first, ...rest]) => h("tr", {}, h("th", { scope: "row", text: first }), ...rest.map((text) => h("td", { text })))))));
}

/** Any fields that the gateway tells of its keys, since limits differ from key to key. */
function keyTable(keys) {
  const columns = [...new Set(keys.flatMap((item) => Object.keys(item)))].filter((name) => name !== "name");
  const rows = keys.map((item) => [item.name, ...columns.map((name) => shown(item[name]))]);
  return table(t("keys.limits"), [t("keys.name"), ...columns.map(words)], rows);
}

function usageTable(rows) {
  return table(t("keys.usage"), [t("keys.name"), ...USED.map((name) => t(`used.${name}`))], rows.map((row) => [row.key || "–", ...USED.map((name) => count(row[name]))]));
}

function words(name) {
  const text = name.replaceAll("_", " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function shown(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value === "number") return count(value);
  if (typeof value === "boolean") return t(value ? "yes" : "no");
  if (Array.isArray(value)) return value.map(shown).join(", ") || "–";
  if (typeof value === "object") return Object.entries(value).map(([name, inner]) => `${words(name)}: ${shown(inner)}`).join(", ") || "–";
  return String(value);
}
