"""Prefill attention of one chunk through PyTorch's library kernels, over keys and values gathered from their blocks."""

from __future__ import annotations

import torch

FLASH, CUDNN = "flash", "cudnn"


def gather(kv: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``length`` keys and values ``[1, kv_heads, length, head_size]`` of a block table (int32)."""
    blocks = table[: -(-length // kv.shape[3])]
    keys, values = kv.transpose(1, 2).index_select(2, blocks).flatten(2, 3)[:, None, :, :length]
    return keys, values


def attend(backend: str, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last ``n`` positions: q ``[1, heads, n, head_size]`` fp16, keys and values as gathered.

    Returns ``[1, heads, n, head_size]``. ``RuntimeError`` where the library or the GPU does not take the shapes.
    """
    n, context = q.shape[2], keys.shape[2] - q.shape[2]
    if backend == FLASH:  # its causal mask ends in the lower right corner
        return torch.ops.aten._scaled_dot_product_flash_attention(q, keys, values, 0.0, True)[0]
    # cuDNN's begins in the upper left one: the context and the chunk itself apart, merged by their sums' logarithms.
    own, own_sum = _cudnn(q, keys[:, :, context:], values[:, :, context:], True)
    if not context:
        return own
    before, before_sum = _cudnn(q, keys[:, :, :context], values[:, :, :context], False)
    share = torch.sigmoid(before_sum - own_sum).view(1, -1, n, 1)
    return torch.lerp(own, before, share.to(own.dtype))


def _cudnn(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out, log_sum = torch.ops.aten._scaled_dot_product_cudnn_attention(q, keys, values, None, True, 0.0, causal)[:2]
    return out, log_sum
