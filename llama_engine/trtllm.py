"""TensorRT-LLM as a backend: which one ``auto`` means, and building with ``trtllm-build``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
from pathlib import Path

import torch

from llama_engine.build import finish
from llama_engine.checkpoint import Checkpoint
from llama_engine.config import EngineConfig
from llama_engine.errors import InputError, RunError
from llama_engine.files import atomic_dir
from llama_engine.quantization import layout_for

INSTALL = "pip install -r requirements-trtllm.txt, or use --backend native"


def installed() -> bool:
    """Whether the package ``tensorrt_llm`` can be imported; it is not imported."""
    return importlib.util.find_spec("tensorrt_llm") is not None


def pick_backend(backend: str) -> str:
    """Resolve "auto" and say what it became. Raises :class:`InputError` for an unknown name."""
    if backend == "auto":
        backend = "tensorrt_llm" if installed() else "native"
        print(f"backend: {backend} (TensorRT-LLM is {'' if backend == 'tensorrt_llm' else 'not '}installed)")
    if backend not in ("native", "tensorrt_llm"):
        raise InputError(f"unknown backend {backend!r}: auto, native or tensorrt_llm")
    return backend


def build_command(
    checkpoint_dir: Path | str, output_dir: Path | str, engine: EngineConfig, flags: dict[str, str]
) -> list[str]:
    """The ``trtllm-build`` command. ``--max_seq_len`` is always given: its default is the model's whole context."""
    command = ["trtllm-build", "--checkpoint_dir", str(checkpoint_dir), "--output_dir", str(output_dir)]
    for name, value in flags.items():
        command += [f"--{name}", value]
    for name in ("max_batch_size", "max_seq_len", "max_num_tokens", "tokens_per_block"):
        command += [f"--{name}", str(getattr(engine, name))]
    return command


def build(
    checkpoint_dir: Path | str,
    output_dir: Path | str,
    engine: EngineConfig,
    flags: dict[str, str],
    *,
    force: bool = False,
) -> None:
    """Run ``trtllm-build``; its output is shown. Raises :class:`InputError` or :class:`RunError`."""
    if not installed() or shutil.which("trtllm-build") is None:
        raise InputError(f"TensorRT-LLM is not installed: {INSTALL}")
    source = Checkpoint(checkpoint_dir)
    _check_layout(source)
    with atomic_dir(Path(output_dir), force=force) as out:
        code = subprocess.run(build_command(checkpoint_dir, out, engine, flags), check=False).returncode
        if code:
            raise RunError(f"trtllm-build failed with exit code {code}; its own messages are above")
        finish(out, "tensorrt_llm", source, engine)


def _check_layout(source: Checkpoint) -> None:
    """TensorRT-LLM loads INT8 bytes unchecked, so a wrong layout would give wrong answers, not an error."""
    if source.layout is None or not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability()
    version = importlib.metadata.version("tensorrt_llm")
    needed = layout_for(f"sm{major}{minor}", version)
    if needed != source.layout:
        raise InputError(
            f"{source.dir} is packed as {source.layout.name}, but sm{major}{minor} and TensorRT-LLM {version} "
            f"need {needed.name}: convert with --target_arch sm{major}{minor} --trtllm_version {version}, or "
            "--quantize_at_build"
        )
