// The console: connection, access, navigation. The views are in modules of their own.

import { ActivityView } from "./activity.js";
import { call, key, reason } from "./api.js";
import { announce, h, list, setClass, setHidden, setText } from "./dom.js";
import { count, time } from "./format.js";
import { gate } from "./gate.js";
import { isSwitching, switchText } from "./gpu.js";
import { choose, language, LANGUAGES, t } from "./i18n.js";
import { KeysView } from "./keys.js";
import { OverviewView } from "./overview.js";
import { aloneText, isShared } from "./replicas.js";
import { ServersView } from "./servers.js";
import { Stream } from "./stream.js";
import { chooseTheme, theme, THEMES } from "./theme.js";
import { toast, toasts } from "./toast.js";
import { TryView } from "./try.js";
import { assignmentText, changeResult } from "./words.js";

const root = document.getElementById("app");
const VIEWS = { overview: OverviewView, servers: ServersView, activity: ActivityView, keys: KeysView, try: TryView };

class Console {
  constructor() {
    this.stream = new Stream(() => this.schedule());
    this.views = {};
    this.shown = null;
    this.phase = null;
    addEventListener("hashchange", () => this.navigate(true));
  }

  start() {
    root.replaceChildren(gate.loading());
    this.stream.start();
  }

  /** Draw once for all changes within one frame. A page in the background draws when it is seen. */
  schedule() {
    if (this.isScheduled) return;
    this.isScheduled = true;
    requestAnimationFrame(() => {
      this.isScheduled = false;
      this.draw();
    });
  }

  draw() {
    const { phase, status, message } = this.stream.state;
    const was = this.phase;
    this.phase = phase;
    if (phase === "locked" || phase === "forbidden") {
      if (was !== phase) this.lock(phase, message);
      return;
    }
    if (status === null) {
      if (was !== phase) root.replaceChildren(phase === "lost" ? gate.lost(() => this.stream.start()) : gate.loading());
      return;
    }
    if (!this.frame) this.build();
    this.drawFrame(was);
    this.views[this.shown]?.update(this.stream.state);
  }

  lock(phase, message) {
    const had = key.get() !== "";
    key.forget();
    this.frame = null;
    this.views = {};
    this.stream.state.status = this.stream.state.series = null;
    const view = phase === "locked" ? gate.login(had, (secret) => this.unlock(secret)) : gate.forbidden(message, () => this.stream.start());
    root.replaceChildren(view);
    view.querySelector("input, button")?.focus();
  }

  unlock(secret) {
    key.set(secret);
    this.stream.state.phase = "loading";
    this.phase = null;
    root.replaceChildren(gate.loading());
    this.stream.start();
  }

  build() {
    const select = (name, label, current, items, onChange) =>
      h("select", { class: "quiet", "aria-label": label, name, on: { change: (event) => onChange(event.target.value) } },
        ...Object.entries(items).map(([value, text]) => h("option", { value, text, selected: value === current })));
    this.links = Object.fromEntries(Object.keys(VIEWS).map((name) => [name, h("a", { href: `#${name}`, text: t(`view.${name}`) })]));
    this.links.keys.hidden = true;
    this.pill = h("span", { class: "pill" });
    this.version = h("span", { class: "version" });
    this.bannerText = h("p");
    this.banner = h("section", { class: "banner", "aria-label": t("phase.lost"), hidden: true }, this.bannerText);
    this.sentence = h("p", { class: "sentence" });
    this.notes = h("ul", { class: "notes" });
    this.gpuPhase = null;
    this.rollback = h("button", { class: "danger big", type: "button", on: { click: () => this.act("rollback", this.rollback) } });
    this.undo = h("button", { type: "button", text: t("action.undo"), on: { click: () => this.act("undo", this.undo) } });
    this.main = h("main", { id: "main", tabindex: "-1" });
    const signOut = h("button", { class: "quiet", type: "button", text: t("action.signout"), hidden: key.get() === "", on: { click: () => this.signOut() } });
    this.frame = h("div", { class: "frame" },
      h("a", { class: "skip", href: "#main", text: t("skip"), on: { click: (event) => { event.preventDefault(); this.main.focus(); } } }),
      h("header", { class: "top" },
        h("div", { class: "brand" }, h("img", { src: "console/icon.svg", alt: "", width: 28, height: 28 }),
          h("h1", { text: t("title") }), this.version, this.pill),
        h("nav", { "aria-label": t("nav") }, ...Object.values(this.links)),
        h("div", { class: "settings" },
          select("language", t("language"), language, LANGUAGES, choose),
          select("theme", t("theme"), theme(), Object.fromEntries(THEMES.map((name) => [name, t(`theme.${name}`)])), chooseTheme),
          signOut)),
      this.banner,
      h("section", { class: "rollbar", "aria-label": t("rollout") }, h("div", { class: "where" }, this.sentence, this.notes), h("div", { class: "buttons" }, this.undo, this.rollback)),
      this.main, toasts);
    root.replaceChildren(this.frame);
    this.navigate(false);
    this.findKeys();
  }

  drawFrame(was) {
    const { phase, status, since, updated } = this.stream.state;
    const live = phase === "live";
    const draining = status.ready.status === "draining";
    setText(this.version, status.version);
    setClass(this.pill, `pill ${live ? (draining ? "warn" : "good") : "bad"}`);
    setText(this.pill, t(live ? (draining ? "phase.draining" : "phase.live") : "phase.lost"));
    setHidden(this.banner, live);
    if (!live) setText(this.bannerText, t("lost.banner", { time: time(updated ?? since) }));
    setClass(this.frame, live ? "frame" : "frame stale");
    if (was && was !== phase) announce(t(live ? "phase.back" : "phase.lost"));
    setText(this.sentence, sentence(status));
    this.drawNotes(status);
    setText(this.rollback, t("action.rollback", { backend: status.rollout.rollback_to }));
    this.undo.disabled = !live || status.rollout.history.length === 0; // a rollback can always be tried
  }

  /** Below the sentence, whatever the view: a switch of the GPU, and what the replicas do not share. */
  drawNotes({ rollout, replicas }) {
    const { gpu, shared } = rollout;
    const notes = [];
    if (gpu !== null && isSwitching(gpu)) notes.push({ name: "gpu", kind: gpu.phase === "failed" ? "bad" : "warn", text: `${t("gpu")}: ${switchText(gpu)}` });
    if (replicas !== null && !isShared(replicas)) notes.push({ name: "replicas", kind: "bad", text: aloneText(replicas) });
    if (shared === false) notes.push({ name: "rollout", kind: "bad", text: t("replicas.unshared") });
    list(this.notes, notes, ({ name }) => name, () => h("li"), (node, { kind, text }) => {
      setClass(node, `note ${kind}`);
      setText(node, text);
    });
    const phase = gpu?.phase ?? null;
    if (this.gpuPhase !== null && phase !== null && phase !== this.gpuPhase) announce(`${t("gpu")}: ${t(`gpu.phase.${phase}`)}`);
    this.gpuPhase = phase;
  }

  navigate(isAsked) {
    if (!this.frame) return;
    const name = location.hash.slice(1);
    const wanted = Object.hasOwn(VIEWS, name) && !this.links[name].hidden ? name : "overview";
    for (const [other, link] of Object.entries(this.links)) {
      if (other === wanted) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (wanted === this.shown && this.main.firstChild) return;
    this.views[this.shown]?.leave?.();
    this.shown = wanted;
    this.links[wanted].scrollIntoView({ block: "nearest", inline: "nearest" }); // on a small phone not all links have room
    const view = (this.views[wanted] ??= new VIEWS[wanted](this.stream, () => this.schedule()));
    this.main.replaceChildren(view.node);
    document.title = `${t(`view.${wanted}`)} · ${t("title")}`;
    view.enter?.();
    view.update(this.stream.state);
    if (isAsked) {
      this.main.focus();
      scrollTo(0, 0);
    }
  }

  async act(action, button) {
    button.disabled = true;
    try {
      const answer = await call("POST", `ops/${action}`, { body: {} });
      const undo = answer.changed ? { text: t("action.undo"), run: () => this.act("undo", this.undo) } : null;
      toast(answer.changed ? "good" : "info", t(answer.changed ? `done.${action}` : "done.nothing"), changeResult(answer), undo);
    } catch (error) {
      toast("bad", t("failed"), [reason(error)]);
      if (error.status === 401) this.stream.start();
    } finally {
      button.disabled = false;
      button.focus();
      this.schedule();
    }
  }

  signOut() {
    key.forget();
    location.reload();
  }

  /** Show the view of the keys where the gateway has some. */
  async findKeys() {
    const found = await Promise.allSettled([call("GET", "ops/keys"), call("GET", "ops/usage?by=key")]);
    if (this.frame && found.some((result) => result.status === "fulfilled")) {
      this.links.keys.hidden = false;
      if (location.hash === "#keys") this.navigate(false);
    }
  }
}

function sentence(status) {
  const tiers = Object.entries(status.tiers).filter(([, tier]) => !tier.pinned);
  const places = new Map();
  for (const [name, tier] of tiers) {
    const text = assignmentText({ backend: tier.active_backend, canary: tier.canary });
    places.set(text, [...(places.get(text) ?? []), name]);
  }
  if (places.size === 0) return t("sentence.pinned");
  if (places.size === 1 && tiers.length > 1) return t("sentence.all", { place: [...places.keys()][0], count: count(tiers.length) });
  const named = (names) => (names.length <= 2 ? names.join(", ") : t("sentence.count", { count: count(names.length) }));
  return [...places].map(([place, names]) => t("sentence.some", { tiers: named(names), place })).join("  ·  ");
}

new Console().start();
