"""The native backend: from an engine directory to an :class:`Engine` on the fastest executor of its device."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.cpu import fused
from llama_engine.cpu.executor import HostExecutor
from llama_engine.device import pick_device
from llama_engine.engine.engine import Engine
from llama_engine.engine.executor import Executor
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError, RunError
from llama_engine.model.llama import TorchModel
from llama_engine.model.schemes import FP8
from llama_engine.model.weights import LINEARS, load_weights


def load_engine(
    engine_dir: str | Path, *, device: str = "auto", kernels: str = "auto", threads: int | None = None, **changes: Any
) -> Engine:
    """Load a built engine. ``device`` is auto, cpu or cuda; ``kernels`` auto (fused) or torch (the reference); on
    a GPU also stream or triton (:class:`llama_engine.gpu.executor.CudaExecutor`). ``changes`` replace fields of
    the :class:`EngineConfig` it was built with.

    Raises :class:`InputError` for a missing or damaged engine or an unavailable device.
    """
    info = load_engine_json(Path(engine_dir))
    config = replace(info.engine, **changes)
    executor = make_executor(Path(engine_dir), info.model, config, pick_device(device), kernels, threads)
    return Engine(info.model, config, executor)


def make_executor(
    engine_dir: Path, model: ModelConfig, config: EngineConfig, device: torch.device, kernels: str, threads: int | None
) -> Executor:
    """The fastest executor for ``device`` that supports this model, or the PyTorch reference for kernels="torch"."""
    choices = ("auto", "stream", "triton", "torch") if device.type == "cuda" else ("auto", "torch")
    if kernels not in choices:
        raise InputError(f"kernels must be one of {', '.join(choices)} on {device.type}, got {kernels!r}")
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


def prepare_machine(engine_dir: Path) -> list[str]:
    """Compile and tune the engine's kernels for this machine, as far as it can; one line a thing done or left out.

    An engine moved to another machine compiles at its first load, or runs untuned.
    """
    try:
        library = fused.compile_library(engine_dir / "kernels")
        lines = [f"CPU kernel: {library.name if library else 'no C++ compiler, PyTorch operations'}"]
    except RunError as error:
        lines = [f"CPU kernel: {error}"]
    if torch.cuda.is_available():
        from llama_engine.gpu.tuner import tune_engine

        lines.append(tune_engine(engine_dir))
    return lines
