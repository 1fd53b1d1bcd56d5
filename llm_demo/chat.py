r"""Chat with the served engine in a terminal, or watch it race the Hugging Face baseline.

Purpose: the page's chat and race without a browser; also a small client of the gateway's OpenAI API.
Method:  streams from a running gateway (./scripts/demo.sh). TTFT is t1 - t0, speed (N - n1) / (tN - t1).
Output:  the conversation. /new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer.

    python llm_demo/chat.py
    python llm_demo/chat.py --race "Write a short story about a lighthouse keeper."
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from llama_engine.errors import InputError, RunError, run_cli
from llama_engine.flags import Parser

now = time.perf_counter


@dataclass
class Answer:
    """One answer as it grows; ``first`` and ``last`` are (seconds since the request, tokens so far)."""

    start: float = field(default_factory=now)
    text: str = ""
    first: tuple[float, int] = (0.0, 0)
    last: tuple[float, int] = (0.0, 0)

    def add(self, piece: str, tokens: int) -> None:
        self.text += piece
        if tokens > self.last[1]:
            self.last = (now() - self.start, tokens)
            self.first = self.first if self.first[1] else self.last

    @property
    def speed(self) -> str:
        (t1, n1), (tn, n) = self.first, self.last
        rate = f"{(n - n1) / (tn - t1):.1f} tok/s, " if tn > t1 else ""
        return f"{rate}first token {t1 * 1e3:.0f} ms, {n} tokens in {tn:.2f} s" if n else "waiting"


class Gateway:
    """The gateway's API. Raises :class:`RunError` in one line."""

    def __init__(self, url: str, key: str | None) -> None:
        self.http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(600, connect=5),
            trust_env=False,
            event_hooks={"response": [_check]},
        )

    @contextlib.contextmanager
    def call(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        try:
            with self.http.stream(method, path, **options) as response:
                yield response
        except httpx.HTTPError as error:
            url = str(self.http.base_url).rstrip("/")
            raise RunError(f"no gateway at {url} ({error}): start it with ./scripts/demo.sh, or give --url") from None

    def models(self) -> list[str]:
        with self.call("GET", "/v1/models") as response:
            return [model["id"] for model in json.loads(response.read())["data"]]

    def stream(self, body: dict) -> Iterator[tuple[str, int]]:
        """Pieces of an answer with the number of tokens so far."""
        body = body | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        with self.call("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RunError(event["error"]["message"])
                delta = event["choices"][0]["delta"] if event["choices"] else {}
                if event["usage"]:
                    text = "".join(c for c in delta.get("content", "") if c.isprintable() or c in "\n\t")
                    yield text, event["usage"]["completion_tokens"]  # no control codes from a model to a terminal


def _check(response: httpx.Response) -> None:
    if response.is_error:
        try:
            message = json.loads(response.read())["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"HTTP {response.status_code}"
        raise RunError(message)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("prompt", nargs="?", help="ask this and end (default: a conversation)")
    parser.add_argument("--race", action="store_true", help="engine against baseline, both at once")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--api-key", default=os.environ.get("LLM_DEMO_API_KEY"), help="or $LLM_DEMO_API_KEY")
    parser.add_argument("--max-tokens", type=int, default=256, help="at most; the race's finish line")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--system", help="system prompt (default: the model's own)")
    args = parser.parse_args()
    if args.race and not args.prompt:
        raise InputError('--race needs a prompt: chat.py --race "Write a short story."')
    console, gateway = Console(highlight=False), Gateway(args.url, args.api_key)
    models = gateway.models()
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    system = [{"role": "system", "content": args.system}] if args.system else []
    if args.race:
        messages = [*system, {"role": "user", "content": args.prompt}]
        race(console, gateway, models, {"messages": messages, **options})
    else:
        chat(console, gateway, {"model": models[0], **options}, system, args.prompt)


def chat(console: Console, gateway: Gateway, body: dict, system: list[dict], only: str | None) -> None:
    console.print(f"[dim]{body['model']}. /new starts over, /quit ends, Ctrl-C stops an answer.[/]")
    history = list(system)
    while True:
        try:
            prompt = only or console.input("\n[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if prompt in ("/quit", "/exit"):
            return
        if prompt == "/new":
            history = list(system)
        elif prompt:
            history.append({"role": "user", "content": prompt})
            answer = Answer()
            try:
                for piece, tokens in gateway.stream(body | {"messages": history}):
                    answer.add(piece, tokens)
                    console.print(Text(piece), end="", soft_wrap=True)
            except KeyboardInterrupt:
                console.print(" (stopped)", end="")
            except RunError as error:
                if only:
                    raise
                history.pop()
                console.print(Text(f"error: {error}", "red"))
                continue
            console.print(f"\n[dim]{answer.speed}[/]")
            history.append({"role": "assistant", "content": answer.text})
        if only:
            return


def race(console: Console, gateway: Gateway, models: list[str], body: dict) -> None:
    """Both at once, a thread a lane; the ratio compares the time a token, first token included."""
    with console.status("loading the baseline"), gateway.call("POST", "/baseline", json={}):
        pass
    lanes, failures = [Answer(), Answer()], []

    def run(lane: Answer, model: str) -> None:
        try:
            for piece, tokens in gateway.stream(body | {"model": model}):
                lane.add(piece, tokens)
        except RunError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in zip(lanes, models)]
    for thread in threads:
        thread.start()
    draw = partial(_track, console, lanes, body["max_tokens"])
    with Live(console=console, get_renderable=draw, refresh_per_second=12):
        for thread in threads:
            thread.join()
    if failures or not all(lane.last[1] for lane in lanes):
        raise RunError(f"no result: {failures[0] if failures else 'a lane made no tokens'}")
    engine, baseline = (lane.last[0] / lane.last[1] for lane in lanes)
    winner, ratio = ("INT8 engine", baseline / engine) if engine <= baseline else ("baseline", engine / baseline)
    console.print(f"[bold]{winner}: {ratio:.1f}x faster[/] [dim](one run, both sharing this machine)[/]")


def _track(console: Console, lanes: list[Answer], goal: int) -> Columns:
    width = max(24, console.width // 2 - 2)
    panels = []
    for lane, title, colour in zip(lanes, ("INT8 engine", "Hugging Face baseline"), ("green", "yellow")):
        text = Text(lane.text).wrap(console, width - 4)[-max(4, console.height - 9) :]
        bar = ProgressBar(goal, lane.last[1], complete_style=colour, finished_style=colour)
        panels.append(Panel(Group(Text(lane.speed, colour), bar, *text), title=title, width=width, border_style=colour))
    return Columns(panels)


if __name__ == "__main__":
    run_cli(main)
