// Results of actions. They stay until they are dismissed or the next one comes.

import { h } from "./dom.js";
import { t } from "./i18n.js";

export const toasts = h("div", { class: "toasts", role: "status", "aria-live": "polite" });

/** Show a result; `action` is a further button with `text` and `run`. */
export function toast(kind, title, lines, action = null) {
  const close = () => node.remove();
  const node = h("div", { class: `toast ${kind}` },
    h("div", {}, h("strong", { text: title }), ...lines.map((text) => h("p", { text }))),
    h("div", { class: "buttons" },
      action ? h("button", { type: "button", text: action.text, on: { click: () => { close(); action.run(); } } }) : null,
      h("button", { class: "quiet", type: "button", text: t("action.dismiss"), on: { click: close } })));
  toasts.replaceChildren(node);
}
