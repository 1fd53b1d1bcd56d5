"""TensorRT-LLM's unified checkpoint for Llama: ``config.json`` and one ``rank{N}.safetensors`` a rank.

What TensorRT-LLM does not record (byte layout, target, source) lies in the ``llama_engine`` entry of each rank file's
safetensors metadata, which its loader ignores. Layout names and shapes: docs/TENSORRT_LLM.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llama_engine.config import ModelConfig, RopeScaling
from llama_engine.errors import InputError
from llama_engine.files import combined_sha256, read_json, sha256_files
from llama_engine.quantization import LAYOUTS, Layout, unpack

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
EMBEDDING, FINAL_NORM, LM_HEAD = "transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"
LAYER_LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")


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
    linear: bool = False  # one of the matrices that W8A16 quantizes


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
    hidden, head, vocab = config.hidden_size, config.head_size, config.vocab_size
    embed = "model.embed_tokens.weight"
    q_rows = config.q_size // tp
    kv_heads = max(config.num_kv_heads // tp, 1)
    # With fewer KV heads than ranks, neighbouring ranks hold the same head.
    kv_first = rank * config.num_kv_heads // tp
    kv = (kv_first * head, (kv_first + kv_heads) * head)
    kv_rows = kv[1] - kv[0]
    q = (rank * q_rows, (rank + 1) * q_rows)
    inter_rows = config.intermediate_size // tp
    inter = (rank * inter_rows, (rank + 1) * inter_rows)

    yield Target(EMBEDDING, (vocab, hidden), (Piece(0, embed, (0, vocab)),))
    for i in range(config.num_layers):
        here, there = f"transformer.layers.{i}", f"model.layers.{i}"
        for name, source in (("input_layernorm", "input_layernorm"), ("post_layernorm", "post_attention_layernorm")):
            piece = Piece(0, f"{there}.{source}.weight", (0, hidden))
            yield Target(f"{here}.{name}.weight", (hidden,), (piece,))
        qkv = (
            Piece(0, f"{there}.self_attn.q_proj.weight", q),
            Piece(q_rows, f"{there}.self_attn.k_proj.weight", kv),
            Piece(q_rows + kv_rows, f"{there}.self_attn.v_proj.weight", kv),
        )
        yield Target(f"{here}.attention.qkv.weight", (q_rows + 2 * kv_rows, hidden), qkv, linear=True)
        piece = Piece(0, f"{there}.self_attn.o_proj.weight", (0, hidden), q)
        yield Target(f"{here}.attention.dense.weight", (hidden, q_rows), (piece,), linear=True)
        for name, source in (("fc", "gate_proj"), ("gate", "up_proj")):
            piece = Piece(0, f"{there}.mlp.{source}.weight", inter)
            yield Target(f"{here}.mlp.{name}.weight", (inter_rows, hidden), (piece,), linear=True)
        piece = Piece(0, f"{there}.mlp.down_proj.weight", (0, hidden), inter)
        yield Target(f"{here}.mlp.proj.weight", (hidden, inter_rows), (piece,), linear=True)
    yield Target(FINAL_NORM, (hidden,), (Piece(0, "model.norm.weight", (0, hidden)),))
    head_rows = -(-vocab // tp)
    source = embed if config.tie_word_embeddings else "lm_head.weight"
    piece = Piece(0, source, (rank * head_rows, min((rank + 1) * head_rows, vocab)))
    yield Target(LM_HEAD, (head_rows, hidden), (piece,))


def config_json(config: ModelConfig, *, dtype: str, quant_algo: str | None, tp: int) -> dict[str, Any]:
    """The checkpoint's config.json, complete for TensorRT-LLM 0.15 and accepted by later releases."""
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
        "rotary_scaling": dataclasses.asdict(config.rope_scaling) if config.rope_scaling else None,
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
            "kv_cache_quant_algo": None,
            "group_size": 128,
            "smoothquant_val": 0.5,
            "clamp_val": None,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": None,
        },
    }


class Checkpoint:
    """Read a unified checkpoint; INT8 matrices come back as plain ``[out, in]``, whatever their layout on disk.

    Raises :class:`InputError` for a missing rank, a missing or misshapen tensor, an unsupported feature, or INT8
    weights whose layout is not recorded.
    """

    def __init__(self, checkpoint_dir: Path | str) -> None:
        self.dir = Path(checkpoint_dir)
        if not self.dir.is_dir():
            raise InputError(f"checkpoint {self.dir} does not exist: run scripts/convert_checkpoint.sh")
        data = read_json(self.dir / "config.json")
        try:
            self.dtype_name, self.tp_size, self.quant_algo = _check_config(data, self.dir / "config.json")
            _model_config(data, {})
        except InputError:
            raise
        except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"{self.dir}/config.json holds a value of the wrong kind: {error}") from None
        self.files = [self.dir / f"rank{rank}.safetensors" for rank in range(self.tp_size)]
        missing = [path.name for path in self.files if not path.is_file()]
        if missing:
            raise InputError(f"{self.dir} is incomplete: {', '.join(missing)} missing; convert again")
        self.record = self._record()
        model = self.record.get("model", {})
        self.config = _model_config(data, model)
        self.quantized = self._check_headers()
        name = self.record.get("layout")
        if self.quantized and name not in LAYOUTS:
            raise InputError(
                f"{self.dir}: INT8 weights whose byte layout is not recorded (found {name!r}); TensorRT-LLM's format "
                "does not say which GPU they were packed for. Convert again with scripts/convert_checkpoint.sh"
            )
        self.layout: Layout | None = LAYOUTS[name] if self.quantized else None

    def _record(self) -> dict[str, Any]:
        records = []
        for path in self.files:
            with _open(path) as file:
                records.append(json.loads((file.metadata() or {}).get("llama_engine", "{}")))
        if any(record != records[0] for record in records):
            raise InputError(f"{self.dir}: the ranks come from different conversions; convert again")
        return records[0]

    def _check_headers(self) -> bool:
        dtypes: set[str] = set()
        for rank, path in enumerate(self.files):
            with _open(path) as file:
                present = set(file.keys())
                for target in targets(self.config, rank, self.tp_size):
                    if target.name not in present:
                        raise InputError(f"{path}: tensor {target.name} is missing; convert again")
                    entry = file.get_slice(target.name)
                    kind, shape = entry.get_dtype(), tuple(entry.get_shape())
                    if shape != (target.shape if kind != "I8" else target.shape[::-1]):
                        raise InputError(f"{path}: {target.name} has shape {list(shape)}, expected {target.shape}")
                    if target.linear:
                        dtypes.add(kind)
                        if kind == "I8" and scale_name(target.name) not in present:
                            raise InputError(f"{path}: tensor {scale_name(target.name)} is missing; convert again")
        if len(dtypes) > 1 or (dtypes == {"I8"} and self.quant_algo != "W8A16"):
            raise InputError(f"{self.dir}: weights are {sorted(dtypes)} but quant_algo is {self.quant_algo!r}")
        return dtypes == {"I8"}

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def identity(self) -> dict[str, str]:
        """Name, source and SHA-256 of the model this was converted from, as far as recorded."""
        return {"name": self.config.name, "source": self.config.source, "sha256": self.record.get("source_sha256", "")}

    def sha256(self) -> str:
        """One hash over config.json and the rank files."""
        return combined_sha256(sha256_files([self.dir / "config.json", *self.files]))

    def read(self, name: str, rows: tuple[int, int], shape: tuple[int, ...], rank: int = 0) -> torch.Tensor:
        """Logical rows of a tensor: int8 ``[rows, in]`` for a packed matrix (``rows`` even), else as stored."""
        start, stop = rows
        with _open(self.files[rank]) as file:
            entry = file.get_slice(name)
            if entry.get_dtype() != "I8":
                return entry[start:stop].clone()
            assert self.layout is not None
            n, k = shape
            # The reported shape is (k, n); the bytes lie n-major.
            first, last = start * k // n, -(-stop * k // n)
            data = entry[first:last].reshape(-1)[start * k - first * n : stop * k - first * n]
            return unpack(data.clone(), stop - start, k, self.layout)

    def scale(self, name: str, rank: int = 0) -> torch.Tensor:
        """Per-channel scales ``[out]`` of a quantized matrix, in the checkpoint's dtype."""
        with _open(self.files[rank]) as file:
            return file.get_tensor(scale_name(name))


def scale_name(weight: str) -> str:
    return weight.removesuffix("weight") + "per_channel_scale"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete .safetensors file: {error}") from None


def _check_config(data: dict[str, Any], path: Path) -> tuple[str, int, str | None]:
    quantization, mapping = data.get("quantization") or {}, data.get("mapping") or {}
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "architecture": (data.get("architecture"), ("LlamaForCausalLM",)),
        "dtype": (data.get("dtype"), tuple(DTYPES)),
        "hidden_act": (data.get("hidden_act", "silu"), ("silu",)),
        "position_embedding_type": (data.get("position_embedding_type"), ("rope_gpt_neox",)),
        "quantization.quant_algo": (quantization.get("quant_algo"), (None, "W8A16")),
        "quantization.kv_cache_quant_algo": (quantization.get("kv_cache_quant_algo"), (None,)),
        "mapping.pp_size": (mapping.get("pp_size", 1), (1,)),
        "mapping.cp_size": (mapping.get("cp_size", 1), (1,)),
    } | {
        key: (bool(data.get(key)), (False,))
        for key in ("attn_bias", "mlp_bias", "qk_layernorm", "residual_mlp", "use_parallel_embedding")
    }
    for key, (value, allowed) in expected.items():
        if value not in allowed:
            choices = " or ".join(repr(item) for item in allowed)
            raise InputError(f"{path}: {key} is {value!r}; only {choices} is supported")
    return data["dtype"], int(mapping.get("tp_size", 1)), quantization.get("quant_algo")


def _model_config(data: dict[str, Any], model: dict[str, Any]) -> ModelConfig:
    missing = [
        key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads") if key not in data
    ]
    if missing:
        raise InputError(f"checkpoint config.json: missing keys {missing}")
    scaling = dict(data.get("rotary_scaling") or {})
    rope_type = scaling.pop("rope_type", None) or scaling.pop("type", None)
    scaling.pop("type", None)
    if rope_type == "default":
        scaling = {}
    try:
        rope = RopeScaling(rope_type=rope_type, **scaling) if scaling else None
    except TypeError as error:
        raise InputError(f"checkpoint config.json: rotary_scaling is not supported ({error})") from None
    heads, hidden = data["num_attention_heads"], data["hidden_size"]
    return ModelConfig(
        vocab_size=data["vocab_size"],
        hidden_size=hidden,
        intermediate_size=data.get("intermediate_size") or 4 * hidden,
        num_layers=data["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads") or heads,
        head_size=data.get("head_size") or hidden // heads,
        max_position_embeddings=data.get("max_position_embeddings") or 2048,
        rms_norm_eps=data.get("norm_epsilon", 1e-5),
        rope_theta=float(data.get("rotary_base", 10000.0)),
        rope_scaling=rope,
        tie_word_embeddings=model.get("tie_word_embeddings", False),
        eos_token_ids=tuple(model.get("eos_token_ids", ())),
        name=model.get("name", "llama"),
        source=model.get("source", "pretrained"),
    )
