"""OpenAI's answers: pieces of a choice as they come, and the objects they are put into."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

OBFUSCATION = 16  # characters that text and padding of a chunk have together, unless the text is longer


@dataclass
class Usage:
    """Tokens of one request so far, over all its prompts and choices."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int | None = None  # of the prompts, found in the engine's prefix cache
    resumed_after: list[int] = field(default_factory=list)  # tokens, where an answer went on in another replica

    def as_json(self) -> dict[str, Any]:
        usage: dict[str, Any] = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        usage["total_tokens"] = self.prompt_tokens + self.completion_tokens
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        if self.resumed_after:
            usage["resumed_after"] = self.resumed_after
        return usage


@dataclass
class Score:
    """A token's bytes, its log-probability (None for the first of a prompt) and those of the most likely."""

    token: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]

    def as_chat(self) -> dict[str, Any]:
        top = [_named(token, logprob) for token, logprob in self.top]
        return _named(self.token, self.logprob) | {"top_logprobs": top}


def _named(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}


@dataclass
class Piece:
    """What is new of one choice. The last one alone has a ``reason``."""

    index: int
    text: str
    reason: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    scores: list[Score] | None = None
    offset: int = 0  # characters of the choice before the first of the scores
    ids: list[int] | None = None
    prompt_ids: list[int] | None = None  # in the first one


class Shape:
    """The objects of one answer, ``chat.completion`` or ``text_completion``, whole or in chunks."""

    def __init__(self, model: str, chat: bool, *, obfuscate: bool = False) -> None:
        self.chat, self._obfuscate = chat, obfuscate
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> dict[str, Any]:
        """All pieces of all choices as one object."""
        choices: dict[int, Piece] = {}
        for piece in pieces:
            choice = choices.setdefault(piece.index, Piece(piece.index, ""))
            choice.text += piece.text
            choice.calls += piece.calls
            choice.reason = piece.reason
            choice.prompt_ids = choice.prompt_ids or piece.prompt_ids
            if piece.ids is not None:
                choice.ids = (choice.ids or []) + piece.ids
            if piece.scores is not None:
                choice.scores = (choice.scores or []) + piece.scores
        rows = [self._choice(choice, self._message(choice)) for _, choice in sorted(choices.items())]
        return self._answer("chat.completion", rows, usage)

    def chunk(self, piece: Piece, usage: Usage | None) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(piece.calls)]
        content = {"delta": delta} if self.chat else {"text": piece.text}
        chunk = self._answer("chat.completion.chunk", [self._choice(piece, content)], usage)
        if self._obfuscate:
            chunk["obfuscation"] = secrets.token_urlsafe(OBFUSCATION)[: max(0, OBFUSCATION - len(piece.text))]
        return chunk

    def opening(self, index: int) -> dict[str, Any]:
        content = {"delta": {"role": "assistant", "content": ""}}
        return self._answer("chat.completion.chunk", [self._choice(Piece(index, ""), content)], None)

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk that only tells the usage."""
        return self._answer("chat.completion.chunk", [], usage)

    def _message(self, choice: Piece) -> dict[str, Any]:
        if not self.chat:
            return {"text": choice.text}
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.calls}
        return {"message": message}

    def _choice(self, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        scores = None
        if piece.scores is not None and self.chat:
            scores = {"content": [score.as_chat() for score in piece.scores], "refusal": None}
        elif piece.scores is not None:
            scores = _as_completion(piece.scores, piece.offset)
        given = {"token_ids": piece.ids, "prompt_token_ids": piece.prompt_ids}
        ids = {name: value for name, value in given.items() if value is not None}
        return {"index": piece.index, **content, **ids, "logprobs": scores, "finish_reason": piece.reason}

    def _answer(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        told = {"usage": usage and usage.as_json(), "object": kind if self.chat else "text_completion"}
        return self._base | {"choices": choices} | told


def _as_completion(scores: list[Score], offset: int) -> dict[str, Any]:
    tokens = [score.token.decode(errors="replace") for score in scores]
    offsets = [offset, *itertools.accumulate(map(len, tokens), initial=offset)][1:]
    tops: list[dict[str, float] | None] = []
    for score in scores:
        top: dict[str, float] = {}
        for other, logprob in [*score.top, *([(score.token, score.logprob)] if score.top else [])]:
            top.setdefault(other.decode(errors="replace"), logprob)  # the most likely of those that look alike
        tops.append(top or None)
    return {
        "tokens": tokens,
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": offsets[: len(tokens)],
    }
