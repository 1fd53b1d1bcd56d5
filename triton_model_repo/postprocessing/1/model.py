"""Triton's Python backend: token ids to text. Needs transformers only.

A streamed piece may end inside a character, so the pieces are bytes: exactly those that the tokens of a byte-level
tokenizer (Llama 3, SmolLM2) stand for. Joined, they are the UTF-8 of the whole answer. Special tokens give nothing.
"""

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


def byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        directory = json.loads(args["model_config"])["parameters"]["tokenizer_dir"]["string_value"]
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        decoder = json.loads(self.tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
        self.byte_level = byte_of_character() if decoder.get("type") == "ByteLevel" else None

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
            lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
            texts = [
                self._text(row[:length].tolist())
                for beams, beam_lengths in zip(tokens, lengths)
                for row, length in zip(beams, beam_lengths)
            ]
            output = np.array(texts, dtype=np.object_).reshape(lengths.shape)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", output)]))
        return responses

    def _text(self, ids: list[int]) -> bytes:
        ids = [i for i in ids if i >= 0 and i not in self.special]
        if self.byte_level is None:
            return self.tokenizer.decode(ids).encode()
        return bytes(self.byte_level[char] for token in self.tokenizer.convert_ids_to_tokens(ids) for char in token)
