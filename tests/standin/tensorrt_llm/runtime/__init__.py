"""``ModelRunnerCpp`` with the keywords, types and output shapes of release 0.15.0, around the executor."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tensorrt_llm.bindings import executor

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

    def __init__(self, session, max_batch_size: int, max_input_len: int, max_seq_len: int) -> None:
        self.session, self.max_batch_size = session, max_batch_size
        self.max_input_len, self.max_seq_len = max_input_len, max_seq_len

    @classmethod
    def from_dir(cls, engine_dir, **options):
        _check("from_dir", {"lora_dir": engine_dir} | options, _FROM_DIR)
        build_config = json.loads((Path(engine_dir) / "config.json").read_text())["build_config"]
        if not (Path(engine_dir) / "rank0.engine").is_file():
            raise RuntimeError("Error opening engine file")
        limit = options.get("max_batch_size", build_config["max_batch_size"])
        assert limit <= build_config["max_batch_size"]
        assert options.get("rank", 0) == 0
        session = executor.Executor(
            engine_dir,
            free_gpu_memory_fraction=options.get("kv_cache_free_gpu_memory_fraction", 0.9),
            max_tokens=options.get("max_tokens_in_paged_kv_cache"),
        )
        cls.loaded.append(options)
        max_input_len = options.get("max_input_len", build_config["max_input_len"])
        return cls(session, limit, max_input_len, build_config["max_seq_len"])

    def generate(self, batch_input_ids, **options):
        _check("generate", options, _GENERATE)
        if any(ids.dtype != torch.int32 or ids.dim() != 1 for ids in batch_input_ids):
            raise TypeError("batch_input_ids must be 1-D int32 tensors")
        new_tokens, end_id = options.get("max_new_tokens", 1), options["end_id"]
        longest = max(len(ids) for ids in batch_input_ids)
        for what, value, most in (
            ("Input batch size", len(batch_input_ids), self.max_batch_size),
            ("Maximum input length", longest, self.max_input_len),
            ("Maximum input length + maximum new tokens", longest + new_tokens, self.max_seq_len),
        ):
            if value > most:
                raise RuntimeError(f"{what} ({value}) exceeds the engine or specified limit ({most})")
        words = options.get("stop_words_list") or [[] for _ in batch_input_ids]
        if len(words) != len(batch_input_ids):
            raise TypeError("stop_words_list must hold for each prompt a list of words, each a list of ids")
        streaming, rows = options.get("streaming", False), [ids.tolist() for ids in batch_input_ids]
        requests = [
            executor.Request(
                input_token_ids=[*row],
                max_tokens=new_tokens,
                streaming=streaming,
                end_id=end_id,
                pad_id=options["pad_id"],
                stop_words=stop,
            )
            for row, stop in zip(rows, words)
        ]
        numbers = self.session.enqueue_requests(requests)
        if streaming:
            return self._stream(numbers, rows, options)
        responses = [response for group in self.session.await_responses(numbers) for response in group]
        return self._filled(responses, numbers, [[] for _ in rows], options)

    def _stream(self, numbers, rows, options):
        finished = 0
        while finished < len(numbers):
            responses = self.session.await_responses()
            finished += sum(response.has_error() or response.result.is_final for response in responses)
            yield self._filled(responses, numbers, rows, options)

    def _filled(self, responses, numbers, rows, options):
        """Whole sequences, copied and padded to the engine's max_seq_len at each step."""
        for response in responses:
            if response.has_error():
                raise RuntimeError(response.error_msg)
            rows[numbers.index(response.request_id)] += response.result.output_token_ids[0]
        output_ids = torch.full((len(rows), 1, self.max_seq_len), options["end_id"], dtype=torch.int32)
        for i, row in enumerate(rows):
            output_ids[i, 0, : len(row)] = torch.tensor(row, dtype=torch.int32)
        if not options.get("return_dict", False):
            return output_ids
        lengths = torch.tensor([[len(row)] for row in rows], dtype=torch.int32)
        return {"output_ids": output_ids} | (
            {"sequence_lengths": lengths} if options.get("output_sequence_lengths", False) else {}
        )
