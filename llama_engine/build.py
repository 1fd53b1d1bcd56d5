"""Unified checkpoint to native engine directory.

engine.json         configuration, hashes, where it came from
engine.safetensors  the tensors of llama_engine/weights.py: any checkpoint layout undone, qkv and gate_up stacked
tokenizer files     so that the directory alone can serve text
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_engine.checkpoint import DTYPES, EMBEDDING, FINAL_NORM, LM_HEAD, Checkpoint
from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.errors import InputError
from llama_engine.files import (
    TensorFileWriter,
    atomic_dir,
    byte_progress,
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
FORMAT_VERSION = 1
WEIGHTS = {"native": WEIGHTS_FILE, "tensorrt_llm": "rank0.engine"}


@dataclass(frozen=True)
class EngineInfo:
    """What ``engine.json`` says. ``identity`` is the model's name, source and sha256."""

    model: ModelConfig
    engine: EngineConfig
    checkpoint_sha256: str
    weights_sha256: str
    identity: dict[str, str]


@dataclass(frozen=True)
class _Part:
    """Rows of an engine tensor from ``start`` on are those of checkpoint tensor ``source`` (``shape`` out, in)."""

    name: str
    start: int
    source: str
    shape: tuple[int, ...]


def build_native(
    checkpoint_dir: Path | str,
    output_dir: Path | str,
    engine_config: EngineConfig,
    *,
    force: bool = False,
    progress: bool = True,
) -> None:
    """Build the engine directory. Raises :class:`InputError`; a failed build leaves nothing behind."""
    source = Checkpoint(checkpoint_dir)
    config = source.config
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
    int8 = source.quant_algo == "W8A16"
    quantized = {name for name, _ in tensor_names(config) if int8 and name.rsplit(".", 1)[-1] in LINEARS}
    if engine_config.lm_head == "int8":
        quantized.add("lm_head")

    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in tensor_names(config):
        specs[name] = (torch.int8 if name in quantized else DTYPES[source.dtype_name], shape)
        if name in quantized:
            specs[f"{name}.scale"] = (torch.float32, shape[:1])

    jobs = [
        (part, rows)
        for part in _parts(config)
        for rows in row_chunks(part.shape[0], part.shape[1] if len(part.shape) > 1 else 1)
    ]
    with atomic_dir(Path(output_dir), force=force) as out:
        with (
            TensorFileWriter(out / WEIGHTS_FILE, specs, {}) as writer,
            byte_progress("building", writer.nbytes, progress) as advance,
        ):

            def run(job: tuple[_Part, tuple[int, int]]) -> None:
                advance(_write(*job, source, writer, job[0].name in quantized))

            parallel(run, jobs)
        finish(out, "native", source, engine_config)


def finish(out: Path, backend: str, source: Checkpoint, engine_config: EngineConfig) -> None:
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
        },
    )


def engine_backend(engine_dir: Path | str) -> str:
    """ "native" or "tensorrt_llm": what the engine directory was built for."""
    path = Path(engine_dir) / ENGINE_JSON
    if not path.is_file():
        raise InputError(f"{engine_dir} is not an engine ({ENGINE_JSON} is missing): run scripts/build_engine.sh")
    backend = read_json(path).get("backend")
    if backend not in WEIGHTS:
        raise InputError(f"{path}: unknown backend {backend!r}: build the engine again")
    return backend


def load_engine_json(
    engine_dir: Path | str, checkpoint_dir: Path | str | None = None, *, backend: str = "native"
) -> EngineInfo:
    """Read and check ``engine.json``; with ``checkpoint_dir``, also that the engine was built from it."""
    path = Path(engine_dir) / ENGINE_JSON
    found = engine_backend(engine_dir)
    if found != backend:
        raise InputError(f"{engine_dir} is an engine of backend {found}, not {backend}: give --backend {found}")
    data = read_json(path)
    if data.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {data.get('format_version')!r}, expected {FORMAT_VERSION}: build the engine again"
        )
    keys = {"format_version", "backend", "model", "engine", "checkpoint_sha256", "model_identity", "weights"}
    if set(data) != keys:
        raise InputError(f"{path}: unknown or missing keys {sorted(set(data) ^ keys)}: build the engine again")
    weights = Path(engine_dir) / WEIGHTS[backend]
    if not weights.is_file() or weights.stat().st_size != data["weights"]["bytes"]:
        raise InputError(f"{weights} is missing or does not belong to {path}: build the engine again")
    if checkpoint_dir is not None and Checkpoint(checkpoint_dir).sha256() != data["checkpoint_sha256"]:
        raise InputError(f"{engine_dir} was built from another checkpoint than {checkpoint_dir}: build it again")
    return EngineInfo(
        model=ModelConfig.from_dict(data["model"]),
        engine=EngineConfig.from_dict(data["engine"]),
        checkpoint_sha256=data["checkpoint_sha256"],
        weights_sha256=data["weights"]["sha256"],
        identity=data["model_identity"],
    )


def _parts(config: ModelConfig) -> Iterator[_Part]:
    hidden, inter = config.hidden_size, config.intermediate_size
    yield _Part("embedding", 0, EMBEDDING, (config.vocab_size, hidden))
    for i in range(config.num_layers):
        here, there = f"layers.{i}", f"transformer.layers.{i}"
        yield _Part(f"{here}.input_norm", 0, f"{there}.input_layernorm.weight", (hidden,))
        yield _Part(f"{here}.qkv", 0, f"{there}.attention.qkv.weight", (config.qkv_size, hidden))
        yield _Part(f"{here}.o", 0, f"{there}.attention.dense.weight", (hidden, config.q_size))
        yield _Part(f"{here}.post_norm", 0, f"{there}.post_layernorm.weight", (hidden,))
        # TensorRT-LLM calls gate_proj "fc" and up_proj "gate".
        yield _Part(f"{here}.gate_up", 0, f"{there}.mlp.fc.weight", (inter, hidden))
        yield _Part(f"{here}.gate_up", inter, f"{there}.mlp.gate.weight", (inter, hidden))
        yield _Part(f"{here}.down", 0, f"{there}.mlp.proj.weight", (hidden, inter))
    yield _Part("final_norm", 0, FINAL_NORM, (hidden,))
    yield _Part("lm_head", 0, LM_HEAD, (config.vocab_size, hidden))


def _write(part: _Part, rows: tuple[int, int], source: Checkpoint, writer: TensorFileWriter, quantized: bool) -> int:
    data = source.read(part.source, rows, part.shape)
    if quantized:
        if data.dtype == torch.int8:
            scale = source.scale(part.source)[rows[0] : rows[1]]
        else:
            data, scale = quantize(data)
            if part.name != "lm_head":
                # What trtllm-build would store for the same weights.
                scale = scale.to(DTYPES[source.dtype_name])
        writer.write(f"{part.name}.scale", part.start + rows[0], scale.float())
    writer.write(part.name, part.start + rows[0], data)
    return data.nbytes
