// Which buttons may be pressed.
import { $ } from "./dom.js";
import { server } from "./server.js";

export const busy = { chat: null, race: null }; // AbortController while it is

export function controls() {
  const up = server.status === "ok";
  $("send").disabled = !up || !!busy.race;
  $("send").hidden = !!busy.chat;
  $("stop").hidden = !busy.chat;
  $("start").disabled = !up || !!busy.chat || $("lane-0").value === $("lane-1").value;
  $("start").hidden = !!busy.race;
  $("abort").hidden = !busy.race;
}

$("stop").onclick = () => busy.chat?.abort();
$("abort").onclick = () => busy.race?.abort();
document.addEventListener("keydown", (event) => { if (event.key === "Escape") (busy.chat ?? busy.race)?.abort(); });
