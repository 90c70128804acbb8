// A chat with a tier on two sides at once, to compare them before a switch.

import { events, open, reason } from "./api.js";
import { h, list, options, setClass, setHidden, setText } from "./dom.js";
import { duration, rate } from "./format.js";
import { t } from "./i18n.js";
import { side } from "./words.js";

export class TryView {
  constructor() {
    this.tier = h("select", { id: "try-tier", on: { change: () => this.restart() } });
    this.prompt = h("textarea", { id: "try-prompt", rows: 3, placeholder: t("try.placeholder"), on: { keydown: (event) => this.shortcut(event) } });
    this.tokens = h("input", { id: "try-tokens", type: "number", min: 1, max: 32768, value: 256, inputmode: "numeric" });
    this.send = h("button", { class: "primary", type: "submit", text: t("try.send") });
    this.stop = h("button", { type: "button", text: t("try.stop"), hidden: true, on: { click: () => this.abort() } });
    this.again = h("button", { class: "quiet", type: "button", text: t("try.restart"), on: { click: () => this.restart() } });
    this.sides = h("div", { class: "sides" });
    this.node = h("div", { class: "stack" },
      h("h2", { text: t("view.try") }), h("p", { class: "muted", text: t("try.note") }),
      h("form", { class: "card try", on: { submit: (event) => { event.preventDefault(); this.ask(); } } },
        h("div", { class: "row" },
          h("div", {}, h("label", { for: "try-tier", text: t("try.tier") }), this.tier),
          h("div", {}, h("label", { for: "try-tokens", text: t("try.tokens") }), this.tokens)),
        h("label", { for: "try-prompt", text: t("try.prompt") }), this.prompt,
        h("div", { class: "buttons" }, this.send, this.stop, this.again)),
      this.sides);
    this.panes = new Map();
    this.running = 0;
  }

  update({ status, phase }) {
    this.status = status;
    this.isLive = phase === "live";
    options(this.tier, Object.keys(status.tiers).map((name) => [name, name]));
    const tier = status.tiers[this.tier.value];
    const backends = tier ? Object.keys(tier.models) : [];
    list(this.sides, backends, (name) => `${this.tier.value} ${name}`, (name) => this.pane(name), (pane, name) => pane.update(status, tier, name));
    this.shown = backends.map((name) => this.panes.get(`${this.tier.value} ${name}`));
    this.draw();
  }

  pane(name) {
    const pane = new Pane(name);
    this.panes.set(`${this.tier.value} ${name}`, pane);
    return pane;
  }

  draw() {
    this.send.disabled = this.running > 0 || !this.isLive;
    setHidden(this.stop, this.running === 0);
  }

  shortcut(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.ask();
    }
  }

  abort() {
    for (const pane of this.shown) pane.controller?.abort();
  }

  restart() {
    this.abort();
    this.sides.keyed?.clear();
    this.sides.replaceChildren();
    this.panes.clear();
    this.update({ status: this.status, phase: this.isLive ? "live" : "lost" });
  }

  async ask() {
    const prompt = this.prompt.value.trim();
    if (prompt === "" || this.running > 0) return;
    this.prompt.value = "";
    const panes = this.shown.filter((pane) => pane.isChosen);
    this.running = panes.length;
    this.draw();
    await Promise.all(panes.map(async (pane) => {
      await pane.ask(this.tier.value, prompt, Number.parseInt(this.tokens.value, 10) || 256);
      this.running--;
      this.draw();
    }));
    this.prompt.focus();
  }
}

class Pane {
  constructor(backend) {
    this.backend = backend;
    this.messages = [];
    this.swatch = h("span", { "aria-hidden": "true" });
    this.model = h("span", { class: "model" });
    this.role = h("span", { class: "badge" });
    this.use = h("input", { type: "checkbox", checked: true, "aria-label": t("try.use", { backend }) });
    this.talk = h("div", { class: "talk", role: "log", "aria-label": t("try.talk", { backend }), tabindex: "0" });
    this.empty = h("p", { class: "empty", text: t("try.empty") });
    this.talk.append(this.empty);
    this.node = h("section", { class: "card pane", "aria-label": t("backend.named", { name: backend }) },
      h("div", { class: "head" }, this.use, this.swatch, h("h3", { text: backend }), this.role, this.model), this.talk);
  }

  get isChosen() {
    return this.use.checked;
  }

  update(status, tier, name) {
    setClass(this.swatch, `swatch ${side(status, name)}`);
    setText(this.model, tier.models[name]);
    const role = name === tier.active_backend ? "active" : name === tier.canary?.backend ? "canary" : "other";
    setClass(this.role, `badge ${role === "other" ? "info" : "good"}`);
    setText(this.role, t(`try.${role}`));
  }

  async ask(model, prompt, maxTokens) {
    this.empty.remove();
    const content = h("p", { class: "text" });
    const thinking = h("p", { class: "text" });
    const thought = h("details", { hidden: true }, h("summary", { text: t("try.reasoning") }), thinking);
    const facts = h("p", { class: "muted small", text: t("try.waiting") });
    this.talk.append(h("div", { class: "said" }, h("p", { class: "text", text: prompt })), h("div", { class: "answer", "aria-busy": "true" }, thought, content, facts));
    const answer = this.talk.lastElementChild;
    this.messages.push({ role: "user", content: prompt });
    this.controller = new AbortController();
    const began = performance.now();
    let first = null;
    let usage = null;
    let text = "";
    let served = this.backend;
    try {
      const body = { model, messages: this.messages, max_tokens: maxTokens, stream: true, stream_options: { include_usage: true } };
      const response = await open("POST", "ops/chat", { body, signal: this.controller.signal, more: { "x-gateway-backend": this.backend } });
      served = response.headers.get("x-gateway-backend") ?? served;
      for await (const [, data] of events(response)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        const delta = chunk.choices?.[0]?.delta ?? {};
        if (delta.reasoning) {
          first ??= performance.now();
          thinking.append(delta.reasoning);
          setHidden(thought, false);
        }
        if (delta.content) {
          first ??= performance.now();
          text += delta.content;
          content.append(delta.content);
          this.talk.scrollTop = this.talk.scrollHeight;
        }
      }
      this.messages.push({ role: "assistant", content: text });
      const seconds = (performance.now() - (first ?? began)) / 1000;
      const tokens = usage?.completion_tokens ?? 0;
      const speed = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
      setText(facts, t("try.facts", { first: duration(first === null ? null : (first - began) / 1000), tokens, speed: rate(speed) }) + (served === this.backend ? "" : ` · ${t("try.fallback", { backend: served })}`));
    } catch (error) {
      this.messages.pop();
      setClass(facts, "error small");
      setText(facts, this.controller.signal.aborted ? t("try.stopped") : t("failed.reason", { reason: error instanceof TypeError ? reason(error) : error.message }));
    } finally {
      answer.removeAttribute("aria-busy");
      this.talk.scrollTop = this.talk.scrollHeight;
    }
  }
}
