"""One stack of a tournament in a process of its own, so that its libraries, threads and memory are its own.

A line of JSON asks, a line answers: ``{"prompts", "new_tokens", "sampling"}`` gives ``{"t0", "times", "hits"}``, in
seconds of the clock that all processes of a machine share. The first line says what was loaded; ``{"error", "input"}``
ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_engine.errors import InputError, RunError
from llama_engine.sampling import SamplingParams


class StackProcess:
    """A started worker. Raises :class:`InputError` and :class:`RunError` as the stack itself does."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            told = self._read()
        except BaseException:
            self.stop()
            raise
        self.about, self.most = told["about"], told["most"]

    def generate(
        self, prompts: Sequence[list[int]], new_tokens: Sequence[int], sampling: dict[str, Any] | None
    ) -> dict[str, Any]:
        """All prompts at once: ``t0``, and for each prompt the times of its tokens."""
        ask = {"prompts": prompts, "new_tokens": new_tokens, "sampling": sampling}
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended is in its answer
            print(json.dumps(ask), file=self.process.stdin, flush=True)
        return self._read()

    def stop(self) -> None:
        """End it, and give its memory back. Safe to call twice."""
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RunError(f"the process of {self.job['kind']}:{self.job['path']} ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            kind = InputError if answer["input"] else RunError
            raise kind(f"{self.job['kind']}:{self.job['path']}: {answer['error']}")
        return answer


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=out, flush=True)

    from llama_engine.measure.peers import open_peer

    job = json.loads(sys.argv[1])
    try:
        peer = open_peer(**job | {"path": Path(job["path"])})
        say(about=peer.about, most=peer.most)
        for line in sys.stdin:
            ask = json.loads(line)
            sampling = SamplingParams(**ask["sampling"]) if ask["sampling"] else None
            runs = peer.generate_batch(ask["prompts"], ask["new_tokens"], sampling)
            scheduler = getattr(getattr(peer, "engine", None), "scheduler", None)
            hits = getattr(scheduler, "prefix_cache_hit_tokens", None)
            say(t0=[run.t0 for run in runs], times=[run.token_times for run in runs], hits=hits)
    except Exception as error:  # the libraries raise what they like
        text = f"{error}" if isinstance(error, (InputError, RunError)) else f"{type(error).__name__}: {error}"
        say(error=" ".join(text.split())[:500], input=isinstance(error, InputError))


if __name__ == "__main__":
    main()
