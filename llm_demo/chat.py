r"""Chat with the served engine in a terminal, or watch it race the Hugging Face baseline.

Purpose: the page's chat and race without a browser; also a small client of the gateway's OpenAI API.
Method:  streams from a running gateway (./scripts/demo.sh). TTFT is t1 - t0, speed (N - n1) / (tN - t1).
Output:  the conversation. /new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer.

    python llm_demo/chat.py
    python llm_demo/chat.py --race "Write a short story about a lighthouse keeper."
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from llama_engine.errors import InputError, RunError, run_cli

now = time.perf_counter


@dataclass
class Answer:
    """One answer as it grows: ``arrivals`` are (seconds since the request, tokens so far)."""

    start: float = field(default_factory=now)
    text: str = ""
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    def add(self, piece: str, tokens: int) -> None:
        self.text += piece
        if tokens > self.tokens:
            self.arrivals.append((now() - self.start, tokens))

    @property
    def tokens(self) -> int:
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def total_s(self) -> float:
        return self.arrivals[-1][0] if self.arrivals else 0.0

    @property
    def speed(self) -> str:
        if not self.arrivals:
            return "waiting"
        (t1, n1), (tn, n) = self.arrivals[0], self.arrivals[-1]
        rate = f"{(n - n1) / (tn - t1):.1f} tok/s, " if tn > t1 else ""
        return f"{rate}first token {t1 * 1e3:.0f} ms, {n} tokens in {tn:.2f} s"


class Gateway:
    """The gateway's API. Raises :class:`RunError` in one line."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(600, connect=5), trust_env=False)

    def call(self, method: str, path: str) -> dict:
        try:
            return _checked(self.http.request(method, path)).json()
        except httpx.HTTPError as error:
            raise self._lost(error) from None

    def stream(self, body: dict) -> Iterator[tuple[str, int]]:
        """Pieces of an answer with the number of tokens so far."""
        body = body | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                for line in _checked(response).iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RunError(event["error"]["message"])
                    delta = event["choices"][0]["delta"] if event["choices"] else {}
                    if event["usage"]:
                        text = "".join(c for c in delta.get("content", "") if c.isprintable() or c in "\n\t")
                        yield text, event["usage"]["completion_tokens"]  # no control codes from a model to a terminal
        except httpx.HTTPError as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> RunError:
        return RunError(f"no gateway at {self.url} ({error}): start it with ./scripts/demo.sh, or give --url")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    models = [model["id"] for model in gateway.call("GET", "/v1/models")["data"]]
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
    with console.status("loading the baseline"):
        gateway.call("POST", "/baseline")
    lanes, failures = [Answer(), Answer()], []

    def run(lane: Answer, model: str) -> None:
        try:
            for piece, tokens in gateway.stream(body | {"model": model}):
                lane.add(piece, tokens)
        except RunError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in zip(lanes, models)]
    with Live(console=console, refresh_per_second=12) as live:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            live.update(_track(console, lanes, body["max_tokens"]))
            time.sleep(0.08)
        live.update(_track(console, lanes, body["max_tokens"]))
    if failures or not all(lane.tokens for lane in lanes):
        raise RunError(f"no result: {failures[0] if failures else 'a lane made no tokens'}")
    engine, baseline = (lane.total_s / lane.tokens for lane in lanes)
    winner, ratio = ("INT8 engine", baseline / engine) if engine <= baseline else ("baseline", engine / baseline)
    console.print(f"[bold]{winner}: {ratio:.1f}x faster[/] [dim](one run, both sharing this machine)[/]")


def _track(console: Console, lanes: list[Answer], goal: int) -> Columns:
    width = max(24, console.width // 2 - 2)
    rows = max(4, console.height - 9)
    panels = []
    for lane, (title, colour) in zip(lanes, [("INT8 engine", "green"), ("Hugging Face baseline", "yellow")]):
        lines = Text(lane.text).wrap(console, width - 4)[-rows:]
        bar = ProgressBar(goal, lane.tokens, width=width - 4, complete_style=colour, finished_style=colour)
        panels.append(
            Panel(Group(Text(lane.speed, colour), bar, *lines), title=title, width=width, border_style=colour)
        )
    return Columns(panels)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"HTTP {response.status_code}"
        raise RunError(message)
    return response


if __name__ == "__main__":
    run_cli(main)
