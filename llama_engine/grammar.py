"""What an answer may look like: a grammar as a mask over each next token, by the llguidance library.

A grammar is text in llguidance's dialect of Lark, in which ``%json {...}`` stands for a JSON schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_engine.errors import InputError

# The separators of json.dumps, and no other space: a small model may else write nothing but space for ever.
WHITESPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_grammar(schema: dict[str, Any], before: str = "", after: str = "") -> str:
    """A grammar of what fits a JSON schema, between two fixed texts."""
    parts = [json.dumps(before)] * bool(before) + [f"%json {json.dumps({'x-guidance': WHITESPACE} | schema)}"]
    return f"start: {' '.join(parts + [json.dumps(after)] * bool(after))}"


class Grammars:
    """Compiles grammars for the tokenizer in a directory; ``end_ids`` may follow where an answer is complete."""

    def __init__(self, directory: Path | str, vocab_size: int, end_ids: Sequence[int]) -> None:
        file = Path(directory) / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{directory} has no tokenizer.json, without which there are no grammars")
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise InputError("grammars need llguidance: pip install -r requirements.txt") from None
        self.vocab_size = vocab_size
        try:
            self._tokenizer = LLTokenizer(str(file), n_vocab=vocab_size, eos_token=list(end_ids) or None)
        except ValueError as error:
            raise InputError(f"{file} has no grammars: {error}") from None

    def compile(self, text: str) -> Grammar:
        """Raises :class:`InputError` for a grammar that is none, or is too large."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(text), log_level=0)
        if matcher.is_error():
            raise InputError(f"the grammar is refused: {' '.join(matcher.get_error().split())[:300]}")
        return Grammar(matcher, self.vocab_size)


class Grammar:
    """Where in the grammar one answer stands."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def forbidden(self) -> np.ndarray:
        """bool ``[vocab]``: the tokens that may not come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little") == 0

    def advance(self, token: int) -> bool:
        """Take the next token; whether nothing may follow it but the end."""
        self._matcher.consume_token(token)
        return self._matcher.is_stopped() or self._matcher.is_error()
