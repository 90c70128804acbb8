// What is shown before there is a status: loading, asking for the key, no access, no connection.

import { h } from "./dom.js";
import { t } from "./i18n.js";

function page(...children) {
  return h("main", { class: "gate" }, h("img", { src: "console/icon.svg", alt: "", width: 48, height: 48 }), h("h1", { text: t("title") }), ...children);
}

export const gate = {
  loading: () => page(h("p", { role: "status", class: "muted", text: t("loading") }), h("div", { class: "skeleton" }), h("div", { class: "skeleton short" })),

  lost: (retry) =>
    page(h("p", { role: "alert", text: t("lost.first") }), h("button", { class: "primary", type: "button", text: t("action.retry"), on: { click: retry } })),

  forbidden: (message, retry) =>
    page(h("p", { role: "alert", text: message }), h("button", { class: "primary", type: "button", text: t("action.retry"), on: { click: retry } })),

  /** Ask for the admin key; `wasRefused`: the last one was not accepted. */
  login: (wasRefused, unlock) => {
    const input = h("input", { id: "key", type: "password", autocomplete: "current-password", required: true, spellcheck: "false", "aria-describedby": "key-help" });
    if (wasRefused) input.setAttribute("aria-invalid", "true");
    const submit = (event) => {
      event.preventDefault();
      const secret = input.value.trim();
      if (/^[\x21-\x7e]+$/.test(secret)) unlock(secret);
      else input.setAttribute("aria-invalid", "true");
    };
    return page(
      wasRefused ? h("p", { class: "error", role: "alert", text: t("login.refused") }) : null,
      h("form", { on: { submit } },
        h("label", { for: "key", text: t("login.label") }), input,
        h("p", { id: "key-help", class: "muted", text: t("login.help") }),
        h("button", { class: "primary", type: "submit", text: t("login.submit") })));
  },
};
