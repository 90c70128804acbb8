// States and results of the gateway in words.

import { count, percent } from "./format.js";
import { t } from "./i18n.js";

/** "ollama", or "ollama, 10 % on vllm". */
export function assignmentText({ backend, canary }) {
  return canary ? t("assignment.canary", { backend, canary: canary.backend, percent: percent(canary.percent) }) : backend;
}

/** The lines that tell what a change of the roll-out did. */
export function changeResult(answer) {
  const lines = [];
  const change = answer.changed ? answer.history[0] : null;
  if (change) {
    const moves = Object.entries(change.tiers);
    for (const [tier, move] of moves.slice(0, 5)) lines.push(moveText(tier, move));
    if (moves.length > 5) lines.push(t("result.more", { count: count(moves.length - 5) }));
    if (answer.moved > 0) lines.push(t("result.moved", { count: count(answer.moved) }));
  }
  for (const [tier, why] of Object.entries(answer.unmoved)) lines.push(t("result.unmoved", { tier, why }));
  if (answer.changed && !answer.persisted && !answer.shared) lines.push(t("result.unsaved"));
  if (answer.shared === false) lines.push(t("result.unshared"));
  return lines;
}

export function moveText(tier, move) {
  return t("move", { tier, from: assignmentText(move.from), to: assignmentText(move.to) });
}

/** The state of a server as [kind of badge, text]. */
export function serverState(server) {
  if (server.up === null) return ["info", t("server.unknown")];
  if (server.up === false || (server.circuit === "open" && !server.gets_requests)) return ["bad", t("server.down")];
  if (server.ejections.length > 0) return [server.gets_requests ? "warn" : "bad", t("server.ejected")];
  if (server.circuit !== "closed") return ["warn", t("server.suspect")];
  if (server.paused) return ["warn", t("server.paused")];
  return server.gets_requests ? ["good", t("server.serving")] : ["warn", t("server.idle")];
}

/** The state of a backend as [kind of badge, text]. */
export function backendState(backend) {
  if (backend.state === "sleeping") return ["info", t("backend.sleeping")];
  if (backend.state === "waking" || backend.state === "leaving") return ["warn", t(`backend.${backend.state}`)];
  if (backend.servers.length > 0 && backend.servers.every((server) => server.up === null)) return ["info", t("server.unknown")];
  if (!backend.up || backend.servers.length === 0) return ["bad", t("backend.down")];
  const states = backend.servers.map(serverState);
  const serving = states.filter(([kind]) => kind === "good").length;
  if (serving === states.length) return ["good", t("backend.up")];
  if (states.length === 1) return states[0];
  return [serving === 0 ? "bad" : "warn", t("backend.some", { serving, all: states.length })];
}

/** The class of a side's colour, the same wherever the backend appears. */
export function side(status, backend) {
  return `side-${Math.max(0, Object.keys(status.backends).indexOf(backend)) % 6}`;
}
