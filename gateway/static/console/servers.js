// The servers of each backend: state, load, models, and why one gets no requests; host names, replicas.

import { h, list, setClass, setHidden, setText } from "./dom.js";
import { count, time } from "./format.js";
import { t } from "./i18n.js";
import { ReplicasSection } from "./replicas.js";
import { backendState, serverState, side } from "./words.js";

const LATEST = ":latest"; // an Ollama reports `qwen3:latest` for what the settings may name `qwen3`

export class ServersView {
  constructor() {
    this.backends = h("div", { class: "stack" });
    this.replicas = new ReplicasSection();
    this.node = h("div", { class: "stack" }, h("h2", { text: t("view.servers") }), this.backends, this.replicas.node);
  }

  update({ status }) {
    list(this.backends, Object.entries(status.backends), ([name]) => name, ([name]) => new BackendSection(name), (section, [name, backend]) => section.update(status, name, backend));
    this.replicas.update(status);
  }
}

class BackendSection {
  constructor(name) {
    this.swatch = h("span", { "aria-hidden": "true" });
    this.badge = h("span");
    this.limits = h("p", { class: "muted small" });
    this.names = h("ul", { class: "names" });
    this.servers = h("div", { class: "cards" });
    this.leaving = h("ul", { class: "reasons" });
    this.node = h("section", { class: "card", "aria-label": t("backend.named", { name }) },
      h("div", { class: "head" }, this.swatch, h("h3", { text: name }), this.badge), this.limits, this.names, this.servers, this.leaving);
  }

  update(status, name, backend) {
    const [kind, text] = backendState(backend);
    setClass(this.badge, `badge ${kind}`);
    setText(this.badge, text);
    setClass(this.swatch, `swatch ${side(status, name)}`);
    const { limits } = backend;
    setText(this.limits, t("servers.limits", { kind: backend.kind, max: count(limits.max_concurrency), queue: count(limits.max_queue) }));
    list(this.servers, backend.servers, (server) => server.name, (server) => new ServerCard(server.name), (card, server) => card.update(server));
    list(this.names, backend.names, (found) => found.name, () => new HostName(), (row, found) => row.update(found));
    list(this.leaving, backend.leaving, (server) => server.name, () => h("li"), (node, server) => setText(node, t("servers.leaving", { name: server.name, running: count(server.running) })));
  }
}

class HostName {
  constructor() {
    this.badge = h("span");
    this.text = h("span");
    this.node = h("li", {}, this.badge, this.text);
  }

  update(found) {
    setClass(this.badge, `badge ${found.resolved ? "good" : "bad"}`);
    setText(this.badge, t(found.resolved ? "name.resolved" : "name.unresolved"));
    const parts = [t("name.servers", { name: found.name, servers: count(found.servers) })];
    if (found.ignored > 0) parts.push(t("name.ignored", { ignored: count(found.ignored) }));
    if (!found.resolved) parts.push(t(found.servers > 0 ? "name.kept" : "name.nothing", { failure: found.failure }));
    setText(this.text, parts.join(" "));
  }
}

class ServerCard {
  constructor(name) {
    this.badge = h("span");
    this.load = h("dd");
    this.connections = h("dd");
    this.models = h("ul", { class: "models" });
    this.noModels = h("p", { class: "muted small" });
    this.ejections = h("ul", { class: "reasons" });
    this.node = h("article", { class: "server", "aria-label": t("server.named", { name }) },
      h("div", { class: "head" }, h("h4", { text: name }), this.badge),
      h("dl", { class: "figures" }, h("div", {}, h("dt", { text: t("servers.running") }), this.load), h("div", {}, h("dt", { text: t("servers.connections") }), this.connections)),
      this.models, this.noModels, this.ejections);
  }

  update(server) {
    const [kind, text] = serverState(server);
    setClass(this.badge, `badge ${kind}`);
    setText(this.badge, text);
    setText(this.load, count(server.running));
    setText(this.connections, count(server.connections));
    const reported = new Set([...(server.models ?? []), ...Object.keys(server.model_slots), ...Object.keys(server.loads ?? {})]);
    const names = [...reported].filter((name) => !(name.endsWith(LATEST) && reported.has(name.slice(0, -LATEST.length))));
    setHidden(this.noModels, names.length > 0);
    setText(this.noModels, t(server.models === null ? "servers.models.unknown" : "servers.models.none"));
    list(this.models, names, (name) => name, (name) => new ModelRow(name), (row, name) => row.update(server, name));
    list(this.ejections, server.ejections, (ejection) => `${ejection.model} ${ejection.lane}`, () => h("li"), (node, ejection) => setText(node, ejectionText(ejection)));
  }
}

class ModelRow {
  constructor(name) {
    this.slots = h("span", { class: "numbers" });
    this.load = h("span", { class: "muted small" });
    this.node = h("li", {}, h("span", { class: "model", text: name }), this.load, this.slots);
  }

  update(server, name) {
    const slots = server.model_slots[name];
    const load = server.loads?.[name];
    setText(this.load, load ? t(`load.${load}`) : "");
    setText(this.slots, slots ? t(slots.learned ? "servers.slots.learned" : "servers.slots", { running: count(slots.running), limit: count(slots.limit) }) : "");
  }
}

function ejectionText(ejection) {
  const when = ejection.state === "trial" ? t("servers.trial") : t("servers.until", { time: time(ejection.until) });
  const only = ejection.gets_requests && ejection.state !== "trial" ? ` ${t("servers.only")}` : "";
  return `${t("servers.ejected", { model: ejection.model, lane: t(`lane.${ejection.lane}`), reason: ejection.reason })} ${when}${only}`;
}
