// What happened: failed requests with their reasons, and the changes of the roll-out.

import { h, list, setHidden, setText } from "./dom.js";
import { duration, time } from "./format.js";
import { t } from "./i18n.js";
import { moveText } from "./words.js";

export class ActivityView {
  constructor() {
    this.errors = h("tbody");
    this.table = h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": t("errors") },
      h("table", {}, h("thead", {}, h("tr", {}, ...["when", "tier", "backend", "error", "after", "request"].map((key) => h("th", { scope: "col", text: t(`errors.${key}`) })))), this.errors));
    this.noErrors = h("p", { class: "empty", text: t("errors.none") });
    this.history = h("ol", { class: "history" });
    this.noHistory = h("p", { class: "empty", text: t("history.none") });
    this.reload = h("div", { class: "card", hidden: true });
    this.node = h("div", { class: "stack" },
      h("section", { "aria-labelledby": "h-errors" }, h("h2", { id: "h-errors", text: t("errors") }), h("div", { class: "card" }, this.table, this.noErrors)),
      h("section", { "aria-labelledby": "h-history" }, h("h2", { id: "h-history", text: t("history") }), h("div", { class: "card" }, this.history, this.noHistory)),
      this.reload);
  }

  update({ status }) {
    setHidden(this.table, status.errors.length === 0);
    setHidden(this.noErrors, status.errors.length > 0);
    list(this.errors, status.errors, (error) => JSON.stringify(error), errorRow);
    const { history } = status.rollout;
    setHidden(this.noHistory, history.length > 0);
    list(this.history, history, (change) => JSON.stringify(change), changeItem); // some happen within one millisecond
    this.showReload(status.reload);
  }

  showReload(reload) {
    setHidden(this.reload, reload === null);
    if (reload === null || reload.at === this.reloadAt) return;
    this.reloadAt = reload.at;
    this.reload.replaceChildren(
      h("h2", { text: t("reload") }),
      h("p", {}, h("span", { class: `badge ${reload.ok ? "good" : "bad"}`, text: t(reload.ok ? "reload.ok" : "reload.refused") }), ` ${time(reload.at)}`),
      h("ul", { class: "reasons" }, ...reload.reasons.map((text) => h("li", { text })), ...reload.needs_restart.map((text) => h("li", { text: t("reload.restart", { text }) })), ...reload.changed.map((text) => h("li", { text }))));
  }
}

function known(name) {
  return name === "none" ? "–" : name;
}

function errorRow(error) {
  const kind = error.outcome === "client_error" ? "info" : error.outcome === "rejected" ? "warn" : "bad";
  const why = error.reason && error.reason !== error.code ? ` · ${error.reason}` : "";
  return h("tr", {},
    h("td", { class: "nowrap", text: time(error.at) }), h("td", { text: known(error.tier) }), h("td", { text: known(error.backend) }),
    h("td", {}, h("span", { class: `badge ${kind}`, text: String(error.status) }), ` ${error.code ?? ""}${why} `, h("span", { class: "muted small", text: t(`outcome.${error.outcome}`) })),
    h("td", { class: "nowrap", text: duration(error.seconds) }), h("td", {}, h("code", { text: error.request_id })));
}

function changeItem(change) {
  const kind = change.cause === "guard" || change.cause === "exclusive" ? "warn" : change.is_rollback ? "bad" : "info";
  const name = change.is_rollback && change.cause === "operator" ? t("cause.rollback") : t(`cause.${change.cause}`);
  const moves = Object.entries(change.tiers);
  const by = [
    change.by ? t(change.by === "local" ? "history.local" : "history.by", { key: change.by }) : "",
    change.replica ? t("history.replica", { replica: change.replica }) : "",
  ].filter((text) => text !== "").join(", ");
  const lines = h("ul", {}, ...moves.slice(0, 10).map(([tier, move]) => h("li", { text: moveText(tier, move) })), moves.length > 10 ? h("li", { text: t("result.more", { count: moves.length - 10 }) }) : null);
  return h("li", {},
    h("div", { class: "head" }, h("time", { datetime: change.at, text: time(change.at) }), h("span", { class: `badge ${kind}`, text: name }), h("span", { class: "muted small", text: by })),
    lines, change.why ? h("p", { class: "muted", text: change.why }) : null);
}
