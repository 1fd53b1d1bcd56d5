// Two models, one prompt.
import { busy, controls } from "./controls.js";
import { $, el, painter, seconds, speed } from "./dom.js";
import { Meter, raceplot } from "./plots.js";
import { complete, request, server } from "./server.js";

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

export const lanes = [new Lane("engine"), new Lane("base")];

/** Offer every model to both lanes, once the server has said which there are. */
export function offer() {
  for (const [i, lane] of lanes.entries()) {
    const choice = $(`lane-${i}`);
    if (choice.options.length === server.models.length || busy.race) continue;
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
  busy.race = new AbortController();
  const { signal } = busy.race;
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
    busy.race.abort();
    show();
    if (signal.aborted && error.name === "AbortError") verdict("Stopped", "", "");
    else verdict("No result", "base", error.message);
  }
  busy.race = null;
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
  if (!busy.race && !$("start").disabled) race();
};
