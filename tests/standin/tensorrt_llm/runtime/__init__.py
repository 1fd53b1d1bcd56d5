"""``ModelRunnerCpp`` with the keywords, types and output shapes of release 0.15.0 over a toy next-token rule."""

from __future__ import annotations

import json
from pathlib import Path

import torch

# Keywords of from_dir and of generate at 0.15.0, with the types that the bindings take.
_FROM_DIR = {
    "lora_dir": str,
    "rank": int,
    "max_batch_size": int,
    "max_input_len": int,
    "max_output_len": int,
    "max_beam_width": int,
    "max_attention_window_size": list,
    "sink_token_length": int,
    "kv_cache_free_gpu_memory_fraction": float,
    "cross_kv_cache_fraction": float,
    "medusa_choices": list,
    "eagle_choices": list,
    "lookahead_config": list,
    "debug_mode": bool,
    "lora_ckpt_source": str,
    "gpu_weights_percent": float,
    "max_tokens_in_paged_kv_cache": int,
    "kv_cache_enable_block_reuse": bool,
    "enable_chunked_context": bool,
    "is_enc_dec": bool,
    "multi_block_mode": bool,
    "enable_context_fmha_fp32_acc": bool,
    "cuda_graph_mode": bool,
    "logits_processor_map": dict,
    "device_ids": list,
    "is_orchestrator_mode": bool,
    "use_runtime_defaults": bool,
}
_GENERATE = {
    "streaming": bool,
    "max_new_tokens": int,
    "end_id": int,
    "pad_id": int,
    "bad_words_list": list,
    "stop_words_list": list,
    "return_dict": bool,
    "output_sequence_lengths": bool,
    "output_log_probs": bool,
    "output_cum_log_probs": bool,
    "return_all_generated_tokens": bool,
    # Passed on to SamplingConfig.
    "num_beams": int,
    "top_k": int,
    "top_p": float,
    "temperature": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "length_penalty": float,
    "min_tokens": int,
    "early_stopping": int,
    "random_seed": int,
    "num_return_sequences": int,
}


def _check(function: str, given: dict, allowed: dict) -> None:
    for key, value in given.items():
        if key not in allowed:
            raise TypeError(f"{function}() got an unexpected keyword argument {key!r}")
        if type(value) is not allowed[key]:
            raise TypeError(f"{function}(): {key} must be {allowed[key].__name__}, got {value!r}")


class ModelRunnerCpp:
    loaded: list[dict] = []  # noqa: RUF012 (what from_dir was called with, for tests)

    def __init__(self, build_config: dict, max_batch_size: int) -> None:
        self.max_batch_size, self.max_seq_len = max_batch_size, build_config["max_seq_len"]

    @classmethod
    def from_dir(cls, engine_dir, **options):
        _check("from_dir", {"lora_dir": engine_dir} | options, _FROM_DIR)
        build_config = json.loads((Path(engine_dir) / "config.json").read_text())["build_config"]
        if not (Path(engine_dir) / "rank0.engine").is_file():
            raise RuntimeError("Error opening engine file")
        limit = options.get("max_batch_size", build_config["max_batch_size"])
        assert limit <= build_config["max_batch_size"]
        assert options.get("rank", 0) == 0
        cls.loaded.append(options)
        return cls(build_config, limit)

    def generate(self, batch_input_ids, **options):
        _check("generate", options, _GENERATE)
        if any(ids.dtype != torch.int32 or ids.dim() != 1 for ids in batch_input_ids):
            raise TypeError("batch_input_ids must be 1-D int32 tensors")
        new_tokens, end_id = options.get("max_new_tokens", 1), options["end_id"]
        longest = max(len(ids) for ids in batch_input_ids)
        if len(batch_input_ids) > self.max_batch_size or longest + new_tokens > self.max_seq_len:
            raise RuntimeError("exceeds the engine or specified limit")
        words = options.get("stop_words_list") or [[] for _ in batch_input_ids]
        if len(words) != len(batch_input_ids) or any(
            type(token) is not int for row in words for word in row for token in word
        ):
            raise TypeError("stop_words_list must hold for each prompt a list of words, each a list of ids")
        rows = [ids.tolist() for ids in batch_input_ids]
        steps = self._steps(rows, new_tokens, end_id, words, options)
        if options.get("streaming", False):
            return steps
        return list(steps)[-1]

    def _steps(self, rows, new_tokens, end_id, words, options):
        finished = [False] * len(rows)
        for _ in range(new_tokens):
            for i, row in enumerate(rows):
                if not finished[i]:
                    row.append((7 * row[-1] + 3) % 509)
                    finished[i] = row[-1] == end_id or any(row[-len(word) :] == word for word in words[i])
            output_ids = torch.full((len(rows), 1, self.max_seq_len), end_id, dtype=torch.int32)
            for i, row in enumerate(rows):
                output_ids[i, 0, : len(row)] = torch.tensor(row, dtype=torch.int32)
            if options.get("return_dict", False):
                result = {"output_ids": output_ids}
                if options.get("output_sequence_lengths", False):
                    result["sequence_lengths"] = torch.tensor([[len(row)] for row in rows], dtype=torch.int32)
                yield result
            else:
                yield output_ids
            if all(finished):
                return
