// What every part of the page builds its elements with. Text reaches the document through textContent alone.

export const $ = (id) => document.getElementById(id);

export function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) node[key] = value;
  node.append(...children);
  return node;
}

export function svg(tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

export function action(label, onclick) {
  return el("button", { type: "button", textContent: label, onclick });
}

/** At most one drawing a frame, however fast tokens come. */
export function painter(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  };
}

/** To the clipboard, also where a page has none because its address is not secure. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

export const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
export const speed = (rate) => (rate >= 100 ? rate.toFixed(0) : rate.toFixed(1));
