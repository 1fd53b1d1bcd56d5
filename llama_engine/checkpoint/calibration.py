"""What integer activations lose: each layer of an engine on a short text, against the same matrices on unrounded ones.

The kernels hold a token's activations as integers with one scale a token (:mod:`llama_engine.kernels`). That is finer
than the INT8 weights, unless a channel is thousands of times larger than those that matter beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from llama_engine.config import ModelConfig
from llama_engine.model.llama import apply_rope, rms_norm
from llama_engine.model.rope import rope_tables
from llama_engine.model.weights import LINEARS, Linear, stored_name
from llama_engine.tensor_files import open_tensors

TOKENS = 128  # a pass costs two products of each matrix with so many rows: about a minute for 8B on two CPU cores
AWQ_TOKENS = 2048  # of the text that INT4 is scaled for
LEVELS = 16383  # of the CPU's 15 bits; a GPU's 16 lose half of that
TEXT = """The harbour lights went out at 23:45, one after another, and Dr. Okafor wrote the last number in her notebook.
"Forty-two ships," she said, "and not a single flag."
# Totals
def total(rows): return sum(row["price"] * 1.19 for row in rows if row["price"] > 0)
| name | kg | € |
| tea | 2.5 | 31.00 |
Où est la gare ? Der Zug fährt um sieben. 東京は今日も雨です。
User: What is 17 * 3? Assistant: 17 * 3 = 51. See https://example.org/a?b=c for more; then try {"x": [1, 2, null]}.
"""


def text_ids(directory: Path, config: ModelConfig, text: str, most: int = AWQ_TOKENS) -> torch.Tensor | None:
    """int64 ``[<= most]``: ``text`` as the tokenizer in ``directory`` has it, None without one."""
    path = directory / "tokenizer.json"
    ids = Tokenizer.from_file(str(path)).encode(text).ids if path.is_file() else []
    ids = [i for i in ids if i < config.vocab_size][: min(most, config.max_position_embeddings)]
    return torch.tensor(ids) if ids else None


def calibration_ids(directory: Path, config: ModelConfig) -> torch.Tensor:
    """int64 ``[<= TOKENS]``: :data:`TEXT` as the tokenizer in ``directory`` has it, seeded random ids without one."""
    ids = text_ids(directory, config, TEXT, TOKENS)
    if ids is not None:
        return ids
    count = min(TOKENS, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def activation_losses(weights_file: Path, config: ModelConfig, ids: torch.Tensor, ranks: int = 1) -> list[float]:
    """What each layer loses, and the lm_head if it is INT8: the RMS over tokens of the relative error of the matrix
    that loses most, on any of ``ranks``. One layer at a time in memory; on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    c = config.share(ranks)
    cos, sin = (table.to(device) for table in rope_tables(c, len(ids)))
    lost: list[float] = []
    with open_tensors(weights_file, str(device)) as file:
        names = set(file.keys())

        def linear(name: str, rank: int) -> Linear:
            name = stored_name(name, rank, ranks)
            return Linear(file.get_tensor(name), file.get_tensor(f"{name}.scale") if f"{name}.scale" in names else None)

        def product(x: torch.Tensor, matrix: Linear) -> torch.Tensor:
            """``x @ W.T`` for ``x`` ``[T, K]``; what rounding ``x`` does to it is kept in ``lost``."""
            scale = x.abs().amax(-1, keepdim=True) / LEVELS
            error = x - torch.where(scale > 0, (x / scale).round() * scale, 0)
            exact, wrong = F.linear(torch.cat((x, error)), matrix.dequantize()).chunk(2)
            if matrix.scale is not None:
                square = wrong.pow(2).sum(-1) / exact.pow(2).sum(-1).clamp(min=1e-30)
                lost[-1] = max(lost[-1], float(square.mean().sqrt()))
            return exact

        x = file.get_tensor("embedding")[ids.to(device)].float()
        for i in range(c.num_layers):
            lost.append(0.0)
            norms = [file.get_tensor(f"layers.{i}.{name}") for name in ("input_norm", "post_norm")]
            every = [[linear(f"layers.{i}.{name}", rank) for name in LINEARS] for rank in range(ranks)]
            normed, partial = rms_norm(x, norms[0], c.rms_norm_eps), []
            for qkv, o, _, _ in every:
                parts = product(normed, qkv).split((c.q_size, c.kv_size, c.kv_size), -1)
                q, k, v = (part.unflatten(-1, (-1, c.head_size)) for part in parts)
                q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
                q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                partial.append(product(attended[0].transpose(0, 1).flatten(1), o))
            x = x + sum(partial)
            normed, partial = rms_norm(x, norms[1], c.rms_norm_eps), []
            for _, _, gate_up, down in every:
                gate, up = product(normed, gate_up).chunk(2, -1)
                partial.append(product(F.silu(gate) * up, down))
            x = x + sum(partial)
        heads = [linear("lm_head", rank) for rank in range(ranks)]
        if heads[0].scale is not None:
            lost.append(0.0)
            for head in heads:
                product(rms_norm(x, file.get_tensor("final_norm"), c.rms_norm_eps), head)
    return lost
