"""TensorRT-LLM as a backend: which one ``auto`` means, building with ``trtllm-build``, running with ModelRunnerCpp.

Signatures are those of release 0.15.0 (docs/TENSORRT_LLM.md). Nothing of the package is imported before it is used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from llama_engine.build import EngineInfo, finish, load_engine_json
from llama_engine.checkpoint import Checkpoint
from llama_engine.config import EngineConfig
from llama_engine.errors import InputError, RunError
from llama_engine.files import atomic_dir
from llama_engine.quantization import layout_for
from llama_engine.sampling import require_int_ids

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


class TensorRTRunner:
    """A TensorRT engine behind the face of :class:`llama_engine.runner.ModelRunner`."""

    def __init__(self, runner: Any, info: EngineInfo) -> None:
        self.runner, self.info = runner, info

    @classmethod
    def from_dir(
        cls,
        engine_dir: str | Path,
        *,
        kv_cache_free_gpu_memory_fraction: float | None = None,
        cuda_graph_mode: bool = True,
    ) -> TensorRTRunner:
        """Load a TensorRT engine on the first GPU. Raises :class:`InputError`; :class:`RunError` if loading fails."""
        info = load_engine_json(engine_dir, backend="tensorrt_llm")
        if not installed():
            raise InputError(f"TensorRT-LLM is not installed: {INSTALL}")
        from tensorrt_llm.runtime import ModelRunnerCpp

        fraction = kv_cache_free_gpu_memory_fraction or info.engine.kv_cache_free_gpu_memory_fraction
        try:
            runner = ModelRunnerCpp.from_dir(
                str(engine_dir),
                rank=0,
                max_batch_size=info.engine.max_batch_size,
                max_beam_width=1,
                kv_cache_free_gpu_memory_fraction=float(fraction),
                cuda_graph_mode=cuda_graph_mode,
            )
        except (AssertionError, RuntimeError) as error:
            raise RunError(f"TensorRT-LLM could not load {engine_dir}: {error}") from error
        return cls(runner, info)

    @property
    def max_batch_size(self) -> int:
        return self.info.engine.max_batch_size

    @property
    def max_seq_len(self) -> int:
        return self.info.engine.max_seq_len

    def generate(
        self,
        batch_input_ids: Sequence[torch.Tensor],
        *,
        max_new_tokens: int = 1,
        end_id: int,
        pad_id: int,
        temperature: float = 1.0,
        top_k: int = 1,
        top_p: float = 1.0,
        random_seed: int = 0,
        streaming: bool = False,
        return_dict: bool = False,
        output_sequence_lengths: bool = False,
    ) -> Any:
        """As :meth:`llama_engine.runner.ModelRunner.generate`; an ``end_id`` of -1 cannot occur, so EOS is ignored."""
        require_int_ids(end_id=end_id, pad_id=pad_id)
        prompts = [torch.as_tensor(ids, dtype=torch.int32) for ids in batch_input_ids]
        self._validate(prompts, max_new_tokens)
        width = max(prompt.numel() for prompt in prompts) + max_new_tokens
        # ModelRunnerCpp drops keywords it does not know without a word; these are all among those it accepts.
        result = self.runner.generate(
            prompts,
            max_new_tokens=max_new_tokens,
            end_id=end_id,
            pad_id=pad_id,
            temperature=float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
            random_seed=int(random_seed),
            streaming=streaming,
            return_dict=return_dict,
            output_sequence_lengths=output_sequence_lengths,
        )
        return _stream(result, width) if streaming else _trim(result, width)

    def _validate(self, prompts: list[torch.Tensor], max_new_tokens: int) -> None:
        model, limits = self.info.model, self.info.engine
        if not prompts or any(prompt.dim() != 1 or not prompt.numel() for prompt in prompts):
            raise InputError("batch_input_ids must be a list of 1-D tensors with at least one token id each")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if len(prompts) > limits.max_batch_size:
            raise InputError(f"{len(prompts)} prompts, but the engine was built for {limits.max_batch_size} at once")
        for prompt in prompts:
            if not 0 <= int(prompt.min()) <= int(prompt.max()) < model.vocab_size:
                raise InputError(f"token ids must be in 0..{model.vocab_size - 1}")
            if prompt.numel() + max_new_tokens > limits.max_seq_len:
                raise InputError(
                    f"prompt of {prompt.numel()} tokens and {max_new_tokens} new ones are more than the engine's "
                    f"max_seq_len {limits.max_seq_len}: build with a larger --max_seq_len"
                )


def _trim(result: Any, width: int) -> Any:
    """TensorRT-LLM pads to the engine's max_seq_len; nothing lies beyond ``width``. Bring it to the host."""
    if isinstance(result, dict):
        return {
            key: _trim(value, width) if key == "output_ids" else value.cpu()
            for key, value in result.items()
            if isinstance(value, torch.Tensor)
        }
    return result[..., :width].cpu()


def _stream(results: Iterator[Any], width: int) -> Iterator[Any]:
    for result in results:
        yield _trim(result, width)
