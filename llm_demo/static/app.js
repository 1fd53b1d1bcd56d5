// The page's logic. Text from people and models reaches the document through textContent only.
import { markdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const UNREACHABLE = "This page cannot reach the demo. If it was stopped, start it again with ./scripts/demo.sh; the page then goes on by itself.";

function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) node[key] = value;
  node.append(...children);
  return node;
}
const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
const speed = (rate) => (rate >= 100 ? rate.toFixed(0) : rate.toFixed(1));

// ---- the server ----------------------------------------------------------------------------------------------------

let server = { models: [], status: "unknown" };
let misses = 0; // in a row: one late answer of a busy machine is no outage

async function request(path, options = {}) {
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

async function watch() {
  try {
    const response = await fetch("health");
    server = await response.json();
  } catch {
    server = { ...server, status: "unreachable", message: UNREACHABLE };
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
  offer();
  controls();
  setTimeout(watch, misses ? 1000 : 4000);
}

/** Stream a chat completion; calls `on(text, tokens so far, usage)` for every piece. Resolves when it is complete. */
async function complete(body, on, signal) {
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

/** When each token came. TTFT = t1 - t0; speed = (N - n1) / (tN - t1), decode only. */
class Meter {
  constructor() { this.start = performance.now(); this.points = []; }
  add(tokens) {
    if (tokens > (this.points.at(-1)?.tokens ?? 0)) this.points.push({ ms: performance.now() - this.start, tokens });
  }
  get tokens() { return this.points.at(-1)?.tokens ?? 0; }
  get ttft() { return this.points[0]?.ms ?? 0; }
  get total() { return this.points.at(-1)?.ms ?? 0; }
  get rate() { return Meter.between(this.points[0], this.points.at(-1)); }
  /** Tokens a second over a window of eight arrivals. */
  get rates() { return this.points.map((p, i) => [p.ms, Meter.between(this.points[Math.max(0, i - 8)], p)]).slice(4); }
  static between(a, b) { return a && b && b.ms > a.ms ? ((b.tokens - a.tokens) * 1000) / (b.ms - a.ms) : 0; }
}

// ---- plots ---------------------------------------------------------------------------------------------------------

function svg(tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

/** A line of `[x, y]` points, both axes from zero, in the box `[left, top, right, bottom]`, with a dot at its end. */
function line(name, points, [left, top, right, bottom], maxX, maxY) {
  const at = points.map(([x, y]) => [left + (x / maxX) * (right - left), bottom - (y / maxY) * (bottom - top)]);
  const [cx, cy] = at.at(-1);
  return [svg("polyline", { class: name, points: at.join(" ") }), svg("circle", { class: name, cx, cy, r: 3 })];
}

function sparkline(target, meter) {
  const rates = meter.rates;
  if (rates.length < 2) return;
  const [start, end] = [rates[0][0], rates.at(-1)[0]], top = Math.max(...rates.map(([, rate]) => rate));
  const points = rates.map(([ms, rate]) => [ms - start, rate]);
  target.replaceChildren(
    svg("path", { class: "axis", d: "M0 31.5H160" }), ...line("engine", points, [1, 3, 156, 31], end - start, top * 1.1),
  );
  target.setAttribute("role", "img");
  target.setAttribute("aria-label", `Speed over the answer, up to ${speed(top)} tokens a second`);
}

function raceplot(lanes, goal) {
  const plot = $("plot"), { width, height } = plot.getBoundingClientRect();
  const maxX = Math.max(1000, ...lanes.map((lane) => lane.meter.total)) * 1.02;
  const box = [30, 18, width - 10, height - 18], [left, top, right, bottom] = box;
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  plot.replaceChildren(
    svg("path", { class: "axis", d: `M${left} ${bottom}H${right}` }),
    svg("path", { class: "finish", d: `M${left} ${top}H${right}` }),
    svg("text", { x: left, y: top - 6 }, `finish line: ${goal} tokens`),
    ...[0, goal / 2].map((n) => svg("text", { x: 0, y: bottom - (n / goal) * (bottom - top) + 4 }, n)),
  );
  const step = [0.25, 0.5, 1, 2, 5, 10, 30, 60].find((s) => maxX / 1000 / s <= Math.max(3, width / 90)) ?? 120;
  for (let s = 0; s * 1000 <= maxX; s += step) {
    const x = left + ((s * 1000) / maxX) * (right - left);
    plot.append(svg("path", { class: "axis", d: `M${x} ${top}V${bottom}` }));
    if (x < right - 20) plot.append(svg("text", { x: x + 2, y: height - 4 }, `${s} s`));
  }
  for (const { kind, meter } of lanes)
    plot.append(...line(kind, [[0, 0], ...meter.points.map((p) => [p.ms, p.tokens])], box, maxX, goal));
}

// ---- chat ----------------------------------------------------------------------------------------------------------

const history = [];
let chatting = null, racing = null; // AbortController while busy

function controls() {
  const up = server.status === "ok";
  $("send").disabled = !up || !!racing;
  $("send").hidden = !!chatting;
  $("stop").hidden = !chatting;
  $("start").disabled = !up || !!chatting || lanes[0].model === lanes[1].model;
  $("start").hidden = !!racing;
  $("abort").hidden = !racing;
}

function scroll(force) {
  const log = $("log");
  if (force || log.scrollHeight - log.scrollTop - log.clientHeight < 90) log.scrollTop = log.scrollHeight;
}

const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens"];

function options() {
  const body = { model: server.models[0] };
  for (const name of SAMPLING) if ($(name).value !== "") body[name] = Number($(name).value);
  return body;
}

/** To the clipboard, also where a page has none because its address is not secure. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function action(label, onclick) {
  return el("button", { type: "button", textContent: label, onclick });
}

/** What can be done with an answer: copy it, and ask the last question again. */
function actions(question, answer) {
  const copying = action("Copy", async () => {
    await copy(answer);
    copying.textContent = "Copied";
    setTimeout(() => { copying.textContent = "Copy"; }, 1500);
  });
  const again = action("Regenerate", () => {
    if (chatting || $("send").disabled) return;
    history.splice(-2);
    for (const box of [...$("log").querySelectorAll(".message")].slice(-2)) box.remove();
    $("prompt").focus();
    say(question);
  });
  again.className = "again"; // the newest answer's alone is shown
  return el("div", { className: "actions" }, copying, again);
}

async function say(question) {
  $("empty").hidden = true;
  $("log").append(el("div", { className: "message user" }, el("p", { textContent: question })));
  const text = el("div", { className: "body" }), meta = el("div", { className: "meta" });
  const box = el("div", { className: "message assistant busy", ariaBusy: "true" }, text, meta);
  const plot = svg("svg", {});
  const [ttft, rate, count, reused] = [el("b"), el("b"), el("b"), el("span", { className: "reused" })];
  $("log").append(box);
  scroll(true);
  chatting = new AbortController();
  controls();
  const system = $("system").value.trim(), meter = new Meter();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...history, { role: "user", content: question }];
  let answer = "", failed = false, usage = null;
  const show = () => {
    text.replaceChildren(...markdown(answer));
    if (meter.tokens && !meta.firstChild)
      meta.append(el("span", {}, "first token ", ttft), el("span", {}, rate, " tok/s"), el("span", {}, count, " tokens"), reused, plot);
    ttft.textContent = seconds(meter.ttft);
    rate.textContent = meter.rate ? speed(meter.rate) : "–";
    count.textContent = meter.tokens;
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    reused.textContent = cached ? `${cached} of ${usage.prompt_tokens} prompt tokens reused` : "";
    sparkline(plot, meter);
    scroll(false);
  };
  const draw = painter(show);
  try {
    const on = (piece, tokens, told) => { answer += piece; usage = told ?? usage; meter.add(tokens); draw(); };
    await complete({ ...options(), messages }, on, chatting.signal);
  } catch (error) {
    failed = !answer;
    if (error.name !== "AbortError") box.append(el("p", { className: "error", role: "alert", textContent: error.message }));
    else if (!answer) answer = "(stopped)";
  }
  show();
  if (!failed) {
    history.push({ role: "user", content: question }, { role: "assistant", content: answer });
    box.append(actions(question, answer));
  } else if (!$("prompt").value) $("prompt").value = question.slice(0, 4000);
  box.classList.remove("busy");
  box.ariaBusy = "false";
  chatting = null;
  controls();
  scroll(failed);
}

/** At most one drawing a frame, however fast tokens come. */
function painter(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  };
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const question = $("prompt").value.trim();
  if (!question || chatting || $("send").disabled) return;
  $("prompt").value = "";
  say(question);
};
for (const [area, form] of [["prompt", "composer"], ["race-prompt", "race-form"]])
  $(area).onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $(form).requestSubmit();
  };
$("stop").onclick = () => chatting?.abort();
$("abort").onclick = () => racing?.abort();
document.addEventListener("keydown", (event) => { if (event.key === "Escape") (chatting ?? racing)?.abort(); });
$("clear").onclick = () => {
  chatting?.abort();
  history.length = 0;
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("prompt").focus();
};
for (const idea of ["What is the capital of France?", "Explain rainbows to a child.", "Write a haiku about the sea."])
  $("ideas").append(el("button", { type: "button", textContent: idea, onclick: () => { $("prompt").value = idea; $("composer").requestSubmit(); } }));
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  $("key-form").hidden = true;
};

// ---- race ----------------------------------------------------------------------------------------------------------

const titleOf = (model) => ["INT8 engine", "Baseline"][[server.models[0], `${server.models[0]}:baseline`].indexOf(model)] ?? model;

class Lane {
  constructor(kind) {
    this.kind = kind;
    for (const part of ["what", "speed", "times", "text"]) this[part] = el("p", { className: part });
    this.bar = el("progress");
    this.name = el("h2");
    $("lanes").append(el("section", { className: `lane ${kind}` }, this.name, this.what, this.speed, this.times, this.bar, this.text));
    this.reset(1);
  }
  /** Which model runs in it. */
  assign(model) {
    const own = server.models[0], base = model === `${own}:baseline`;
    this.model = model;
    this.title = titleOf(model);
    this.name.textContent = this.title;
    this.bar.ariaLabel = `${this.title}: tokens made`;
    this.what.textContent = model === own ? "Triton Inference Server, paged KV cache"
      : base ? "Hugging Face transformers, SDPA, 16-bit" : "another server, through this gateway";
  }
  reset(goal) { Object.assign(this, { goal, meter: new Meter(), answer: "" }); this.show(); }
  show() {
    const { tokens, rate, ttft, total } = this.meter;
    this.speed.replaceChildren(rate ? speed(rate) : "–", el("small", { textContent: " tok/s" }));
    this.times.textContent = tokens ? `first token ${seconds(ttft)} · ${tokens} tokens in ${seconds(total)}` : "waiting for the start";
    Object.assign(this.bar, { max: this.goal, value: tokens });
    this.text.textContent = this.answer;
  }
  run(body, signal, draw) {
    this.meter = new Meter();
    return complete({ ...body, model: this.model }, (piece, tokens) => { this.answer += piece; this.meter.add(tokens); draw(); }, signal);
  }
}

const lanes = [new Lane("engine"), new Lane("base")];

/** Offer every model to both lanes, once the server has said which there are. */
function offer() {
  for (const [i, lane] of lanes.entries()) {
    const choice = $(`lane-${i}`);
    if (choice.options.length === server.models.length || racing) continue;
    choice.replaceChildren(...server.models.map((name) => el("option", { value: name, textContent: titleOf(name) })));
    choice.selectedIndex = Math.min(i, server.models.length - 1);
    choice.onchange = () => { lane.assign(choice.value); lane.reset(1); controls(); };
    choice.onchange();
  }
}

function verdict(headline, kind, detail) {
  $("verdict").replaceChildren(el("b", { className: kind, textContent: headline }), detail);
}

async function race() {
  const goal = Number($("race-tokens").value), turns = $("turns").checked;
  const messages = [{ role: "user", content: $("race-prompt").value.trim() }];
  racing = new AbortController();
  const { signal } = racing;
  controls();
  lanes.forEach((each) => each.reset(goal));
  const show = () => { lanes.forEach((each) => each.show()); raceplot(lanes, goal); };
  show();
  $("race-note").textContent = "";
  try {
    if (lanes.some((each) => each.model === `${server.models[0]}:baseline`)) {
      verdict("On your marks", "", server.baseline_loaded ? "" : "Loading the baseline: this happens once.");
      await request("baseline", { method: "POST", signal });
    }
    verdict("Go", "", turns ? "Each lane runs alone, lane one first." : "Both lanes run at once and share what machine they have.");
    const run = (each) => each.run({ messages, temperature: 0, max_tokens: goal }, signal, painter(show));
    if (turns) for (const each of lanes) await run(each);
    else await Promise.all(lanes.map(run));
    show();
    finish(turns, goal);
  } catch (error) {
    racing.abort();
    show();
    if (signal.aborted && error.name === "AbortError") verdict("Stopped", "", "");
    else verdict("No result", "base", error.message);
  }
  racing = null;
  controls();
}

/** Ratio of the mean time a token, first token included: of the finish times where both lanes made as many tokens. */
function finish(turns, goal) {
  const [engine, base] = lanes.map((each) => each.meter);
  if (!engine.tokens || !base.tokens) return verdict("No result", "base", "A lane made no tokens: try another prompt.");
  const ratio = base.total / base.tokens / (engine.total / engine.tokens);
  const [winner, factor] = ratio >= 1 ? [lanes[0].title, ratio] : [lanes[1].title, 1 / ratio];
  const early = [engine, base].some((meter) => meter.tokens < goal) ? " A lane's answer ended before the line, so time a token is compared." : "";
  verdict(
    `${winner}: ${factor.toFixed(1)}× faster`, ratio >= 1 ? "engine" : "base",
    `${engine.tokens} tokens in ${seconds(engine.total)} against ${base.tokens} in ${seconds(base.total)}; ` +
    `first token after ${seconds(engine.ttft)} against ${seconds(base.ttft)}.${early}`,
  );
  $("race-note").textContent = (turns ? "One run each, one after the other" : "One run, both at once, so that lanes on one machine shared its cores") +
    ", measured in this browser. The benchmark, with intervals and accuracy beside it, is in results/.";
}

$("race-form").onsubmit = (event) => {
  event.preventDefault();
  if (!racing && !$("start").disabled) race();
};

// ---- tabs ----------------------------------------------------------------------------------------------------------

function select(name) {
  for (const each of ["chat", "race"]) {
    $(each).hidden = each !== name;
    Object.assign($(`tab-${each}`), { ariaSelected: String(each === name), tabIndex: each === name ? 0 : -1 });
  }
  if (name === "race") raceplot(lanes, Number($("race-tokens").value));
  window.history.replaceState(null, "", `#${name}`);
}
for (const [name, other] of [["chat", "race"], ["race", "chat"]]) {
  $(`tab-${name}`).onclick = () => select(name);
  $(`tab-${name}`).onkeydown = (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    select(other);
    $(`tab-${other}`).focus();
  };
}
window.addEventListener("resize", () => { if (!$("race").hidden) raceplot(lanes, Number($("race-tokens").value)); });
select(window.location.hash === "#race" ? "race" : "chat");
watch();
