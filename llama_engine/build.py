"""Unified checkpoint to native engine directory.

engine.json         configuration, hashes, where it came from, what integer activations lose in each layer
engine.safetensors  the tensors of llama_engine/weights.py: any checkpoint layout undone, qkv and gate_up stacked
tokenizer files     so that the directory alone can serve text
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_engine.calibration import BUDGET, activation_losses, calibration_ids
from llama_engine.checkpoint import DTYPES, EMBEDDING, FINAL_NORM, LM_HEAD, Checkpoint
from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError, RunError
from llama_engine.files import (
    Specs,
    TensorFileWriter,
    atomic_dir,
    copy_tokenizer,
    parallel,
    read_json,
    row_chunks,
    sha256_file,
    write_json,
)
from llama_engine.quantization import quantize
from llama_engine.weights import LINEARS, WEIGHTS_FILE, tensor_names

ENGINE_JSON = "engine.json"
FORMAT_VERSION = 2
WEIGHTS = {"native": WEIGHTS_FILE, "tensorrt_llm": "rank0.engine"}
# The checkpoint tensors whose rows an engine tensor stacks. TensorRT-LLM calls gate_proj "fc" and up_proj "gate".
SOURCES = {"embedding": (EMBEDDING,), "final_norm": (FINAL_NORM,), "lm_head": (LM_HEAD,)}
LAYER_SOURCES = {
    "input_norm": ("input_layernorm",),
    "qkv": ("attention.qkv",),
    "o": ("attention.dense",),
    "post_norm": ("post_layernorm",),
    "gate_up": ("mlp.fc", "mlp.gate"),
    "down": ("mlp.proj",),
}


@dataclass(frozen=True)
class EngineInfo:
    """What ``engine.json`` says. ``identity`` is the model's name, source and sha256; ``activation_losses`` what
    :func:`llama_engine.calibration.activation_losses` found, empty for matrices that no integer kernel runs."""

    backend: str
    model: ModelConfig
    engine: EngineConfig
    checkpoint_sha256: str
    weights_sha256: str
    identity: dict[str, str]
    activation_losses: list[float]

    @property
    def needs_float_activations(self) -> bool:
        """Whether some layer loses more than the budget in the fused kernels, so that PyTorch's must run."""
        return max(self.activation_losses, default=0.0) > BUDGET


def build_native(checkpoint_dir: Path, output_dir: Path, engine_config: EngineConfig, *, force: bool = False) -> None:
    """Build the engine directory. Raises :class:`InputError`; a failed build leaves nothing behind."""
    source = Checkpoint(checkpoint_dir)
    config, dtype = source.config, DTYPES[source.dtype_name]
    if source.tp_size != 1:
        raise InputError(
            f"{checkpoint_dir} is split over {source.tp_size} ranks, each with scales of its own; the native engine "
            "runs on one device: convert with --tp_size 1"
        )
    if engine_config.max_seq_len > config.max_position_embeddings:
        raise InputError(
            f"--max_seq_len {engine_config.max_seq_len} is more than the {config.max_position_embeddings} positions "
            "that the model has"
        )
    int8 = LINEARS if source.quant_algo == "W8A16" else ()
    if engine_config.lm_head == "int8":
        int8 = (*int8, "lm_head")

    specs: Specs = {}
    jobs: list[tuple[str, int, str, tuple[int, int]]] = []  # engine tensor, its row, checkpoint tensor, rows of that
    for name, shape in tensor_names(config):
        layer, _, kind = name.rpartition(".")
        quantized = kind in int8
        specs[name] = (torch.int8 if quantized else dtype, shape)
        if quantized:
            specs[f"{name}.scale"] = (torch.float32, shape[:1])
        sources = [f"transformer.{layer}.{part}.weight" for part in LAYER_SOURCES[kind]] if layer else SOURCES[kind]
        rows = shape[0] // len(sources)
        for i, part in enumerate(sources):
            jobs += [(name, i * rows, part, chunk) for chunk in row_chunks(rows, math.prod(shape[1:]))]

    with atomic_dir(output_dir, force=force) as out:
        writer = TensorFileWriter(out / WEIGHTS_FILE, specs)

        def write(job: tuple[str, int, str, tuple[int, int]]) -> int:
            name, first, part, (start, stop) = job
            data = source.read(part, (start, stop))
            if f"{name}.scale" in specs:
                if data.dtype == torch.int8:
                    scale = source.scale(part)[start:stop]
                else:
                    data, scale = quantize(data)
                    if name != "lm_head":
                        scale = scale.to(dtype)  # what trtllm-build would store for the same weights
                writer.write(f"{name}.scale", first + start, scale.float())
            writer.write(name, first + start, data)
            return data.nbytes

        parallel(write, jobs, "building", writer.nbytes)
        losses = activation_losses(out / WEIGHTS_FILE, config, calibration_ids(source.dir, config)) if int8 else []
        finish(out, "native", source, engine_config, losses)


def finish(
    out: Path, backend: str, source: Checkpoint, engine_config: EngineConfig, losses: Sequence[float] = ()
) -> None:
    """Add to a directory that holds the weights what makes it an engine: tokenizer files and ``engine.json``."""
    copy_tokenizer(source.dir, out)
    weights = out / WEIGHTS[backend]
    write_json(
        out / ENGINE_JSON,
        {
            "format_version": FORMAT_VERSION,
            "backend": backend,
            "model": source.config.to_dict(),
            "engine": engine_config.to_dict(),
            "checkpoint_sha256": source.sha256(),
            "model_identity": source.identity,
            "weights": {"bytes": weights.stat().st_size, "sha256": sha256_file(weights)},
            "activation_losses": list(losses),
        },
    )


def prepare_machine(engine_dir: Path) -> list[str]:
    """Compile and tune the engine's kernels for this machine, as far as it can; one line a thing done or left out.

    An engine moved to another machine compiles at its first load, or runs untuned.
    """
    from llama_engine.kernels import cpu

    if load_engine_json(engine_dir).needs_float_activations:
        return ["PyTorch operations: a layer's activations hold channels too large for integers with one scale a token"]
    try:
        library = cpu.compile_library(engine_dir / "kernels")
        lines = [f"CPU kernel: {library.name if library else 'no C++ compiler, PyTorch operations'}"]
    except RunError as error:
        lines = [f"CPU kernel: {error}"]
    if torch.cuda.is_available():
        from llama_engine.kernels.tuning import tune_engine

        lines.append(tune_engine(engine_dir))
    return lines


def load_engine_json(engine_dir: Path | str, *, backend: str = "native") -> EngineInfo:
    """Read and check ``engine.json``; ``backend`` auto takes any.

    Raises :class:`InputError` for another backend and a damaged directory.
    """
    path = Path(engine_dir) / ENGINE_JSON
    if not path.is_file():
        raise InputError(f"{engine_dir} is not an engine ({ENGINE_JSON} is missing): run scripts/build_engine.sh")
    data = read_json(path)
    found = data.get("backend")
    if found not in WEIGHTS:
        raise InputError(f"{path}: unknown backend {found!r}: build the engine again")
    if backend not in ("auto", found):
        raise InputError(
            f"{engine_dir} is an engine of backend {found}, but this needs one of backend {backend}: build one with "
            f"scripts/build_engine.sh --backend {backend}"
        )
    if data.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {data.get('format_version')!r}, expected {FORMAT_VERSION}: build the engine again"
        )
    keys = {"format_version", "backend", "model", "engine", "checkpoint_sha256", "model_identity", "weights"}
    keys |= {"activation_losses"}
    if set(data) != keys:
        raise InputError(f"{path}: unknown or missing keys {sorted(set(data) ^ keys)}: build the engine again")
    weights = Path(engine_dir) / WEIGHTS[found]
    if not weights.is_file() or weights.stat().st_size != data["weights"]["bytes"]:
        raise InputError(f"{weights} is missing or does not belong to {path}: build the engine again")
    return EngineInfo(
        backend=found,
        model=ModelConfig.from_dict(data["model"]),
        engine=EngineConfig.from_dict(data["engine"]),
        checkpoint_sha256=data["checkpoint_sha256"],
        weights_sha256=data["weights"]["sha256"],
        identity=data["model_identity"],
        activation_losses=data["activation_losses"],
    )
