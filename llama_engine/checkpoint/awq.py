"""Activation-aware scaling before INT4: inputs that the model uses strongly are rounded finely.

The method of AWQ (Lin et al., 2023). A matrix's input k is divided by s[k] and its column multiplied by it, which
changes nothing but the rounding: a large column moves less by it. s = mean|x| ** alpha over a text, with the alpha that
changes the matrix's output least. The division is folded into what makes the input: the norm before qkv and gate_up,
the rows of v before o, those of up before down. So the model's form stays the same, and no kernel knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from llama_engine.checkpoint.hf import EMBEDDING, HFModel
from llama_engine.checkpoint.packing import quantize_int4
from llama_engine.model.llama import apply_rope, rms_norm
from llama_engine.model.rope import rope_tables

ALPHAS = tuple(i / 10 for i in range(11))
ROWS = 1024  # of a matrix stand for all of them in the search


@dataclass
class Scaling:
    """What to do to a model's tensors, by Hugging Face's names, before they are quantized. All float32, on the CPU."""

    rows: dict[str, torch.Tensor] = field(default_factory=dict)  # factor of each output, or element of a norm
    columns: dict[str, torch.Tensor] = field(default_factory=dict)  # factor of each input
    importance: dict[str, torch.Tensor] = field(default_factory=dict)  # mean square of each scaled input

    def apply(self, name: str, data: torch.Tensor, first: int) -> torch.Tensor:
        """``data``, the rows of the tensor ``name`` from ``first`` on, scaled, in float32 where it is."""
        if name in self.rows:
            data = data.float() * self.rows[name][first : first + len(data)].reshape(-1, *[1] * (data.dim() - 1))
        return data.float() * self.columns[name] if name in self.columns else data


def best_scale(x: torch.Tensor, weight: torch.Tensor, group: int, shared: int = 1) -> torch.Tensor:
    """The scale float32 ``[K]`` of each input of ``weight`` ``[N, K]`` for the activations ``x`` ``[T, K]``.

    ``shared``: so many runs of inputs as long as the shared scale follow one another and have one scale (query heads of
    a KV head): K = KV heads x shared x head size is given as ``x`` ``[T, KV heads, shared, head size]``.
    """
    size = x.abs().mean((0, 2), keepdim=True).expand(1, *x.shape[1:]).flatten() if x.dim() == 4 else x.abs().mean(0)
    x = x.flatten(1)
    weight = weight[:: max(1, len(weight) // ROWS)]
    square, exact = x.square().mean(0), F.linear(x, weight)
    best, found = torch.inf, torch.ones_like(size)
    for alpha in ALPHAS:
        scale = size.clamp(min=1e-4) ** alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        values, scales = quantize_int4(weight * scale, group, square / scale.square())
        rounded = (values.unflatten(1, (-1, group)) * scales.float()[..., None]).flatten(1) / scale
        error = float((F.linear(x, rounded) - exact).square().mean())
        if error < best:
            best, found = error, scale
    return found


@torch.inference_mode()
def search(model: HFModel, ids: torch.Tensor, group: int, progress: Callable[[int], None] = lambda _: None) -> Scaling:
    """The scaling of every layer of ``model`` for INT4 in groups of ``group``, over the text ``ids`` (int64 ``[T]``).

    One layer at a time in memory, in float32; on a GPU where there is one. ``progress`` is called with each layer done.
    """
    device, c, out = torch.device("cuda" if torch.cuda.is_available() else "cpu"), model.config, Scaling()
    cos, sin = (table.to(device) for table in rope_tables(c, len(ids)))
    x = torch.cat([model.read(EMBEDDING, (i, i + 1), torch.float32) for i in ids.tolist()]).to(device)
    for i in range(c.num_layers):
        here = f"model.layers.{i}."

        def tensor(name: str, here: str = here) -> torch.Tensor:
            return model.tensor(f"{here}{name}.weight", torch.float32).to(device)

        def scale(inputs: torch.Tensor, matrices: dict[str, torch.Tensor], source: str, here: str = here) -> None:
            """Scale what multiplies ``inputs``, and undo it in the rows of ``source``."""
            found = best_scale(inputs, torch.cat(list(matrices.values())), group)
            undo = found.view(inputs.shape[1:])[:, 0].flatten() if inputs.dim() == 4 else found
            out.rows[f"{here}{source}.weight"] = (1 / undo).cpu()
            for name in matrices:
                out.columns[f"{here}{name}.weight"] = found.cpu()
                square = inputs.flatten(1).square().mean(0) / found.square()
                out.importance[f"{here}{name}.weight"] = square.cpu()

        qkv = {f"self_attn.{n}_proj": tensor(f"self_attn.{n}_proj") for n in "qkv"}
        h = rms_norm(x, tensor("input_layernorm"), c.rms_norm_eps)
        scale(h, qkv, "input_layernorm")
        q, k, v = (F.linear(h, weight).unflatten(-1, (-1, c.head_size)) for weight in qkv.values())
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        o = tensor("self_attn.o_proj")
        scale(attended.unflatten(1, (c.num_kv_heads, -1)), {"self_attn.o_proj": o}, "self_attn.v_proj")
        x = x + F.linear(attended.flatten(1), o)
        h = rms_norm(x, tensor("post_attention_layernorm"), c.rms_norm_eps)
        mlp = {f"mlp.{n}_proj": tensor(f"mlp.{n}_proj") for n in ("gate", "up")}
        scale(h, mlp, "post_attention_layernorm")
        gate, up = (F.linear(h, weight) for weight in mlp.values())
        h, down = F.silu(gate) * up, tensor("mlp.down_proj")
        scale(h, {"mlp.down_proj": down}, "mlp.up_proj")
        x = x + F.linear(h, down)
        progress(i + 1)
    return out
