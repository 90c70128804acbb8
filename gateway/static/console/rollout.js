// The control of the roll-out: where tiers go, the canary's share, the check before and the result after.

import { call, reason } from "./api.js";
import { h, list, options, setClass, setHidden, setText } from "./dom.js";
import { count, duration, percent } from "./format.js";
import { t } from "./i18n.js";
import { assignmentText, changeResult, side } from "./words.js";

const CHECK_SECONDS = 30;
const KEEP = ""; // no backend: each tier stays where it is, beside a canary
const SEVERITIES = ["breaks", "notices", "note", "fine"];

export class RolloutControl {
  constructor() {
    this.scope = h("select", { id: "scope", on: { change: () => this.reset() } });
    this.now = h("p", { class: "now" });
    this.backends = h("div", { class: "choices" });
    this.canary = h("select", { id: "canary-backend", on: { change: () => this.edit() } });
    this.range = h("input", { id: "canary", type: "range", min: 0, max: 100, step: 1, value: 0, on: { input: () => this.slide(this.range) } });
    this.exact = h("input", { id: "canary-exact", type: "number", min: 0, max: 100, step: 0.01, value: 0, inputmode: "decimal", "aria-label": t("control.exact"), on: { input: () => this.slide(this.exact) } });
    this.canaryRow = h("div", { class: "canary" },
      h("div", { class: "head" }, h("label", { for: "canary", text: t("control.canary") }),
        h("label", { for: "canary-backend", class: "visually-hidden", text: t("control.canary.backend") }), this.canary),
      h("div", { class: "slider" }, this.range, this.exact, h("span", { text: "%", "aria-hidden": "true" })));
    this.split = h("div", { class: "split", "aria-hidden": "true" });
    this.preview = h("p", { class: "preview", "aria-live": "polite" });
    this.oneGpu = h("p", { class: "muted small", text: t("control.gpu"), hidden: true });
    this.apply = h("button", { class: "primary", type: "submit", text: t("control.review") });
    this.cancel = h("button", { type: "button", text: t("action.reset"), on: { click: () => this.reset() } });
    this.heading = h("h2", { id: "h-control", text: t("control") });
    this.form = h("form", { on: { submit: (event) => { event.preventDefault(); this.review(); } } },
      h("label", { for: "scope", text: t("control.scope") }), this.scope, this.now,
      h("fieldset", {}, h("legend", { text: t("control.backend") }), this.backends),
      this.canaryRow, this.split, this.preview, this.oneGpu,
      h("div", { class: "buttons" }, this.apply, this.cancel));
    this.dialog = new ChangeDialog();
    // The wrapper is as tall as its row, within which the card stays in sight.
    this.node = h("div", { class: "side" }, h("section", { class: "card control", "aria-labelledby": "h-control" }, this.heading, this.form), this.dialog.node);
    this.isEdited = false;
    this.order = { backend: "", canary: "", percent: 0 };
  }

  /** Change one tier: the button of its card. */
  choose(tier) {
    this.scope.value = `.${tier}`;
    this.reset();
    this.node.scrollIntoView({ block: "start" });
    this.scope.focus({ preventScroll: true });
  }

  update({ status, phase }) {
    this.status = status;
    const free = Object.entries(status.tiers).filter(([, tier]) => !tier.pinned);
    options(this.scope, [["", t("control.all", { count: count(free.length) })], ...free.map(([name]) => [`.${name}`, name])]);
    this.isLive = phase === "live";
    this.tiers = this.scope.value === "" ? free : free.filter(([name]) => `.${name}` === this.scope.value);
    const assignments = this.tiers.map(([, tier]) => ({ backend: tier.active_backend, canary: tier.canary }));
    this.current = assignments.length > 0 && assignments.every((item) => sameAssignment(item, assignments[0])) ? assignments[0] : null;
    this.choices = Object.keys(status.backends).filter((name) => this.tiers.every(([, tier]) => Object.hasOwn(tier.models, name)));
    setText(this.now, assignments.length === 0 ? t("sentence.pinned") : this.current ? t("control.now", { place: assignmentText(this.current) }) : t("control.differ"));
    setHidden(this.oneGpu, status.rollout.gpu === null);
    if (!this.isEdited) this.follow();
    this.draw();
  }

  /** Take over what is in force. */
  follow() {
    const backend = this.current?.backend ?? KEEP;
    const canary = this.current?.canary;
    this.order = { backend, canary: canary?.backend ?? this.beside(backend), percent: canary?.percent ?? 0 };
    this.range.value = this.exact.value = String(this.order.percent);
  }

  /** The backend that a new canary beside `backend` would be on. */
  beside(backend) {
    const others = this.choices.filter((name) => name !== backend);
    return others.find((name) => name !== this.status.rollout.rollback_to) ?? others[0] ?? "";
  }

  reset() {
    this.isEdited = false;
    this.update({ status: this.status, phase: this.isLive ? "live" : "lost" });
  }

  edit() {
    this.isEdited = true;
    const { order } = this;
    if (this.canary.value) order.canary = this.canary.value;
    if (order.canary === order.backend) order.canary = this.beside(order.backend);
    this.draw();
  }

  slide(input) {
    const value = Math.min(100, Math.max(0, Number.parseFloat(input.value) || 0));
    this.order.percent = Math.round(value * 100) / 100;
    for (const other of [this.range, this.exact]) if (other !== input) other.value = String(this.order.percent);
    this.edit();
  }

  pick(backend) {
    const { order } = this;
    if (order.backend === backend) return;
    if (order.canary === backend) order.canary = order.backend;
    order.backend = backend;
    order.percent = 0;
    this.range.value = this.exact.value = "0";
    this.canary.value = "";
    this.edit();
  }

  draw() {
    const { order, status } = this;
    const choices = this.current === null && this.tiers.length > 0 ? [KEEP, ...this.choices] : this.choices;
    list(this.backends, choices, (name) => name, (name) => new Choice(name, () => this.pick(name)), (choice, name) => choice.update(status, name, order.backend));
    const others = this.choices.filter((name) => name !== order.backend);
    options(this.canary, others.map((name) => [name, name]));
    if (this.canary.value !== order.canary) this.canary.value = order.canary;
    setHidden(this.canaryRow, others.length === 0);
    setHidden(this.canary, others.length < 2);
    const share = others.length ? order.percent : 0;
    const parts = order.backend === KEEP ? [] : [[order.backend, 100 - share], [order.canary, share]].filter(([, part]) => part > 0);
    list(this.split, parts, ([name]) => name, () => h("span"), (node, [name, part]) => {
      setClass(node, side(status, name));
      node.style.flexGrow = String(part);
    });
    const wanted = this.wanted();
    const isNew = wanted !== null && (this.current === null || !sameAssignment(wanted, this.current));
    setText(this.preview, wanted === null ? t("control.pick") : isNew ? t("control.preview", { place: placeText(wanted) }) : t("control.same"));
    this.apply.disabled = !isNew || !this.isLive;
    this.range.setAttribute("aria-valuetext", t("control.value", { percent: percent(order.percent), backend: order.canary }));
    setHidden(this.cancel, !this.isEdited);
  }

  wanted() {
    const { backend, canary, percent: share } = this.order;
    if (backend === KEEP && (share === 0 || canary === "")) return null;
    return { backend, canary: share > 0 && canary !== "" ? { backend: canary, percent: share } : null };
  }

  review() {
    const wanted = this.wanted();
    const tier = this.scope.value === "" ? null : this.scope.value.slice(1);
    const serves = (name) => this.current !== null && (this.current.backend === name || this.current.canary?.backend === name);
    const target = [wanted.canary?.backend, wanted.backend].find((name) => name && name !== KEEP && !serves(name) && name !== this.status.rollout.rollback_to) ?? null;
    const body = { ...(wanted.backend === KEEP ? {} : { backend: wanted.backend }), ...(wanted.canary ? { canary: wanted.canary } : {}), ...(tier ? { tier } : {}) };
    this.dialog.open({ body, target, tier, wanted, from: this.current, onDone: () => { this.isEdited = false; } });
  }
}

function placeText(wanted) {
  if (wanted.backend !== KEEP) return assignmentText(wanted);
  return t("control.keep.canary", { percent: percent(wanted.canary.percent), backend: wanted.canary.backend });
}

function sameAssignment(one, other) {
  return one.backend === other.backend && one.canary?.backend === other.canary?.backend && one.canary?.percent === other.canary?.percent;
}

class Choice {
  constructor(name, pick) {
    this.input = h("input", { type: "radio", name: "backend", value: name, on: { change: pick } });
    this.swatch = h("span", { class: "swatch", "aria-hidden": "true" });
    this.node = h("label", { class: "choice" }, this.input, this.swatch, h("span", { text: name === KEEP ? t("control.keep") : name }));
  }

  update(status, name, chosen) {
    this.input.checked = name === chosen;
    setHidden(this.swatch, name === KEEP);
    setClass(this.swatch, `swatch ${side(status, name)}`);
  }
}

/** Shows what a change would break, makes it, and shows the result. */
class ChangeDialog {
  constructor() {
    this.title = h("h2", { id: "h-change" });
    this.what = h("p", { class: "what" });
    this.body = h("div", { class: "findings", "aria-live": "polite" });
    this.yes = h("button", { class: "primary", type: "button", on: { click: () => this.run() } });
    this.no = h("button", { type: "button", on: { click: () => this.node.close() } });
    this.node = h("dialog", { "aria-labelledby": "h-change", on: { close: () => this.controller?.abort() } }, this.title, this.what, this.body, h("div", { class: "buttons" }, this.yes, this.no));
  }

  open(change) {
    this.change = change;
    this.controller?.abort();
    this.controller = new AbortController();
    setText(this.title, t("change.title"));
    setText(this.what, t("change.what", { scope: change.tier ?? t("change.all"), place: placeText(change.wanted) }));
    setText(this.no, t("action.cancel"));
    setHidden(this.yes, false);
    setClass(this.yes, "primary");
    setText(this.yes, t("change.apply"));
    this.yes.disabled = false;
    this.body.replaceChildren(h("p", { class: "muted", text: t("change.unchecked") }));
    this.node.showModal();
    if (change.target === null) this.yes.focus();
    else this.check();
  }

  async check() {
    const { target, tier } = this.change;
    const { signal } = this.controller;
    setText(this.yes, t("change.skip"));
    setClass(this.yes, "");
    this.body.replaceChildren(h("p", { class: "busy", text: t("change.checking", { backend: target, seconds: CHECK_SECONDS }) }), h("progress", { "aria-label": t("change.checking.label") }));
    const query = new URLSearchParams({ backend: target, seconds: String(CHECK_SECONDS), ...(tier ? { tier } : {}) });
    try {
      const answer = await call("POST", `ops/preflight?${query}`, { signal });
      setClass(this.yes, answer.breaks ? "danger" : "primary");
      setText(this.yes, t(answer.breaks ? "change.anyway" : "change.apply"));
      this.body.replaceChildren(...findings(answer));
    } catch (error) {
      if (signal.aborted) return;
      setClass(this.yes, "danger");
      setText(this.yes, t("change.anyway"));
      this.body.replaceChildren(h("p", { class: "error", text: t("change.uncheckable", { reason: reason(error) }) }));
    }
  }

  async run() {
    this.controller.abort();
    this.yes.disabled = true;
    try {
      const answer = await call("PUT", "ops/rollout", { body: this.change.body });
      this.change.onDone();
      setText(this.title, t(answer.changed ? "change.done" : "done.nothing"));
      this.body.replaceChildren(h("ul", { class: "result" }, ...changeResult(answer).map((text) => h("li", { text }))));
      setHidden(this.yes, true);
      setText(this.no, t("action.close"));
      this.no.focus();
    } catch (error) {
      this.yes.disabled = false;
      this.body.replaceChildren(h("p", { class: "error", role: "alert", text: t("change.failed", { reason: reason(error) }) }));
    }
  }
}

/** The findings of a preflight check, the most severe first; those as good as before are counted. */
function findings(answer) {
  const known = new Map();
  for (const item of answer.findings) {
    if (!item.words) continue;
    const key = `${item.severity} ${item.words}`;
    if (!known.has(key)) known.set(key, { ...item, tiers: [] });
    if (item.tier !== null) known.get(key).tiers.push(item.tier);
  }
  const rows = [...known.values()].sort((one, other) => SEVERITIES.indexOf(one.severity) - SEVERITIES.indexOf(other.severity));
  const fine = answer.findings.filter((item) => item.severity === "fine").length;
  return [
    h("p", { class: `verdict ${answer.breaks ? "bad" : "good"}`, text: t(answer.breaks ? "change.breaks" : "change.fine", { backend: answer.backend }) }),
    h("ul", { class: "checks" }, ...rows.map((item) =>
      h("li", {}, h("span", { class: `badge ${{ breaks: "bad", notices: "warn", note: "info", fine: "good" }[item.severity]}`, text: t(`severity.${item.severity}`) }),
        h("span", {}, item.tiers.length ? h("strong", { text: `${item.tiers.join(", ")}: ` }) : null, item.words)))),
    h("p", { class: "muted small", text: t("change.rest", { count: count(fine), time: duration(answer.seconds) }) }),
  ];
}
