"""Rotary position embedding: frequencies and tables, as every executor and kernel reads them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama_engine.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies, float32 ``[head_size / 2]``, with Llama 3's wavelength-dependent scaling if configured.

    Formula: theta^(-2i/d); wavelengths above ``original / low_freq_factor`` are divided by ``factor``, those below
    ``original / high_freq_factor`` kept, the band between interpolated (Llama 3.1 reference implementation).
    """
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    inverse = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    wavelength = 2 * math.pi / inverse
    ratio = scaling.original_max_position_embeddings / wavelength
    smooth = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(inverse / scaling.factor, inverse, smooth.clamp(0, 1))


def rope_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 ``[length, head_size / 2]``."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rope_frequencies(config))
    return angles.cos(), angles.sin()
