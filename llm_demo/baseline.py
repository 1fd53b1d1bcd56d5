"""The Hugging Face baseline of the race, in a process of its own so that it cannot slow the gateway's event loop.

The process speaks JSON lines: a request in, token ids out; an empty line cancels. It ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import select
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from llama_engine.errors import RunError


class Baseline:
    """Starts the process at first use, and again after it died. One request at a time, as the benchmark runs it."""

    def __init__(self, model_dir: Path, device: str) -> None:
        self.model_dir, self.device = model_dir, device
        self._process: asyncio.subprocess.Process | None = None
        self._numbers = itertools.count(1)
        self._starting, self._turn = asyncio.Lock(), asyncio.Lock()

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

    async def generate(self, prompt: list[int], max_tokens: int, **options: Any) -> AsyncIterator[list[int]]:
        """New ids as they are made. Leaving early cancels. Raises :class:`RunError`."""
        async with self._turn:
            await self.load()
            process, number, ended = self._process, next(self._numbers), False
            try:
                self._send({"id": number, "prompt": prompt, "max_tokens": max_tokens, **options})
                while line := await process.stdout.readline():
                    answer = json.loads(line)
                    if answer["id"] != number:
                        continue  # the rest of one that was cancelled
                    ended = "ids" not in answer
                    if "error" in answer:
                        raise RunError(f"the baseline failed: {answer['error']}")
                    if ended:
                        return
                    yield answer["ids"]
                ended = True
                raise RunError(f"the baseline failed: its process ended with exit code {await process.wait()}")
            finally:
                if not ended:
                    self._send(None)

    async def close(self) -> None:
        if self._process is not None and self.loaded:
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except asyncio.TimeoutError:
                self._process.kill()
                await self._process.wait()

    def _send(self, message: dict[str, Any] | None) -> None:
        with contextlib.suppress(ConnectionError, RuntimeError):  # a dead process is reported where it is read
            self._process.stdin.write((json.dumps(message) if message else "").encode() + b"\n")


class _Cancelled(Exception):
    pass


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def work(model_dir: str, device: str) -> None:
    """Load, warm up, say ready, then answer requests until standard input closes."""
    import torch

    from llama_engine.device import pick_device
    from llama_engine.measure.stacks import TransformersStack

    device = pick_device(device).type
    stack = TransformersStack(model_dir, device)
    stack.generate([1], 4)
    _say({"ready": True})
    requests = open(sys.stdin.fileno(), "rb", buffering=0)  # noqa: SIM115 - unbuffered, or select() would miss a line
    while line := requests.readline():
        if not line.strip():
            continue
        request = json.loads(line)
        sampling = {"do_sample": False}
        if request["temperature"] > 0:
            sampling = {"do_sample": True, "top_k": 0, "top_p": request["top_p"], "temperature": request["temperature"]}
            torch.manual_seed(request["seed"])

        def on_ids(ids: list[int], number: int = request["id"]) -> None:
            """Write ids as a JSON line; leave ``generate`` when standard input has news."""
            _say({"id": number, "ids": ids})
            if select.select([sys.stdin], [], [], 0)[0]:
                raise _Cancelled

        try:
            options = {"eos_token_id": request["eos"] or None, **sampling}
            stack.stream(request["prompt"], request["max_tokens"], on_ids, **options)
            _say({"id": request["id"], "done": True})
        except _Cancelled:
            continue
        except Exception as error:  # one request's failure must not end the process
            _say({"id": request["id"], "error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    try:
        work(*sys.argv[1:])
    except (ValueError, OSError, RuntimeError) as error:
        _say({"error": " ".join(str(error).split())})
        sys.exit(1)
