"""Triton's Python backend: token ids to text, by ``llama_engine.tokenizer`` alone.

A streamed piece may end inside a character, so the pieces are bytes: exactly those that each token stands for after
another one, a leading space included. Joined, they are the UTF-8 of the whole answer. Special tokens and ids that end
an answer give nothing.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# The backend's stub ignores PYTHONPATH.
sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

from llama_engine.tokenizer import ChatTokenizer

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte of SentencePiece's byte fallback


def byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        directory = json.loads(args["model_config"])["parameters"]["tokenizer_dir"]["string_value"]
        tokenizer = ChatTokenizer(directory)
        self.backend = tokenizer.backend
        self.silent = tokenizer.special_ids | set(tokenizer.eos_token_ids)
        self.added = self.backend.get_added_tokens_decoder()
        decoder = json.dumps(json.loads(self.backend.to_str())["decoder"])
        self.byte_level = byte_of_character() if "ByteLevel" in decoder else None
        self.byte_fallback = "ByteFallback" in decoder
        self.before = [tokenizer.letter]

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
        return b"".join(self._bytes(i) for i in ids if i >= 0 and i not in self.silent)

    def _bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id) or ""  # a model may have more ids than its tokenizer
        if self.byte_level and token_id not in self.added:
            return bytes(self.byte_level[char] for char in token)
        if self.byte_fallback and (byte := BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        before = self.backend.decode(self.before)
        return self.backend.decode([*self.before, token_id])[len(before) :].encode()
