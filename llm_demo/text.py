"""Token ids back to text as they arrive."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream

from llama_engine.tokenizer import ChatTokenizer

MAX_UNFINISHED = 8  # tokens: no character is longer, so these bytes are no character


class TextStream:
    """Ids in, text out: whole characters only, and nothing from a stop string on.

    Text that may be the beginning of a stop string is held back until it is known not to be. One that ends within the
    first ``min_tokens`` tokens is text like any other. ``stopped`` is true once a stop string was found; ``tokens``
    counts the ids pushed.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: list[str], min_tokens: int = 0) -> None:
        self._tokenizer, self._stop, self._min_tokens = tokenizer, stop, min_tokens
        self._early = 0  # characters of what is held that the first min_tokens made
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []  # ids that gave no text yet
        self._held = ""
        self.tokens = 0
        self.stopped = False

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """The text that these ids make final; with ``last``, all that is left."""
        for token in ids:
            self.tokens += 1
            if token not in self._tokenizer.special_ids:
                self._held += self._decode(token)
            if self.tokens <= self._min_tokens:
                self._early = len(self._held)
        if last:
            self._held += self._tokenizer.decode(self._pending)
            self._pending = []
        return self._release(last)

    def _decode(self, token: int) -> str:
        self._pending.append(token)
        try:
            piece = self._decoder.step(self._tokenizer.backend, token)
            stuck = piece is None and len(self._pending) > MAX_UNFINISHED
        except Exception:  # the library's own: bytes that are no character changed text that was already out
            piece, stuck = None, True
        if stuck:
            piece = self._tokenizer.decode(self._pending)
            self._decoder = DecodeStream(skip_special_tokens=True)
            self._decoder.step(self._tokenizer.backend, self._tokenizer.letter)  # what follows is not the first word
        if piece is None:
            return ""
        self._pending = []
        return piece

    def _release(self, last: bool) -> str:
        starts = ((stop, max(0, self._early + 1 - len(stop))) for stop in self._stop)
        found = [at for stop, start in starts if (at := self._held.find(stop, start)) >= 0]
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
        self._early = max(0, self._early - len(text))
        return text
