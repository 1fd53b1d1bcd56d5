"""One Triton request under the tensor names of NVIDIA's ``tensorrt_llm`` model: arrays in, checked values out.

What TensorRT-LLM offers and this engine does not (beam search, logits ...) is accepted at its neutral value and refused
by name at any other: nothing a client asks for is silently ignored. ``top_logprobs`` is this engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_engine.errors import InputError
from llama_engine.sampling import SamplingParams

ONE = ("beam_width", "num_return_sequences", "len_penalty", "early_stopping")
ZERO = ("return_context_logits", "return_generation_logits")
NEUTRAL = dict.fromkeys(ONE, (0, 1)) | dict.fromkeys(ZERO, (0,))


@dataclass(frozen=True)
class GenerationRequest:
    """What the tensors of one request ask for. ``prompt`` is the unpadded token ids; ``output`` those of them at the
    end that another replica has already answered with."""

    prompt: list[int]
    output: list[int]
    max_new_tokens: int
    params: SamplingParams
    stop_token_ids: tuple[int, ...]
    min_tokens: int  # of the answer, output included, before one of stop_token_ids may come
    grammar: str | None
    streaming: bool
    exclude_input: bool


def scalar(arrays: Mapping[str, np.ndarray], name: str, default: Any) -> Any:
    """The one value of a [1] or [1, 1] tensor. Raises :class:`InputError` when it holds none or several."""
    array = arrays.get(name)
    if array is None:
        return default
    if array.size != 1:
        raise InputError(f"{name} must hold one value, got shape {list(array.shape)}")
    return array.reshape(-1)[0].item()


def parse(arrays: Mapping[str, np.ndarray], *, exclude_input_default: bool = False) -> GenerationRequest:
    """Check the tensors of one request. ``input_ids`` is ``[1, S]`` (or ``[S]``), right-padded to ``input_lengths``.

    Sampling is greedy unless temperature, runtime_top_k or runtime_top_p asks for a draw. An absent or negative
    ``end_id`` never stops. ``output_prefix_length`` resumes an answer: so many of the last ``input_ids`` are its
    beginning, and ``request_output_len`` counts what is still to come. Raises :class:`InputError`.
    """
    for name, accepted in NEUTRAL.items():
        if (value := scalar(arrays, name, accepted[0])) not in accepted:
            raise InputError(f"{name}={value} is not supported by the native engine (only {accepted[-1]})")
    ids = _prompt(arrays)
    answered = int(scalar(arrays, "output_prefix_length", 0))
    if not 0 <= answered < len(ids):
        raise InputError(f"output_prefix_length is {answered}, but there are {len(ids)} ids, the prompt's first")
    return GenerationRequest(
        prompt=ids[: len(ids) - answered],
        output=ids[len(ids) - answered :],
        max_new_tokens=int(scalar(arrays, "request_output_len", 0)),
        params=_sampling(arrays),
        stop_token_ids=_stop_ids(arrays),
        min_tokens=int(scalar(arrays, "min_length", 0)),
        grammar=_grammar(arrays),
        streaming=bool(scalar(arrays, "streaming", False)),
        exclude_input=bool(scalar(arrays, "exclude_input_in_output", exclude_input_default)),
    )


def _prompt(arrays: Mapping[str, np.ndarray]) -> list[int]:
    ids = arrays.get("input_ids")
    if ids is None or ids.size == 0:
        raise InputError("input_ids is empty: give at least one token id")
    if ids.ndim == 2 and ids.shape[0] != 1:
        raise InputError(
            f"input_ids has batch size {len(ids)}: send one request a sequence, they are batched in flight"
        )
    if ids.ndim > 2:
        raise InputError(f"input_ids must have shape [1, S], got {list(ids.shape)}")
    row = ids.reshape(-1)
    length = int(scalar(arrays, "input_lengths", row.size))
    if not 1 <= length <= row.size:
        raise InputError(f"input_lengths is {length}, but input_ids holds {row.size} ids")
    return row[:length].tolist()


def _sampling(arrays: Mapping[str, np.ndarray]) -> SamplingParams:
    top_k = int(scalar(arrays, "runtime_top_k", 0))
    top_p = float(scalar(arrays, "runtime_top_p", 0.0))
    asked = "temperature" in arrays or top_k > 1 or 0 < top_p < 1
    temperature = float(scalar(arrays, "temperature", 1.0 if asked else 0.0))
    return SamplingParams(
        temperature,
        top_k,
        top_p or 1.0,
        int(scalar(arrays, "random_seed", 0)),
        repetition_penalty=float(scalar(arrays, "repetition_penalty", 1.0)),
        presence_penalty=float(scalar(arrays, "presence_penalty", 0.0)),
        frequency_penalty=float(scalar(arrays, "frequency_penalty", 0.0)),
        min_p=float(scalar(arrays, "min_p", 0.0)),
        logit_bias=_bias(arrays),
        bad_words=tuple(map(tuple, _words(arrays, "bad_words_list"))),
        logprobs=_logprobs(arrays),
        prompt_logprobs=bool(scalar(arrays, "return_prompt_log_probs", False)),
    )


def _grammar(arrays: Mapping[str, np.ndarray]) -> str | None:
    """The UTF-8 bytes of ``grammar`` as text."""
    text = arrays.get("grammar")
    try:
        return None if text is None else text.tobytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"grammar is not UTF-8: {error}") from None


def _bias(arrays: Mapping[str, np.ndarray]) -> tuple[tuple[int, float], ...]:
    """What ``embedding_bias`` ``[1, vocab]`` adds to which ids."""
    bias = arrays.get("embedding_bias", np.zeros(0, np.float32)).reshape(-1)
    ids = np.flatnonzero(bias)
    return tuple(zip(ids.tolist(), bias[ids].tolist()))


def _logprobs(arrays: Mapping[str, np.ndarray]) -> int | None:
    """How many of the most likely tokens are wanted beside each token's own log-probability; None: not even that."""
    top = int(scalar(arrays, "top_logprobs", 0))
    if scalar(arrays, "return_log_probs", False):
        return top
    for name in ("top_logprobs", "return_prompt_log_probs"):
        if value := scalar(arrays, name, 0):
            raise InputError(f"{name}={value} needs return_log_probs=true")
    return None


def _stop_ids(arrays: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """``end_id`` and the words of ``stop_words_list``."""
    end_id = int(scalar(arrays, "end_id", -1))
    words = _words(arrays, "stop_words_list")
    if any(len(word) != 1 for word in words):
        raise InputError("stop_words_list: the native engine stops at words of one token only")
    return (*([end_id] if end_id >= 0 else []), *(word[0] for word in words))


def _words(arrays: Mapping[str, np.ndarray], name: str) -> list[list[int]]:
    """The words of a list ``[1, 2, n]``: flat ids over end offsets, -1 padded."""
    words = arrays.get(name)
    if words is None or not words.size:
        return []
    if words.ndim not in (2, 3) or words.shape[-2] != 2:
        raise InputError(f"{name} must have shape [1, 2, n], got {list(words.shape)}")
    flat, offsets = words.reshape(2, -1)
    ends = [int(end) for end in offsets if end > 0]
    if ends != sorted(set(ends)) or max(ends, default=0) > flat.size:
        raise InputError(f"{name} ends words at {ends}, which must rise and not pass its {flat.size} ids")
    return [flat[start:end].tolist() for start, end in zip([0, *ends], ends)]
