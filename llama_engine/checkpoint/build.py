"""Unified checkpoint to native engine directory.

engine.json         configuration, hashes, where it came from, what integer activations lose in each layer
engine.safetensors  the tensors of llama_engine/model/weights.py: any checkpoint layout undone, qkv and gate_up stacked
tokenizer files     so that the directory alone can serve text
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_engine.checkpoint.calibration import activation_losses, calibration_ids
from llama_engine.checkpoint.packing import quantize
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.checkpoint.unified import DTYPES, EMBEDDING, FINAL_NORM, LM_HEAD
from llama_engine.config import EngineConfig
from llama_engine.engine_dir import ENGINE_JSON, FORMAT_VERSION, WEIGHTS, WEIGHTS_FILE
from llama_engine.errors import InputError
from llama_engine.files import TOKENIZER_FILES, atomic_dir, copy_tokenizer, read_json, sha256_file, write_json
from llama_engine.model.schemes import BF16, FP16, INT4, INT8, default_group, held_shape, pack_int4, scheme_for
from llama_engine.model.weights import LINEARS, stored_name, tensor_names
from llama_engine.tensor_files import Specs, TensorFileWriter, parallel, row_chunks

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


def build_native(checkpoint_dir: Path, output_dir: Path, engine_config: EngineConfig, *, force: bool = False) -> None:
    """Build the engine directory. Raises :class:`InputError`; a failed build leaves nothing behind."""
    source = Checkpoint(checkpoint_dir)
    config, dtype = source.config, DTYPES[source.dtype_name]
    ranks = source.tp_size
    config.share(ranks)
    if engine_config.max_seq_len > config.max_position_embeddings:
        raise InputError(
            f"--max_seq_len {engine_config.max_seq_len} is more than the {config.max_position_embeddings} positions "
            "that the model has"
        )
    scheme = scheme_for(source.quant_algo, dtype)
    if ranks > 1 and (source.plain or scheme not in (INT8, FP16, BF16)):
        raise InputError(
            f"{checkpoint_dir} is {source.quant_algo}, split over {ranks} ranks; tensor parallelism is for INT8 and "
            "16-bit matrices: convert with --tp_size 1"
        )
    integers = dict.fromkeys(LINEARS, scheme) if scheme in (INT8, INT4) else {}
    if engine_config.lm_head == "int8":
        integers["lm_head"] = INT8
    widths = (config.hidden_size, config.q_size, config.intermediate_size)
    group = default_group(widths, source.group if source.plain else None) if scheme is INT4 else 0

    specs: Specs = {}
    # engine tensor, its row, checkpoint tensor, rows of that, rank
    jobs: list[tuple[str, int, str, tuple[int, int], int]] = []
    for rank, (bare, shape) in itertools.product(range(ranks), tensor_names(config, ranks)):
        layer, _, kind = bare.rpartition(".")
        if (name := stored_name(bare, rank, ranks)) in specs:
            continue
        sources = [f"transformer.{layer}.{part}.weight" for part in LAYER_SOURCES[kind]] if layer else SOURCES[kind]
        held = source.plain.get(sources[0]) or integers.get(kind)
        specs[name] = (dtype, shape)
        if held:
            weight, scales = held_shape(held, shape, group)
            specs[name] = (held.weight_dtype, weight)
            specs[f"{name}.scale"] = (held.scale_dtype, scales)
        rows = shape[0] // len(sources)
        for i, part in enumerate(sources):
            jobs += [(name, i * rows, part, chunk, rank) for chunk in row_chunks(rows, math.prod(shape[1:]))]

    with atomic_dir(output_dir, own_names, inputs=[checkpoint_dir], force=force) as out:
        writer = TensorFileWriter(out / WEIGHTS_FILE, specs)

        def write(job: tuple[str, int, str, tuple[int, int], int]) -> int:
            name, first, part, (start, stop), rank = job
            data = source.read(part, (start, stop), rank)
            if f"{name}.scale" in specs:
                if data.dtype in (specs[name][0], torch.int8):
                    scale = source.scale(part, rank)[start:stop]
                    if data.dtype != specs[name][0]:  # INT4 with a scale a row
                        data, scale = pack_int4(data, group), scale[:, None].expand(-1, data.shape[1] // group)
                else:
                    data, scale = quantize(data)
                    if not name.endswith("lm_head"):
                        scale = scale.to(dtype)  # what trtllm-build would store for the same weights
                writer.write(f"{name}.scale", first + start, scale.to(specs[f"{name}.scale"][0]))
            writer.write(name, first + start, data)
            return data.nbytes

        parallel(write, jobs, "building", writer.nbytes)
        losses = []
        if integers:
            losses = activation_losses(out / WEIGHTS_FILE, config, calibration_ids(source.dir, config), ranks)
        complete(out, "native", source, engine_config, losses)


def own_names(path: Path) -> tuple[str, ...]:
    """What an engine directory of either backend holds, as patterns; nothing for any other directory."""
    try:
        ours = {"format_version", "backend", "weights"} <= read_json(path / ENGINE_JSON).keys()
    except InputError:
        ours = False
    added = ("config.json", "model.cache", "kernels", "tuning.json")  # trtllm-build's; compiled and tuned here
    return (ENGINE_JSON, WEIGHTS_FILE, "rank*.engine", *added, *TOKENIZER_FILES) if ours else ()


def complete(
    out: Path, backend: str, source: Checkpoint, engine_config: EngineConfig, losses: Sequence[float] = (), **more: Any
) -> None:
    """Add to a directory that holds the weights what makes it an engine: tokenizer files and ``engine.json``, with
    ``more`` keys."""
    copy_tokenizer(source.dir, out)
    weights = out / WEIGHTS[backend]
    write_json(
        out / ENGINE_JSON,
        {
            "format_version": FORMAT_VERSION,
            "backend": backend,
            "model": source.config.to_dict(),
            "engine": replace(engine_config, kv_cache=source.kv_cache, tp_size=source.tp_size).to_dict(),
            "checkpoint_sha256": source.sha256(),
            "model_identity": source.identity,
            "quant_algo": source.quant_algo,
            "weights": {"bytes": weights.stat().st_size, "sha256": sha256_file(weights)},
            "activation_losses": list(losses),
            **more,
        },
    )
