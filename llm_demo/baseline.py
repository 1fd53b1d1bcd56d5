"""The Hugging Face baseline of the race, in a process of its own so that it cannot slow the gateway's event loop.

The process speaks JSON lines: requests and cancellations in, token ids out. It ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from llama_engine.errors import RunError


class Baseline:
    """Starts the process at first use, and again after it died. One request at a time, as the benchmark runs it."""

    def __init__(self, model_dir: Path, device: str) -> None:
        self.model_dir, self.device = model_dir, device
        self._process: asyncio.subprocess.Process | None = None
        self._answers: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._starting = asyncio.Lock()

    @property
    def loaded(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def load(self) -> None:
        """Ready and warm on return. Raises :class:`RunError`."""
        async with self._starting:
            if self.loaded:
                return
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, __file__, str(self.model_dir), self.device),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is the gateway's, which then ends this process in order
            )
            ready = json.loads(await process.stdout.readline() or b"{}")
            if not ready.get("ready"):
                await process.wait()
                raise RunError(f"the baseline did not start: {ready.get('error', f'exit code {process.returncode}')}")
            self._process = process
            self._reader = asyncio.create_task(self._read(process))

    async def generate(self, prompt: list[int], max_tokens: int, **options: Any) -> AsyncIterator[list[int]]:
        """New ids as they are made. Leaving early cancels. Raises :class:`RunError`."""
        await self.load()
        number, answers = next(self._numbers), asyncio.Queue()
        self._answers[number] = answers
        ended = False
        try:
            self._send({"id": number, "prompt": prompt, "max_tokens": max_tokens, **options})
            while True:
                answer = await answers.get()
                ended = "ids" not in answer
                if "error" in answer:
                    raise RunError(f"the baseline failed: {answer['error']}")
                if ended:
                    return
                yield answer["ids"]
        finally:
            del self._answers[number]
            if not ended:
                self._send({"cancel": number})

    async def close(self) -> None:
        if self._process is not None and self.loaded:
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except asyncio.TimeoutError:
                self._process.kill()
                await self._process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):  # a dead process is reported by the reader
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        while line := await process.stdout.readline():
            answer = json.loads(line)
            if (answers := self._answers.get(answer["id"])) is not None:
                answers.put_nowait(answer)
        await process.wait()
        for answers in self._answers.values():
            answers.put_nowait({"error": f"its process ended with exit code {process.returncode}"})


class _Cancelled(Exception):
    pass


class _Streamer:
    """A transformers streamer that writes ids as JSON lines and leaves ``generate`` when cancelled."""

    def __init__(self, number: int, gone: Callable[[int], bool]) -> None:
        self.number, self.gone, self.prompt_seen = number, gone, False

    def put(self, value: Any) -> None:
        if self.prompt_seen:
            _say({"id": self.number, "ids": value.reshape(-1).tolist()})
        self.prompt_seen = True
        if self.gone(self.number):
            raise _Cancelled

    def end(self) -> None:
        """Called after the last token."""


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def work(model_dir: str, device: str) -> None:
    """Load, warm up, say ready, then answer requests until standard input closes."""
    import torch

    from llama_engine.measure.generation import TransformersStack

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    stack = TransformersStack(model_dir, device)
    stack.generate([1], 4)
    _say({"ready": True})
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    cancelled: set[int] = set()
    closing = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            message = json.loads(line)
            cancelled.add(message["cancel"]) if "cancel" in message else requests.put(message)
        closing.set()
        requests.put(None)

    def gone(number: int) -> bool:
        return number in cancelled or closing.is_set()

    threading.Thread(target=listen, daemon=True).start()
    while (request := requests.get()) is not None:
        number = request["id"]
        sampling = {"do_sample": False}
        if request["temperature"] > 0:
            sampling = {"do_sample": True, "top_k": 0, "top_p": request["top_p"], "temperature": request["temperature"]}
            torch.manual_seed(request["seed"])
        ids = torch.tensor([request["prompt"]], device=device)
        try:
            with torch.inference_mode():
                stack.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=request["max_tokens"],
                    eos_token_id=request["eos"] or None,
                    streamer=_Streamer(number, gone),
                    **sampling,
                )
            _say({"id": number, "done": True})
        except _Cancelled:
            continue
        except Exception as error:  # one request's failure must not end the process
            _say({"id": number, "error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    try:
        work(*sys.argv[1:])
    except (ValueError, OSError, RuntimeError) as error:
        _say({"error": " ".join(str(error).split())})
        sys.exit(1)
