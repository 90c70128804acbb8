// The replicas: the processes on this machine, and those that share limits through Redis.

import { h, list, setClass, setHidden, setText } from "./dom.js";
import { count, time } from "./format.js";
import { t } from "./i18n.js";

/** Whether the replica shares with others, as far as it is meant to. */
export function isShared(replicas) {
  return replicas.up && replicas.sharing === replicas.replicas;
}

/** Since when the replica is alone, and with which part of the limits. */
export function aloneText(replicas) {
  if (replicas.up) return t("replicas.joining", { redis: replicas.redis });
  return t("replicas.alone", { redis: replicas.redis, time: time(replicas.since * 1000), reason: replicas.reason ?? t("replicas.unconnected"), replicas: count(replicas.replicas) });
}

export class ReplicasSection {
  constructor() {
    this.processes = new Processes();
    this.shared = new Shared();
    this.node = h("section", { class: "card", "aria-labelledby": "h-replicas" },
      h("h3", { id: "h-replicas", text: t("replicas") }), this.processes.node, this.shared.node);
  }

  update({ processes, replicas, rollout }) {
    setHidden(this.node, processes === null && replicas === null);
    setHidden(this.processes.node, processes === null);
    setHidden(this.shared.node, replicas === null);
    if (processes !== null) this.processes.update(processes);
    if (replicas !== null) this.shared.update(replicas, rollout.shared, processes !== null);
  }
}

class Processes {
  constructor() {
    this.head = h("tr");
    this.body = h("tbody");
    this.node = h("div", { class: "part" },
      h("p", { class: "muted small", text: t("replicas.processes.note") }),
      h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": t("replicas.processes") }, h("table", {}, h("thead", {}, this.head), this.body)));
  }

  update(processes) {
    const backends = Object.keys(processes[0].running);
    const columns = [t("replicas.number"), t("replicas.pid"), t("replicas.state"), ...backends];
    list(this.head, columns.map((text, place) => ({ text, place })), ({ text, place }) => `${place} ${text}`, ({ text }) => h("th", { scope: "col", text }));
    list(this.body, processes, (process) => `${process.replica} ${backends.join(" ")}`, () => new ProcessRow(backends), (row, process) => row.update(process));
  }
}

const PROCESS_KINDS = { ready: "good", starting: "info", draining: "warn" };

class ProcessRow {
  constructor(backends) {
    this.number = h("th", { scope: "row" });
    this.pid = h("td");
    this.badge = h("span");
    this.cells = backends.map((backend) => ({ backend, node: h("td", { class: "nowrap" }) }));
    this.node = h("tr", {}, this.number, this.pid, h("td", {}, this.badge), ...this.cells.map(({ node }) => node));
  }

  update(process) {
    setText(this.number, String(process.replica));
    setText(this.pid, String(process.pid));
    setClass(this.badge, `badge ${PROCESS_KINDS[process.status] ?? "info"}`);
    setText(this.badge, t(`ready.${process.status}`));
    for (const { backend, node } of this.cells) {
      setText(node, t("lane.numbers", { running: count(process.running[backend] ?? 0), waiting: count(process.waiting[backend] ?? 0) }));
    }
  }
}

class Shared {
  constructor() {
    this.badge = h("span");
    this.text = h("p");
    this.unshared = h("p", { class: "error", text: t("replicas.unshared") });
    this.note = h("p", { class: "muted small" });
    this.limits = h("tbody");
    const columns = ["limit", "all", "share", "used"];
    this.table = h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": t("replicas.limits") },
      h("table", {}, h("thead", {}, h("tr", {}, ...columns.map((name) => h("th", { scope: "col", text: t(`replicas.column.${name}`) })))), this.limits));
    this.node = h("div", { class: "part" }, h("div", { class: "head" }, this.text, this.badge), this.unshared, this.note, this.table);
  }

  update(replicas, rolloutIsShared, hasProcesses) {
    const shared = isShared(replicas);
    setClass(this.badge, `badge ${shared ? "good" : "bad"}`);
    setText(this.badge, t(shared ? "replicas.up" : "replicas.down"));
    setText(this.text, shared ? t("replicas.shared", { count: count(replicas.replicas), redis: replicas.redis }) : aloneText(replicas));
    setHidden(this.unshared, rolloutIsShared !== false);
    setText(this.note, t(hasProcesses ? "replicas.note.machine" : "replicas.note", { replica: replicas.replica }));
    setHidden(this.table, replicas.limits.length === 0);
    list(this.limits, replicas.limits, (limit) => limit.name, (limit) => new LimitRow(limit.name), (row, limit) => row.update(limit));
  }
}

class LimitRow {
  constructor(name) {
    this.cells = Array.from({ length: 3 }, () => h("td"));
    this.node = h("tr", {}, h("th", { scope: "row" }, h("span", { class: "model", text: name })), ...this.cells);
  }

  update({ limit, share, running }) {
    [limit, share, running].forEach((value, place) => setText(this.cells[place], count(value)));
  }
}
