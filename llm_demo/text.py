"""Prompts to token ids, and token ids back to text as they arrive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_engine.errors import InputError

UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character
MAX_UNFINISHED = 8  # tokens: no character is longer, so these bytes are no character


class ChatTokenizer:
    """The tokenizer and chat template that lie in an engine directory."""

    def __init__(self, engine_dir: Path | str) -> None:
        if not (Path(engine_dir) / "tokenizer.json").is_file():
            raise InputError(f"{engine_dir} has no tokenizer.json: the demo speaks text, give an engine that has one")
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(engine_dir, local_files_only=True)
        self.eos_token_id: int | None = self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Raises :class:`InputError` when the model has no template or its template refuses these messages."""
        if not self._tokenizer.chat_template:
            raise InputError("this model has no chat template: use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template refuses by raising what it likes
            raise InputError(f"the model's chat template refuses these messages: {error}") from None
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class TextStream:
    """Ids in, text out: whole characters only, and nothing from a stop string on.

    Text that may be the beginning of a stop string is held back until it is known not to be. ``stopped`` is true once
    a stop string was found; ``tokens`` counts the ids pushed.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: list[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._start = self._done = 0  # ids[start:done] are shown and give the next ones their context
        self._held = ""
        self.stopped = False

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """The text that these ids make final; with ``last``, all that is left."""
        self._ids += ids
        shown = self._tokenizer.decode(self._ids[self._start : self._done])
        now = self._tokenizer.decode(self._ids[self._start :])
        if last or not now.endswith(UNFINISHED) or len(self._ids) - self._done > MAX_UNFINISHED:
            self._held += now[len(shown) :]
            self._start, self._done = self._done, len(self._ids)
        return self._release(last)

    def _release(self, last: bool) -> str:
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = 0
        if not last:
            ends = (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
            keep = max(ends, default=0)
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        return text
