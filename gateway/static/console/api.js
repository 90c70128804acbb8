// Calls of the gateway, with the admin key. The key lives as long as the browser's tab.

import { t } from "./i18n.js";

const KEY = "gateway-admin-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** The base address: that of the gateway, whatever path a proxy puts in front of it. */
export const BASE = new URL("..", document.baseURI);

/** An answer other than success. */
export class Refused extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function headers(more = {}) {
  const secret = key.get();
  return secret ? { ...more, authorization: `Bearer ${secret}` } : more;
}

/** Call the gateway and return the response. Throws `Refused`, or a TypeError if it cannot be reached. */
export async function open(method, path, { body, signal, more } = {}) {
  const sent = headers({ ...more, ...(body === undefined ? {} : { "content-type": "application/json" }) });
  const response = await fetch(new URL(path, BASE), {
    method, headers: sent, signal, cache: "no-store", credentials: "omit", redirect: "error",
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (response.ok) return response;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // not the gateway's own answer: a proxy in between
  }
  throw new Refused(response.status, typeof error.message === "string" ? error.message : t("error.status", { status: response.status }), error.code);
}

export async function call(method, path, settings) {
  return (await open(method, path, settings)).json();
}

/** What went wrong, in words. */
export function reason(error) {
  return error instanceof Refused ? error.message : t("error.unreachable");
}

/** Yield the server-sent events of a response as [name, text]; `onBytes` is called with each piece. */
export async function* events(response, onBytes = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onBytes();
      rest += value;
      let end;
      while ((end = rest.indexOf("\n\n")) >= 0) {
        const event = rest.slice(0, end);
        rest = rest.slice(end + 2);
        let name = "message";
        let data = "";
        for (const line of event.split("\n")) {
          if (line.startsWith("event: ")) name = line.slice(7);
          else if (line.startsWith("data: ")) data += line.slice(6);
        }
        if (data) yield [name, data];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Apply a JSON Patch (RFC 6902) with `add`, `remove` and `replace` to `root`, and return it. */
export function patched(root, patch) {
  for (const { op, path, value } of patch) {
    const tokens = path.split("/").slice(1).map((token) => token.replaceAll("~1", "/").replaceAll("~0", "~"));
    const last = tokens.pop();
    if (last === undefined) {
      root = value;
      continue;
    }
    let parent = root;
    for (const token of tokens) parent = parent[token];
    if (op === "remove") delete parent[last];
    else Object.defineProperty(parent, last, { value, writable: true, enumerable: true, configurable: true });
  }
  return root;
}
