// A GPU that holds one engine at a time: which one has it, the phases of a switch, what a rollback takes.

import { h, list, setClass, setHidden, setText } from "./dom.js";
import { count, time } from "./format.js";
import { t } from "./i18n.js";

const PHASES = ["draining", "freeing", "waking", "ready"];

export function isSwitching(gpu) {
  return gpu.phase !== "ready";
}

/** "Waking up: ollama → vllm, for 12 s, about 30 s left", or that no engine could be woken. */
export function switchText(gpu) {
  return `${t(`gpu.phase.${gpu.phase}`)}: ${progressText(gpu)}`;
}

function progressText(gpu) {
  const move = gpu.to === null ? "" : gpu.from === null ? gpu.to : t("gpu.move", { from: gpu.from, to: gpu.to });
  const parts = [move, t("gpu.elapsed", { seconds: count(Math.floor(gpu.seconds)) })];
  if (gpu.expected_seconds !== null) parts.push(t("gpu.left", { seconds: count(Math.ceil(gpu.expected_seconds)) }));
  return parts.filter((part) => part !== "").join(", ");
}

export class GpuPanel {
  constructor() {
    this.badge = h("span");
    this.text = h("p");
    this.phases = h("ol", { class: "phases", "aria-label": t("gpu.phases") });
    this.running = h("dd");
    this.waiting = h("dd");
    this.figures = h("dl", { class: "figures" },
      h("div", {}, h("dt", { text: t("gpu.running") }), this.running), h("div", {}, h("dt", { text: t("gpu.waiting") }), this.waiting));
    this.rollback = h("p", { class: "muted small" });
    this.last = h("p", { class: "error small" });
    this.node = h("section", { "aria-labelledby": "h-gpu" },
      h("h2", { id: "h-gpu", text: t("gpu") }),
      h("div", { class: "card gpu" }, h("div", { class: "head" }, this.text, this.badge), this.phases, this.figures, this.last, this.rollback));
  }

  update(gpu) {
    setHidden(this.node, gpu === null);
    if (gpu === null) return;
    const switching = isSwitching(gpu);
    const kind = gpu.phase === "failed" ? "bad" : switching ? "warn" : "good";
    setClass(this.badge, `badge ${kind}`);
    setText(this.badge, t(`gpu.phase.${gpu.phase}`));
    setText(this.text, switching ? progressText(gpu) : t("gpu.has", { backend: gpu.holder ?? "–", time: time(gpu.since) }));
    const at = PHASES.indexOf(gpu.phase);
    setHidden(this.phases, !switching || at < 0);
    list(this.phases, PHASES, (phase) => phase, (phase) => h("li", { text: t(`gpu.phase.${phase}`) }), (node, phase) => {
      const place = PHASES.indexOf(phase);
      setClass(node, place < at ? "done" : place === at ? "now" : "");
      if (place === at) node.setAttribute("aria-current", "step");
      else node.removeAttribute("aria-current");
    });
    setHidden(this.figures, !switching);
    setText(this.running, count(gpu.running));
    setText(this.waiting, count(gpu.waiting));
    setText(this.last, lastText(gpu.last));
    setHidden(this.last, this.last.textContent === "");
    setText(this.rollback, rollbackText(gpu));
    setHidden(this.rollback, this.rollback.textContent === "");
  }
}

/** The last switch, if it did not lead where it should. */
function lastText(last) {
  if (last === null || last.outcome === "done") return "";
  const text = t(`gpu.last.${last.outcome}`, { to: last.to, time: time(last.at) });
  return last.why ? `${text} ${last.why}` : text;
}

function rollbackText({ rollback, holder }) {
  if (rollback.basis === "none") return holder === rollback.to ? "" : t("gpu.rollback.none", { backend: rollback.to });
  if (rollback.seconds === null) return t("gpu.rollback.unknown", { backend: rollback.to });
  return t(`gpu.rollback.${rollback.basis}`, { backend: rollback.to, seconds: count(Math.ceil(rollback.seconds)) });
}
