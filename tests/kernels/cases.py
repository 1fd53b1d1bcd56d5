"""A model, its KV cache and its reference for tests of the persistent kernel."""

from __future__ import annotations

import dataclasses
import math

import torch

from llama_engine.checkpoint.packing import quantize
from llama_engine.config import EngineConfig, ModelConfig, RopeScaling
from llama_engine.kernels import persistent_reference
from llama_engine.kernels.persistent import PersistentDecode, permute
from llama_engine.model.llama import TorchModel
from llama_engine.model.schemes import INT8, Scheme
from llama_engine.model.weights import Linear, random_weights

LLAMA_8B = ModelConfig(
    vocab_size=10000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=1,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    max_position_embeddings=4096,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)
LLAMA_1B = dataclasses.replace(
    LLAMA_8B, hidden_size=2048, intermediate_size=8192, num_layers=4, head_size=64, vocab_size=5000
)
# Nothing divides evenly: rows over blocks, heads over groups of three.
TINY_WIDTHS = {"hidden_size": 96, "intermediate_size": 168, "head_size": 32, "num_heads": 6, "num_kv_heads": 2}
TINY = dataclasses.replace(LLAMA_8B, vocab_size=301, num_layers=3, **TINY_WIDTHS)
LLAMA_3B = dataclasses.replace(LLAMA_8B, hidden_size=3072, intermediate_size=8192, num_heads=24, num_layers=2)


class Case:
    """A model, slot state with random cached KV, and the reference over a copy of it."""

    def __init__(
        self,
        config: ModelConfig,
        past: list[int],
        int8_head: bool = False,
        device: str = "cuda",
        max_seq_len: int = 2048,
        scheme: Scheme = INT8,
    ) -> None:
        self.config = config
        self.weights = random_weights(config, device, scheme=scheme)
        if int8_head:
            self.weights.lm_head = Linear(*quantize(self.weights.lm_head.weight))
        generator = torch.Generator(device).manual_seed(11)
        blocks, slots = max_seq_len // 64, 9
        count = 1 + len(past) * blocks
        self.engine = EngineConfig(max_batch_size=8, max_seq_len=max_seq_len, tokens_per_block=64, num_kv_blocks=count)
        self.reference = TorchModel(config, self.engine, self.weights)
        for cache in self.reference.kv:
            cache.copy_(torch.randn(cache.shape, device=device, generator=generator))
        self.kv = [cache.clone() for cache in self.reference.kv]
        order = torch.randperm(count - 1, device=device, generator=generator).int() + 1
        self.tables = torch.zeros((slots, blocks), dtype=torch.int32, device=device)
        self.slot_ids = torch.tensor([7, 2, 5, 0][: len(past)], dtype=torch.int32, device=device)
        self.last_token = torch.zeros(slots, dtype=torch.int32, device=device)
        self.position = torch.zeros(slots, dtype=torch.int32, device=device)
        for i, slot in enumerate(self.slot_ids.tolist()):
            self.tables[slot] = order[i * blocks : (i + 1) * blocks]
            self.last_token[slot] = 100 + 17 * i
            self.position[slot] = past[i]
        self.sampled = torch.full((len(past),), -1, dtype=torch.int32, device=device)
        self.logits = torch.full((len(past), config.vocab_size), math.nan, device=device)
        if device == "cuda":
            self.decode = PersistentDecode(config, self.engine, self.weights, self.kv, max_rows=len(past))

    def launch(self, logits: bool = True) -> None:
        state = (self.slot_ids, self.last_token, self.position, self.tables, self.sampled)
        self.decode.launch(*state, self.logits if logits else None)
        torch.cuda.synchronize()

    def expect(self) -> torch.Tensor:
        slots = self.slot_ids.long()
        rows = torch.arange(len(slots), device=slots.device)
        return self.reference.forward(
            self.last_token[slots], self.position[slots], self.slot_ids, self.tables, rows.int()
        )

    def follow(self, grid: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Sampled ids, logits and cache of the step-by-step reference, over copies of the state."""
        last_token, position, kv = self.last_token.clone(), self.position.clone(), [x.clone() for x in self.kv]
        state = (self.slot_ids, last_token, position, self.tables)
        sampled, logits = persistent_reference.decode(self.config, self.weights, kv, *state, grid=grid)
        slots = self.slot_ids.long()
        assert torch.equal(last_token[slots], sampled.int())
        assert torch.equal(position[slots], self.position[slots] + 1)
        return sampled, logits, kv


def close(actual: torch.Tensor, expected: torch.Tensor, what: str, share: float = 1.5 / 128) -> None:
    error = (actual.float() - expected.float()).abs().max().item()
    bound = expected.float().abs().max().item() * share
    assert error <= bound, f"{what}: error {error:.4g} above {bound:.4g}"


def received(words: torch.Tensor, permuted: bool = True, packed: int = 1) -> torch.Tensor:
    """The float32 values that exchanged words carry, in natural order."""
    values = (words & ~255).view(torch.float32)
    if not permuted:
        return values
    out = torch.empty_like(values)
    out[:, permute(torch.arange(values.shape[-1], device=values.device), packed)] = values
    return out
