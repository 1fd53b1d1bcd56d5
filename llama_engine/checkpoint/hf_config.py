"""A Hugging Face ``config.json`` as a :class:`ModelConfig`: each key as transformers reads it, or refused by name."""

from __future__ import annotations

from typing import Any

from llama_engine.config import ModelConfig, RopeScaling, check_number
from llama_engine.errors import InputError


def model_config(
    hf: dict[str, Any],
    generation: dict[str, Any] | None = None,
    *,
    name: str = "llama",
    source: str = "pretrained",
) -> ModelConfig:
    """Build from a Hugging Face ``config.json`` and, where there is one, ``generation_config.json``, whose
    end-of-sequence ids come first: what transformers 5 makes of them, or :class:`InputError`.

    Keys that are absent take the defaults of its ``LlamaConfig``, not those of :class:`ModelConfig`.
    """
    architectures = hf.get("architectures") or []
    if "LlamaForCausalLM" not in architectures:
        raise InputError(f"config.json: architectures is {architectures!r}; only 'LlamaForCausalLM' is supported")
    # transformers picks the model's class by this key alone.
    if hf.get("model_type") != "llama":
        raise InputError(f"config.json: model_type is {hf.get('model_type')!r}; only 'llama' is supported")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key, False) is not False:
            raise InputError(f"config.json: {key}={hf[key]!r} is not supported (only false)")
    for key in ("per_layer_config", "transformers_weights", "configuration_files"):
        if hf.get(key) is not None:
            raise InputError(f"config.json: {key} is not supported: it replaces settings or weights by others")
    if hf.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported (only 'silu')")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in required if key not in hf]:
        raise InputError(f"config.json: missing keys {missing}")
    for key in required:
        if type(hf[key]) is not int or hf[key] < 1:
            raise InputError(f"config.json: {key} must be a positive integer, got {hf[key]!r}")
    hidden, heads, kv_heads, head_dim = (
        hf.get(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if hidden % heads:
        raise InputError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    theta, scaling = _rope(hf)
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hidden,
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_size=hidden // heads if head_dim is None else head_dim,
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        eos_token_ids=_eos_ids({"generation_config.json": generation or {}, "config.json": hf}),
        name=name,
        source=source,
    )


def _eos_ids(files: dict[str, dict[str, Any]]) -> tuple[int, ...]:
    """``eos_token_id`` of the first file that has it, an id (0 is one) or a list of ids, each once."""
    for name, data in files.items():
        eos = data.get("eos_token_id")
        if eos is None:
            continue
        ids = eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise InputError(f"{name}: eos_token_id must be a token id or a list of them, got {eos!r}")
        return tuple(dict.fromkeys(ids))
    return ()


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, in transformers 5's order of precedence.

    ``rope_scaling`` (the older key) hides ``rope_parameters`` unless it is empty; ``rope_theta`` in that dict goes
    before the one beside it, ``rope_type`` before ``type``, ``original_max_position_embeddings`` beside it before the
    one in it; further keys have no effect. Unlike transformers, which then takes the model's whole context, this
    refuses a missing ``original_max_position_embeddings``.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(key), (dict, type(None))):
            raise InputError(f"config.json: {key} must be an object or null, got {hf[key]!r}")
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(key) or {}
    if any(isinstance(value, dict) or name in (hf.get("layer_types") or ()) for name, value in rope.items()):
        raise InputError(f"config.json: {key} for each type of layer is not supported")
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1):
        raise InputError("config.json: partial_rotary_factor is not supported (only 1)")
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    check_number("config.json: rope_theta", theta)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return float(theta), None
    if rope_type != "llama3":
        raise InputError(f"config.json: rope_type {rope_type!r} is not supported (only 'default' and 'llama3')")
    original = "original_max_position_embeddings"
    beside = {original: hf[original]} if original in hf else {}
    names = ("factor", "low_freq_factor", "high_freq_factor", original)
    if missing := [name for name in names if (beside | rope).get(name) is None]:
        raise InputError(f"config.json: {key} of rope_type 'llama3' lacks {', '.join(missing)}")
    return float(theta), RopeScaling(*map((rope | beside).get, names))  # type: ignore[arg-type]
