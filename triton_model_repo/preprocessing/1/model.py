"""Triton's Python backend: text to token ids, with the model's chat template. Needs transformers only."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# The backend's stub ignores PYTHONPATH.
sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

from transformers import AutoTokenizer

MAX_QUERY_BYTES = 1 << 20


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        directory = json.loads(args["model_config"])["parameters"]["tokenizer_dir"]["string_value"]
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            ids = self._ids(inputs["QUERY"])
            end_id = _scalar(inputs, "END_ID", self.tokenizer.eos_token_id, -1)
            pad_id = _scalar(inputs, "PAD_ID", self.tokenizer.pad_token_id, max(end_id, 0))
            outputs = {
                "INPUT_ID": [ids],
                "REQUEST_INPUT_LEN": [[len(ids)]],
                "REQUEST_OUTPUT_LEN": [[_scalar(inputs, "REQUEST_OUTPUT_LEN")]],
                "OUT_END_ID": [[end_id]],
                "OUT_PAD_ID": [[pad_id]],
            }
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.array(value, dtype=np.int32)) for name, value in outputs.items()]
        )

    def _ids(self, query: Any) -> list[int]:
        if query.size != 1:
            raise ValueError(f"text_input must hold one text, got {query.size}: send one request a text")
        data: bytes = query.reshape(-1)[0]
        if len(data) > MAX_QUERY_BYTES:
            raise ValueError(f"text_input has {len(data)} bytes, more than {MAX_QUERY_BYTES}")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"text_input is not UTF-8: {error}") from None
        if self.tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            # Rendered and tokenized apart: the template already holds every special token.
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = self.tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError("text_input is empty")
        return ids


def _scalar(inputs: dict[str, Any], name: str, *defaults: int | None) -> int:
    """The one value of an input; where it is absent, the first default that is not None."""
    if name not in inputs:
        return next(default for default in defaults if default is not None)
    if inputs[name].size != 1:
        raise ValueError(f"{name} must hold one value, got shape {list(inputs[name].shape)}")
    return int(inputs[name].item())
