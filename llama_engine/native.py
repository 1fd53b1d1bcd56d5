"""The native backend: from an engine directory to an :class:`Engine` on the fastest executor of its device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_engine.backend import Batch
from llama_engine.config import KERNELS, EngineConfig, ModelConfig
from llama_engine.cpu import fused
from llama_engine.cpu.executor import HostExecutor
from llama_engine.device import pick_device
from llama_engine.engine.engine import Engine
from llama_engine.engine.executor import Executor
from llama_engine.engine.scheduler import Sequence
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError, RunError
from llama_engine.model.llama import SplitModel, TorchModel
from llama_engine.model.schemes import FP8
from llama_engine.model.weights import LINEARS, load_weights


def load_engine(
    engine_dir: str | Path, *, device: str = "auto", kernels: str = "auto", threads: int | None = None, **changes: Any
) -> Engine:
    """Load a built engine. ``device`` is auto, cpu or cuda; ``kernels`` auto (fused) or torch (the reference); on
    a GPU also streaming or tiled (:class:`llama_engine.gpu.executor.CudaExecutor`). auto is torch where the build
    found that a layer's activations do not bear the fused kernels' integers. ``changes`` replace fields of the
    :class:`EngineConfig` it was built with.

    Raises :class:`InputError` for a missing or damaged engine or an unavailable device.
    """
    info = load_engine_json(Path(engine_dir))
    config = replace(info.engine, **changes)
    if kernels == "auto" and info.needs_float_activations:
        worst = max(info.activation_losses)
        where = f"integer activations lose {worst:.1%} in layer {info.activation_losses.index(worst)}"
        print(f"note: {where}, running on PyTorch operations, which are slower", file=sys.stderr)
        kernels = "torch"
    executor = make_executor(Path(engine_dir), info.model, config, pick_device(device), kernels, threads)
    return Engine(info.model, config, executor)


def make_executor(
    engine_dir: Path, model: ModelConfig, config: EngineConfig, device: torch.device, kernels: str, threads: int | None
) -> Executor:
    """The fastest executor for ``device`` that supports this model, or the PyTorch reference for kernels="torch".

    Tensor-parallel ranks take the first GPUs that are visible, one each, or share a CPU.
    """
    choices = KERNELS if device.type == "cuda" else ("auto", "torch")
    if kernels not in choices:
        raise InputError(f"kernels must be one of {', '.join(choices)} on {device.type}, got {kernels!r}")
    if config.tp_size > 1:
        return _split_executor(engine_dir, model, config, device, kernels)
    weights = load_weights(engine_dir, model, device)
    if device.type == "cuda" and kernels != "torch":
        from llama_engine.gpu.executor import CudaExecutor
        from llama_engine.kernels.tiles import load_tuning

        return CudaExecutor(model, config, weights, tuning=load_tuning(engine_dir), kernels=kernels)
    if device.type == "cpu" and any(getattr(layer, name).scheme is FP8 for layer in weights.layers for name in LINEARS):
        print("note: FP8 matrices run on a CPU by exact emulation in PyTorch operations, slowly", file=sys.stderr)
    config = replace(config, num_kv_blocks=config.num_kv_blocks or config.useful_kv_blocks)
    if kernels == "auto" and fused.supported(model, config, weights):
        try:
            library = fused.compile_library(engine_dir / "kernels")
        except (RunError, OSError) as error:  # an old compiler, a read-only directory: slower, not fatal
            print(f"note: no fused CPU kernel, running on PyTorch operations ({error})", file=sys.stderr)
            library = None
        if library is not None:
            threads = threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
            return HostExecutor(fused.CpuModel(library, model, config, weights, threads), model, config, weights)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return HostExecutor(TorchModel(model, config, weights, dtype), model, config, weights)


def _split_executor(
    engine_dir: Path, model: ModelConfig, config: EngineConfig, device: torch.device, kernels: str
) -> Executor:
    """:func:`make_executor` of an engine of several ranks."""
    ranks, share = config.tp_size, model.share(config.tp_size)
    devices = [device] * ranks
    if device.type == "cuda":
        if (count := torch.cuda.device_count()) < ranks:
            raise InputError(f"{engine_dir} is split over {ranks} GPUs (--tp_size), and PyTorch sees {count} of them")
        devices = [torch.device("cuda", rank) for rank in range(ranks)]
    weights = [load_weights(engine_dir, model, place, rank, ranks) for rank, place in enumerate(devices)]
    if device.type == "cuda" and kernels != "torch":
        from llama_engine.gpu.tensor_parallel import TensorParallelExecutor
        from llama_engine.kernels.tiles import load_tuning

        return TensorParallelExecutor(share, config, weights, tuning=load_tuning(engine_dir), kernels=kernels)
    if kernels != "torch":
        print("note: ranks that share a CPU run on PyTorch operations: convert with --tp_size 1", file=sys.stderr)
    config = replace(config, num_kv_blocks=config.num_kv_blocks or config.useful_kv_blocks)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    split = SplitModel([TorchModel(share, config, part, dtype) for part in weights])
    return HostExecutor(split, share, config, weights[0])


def prepare_machine(engine_dir: Path, like: Path | None = None) -> list[str]:
    """Compile and tune the engine's kernels for this machine, as far as it can; one line a thing done or left out.

    ``like``: an engine of the same geometry, whose tiles are taken and not timed again.

    An engine moved to another machine compiles at its first load, or runs untuned.
    """
    if load_engine_json(engine_dir).needs_float_activations:
        return ["PyTorch operations: a layer's activations hold channels too large for integers with one scale a token"]
    try:
        library = fused.compile_library(engine_dir / "kernels")
        lines = [f"CPU kernel: {library.name if library else 'no C++ compiler, PyTorch operations'}"]
    except RunError as error:
        lines = [f"CPU kernel: {error}"]
    if torch.cuda.is_available():
        from llama_engine.gpu.tuner import tune_engine

        lines.append(tune_engine(engine_dir, like))
    return lines


class NativeBackend:
    """Implements :class:`llama_engine.backend.Backend` over an :class:`Engine` in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.eos_token_ids = engine.model_config.eos_token_ids

    def answer(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if any(len(word) != 1 for words in batch.stop_words for word in words):
            raise InputError("stop_words_list: the native engine stops at words of one token only")
        end = (batch.end_id,) if batch.end_id >= 0 else ()
        sequences = [
            self.engine.make_request(
                prompt,
                batch.max_new_tokens,
                params=batch.params,
                stop_token_ids=(*end, *(word[0] for word in words)),
            )
            for prompt, words in zip(batch.prompts, batch.stop_words)
        ]
        return self._steps(batch, sequences)

    def _steps(self, batch: Batch, sequences: list[Sequence]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        output_ids = torch.full((len(batch.prompts), 1, batch.width), batch.end_id, dtype=torch.int32)
        lengths = torch.tensor([[len(prompt)] for prompt in batch.prompts], dtype=torch.int32)
        row_of = {}
        for row, sequence in enumerate(sequences):
            output_ids[row, 0, : len(sequence.prompt)] = torch.tensor(sequence.prompt, dtype=torch.int32)
            self.engine.add(sequence)
            row_of[sequence.request_id] = row
        try:
            while row_of:
                outputs = [output for output in self.engine.step() if output.request_id in row_of]
                for output in outputs:
                    row = row_of[output.request_id]
                    for token in output.token_ids:
                        output_ids[row, 0, lengths[row, 0]] = token
                        lengths[row, 0] += 1
                    if output.finished:
                        del row_of[output.request_id]
                    if isinstance(output.reason, RunError):
                        raise output.reason
                if outputs:
                    yield output_ids.clone(), lengths.clone()
        finally:
            for request_id in row_of:  # the caller left the iterator early
                self.engine.cancel(request_id)
