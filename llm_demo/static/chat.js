// The conversation.
import { busy, controls } from "./controls.js";
import { $, action, copy, el, painter, seconds, speed, svg } from "./dom.js";
import { markdown } from "./markdown.js";
import { Meter, sparkline } from "./plots.js";
import { complete, server } from "./server.js";

const history = [];

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

/** What can be done with an answer: copy it, and ask the last question again. */
function actions(question, answer) {
  const copying = action("Copy", async () => {
    await copy(answer);
    copying.textContent = "Copied";
    setTimeout(() => { copying.textContent = "Copy"; }, 1500);
  });
  const again = action("Regenerate", () => {
    if (busy.chat || $("send").disabled) return;
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
  busy.chat = new AbortController();
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
    await complete({ ...options(), messages }, on, busy.chat.signal);
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
  busy.chat = null;
  controls();
  scroll(failed);
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const question = $("prompt").value.trim();
  if (!question || busy.chat || $("send").disabled) return;
  $("prompt").value = "";
  say(question);
};
$("clear").onclick = () => {
  busy.chat?.abort();
  history.length = 0;
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("prompt").focus();
};
for (const idea of ["What is the capital of France?", "Explain rainbows to a child.", "Write a haiku about the sea."])
  $("ideas").append(el("button", { type: "button", textContent: idea, onclick: () => { $("prompt").value = idea; $("composer").requestSubmit(); } }));
