// The overview: both sides, the roll-out's control, the course of the last minutes, and the tiers.

import { Charts } from "./charts.js";
import { h, list, setClass, setHidden, setText } from "./dom.js";
import { count, pair, percent, rate } from "./format.js";
import { GpuPanel } from "./gpu.js";
import { t } from "./i18n.js";
import { RolloutControl } from "./rollout.js";
import { backendState, side } from "./words.js";

const MANY_TIERS = 8;

export class OverviewView {
  constructor(stream) {
    this.control = new RolloutControl();
    this.charts = new Charts(stream);
    this.gpu = new GpuPanel();
    this.backends = h("div", { class: "cards" });
    this.filter = h("input", { type: "search", id: "tier-filter", placeholder: t("tiers.filter"), "aria-label": t("tiers.filter"), on: { input: () => this.update(this.last) } });
    this.noTier = h("p", { class: "empty", text: t("tiers.none"), hidden: true });
    this.tiers = h("div", { class: "tiers" });
    this.tierCount = h("span", { class: "muted" });
    this.node = h("div", { class: "overview" },
      h("div", { class: "wide" },
        this.gpu.node,
        h("section", { "aria-labelledby": "h-backends" }, h("h2", { id: "h-backends", text: t("backends") }), this.backends),
        this.charts.node),
      this.control.node,
      h("section", { class: "full", "aria-labelledby": "h-tiers" },
        h("div", { class: "head" }, h("h2", { id: "h-tiers", text: t("tiers") }), this.tierCount, this.filter),
        this.tiers, this.noTier));
  }

  update(state) {
    this.last = state;
    const { status } = state;
    this.gpu.update(status.rollout.gpu);
    list(this.backends, Object.entries(status.backends), ([name]) => name, ([name]) => new BackendCard(name), (card, [name, backend]) => card.update(status, name, backend));
    this.control.update(state);
    this.charts.update(state);
    const all = Object.entries(status.tiers);
    setHidden(this.filter, all.length < MANY_TIERS);
    const wanted = this.filter.value.trim().toLowerCase();
    const shown = wanted ? all.filter(([name, tier]) => [name, ...Object.values(tier.models)].some((text) => text.toLowerCase().includes(wanted))) : all;
    setText(this.tierCount, wanted ? t("tiers.shown", { shown: count(shown.length), all: count(all.length) }) : count(all.length));
    setHidden(this.noTier, shown.length > 0);
    list(this.tiers, shown, ([name]) => name, ([name]) => new TierCard(name, () => this.control.choose(name)), (card, [, tier]) => card.update(status, tier));
  }
}

function figure(label) {
  const value = h("dd");
  return { value, node: h("div", {}, h("dt", { text: label }), value) };
}

class BackendCard {
  constructor(name) {
    this.badge = h("span", { class: "badge" });
    this.swatch = h("span", { class: "swatch", "aria-hidden": "true" });
    this.kind = h("span", { class: "muted" });
    this.lanes = h("ul", { class: "lanes" });
    const names = ["tokens", "requests", "errors", "first", "gap"];
    this.figures = Object.fromEntries(names.map((key) => [key, figure(t(`figure.${key}`))]));
    this.node = h("article", { class: "card backend", "aria-label": t("backend.named", { name }) },
      h("div", { class: "head" }, this.swatch, h("h3", { text: name }), this.kind, this.badge),
      h("dl", { class: "figures" }, ...names.map((key) => this.figures[key].node)),
      this.lanes);
  }

  update(status, name, backend) {
    const [kind, text] = backendState(backend);
    setClass(this.badge, `badge ${kind}`);
    setText(this.badge, text);
    setClass(this.swatch, `swatch ${side(status, name)}`);
    setText(this.kind, backend.kind === name ? "" : backend.kind);
    const { live } = backend;
    setText(this.figures.tokens.value, rate(live.tokens));
    setText(this.figures.requests.value, rate(live.requests));
    setText(this.figures.errors.value, rate(live.errors));
    setClass(this.figures.errors.value, live.errors > 0 ? "bad" : "");
    setText(this.figures.first.value, pair(live.time_to_first_token_p50, live.time_to_first_token_p95));
    setText(this.figures.gap.value, pair(live.inter_token_latency_p50, live.inter_token_latency_p95));
    const lanes = Object.keys(backend.running).filter((lane) => lane === "text" || backend.running[lane] || backend.waiting[lane]);
    const { limits, servers } = backend;
    list(this.lanes, lanes, (lane) => lane, (lane) => new LaneRow(lane),
      (row, lane) => row.update(backend.running[lane], backend.waiting[lane], laneLimit(limits, lane) * servers.length));
  }
}

function laneLimit(limits, lane) {
  return lane === "vision" ? Math.min(limits.vision_concurrency ?? limits.max_concurrency, limits.max_concurrency) : limits.max_concurrency;
}


class LaneRow {
  constructor(lane) {
    this.lane = lane;
    this.text = h("span", { class: "numbers" });
    this.bar = h("span");
    this.node = h("li", {}, h("span", { text: t(`lane.${lane}`) }), h("span", { class: "meter", "aria-hidden": "true" }, this.bar), this.text);
  }

  update(running, waiting, limit) {
    setText(this.text, t("lane.numbers", { running: count(running), waiting: count(waiting) }));
    this.bar.style.width = `${Math.min(100, limit ? (100 * running) / limit : 0)}%`;
    setClass(this.bar, waiting > 0 ? "full" : "");
    setClass(this.node, waiting > 0 ? "busy" : "");
  }
}

class TierCard {
  constructor(name, choose) {
    this.badge = h("span", { class: "badge warn" });
    this.split = h("div", { class: "split", "aria-hidden": "true" });
    this.guard = h("p", { class: "guard", hidden: true });
    this.change = h("button", { class: "quiet", type: "button", text: t("action.change"), "aria-label": t("action.change.named", { name }), on: { click: choose } });
    this.body = h("tbody");
    this.node = h("article", { class: "card tier", "aria-label": t("tier.named", { name }) },
      h("div", { class: "head" }, h("h3", { text: name }), this.badge, this.change),
      this.split,
      h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": t("tier.figures", { name }) },
        h("table", {},
          h("thead", {}, h("tr", {}, ...["backend", "share", "column.requests", "column.tokens", "column.first", "column.gap"].map((key) => h("th", { scope: "col", text: t(key) })))),
          this.body)),
      this.guard);
  }

  update(status, tier) {
    const parts = shares(tier);
    setHidden(this.badge, !tier.pinned && !tier.guard);
    setClass(this.badge, `badge ${tier.pinned ? "info" : "warn"}`);
    setText(this.badge, tier.pinned ? t("tier.pinned") : t("tier.watched"));
    setHidden(this.change, tier.pinned);
    list(this.split, parts.filter((part) => part.share > 0), (part) => part.backend, () => h("span"), (node, part) => {
      setClass(node, side(status, part.backend));
      node.style.flexGrow = String(part.share);
    });
    list(this.body, parts, (part) => part.backend, (part) => new SideRow(part.backend), (row, part) => row.update(status, tier, part));
    setHidden(this.guard, !tier.guard);
    if (tier.guard) setText(this.guard, guardText(tier.guard));
  }
}

function shares(tier) {
  const canary = tier.canary?.percent ?? 0;
  return Object.keys(tier.models).map((backend) => ({
    backend,
    share: backend === tier.active_backend ? 100 - canary : backend === tier.canary?.backend ? canary : 0,
  }));
}

class SideRow {
  constructor(backend) {
    this.swatch = h("span", { class: "swatch", "aria-hidden": "true" });
    this.model = h("span", { class: "model" });
    this.share = h("span");
    this.measured = h("span", { class: "model" });
    this.cells = Array.from({ length: 4 }, () => h("td"));
    this.node = h("tr", {}, h("th", { scope: "row" }, this.swatch, h("span", { class: "name", text: backend }), this.model), h("td", {}, this.share, this.measured), ...this.cells);
  }

  update(status, tier, { backend, share }) {
    const live = tier.live[backend];
    setClass(this.node, share > 0 ? "" : "unused");
    setClass(this.swatch, `swatch ${side(status, backend)}`);
    setText(this.model, tier.models[backend]);
    const counted = tier.share?.percent;
    const measured = counted === null || counted === undefined ? null : backend === tier.canary?.backend ? counted : 100 - counted;
    setText(this.share, percent(share));
    setText(this.measured, measured === null || share === 0 ? "" : t("tier.measured", { measured: percent(Math.round(measured * 10) / 10) }));
    const [requests, tokens, first, gap] = this.cells;
    setText(requests, rate(live.requests));
    setText(tokens, rate(live.tokens));
    setText(first, pair(live.time_to_first_token_p50, live.time_to_first_token_p95));
    setText(gap, pair(live.inter_token_latency_p50, live.inter_token_latency_p95));
  }
}

function guardText(guard) {
  const [name, rule] = Object.entries(guard.rules).reduce((worst, item) => (item[1].evidence > worst[1].evidence ? item : worst));
  return t("tier.guard", {
    tested: guard.tested, other: guard.other, rule: t(`rule.${name}`),
    evidence: rate(rule.evidence), needed: rate(guard.needed), requests: count(rule.tested.requests),
  });
}
