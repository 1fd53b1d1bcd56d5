// The page starts here: its two tabs, and the watch over the server.
import "./chat.js";
import { controls } from "./controls.js";
import { $ } from "./dom.js";
import { raceplot } from "./plots.js";
import { lanes, offer } from "./race.js";
import { watch } from "./server.js";

for (const [area, form] of [["prompt", "composer"], ["race-prompt", "race-form"]])
  $(area).onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $(form).requestSubmit();
  };

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
watch(() => { offer(); controls(); });
