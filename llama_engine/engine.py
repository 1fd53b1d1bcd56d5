"""The native engine: add requests, step, read tokens. In-flight batching over any executor."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from llama_engine.build import load_engine_json
from llama_engine.config import EngineConfig, ModelConfig, check_request
from llama_engine.errors import InputError, RunError
from llama_engine.executor import Executor, Step, StepHandle
from llama_engine.host_executor import HostExecutor
from llama_engine.kernels import cpu
from llama_engine.kv_cache import BlockManager
from llama_engine.model import TorchModel
from llama_engine.sampling import Logprobs, SamplingParams
from llama_engine.scheduler import DrainFirst, Plan, Scheduler
from llama_engine.scheduler import Sequence as RunningSequence
from llama_engine.weights import load_weights

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Output:
    """New tokens of one request, and why it ended, if it did."""

    request_id: int
    token_ids: list[int]
    reason: FinishReason | None = None
    logprobs: list[Logprobs] | None = None  # of token_ids, if SamplingParams.logprobs asks for them

    @property
    def finished(self) -> bool:
        return self.reason is not None


class Engine:
    """Not thread-safe: one owner calls everything (see :class:`llama_engine.loop.EngineLoop`)."""

    def __init__(self, model: ModelConfig, config: EngineConfig, executor: Executor) -> None:
        self.model, self.config, self.executor = model, config, executor
        self.scheduler = Scheduler(config, BlockManager(executor.num_kv_blocks, config.tokens_per_block))
        self.tokens_generated = 0
        self.steps = 0
        self._requests: dict[int, RunningSequence] = {}
        self._ids = itertools.count()
        self._inflight: tuple[Plan, StepHandle] | None = None

    @classmethod
    def from_dir(
        cls,
        engine_dir: str | Path,
        *,
        device: str = "auto",
        kernels: str = "auto",
        threads: int | None = None,
        **changes: Any,
    ) -> Engine:
        """Load a built engine. ``device`` is auto, cpu or cuda; ``kernels`` auto (fused) or torch (the reference); on
        a GPU also stream or triton (:class:`llama_engine.cuda_executor.CudaExecutor`). ``changes`` replace fields of
        the :class:`EngineConfig` it was built with.

        Raises :class:`InputError` for a missing or damaged engine or an unavailable device.
        """
        info = load_engine_json(Path(engine_dir))
        config = replace(info.engine, **changes)
        executor = make_executor(Path(engine_dir), info.model, config, pick_device(device), kernels, threads)
        return cls(info.model, config, executor)

    def add_request(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        params: SamplingParams | None = None,
        stop_token_ids: Iterable[int] = (),
    ) -> int:
        """Queue a request and return its id. Raises :class:`InputError` for one that can never run."""
        sequence = self.make_request(prompt, max_new_tokens, params=params, stop_token_ids=stop_token_ids)
        self.add(sequence)
        return sequence.request_id

    def make_request(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        params: SamplingParams | None = None,
        stop_token_ids: Iterable[int] = (),
    ) -> RunningSequence:
        """A checked request for :meth:`add`. The one method that any thread may call."""
        self.validate(prompt, max_new_tokens)
        if params is not None:
            params.check_vocabulary(self.model.vocab_size)
        return RunningSequence(
            next(self._ids), list(prompt), max_new_tokens, params or SamplingParams(), frozenset(stop_token_ids)
        )

    def add(self, sequence: RunningSequence) -> None:
        self._requests[sequence.request_id] = sequence
        self.scheduler.add(sequence)

    def validate(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Raise :class:`InputError`, with the numbers, unless the request can run on this engine."""
        check_request(self.model, self.config, prompt, max_new_tokens)
        total = len(prompt) + max_new_tokens
        blocks = self.scheduler.blocks
        if blocks.blocks_for(total) > blocks.usable:
            raise InputError(
                f"{total} tokens need {blocks.blocks_for(total)} KV blocks of {self.config.tokens_per_block} tokens; "
                f"the cache has {blocks.usable}"
            )

    def cancel(self, request_id: int) -> bool:
        """Drop a request and free its blocks; False when it is unknown or already finished."""
        sequence = self._requests.pop(request_id, None)
        if sequence is None:
            return False
        self.scheduler.finish(sequence)
        return True

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests) or self._inflight is not None

    def step(self) -> list[Output]:
        """Run one step and return what became known. On an asynchronous executor that is the step before."""
        outputs: list[Output] = []
        try:
            plan = self.scheduler.schedule()
        except DrainFirst:
            outputs, self._inflight = self._read(self._inflight), None
            plan = self.scheduler.schedule()
        previous, self._inflight = self._inflight, self._submit(plan) if plan else None
        if not self.executor.asynchronous:
            previous, self._inflight = self._inflight, None
        return outputs + self._read(previous)

    def _submit(self, plan: Plan) -> tuple[Plan, StepHandle]:
        for sequence in plan.admitted:
            self.executor.bind(sequence.slot, sequence.params, sequence.prompt, sequence.output)
        for sequence in plan.grown:
            self.executor.set_block_table(sequence.slot, sequence.table)
        self.steps += 1
        return plan, self.executor.submit(Step(tuple(chunk for _, chunk in plan.work)))

    def _read(self, step: tuple[Plan, StepHandle] | None) -> list[Output]:
        if step is None:
            return []
        plan, handle = step
        sampling = [sequence for sequence, chunk in plan.work if chunk.samples]
        outputs = []
        for sequence, token, logprobs in zip(sampling, handle.tokens(), handle.logprobs()):
            if sequence.finished:
                continue  # cancelled, or stopped while this step was already on its way
            sequence.output.append(token)
            self.tokens_generated += 1
            reason: FinishReason | None = None
            if token in sequence.stop_token_ids:
                reason = "stop"
            elif len(sequence.output) == sequence.max_new_tokens:
                reason = "length"
            if reason:
                self.scheduler.finish(sequence)
                del self._requests[sequence.request_id]
            outputs.append(Output(sequence.request_id, [token], reason, logprobs and [logprobs]))
        return outputs


def pick_device(device: str) -> torch.device:
    """Resolve auto, cpu or cuda. Raises :class:`InputError` when CUDA is asked for and absent."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA GPU is visible to PyTorch: use --device cpu, or check nvidia-smi and the torch build")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def make_executor(
    engine_dir: Path, model: ModelConfig, config: EngineConfig, device: torch.device, kernels: str, threads: int | None
) -> Executor:
    """The fastest executor for ``device`` that supports this model, or the PyTorch reference for kernels="torch"."""
    choices = ("auto", "stream", "triton", "torch") if device.type == "cuda" else ("auto", "torch")
    if kernels not in choices:
        raise InputError(f"kernels must be one of {', '.join(choices)} on {device.type}, got {kernels!r}")
    weights = load_weights(engine_dir, model, device)
    if device.type == "cuda" and kernels != "torch":
        from llama_engine.cuda_executor import CudaExecutor
        from llama_engine.kernels.tuning import load_tuning

        return CudaExecutor(model, config, weights, tuning=load_tuning(engine_dir), kernels=kernels)
    config = replace(config, num_kv_blocks=config.num_kv_blocks or config.useful_kv_blocks)
    if kernels == "auto" and cpu.supported(model, config, weights):
        try:
            library = cpu.compile_library(engine_dir / "kernels")
        except (RunError, OSError) as error:  # an old compiler, a read-only directory: slower, not fatal
            print(f"note: no fused CPU kernel, running on PyTorch operations ({error})", file=sys.stderr)
            library = None
        if library is not None:
            threads = threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
            return HostExecutor(cpu.CpuModel(library, model, config, weights, threads), model, config, weights)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return HostExecutor(TorchModel(model, config, weights, dtype), model, config, weights)
