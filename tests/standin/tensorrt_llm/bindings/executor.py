"""``bindings.executor`` as far as it is used, with the keywords of release 0.15.0: a toy next-token rule, one step at
each ``await_responses``, and the limits that the C++ runtime has."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

TOKEN_NBYTES = 131072  # keys and values of a position of Llama 3.1 8B
gpu = {"free": 80_000_000_000}  # bytes; what is loaded takes its share, and a test may take some for others


@dataclass(kw_only=True)
class SamplingConfig:
    beam_width: int = 1
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    seed: int | None = None


@dataclass(kw_only=True)
class Request:
    input_token_ids: list[int]
    max_tokens: int
    streaming: bool = False
    sampling_config: SamplingConfig = field(default_factory=SamplingConfig)
    end_id: int | None = None
    pad_id: int | None = None
    stop_words: list[list[int]] | None = None

    def __post_init__(self):
        ids = [*self.input_token_ids, self.max_tokens, *(w for word in self.stop_words or [] for w in word)]
        if any(type(value) is not int for value in ids) or type(self.sampling_config) is not SamplingConfig:
            raise TypeError("__init__(): incompatible constructor arguments")


@dataclass
class Result:
    is_final: bool
    output_token_ids: list[list[int]]  # a beam: the new ones alone if streaming, else the prompt too


@dataclass
class Response:
    request_id: int
    error_msg: str | None
    _result: Result | None

    def has_error(self):
        return self.error_msg is not None

    @property
    def result(self):
        assert self._result, "an error has no result"
        return self._result


class Executor:
    def __init__(self, engine_dir: str, *, free_gpu_memory_fraction: float, max_tokens: int | None) -> None:
        config = json.loads((Path(engine_dir) / "config.json").read_text())["build_config"]
        # Context FMHA over packed input: a prompt is one step's, whatever max_input_len the engine was built with.
        self.max_input_len = min(config["max_seq_len"] - 1, config["max_num_tokens"])
        self.kv_tokens = int(gpu["free"] * free_gpu_memory_fraction) // TOKEN_NBYTES
        self.kv_tokens = min(self.kv_tokens, max_tokens or self.kv_tokens)
        gpu["free"] -= self.kv_tokens * TOKEN_NBYTES
        self.numbers, self.active = itertools.count(1), {}

    def can_enqueue_requests(self):
        return True

    def enqueue_requests(self, requests):
        numbers = [next(self.numbers) for _ in requests]
        self.active |= {n: (request, list(request.input_token_ids)) for n, request in zip(numbers, requests)}
        return numbers

    def cancel_request(self, number):
        self.active.pop(number)

    def await_responses(self, ids=None):
        """Of all requests as one list, or a list for each of ``ids``."""
        if ids is None:
            return [self._step(number) for number in [*self.active]]
        return [self._until_response(number) for number in ids]

    def _until_response(self, number):
        return [self._step(number)] if number in self.active else []

    def _step(self, number):
        request, row = self.active[number]
        prompt = len(request.input_token_ids)
        error = None
        if prompt > self.max_input_len:
            error = f"Prompt length ({prompt}) exceeds maximum input length ({self.max_input_len})."
        elif prompt + request.max_tokens > self.kv_tokens:
            error = "Request cannot be scheduled: the KV cache is too small"
        if error:
            del self.active[number]
            return Response(number, error, None)
        while True:
            row.append((7 * row[-1] + 3) % 509)
            words = request.stop_words or []
            final = len(row) == prompt + request.max_tokens or row[-1] == request.end_id
            final = final or any(row[-len(word) :] == word for word in words)
            if final:
                del self.active[number]
            if request.streaming:
                return Response(number, None, Result(final, [row[-1:]]))
            if final:
                return Response(number, None, Result(True, [row]))
