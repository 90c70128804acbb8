// Elements built from text alone: no string ever becomes HTML.

/** Create an element. Props: `class`, `text`, `on` (listeners), `dataset`, and attributes. */
export function h(tag, props = {}, ...children) {
  const node = tag === "svg" || tag === "path" ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.setAttribute("class", value);
    else if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "dataset") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Set the text if it differs, so that nothing is drawn or announced anew. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setClass(node, name) {
  if (node.getAttribute("class") !== name) node.setAttribute("class", name);
}

export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

/** Make the children of `container` those of `items`, keeping the elements of known keys. */
export function list(container, items, keyOf, make, update) {
  const known = container.keyed ?? (container.keyed = new Map());
  const wanted = new Set();
  let place = container.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    wanted.add(key);
    let view = known.get(key);
    if (view === undefined) known.set(key, (view = make(item)));
    update?.(view, item);
    const node = view.node ?? view;
    if (node === place) place = place.nextElementSibling;
    else container.insertBefore(node, place);
  }
  for (const [key, view] of known) {
    if (!wanted.has(key)) {
      (view.node ?? view).remove();
      known.delete(key);
    }
  }
}

/** Make the options of a select, keeping its choice if it still exists. */
export function options(select, items) {
  const signature = JSON.stringify(items);
  if (select.signature === signature) return;
  select.signature = signature;
  const chosen = select.value;
  select.replaceChildren(...items.map(([value, text]) => h("option", { value, text })));
  if (items.some(([value]) => value === chosen)) select.value = chosen;
}

/** Tell screen readers. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}
