"""Model and engine configuration, validated on construction.

Everything here raises :class:`InputError` (a ``ValueError``) that names the offending key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llama_engine.errors import ErrorCode, InputError

DEFAULT_MODEL = "smollm2-135m-instruct"  # what a script takes when no model is named
C = TypeVar("C", bound="_Config")
FLOAT32_MAX = 3.4e38
KERNELS = ("auto", "streaming", "tiled", "torch")  # what llama_engine.native.load_engine takes; a CPU the ends alone
KV_ELEMENT_NBYTES = {"fp16": 2, "fp8": 1}  # of a key or a value, by what EngineConfig.kv_cache says


class _Config:
    """A dataclass that goes to JSON and back."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[C], data: dict[str, Any]) -> C:
        """Raises :class:`InputError` for unknown and missing keys."""
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        if unknown:
            raise InputError(f"{cls.__name__}: unknown keys {unknown}")
        try:
            return cls(**data)
        except TypeError as error:
            raise InputError(f"{cls.__name__}: {error}") from None

    def _check_integers(self, what: str) -> None:
        """Every field declared ``int`` must hold a positive one, or 0 where that is its default."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, least = getattr(self, field.name), 0 if field.default == 0 else 1
            if field.type == "int" and (type(value) is not int or value < least):
                kind = "a positive integer" if least else "an integer >= 0"
                raise InputError(f"{what}: {field.name} must be {kind}, got {value!r}")


def check_number(what: str, value: object) -> None:
    """Raise :class:`InputError` unless a value is a positive number that float32 holds."""
    if type(value) not in (int, float) or not 0 < value < FLOAT32_MAX:  # type: ignore[operator]
        raise InputError(f"{what} must be a positive number, got {value!r}")


@dataclass(frozen=True)
class RopeScaling(_Config):
    """Llama 3 frequency scaling (Llama 3.1 model card, ``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = "llama3"

    def __post_init__(self) -> None:
        if self.rope_type != "llama3":
            raise InputError(f"rope_scaling: rope_type must be 'llama3', got {self.rope_type!r}")
        for key in ("factor", "low_freq_factor", "high_freq_factor"):
            check_number(f"rope_scaling: {key}", getattr(self, key))
        self._check_integers("rope_scaling")
        if self.factor < 1 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError("rope_scaling: needs factor >= 1 and 0 < low_freq_factor < high_freq_factor")


@dataclass(frozen=True)
class ModelConfig(_Config):
    """Geometry of a Llama-architecture decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    name: str = "llama"
    source: str = "pretrained"

    def __post_init__(self) -> None:
        self._check_integers("model config")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model config: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise InputError(f"model config: head_size {self.head_size} must be even for RoPE")
        for key in ("rms_norm_eps", "rope_theta"):
            check_number(f"model config: {key}", getattr(self, key))
        if type(self.tie_word_embeddings) is not bool:
            raise InputError(f"model config: tie_word_embeddings must be a bool, got {self.tie_word_embeddings!r}")
        if self.source not in ("pretrained", "synthetic"):
            raise InputError(f"model config: source must be 'pretrained' or 'synthetic', got {self.source!r}")
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(self.rope_scaling))
        object.__setattr__(self, "eos_token_ids", tuple(int(i) for i in self.eos_token_ids))

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    def share(self, ranks: int) -> ModelConfig:
        """What one of ``ranks`` tensor-parallel ranks computes: its part of the heads and of the MLP, and all else.

        Raises :class:`InputError` where a rank would get another share than the next.
        """
        for key in ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"):
            if getattr(self, key) % ranks:
                raise InputError(f"tp_size {ranks} does not divide the model's {key} {getattr(self, key)}")
        parts = {key: getattr(self, key) // ranks for key in ("num_heads", "num_kv_heads", "intermediate_size")}
        return dataclasses.replace(self, **parts)

    def kv_nbytes(self, element_nbytes: int) -> int:
        """Bytes that keys and values of one position take over all layers."""
        return 2 * self.num_layers * self.kv_size * element_nbytes


@dataclass(frozen=True)
class EngineConfig(_Config):
    """What ``build_engine`` fixes and ``engine.json`` stores.

    ``max_num_tokens`` bounds the tokens of one step (prefill chunks plus decodes), ``max_prefill_tokens`` those of its
    prefill chunks beside decodes (see :mod:`llama_engine.engine.scheduler`). ``num_kv_blocks`` is 0 for "choose at
    load": all of ``max_batch_size * max_seq_len`` on a CPU, ``kv_cache_free_gpu_memory_fraction`` of what is free on a
    GPU, never more than can be used. ``enable_prefix_cache`` keeps the KV blocks of finished requests for prompts that
    start alike (TensorRT-LLM's block reuse, ``enable_kv_cache_reuse``): serving turns it on, what measures leaves it
    off. ``kv_cache`` is what the checkpoint says keys and values are held in: fp16, or fp8 (e4m3, unscaled), and
    ``tp_size`` over how many ranks, a GPU each, it is split.
    """

    max_batch_size: int = 16
    max_seq_len: int = 2048
    max_num_tokens: int = 2048
    tokens_per_block: int = 64
    num_kv_blocks: int = 0
    kv_cache_free_gpu_memory_fraction: float = 0.9
    lm_head: str = "checkpoint"
    max_prefill_tokens: int = 96
    enable_prefix_cache: bool = False
    kv_cache: str = "fp16"
    tp_size: int = 1

    def __post_init__(self) -> None:
        self._check_integers("engine config")
        if self.tokens_per_block & (self.tokens_per_block - 1):
            raise InputError(f"engine config: tokens_per_block must be a power of two, got {self.tokens_per_block}")
        if self.max_num_tokens < self.max_batch_size:
            raise InputError(
                f"engine config: max_num_tokens {self.max_num_tokens} is below max_batch_size {self.max_batch_size}"
            )
        if not 0 < self.kv_cache_free_gpu_memory_fraction <= 1:
            raise InputError("engine config: kv_cache_free_gpu_memory_fraction must be in (0, 1]")
        if self.lm_head not in ("checkpoint", "int8"):
            raise InputError(f"engine config: lm_head must be 'checkpoint' or 'int8', got {self.lm_head!r}")
        if type(self.enable_prefix_cache) is not bool:
            raise InputError(f"engine config: enable_prefix_cache must be a bool, got {self.enable_prefix_cache!r}")

        if self.kv_cache not in KV_ELEMENT_NBYTES:
            raise InputError(f"engine config: kv_cache must be {' or '.join(KV_ELEMENT_NBYTES)}, got {self.kv_cache!r}")

    @property
    def max_blocks_per_sequence(self) -> int:
        return -(-self.max_seq_len // self.tokens_per_block)

    @property
    def kv_element_nbytes(self) -> int:
        return KV_ELEMENT_NBYTES[self.kv_cache]

    @property
    def useful_kv_blocks(self) -> int:
        """What all sequences at full length take, and the scratch block."""
        return self.max_batch_size * self.max_blocks_per_sequence + 1

    def kv_tokens(self, sequences: int) -> int:
        """Positions in the blocks that so many sequences at full length take."""
        return sequences * self.max_blocks_per_sequence * self.tokens_per_block


def check_request(model: ModelConfig, engine: EngineConfig, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raise :class:`InputError`, with the numbers, unless a request fits the engine's limits."""
    if not prompt:
        raise InputError("the prompt is empty: give at least one token id")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1 and an integer, got {max_new_tokens!r}")
    check_length(engine, len(prompt), max_new_tokens)
    bad = [token for token in prompt if type(token) is not int or not 0 <= token < model.vocab_size]
    if bad:
        raise InputError(f"token id {bad[0]!r} is outside the vocabulary of {model.vocab_size}")


def check_length(engine: EngineConfig, prompt_tokens: int, new_tokens: int, flag: str = "") -> None:
    """Raise :class:`InputError`, with the numbers and the ``flag`` that asked, unless prompt and answer fit."""
    if prompt_tokens + new_tokens > engine.max_seq_len:
        raise InputError(
            f"{flag}{': ' if flag else ''}{prompt_tokens} prompt tokens + {new_tokens} new tokens exceed this engine's "
            f"max_seq_len {engine.max_seq_len}",
            ErrorCode.CONTEXT_LENGTH,
        )
