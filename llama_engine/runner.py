"""``ModelRunner``: one face for both engines, shaped like TensorRT-LLM's ``ModelRunnerCpp``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llama_engine.backend import Backend, Batch
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError
from llama_engine.native import NativeBackend, load_engine
from llama_engine.sampling import SamplingParams
from llama_engine.trtllm import TensorRTBackend


class ModelRunner:
    """Answers through the backend that :meth:`from_dir` picks: the one ``engine_dir`` was built for."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @classmethod
    def from_dir(cls, engine_dir: str | Path, *, device: str = "auto", **options: Any) -> ModelRunner:
        """Load an engine; ``options`` go to :func:`llama_engine.native.load_engine` or
        :class:`llama_engine.trtllm.TensorRTBackend`. Raises :class:`InputError`."""
        if load_engine_json(engine_dir, backend="auto").backend == "tensorrt_llm":
            return cls(TensorRTBackend(engine_dir, **options))
        return cls(NativeBackend(load_engine(engine_dir, device=device, **options)))

    def generate(
        self,
        batch_input_ids: Sequence[torch.Tensor],
        *,
        max_new_tokens: int = 1,
        end_id: int,
        pad_id: int,
        stop_words_list: list[list[list[int]]] | None = None,
        temperature: float = 1.0,
        top_k: int = 1,
        top_p: float = 1.0,
        random_seed: int = 0,
        streaming: bool = False,
        return_dict: bool = False,
        output_sequence_lengths: bool = False,
    ) -> Any:
        """Generate for each prompt, a 1-D int tensor, until ``end_id``, a stop word or ``max_new_tokens``.

        Returns int32 ``(batch, 1, longest prompt + max_new_tokens)``, prompt included, padded with ``end_id``; with
        ``return_dict`` and ``output_sequence_lengths`` a dict with ``output_ids`` and ``sequence_lengths`` int32
        ``(batch, 1)``. With ``streaming`` an iterator over the same, growing by what each step brought. To ignore EOS
        pass an ``end_id`` that cannot occur, such as -1. ``stop_words_list`` has for each prompt the words, each a list
        of ids, that end its answer too (default: if ``end_id`` ends this model's answers, the other ids that do); the
        native engine takes words of one id. Raises :class:`InputError`, and
        :class:`RunError` where the logits of a prompt are not finite, or TensorRT-LLM fails.
        """
        for name, value in (("end_id", end_id), ("pad_id", pad_id)):
            if type(value) is not int:
                raise InputError(f"{name} must be an int, got {value!r}")
        prompts = [_as_list(ids) for ids in batch_input_ids]
        if not prompts:
            raise InputError("batch_input_ids is empty")
        params = SamplingParams(temperature, top_k, top_p, random_seed)
        ends = self.backend.eos_token_ids if end_id in self.backend.eos_token_ids else ()
        others = [[token] for token in ends if token != end_id]
        words = [others for _ in prompts] if stop_words_list is None else stop_words_list
        if len(words) != len(prompts):
            raise InputError(f"stop_words_list has words for {len(words)} prompts, but there are {len(prompts)}")
        batch = Batch(prompts, max_new_tokens, params, end_id, pad_id, words, streaming)
        steps = self.backend.answer(batch)
        results = (_result(*step, return_dict, output_sequence_lengths) for step in steps)
        if streaming:
            return results
        *_, last = results
        return last


def _as_list(ids: torch.Tensor) -> list[int]:
    tensor = torch.as_tensor(ids)
    if tensor.dim() != 1 or tensor.is_floating_point():
        raise InputError(f"each prompt must be a 1-D integer tensor, got {tuple(tensor.shape)} {tensor.dtype}")
    return tensor.tolist()


def _result(output_ids: torch.Tensor, lengths: torch.Tensor, return_dict: bool, with_lengths: bool) -> Any:
    if not return_dict:
        return output_ids
    return {"output_ids": output_ids} | ({"sequence_lengths": lengths} if with_lengths else {})
