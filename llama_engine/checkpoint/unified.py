"""TensorRT-LLM's unified checkpoint for Llama: ``config.json`` and one ``rank{N}.safetensors`` a rank.

What TensorRT-LLM does not record (byte layout, target, source) lies in the ``llama_engine`` entry of each rank file's
safetensors metadata, which its loader ignores. Layout names and shapes: docs/TENSORRT_LLM.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from llama_engine.checkpoint.packing import Layout, check_packable, release_of
from llama_engine.config import ModelConfig
from llama_engine.errors import InputError
from llama_engine.model.schemes import FP8, FP8_ALL, FP8_ROWWISE, INT4, INT4_CHANNEL, INT4_GROUPS, Scheme, held_shape
from llama_engine.tensor_files import Specs

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
EMBEDDING, FINAL_NORM, LM_HEAD = "transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"
KV_QUANT_ALGOS = {"fp16": None, "fp8": "FP8"}
FP8_CLAMP = (-1200.0, 1200.0)  # TensorRT-LLM's default clamp_val


@dataclass(frozen=True)
class Piece:
    """Rows ``start ..`` of a checkpoint tensor come from these rows (and columns) of a Hugging Face tensor."""

    start: int
    source: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Target:
    """A checkpoint tensor of one rank: its logical shape (out, in) or (size,), and where its rows come from."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    linear: bool = False  # one of the matrices that a scheme may quantize


def check_tp(config: ModelConfig, tp: int) -> None:
    """Raise :class:`InputError` when the model cannot be split over ``tp`` ranks."""
    kv = config.num_kv_heads
    if tp < 1 or config.num_heads % tp or config.intermediate_size % tp or (kv % tp and tp % kv):
        raise InputError(
            f"--tp_size {tp} does not fit {config.num_heads} heads, {kv} KV heads and intermediate size "
            f"{config.intermediate_size}"
        )


def targets(config: ModelConfig, rank: int = 0, tp: int = 1) -> Iterator[Target]:
    """Every tensor of one rank. Heads, fc and gate split on out, dense and proj on in, lm_head on padded vocabulary."""
    hidden, vocab, embed = config.hidden_size, config.vocab_size, "model.embed_tokens.weight"

    def share(size: int) -> tuple[int, int]:
        return rank * size // tp, (rank + 1) * size // tp

    def norm(name: str, source: str) -> Target:
        return Target(name, (hidden,), (Piece(0, source, (0, hidden)),))

    def linear(name: str, *sources: tuple[str, tuple[int, int]], columns: tuple[int, int] | None = None) -> Target:
        pieces, rows = [], 0
        for source, (start, stop) in sources:
            pieces.append(Piece(rows, f"{there}.{source}.weight", (start, stop), columns))
            rows += stop - start
        width = columns[1] - columns[0] if columns else hidden
        return Target(f"{here}.{name}.weight", (rows, width), tuple(pieces), linear=True)

    q, inter = share(config.q_size), share(config.intermediate_size)
    # With fewer KV heads than ranks, neighbouring ranks hold the same head.
    first, heads = rank * config.num_kv_heads // tp, max(config.num_kv_heads // tp, 1)
    kv = (first * config.head_size, (first + heads) * config.head_size)

    yield Target(EMBEDDING, (vocab, hidden), (Piece(0, embed, (0, vocab)),))
    for i in range(config.num_layers):
        here, there = f"transformer.layers.{i}", f"model.layers.{i}"
        yield norm(f"{here}.input_layernorm.weight", f"{there}.input_layernorm.weight")
        yield norm(f"{here}.post_layernorm.weight", f"{there}.post_attention_layernorm.weight")
        yield linear("attention.qkv", ("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv))
        yield linear("attention.dense", ("self_attn.o_proj", (0, hidden)), columns=q)
        yield linear("mlp.fc", ("mlp.gate_proj", inter))
        yield linear("mlp.gate", ("mlp.up_proj", inter))
        yield linear("mlp.proj", ("mlp.down_proj", (0, hidden)), columns=inter)
    yield norm(FINAL_NORM, "model.norm.weight")
    rows = -(-vocab // tp)
    source = embed if config.tie_word_embeddings else "lm_head.weight"
    yield Target(LM_HEAD, (rows, hidden), (Piece(0, source, (rank * rows, min((rank + 1) * rows, vocab))),))


def plain_matrices(config: ModelConfig, quant_algo: str | None) -> dict[str, Scheme]:
    """The matrices that a checkpoint of this ``quant_algo`` holds just as the engine does, and their scheme.

    NVIDIA's FP8 recipe, after Meta's for Llama 3.1, leaves attention, the first and the last layer in 16 bits.
    """
    inner = tuple(f"transformer.layers.{i}.mlp." for i in range(1, config.num_layers - 1))
    every = ("transformer.layers.",)
    forms = {FP8_ROWWISE: (FP8, inner), FP8_ALL: (FP8, every), INT4_GROUPS: (INT4, every)}
    scheme, prefixes = forms.get(quant_algo or "", (FP8, ()))
    names = (target.name for target in targets(config) if target.linear and target.name.startswith(prefixes))
    return dict.fromkeys(names, scheme)


def packed_bits(quant_algo: str | None) -> int:
    """Bits of a weight in a checkpoint that has a :class:`Layout`."""
    return 4 if quant_algo == INT4_CHANNEL else 8


def tensor_specs(
    rank: Iterable[Target],
    dtype: torch.dtype,
    layout: Layout | None,
    plain: Mapping[str, Scheme] = MappingProxyType({}),
    group: int = 128,
    bits: int = 8,
    kv_cache: str = "fp16",
) -> Specs:
    """Dtype and shape in the file of a rank's tensors, scales included: those in ``plain`` have a scheme's form,
    INT4 in groups of ``group``; with ``layout`` all matrices are packed, ``bits`` a weight; the rest is ``dtype``.
    An fp8 ``kv_cache`` adds a scale a layer.

    Raises :class:`InputError` for a shape that cannot be packed.
    """
    specs: Specs = {}
    for target in rank:
        specs[target.name] = (dtype, target.shape)
        if target.name in plain:
            scheme = plain[target.name]
            weight, scale = held_shape(scheme, target.shape, group)
            specs[target.name] = (scheme.weight_dtype, weight)
            specs[scale_name(target.name)] = (scheme.scale_dtype, scale)
        elif target.linear and layout:
            n, k = target.shape
            check_packable(n, k, layout, target.name, bits)
            specs[target.name] = (torch.int8, (k, n * bits // 8))
            specs[scale_name(target.name)] = (dtype, (n,))
        if kv_cache == "fp8" and target.name.endswith(".qkv.weight"):
            specs[kv_scale_name(target.name)] = (torch.float32, (1,))
    return specs


def recipe_key(version: str) -> dict[str, bool]:
    """``use_meta_recipe`` for the releases of TensorRT-LLM that have it; 0.15 always follows that recipe."""
    return {"use_meta_recipe": True} if release_of(version) > (0, 15) else {}


def config_json(
    config: ModelConfig,
    *,
    dtype: str,
    quant_algo: str | None,
    tp: int,
    version: str = "0.15.0",
    group: int = 128,
    kv_cache: str = "fp16",
) -> dict[str, Any]:
    """The checkpoint's config.json, complete for TensorRT-LLM 0.15 and accepted by later releases.

    ``version``: the release that an FP8 checkpoint is for. ``group``: the inputs that share a scale, where they do.
    ``kv_cache``: as in :class:`llama_engine.config.EngineConfig`.
    """
    fp8 = quant_algo in (FP8_ROWWISE, FP8_ALL)
    return {
        "architecture": "LlamaForCausalLM",
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_size": config.head_size,
        "hidden_act": "silu",
        "norm_epsilon": config.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_base": config.rope_theta,
        "rotary_scaling": config.rope_scaling.to_dict() if config.rope_scaling else None,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "attn_bias": False,
        "mlp_bias": False,
        "qk_layernorm": False,
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "mapping": {
            "world_size": tp,
            "gpus_per_node": 8,
            "cp_size": 1,
            "tp_size": tp,
            "pp_size": 1,
            "moe_tp_size": tp,
            "moe_ep_size": 1,
        },
        "quantization": {
            "quant_algo": quant_algo,
            "kv_cache_quant_algo": KV_QUANT_ALGOS[kv_cache],
            "group_size": group,
            "smoothquant_val": 0.5,
            "clamp_val": list(FP8_CLAMP) if fp8 else None,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": None,
            **(recipe_key(version) if quant_algo == FP8_ROWWISE else {}),
        },
    }


def scale_name(weight: str) -> str:
    return weight.removesuffix("weight") + "per_channel_scale"


def kv_scale_name(qkv: str) -> str:
    return qkv.removesuffix("qkv.weight") + "kv_cache_scaling_factor"
