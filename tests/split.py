"""One model's weights, cut into those of tensor-parallel ranks."""

import torch

from llama_engine.config import ModelConfig
from llama_engine.model.weights import LINEARS, EngineWeights, LayerWeights, Linear


def rank_of(weights: EngineWeights, config: ModelConfig, rank: int, ranks: int, device=None) -> EngineWeights:
    """The share of ``rank`` in ``weights``; o and down keep the scales of the whole row."""
    device = device or weights.embedding.device

    def rows(linear: Linear, *sizes: int) -> Linear:
        def cut(t: torch.Tensor) -> torch.Tensor:
            parts = [part.chunk(ranks)[rank] for part in t.split(sizes)]
            return torch.cat(parts).to(device).contiguous()

        return Linear(cut(linear.weight), None if linear.scale is None else cut(linear.scale))

    def columns(linear: Linear) -> Linear:
        scale = None if linear.scale is None else linear.scale.to(device)
        return Linear(linear.weight.chunk(ranks, dim=1)[rank].to(device).contiguous(), scale)

    c = config
    layers = []
    for layer in weights.layers:
        qkv, o, gate_up, down = (getattr(layer, name) for name in LINEARS)
        layers.append(
            LayerWeights(
                input_norm=layer.input_norm.to(device),
                qkv=rows(qkv, c.q_size, c.kv_size, c.kv_size),
                o=columns(o),
                post_norm=layer.post_norm.to(device),
                gate_up=rows(gate_up, c.intermediate_size, c.intermediate_size),
                down=columns(down),
            )
        )
    head = rows(weights.lm_head, c.vocab_size)
    return EngineWeights(weights.embedding.to(device), layers, weights.final_norm.to(device), head)
