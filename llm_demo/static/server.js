// The gateway as the page sees it: whether it is up, and answers as they stream.
import { $ } from "./dom.js";

const UNREACHABLE = "This page cannot reach the demo. If it was stopped, start it again with ./scripts/demo.sh; the page then goes on by itself.";

export const server = { models: [], status: "unknown" }; // as it last described itself
let misses = 0; // in a row: one late answer of a busy machine is no outage

export async function request(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error(UNREACHABLE);
  });
  if (response.status === 401) $("key-form").hidden = false;
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `The server answered with status ${response.status}.`);
  }
  return response;
}

/** Ask after the server for ever; `changed` is called after each answer. */
export async function watch(changed) {
  try {
    const response = await fetch("health");
    Object.assign(server, { message: "" }, await response.json());
  } catch {
    Object.assign(server, { status: "unreachable", message: UNREACHABLE });
  }
  misses = server.status === "ok" ? 0 : misses + 1;
  const up = misses === 0 || (misses === 1 && $("status").className === "ok");
  if (up) server.status = "ok";
  $("status").className = up ? "ok" : "down";
  $("status-text").textContent = up
    ? server.models[0] + (server.source === "synthetic" ? " (synthetic weights: the text means nothing)" : "") + ", INT8"
    : "not available";
  if ($("banner").textContent !== (up ? "" : server.message)) $("banner").textContent = up ? "" : server.message;
  $("banner").hidden = up;
  changed();
  setTimeout(() => watch(changed), misses ? 1000 : 4000);
}

/** Stream a chat completion; calls `on(text, tokens so far, usage)` for every piece. Resolves when it is complete. */
export async function complete(body, on, signal) {
  const stream_options = { include_usage: true, continuous_usage_stats: true };
  const response = await request("v1/chat/completions", {
    method: "POST", signal, body: JSON.stringify({ ...body, stream: true, stream_options }),
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", pieces = 0;
  for (;;) {
    const part = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error(`The answer broke off. ${UNREACHABLE}`);
    });
    if (part.done) throw new Error("The answer broke off: the server closed the connection.");
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data:"))) {
      if (line.slice(5).trim() === "[DONE]") return;
      const event = JSON.parse(line.slice(5));
      if (event.error) throw new Error(event.error.message);
      const text = event.choices[0]?.delta.content ?? "";
      if (text && !event.usage) pieces++; // a server that does not count along: a token a piece
      if (text || event.usage) on(text, event.usage?.completion_tokens ?? pieces, event.usage);
    }
  }
}

$("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  $("key-form").hidden = true;
};
