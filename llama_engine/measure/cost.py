"""What a token must cost whatever the code: the numerators of MBU and MFU. Definitions: docs/METRICS.md."""

from __future__ import annotations

from dataclasses import dataclass

from llama_engine.config import ModelConfig


@dataclass(frozen=True)
class Cost:
    """What a token must cost whatever the code: bytes for decode, FLOP for prefill. Of one GPU, where
    several share a model."""

    weight_nbytes: int  # read once a decode step, whatever the batch
    kv_nbytes_per_token: int  # read a step for every live position of every sequence
    flop_per_token: float  # 2 x multiply-adds of the linear layers, lm_head excluded

    def decode_nbytes(self, input_tokens: float, output_tokens: float, batch: int = 1) -> float:
        """Mean bytes a decode step reads: weights once + KV of the live tokens, averaged over the run's steps."""
        return self.weight_nbytes + batch * self.kv_nbytes_per_token * (input_tokens + output_tokens / 2)

    @classmethod
    def of(cls, config: ModelConfig, weight_nbytes: int, kv_nbytes_per_token: int) -> Cost:
        return cls(weight_nbytes, kv_nbytes_per_token, 2.0 * linear_weights(config))


def linear_weights(config: ModelConfig) -> int:
    """How many weights the linear layers hold, lm_head excluded."""
    return config.num_layers * config.hidden_size * (config.qkv_size + config.q_size + 3 * config.intermediate_size)
