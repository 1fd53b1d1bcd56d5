"""Triton's Python backend: text to token ids, with the model's chat template, by ``llama_engine.tokenizer`` alone."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# The backend's stub ignores PYTHONPATH.
sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

from llama_engine.tokenizer import ChatTokenizer, stop_inputs

MAX_QUERY_BYTES = 1 << 20
NO_WORDS = [[0], [-1]]  # NVIDIA's padding


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        directory = json.loads(args["model_config"])["parameters"]["tokenizer_dir"]["string_value"]
        self.tokenizer = ChatTokenizer(directory)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            ids = self._ids(inputs["QUERY"])
            stops = stop_inputs(self.tokenizer.eos_token_ids) if "END_ID" not in inputs else {}
            end_id = _scalar(inputs, "END_ID", stops.get("end_id"), -1)
            pad_id = _scalar(inputs, "PAD_ID", self.tokenizer.pad_token_id, max(end_id, 0))
            outputs = {
                "INPUT_ID": [ids],
                "REQUEST_INPUT_LEN": [[len(ids)]],
                "REQUEST_OUTPUT_LEN": [[_scalar(inputs, "REQUEST_OUTPUT_LEN")]],
                "OUT_END_ID": [[end_id]],
                "OUT_PAD_ID": [[pad_id]],
                "STOP_WORDS_IDS": [stops.get("stop_words_list", NO_WORDS)],
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
        if self.tokenizer.template:
            return self.tokenizer.encode_chat([{"role": "user", "content": text}])
        ids = self.tokenizer.encode(text)
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
