"""OpenAI's request and answer shapes: what is accepted, what is refused by name, how an error looks."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama_engine.errors import ErrorCode, InputError, RunError

DOWN = "The inference server does not answer. It may be starting, or it was stopped: see the terminal it runs in."
STATUS = {
    ErrorCode.INVALID: 400,
    ErrorCode.CONTEXT_LENGTH: 400,
    ErrorCode.QUEUE_FULL: 429,
    ErrorCode.CANCELLED: 499,
    ErrorCode.SHUTTING_DOWN: 503,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.TIMEOUT: 504,
}
Text = Annotated[str, Field(max_length=1 << 20)]
# accepted at these values only: the engine does not do them, and nothing asked for is silently ignored
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "suffix": (None,),
}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # not about the text


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @classmethod
    def of(cls, error: InputError | RunError) -> ApiError:
        """By the error's code alone."""
        text = str(error)
        if error.code is ErrorCode.QUEUE_FULL:
            text = f"The engine is busy, try again: {text}"
        elif error.code is ErrorCode.UNAVAILABLE:
            text = f"{DOWN} ({text[:200]})"
        return cls(STATUS.get(error.code, 500), text, code=error.code.value)

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _same(given: Any, accepted: Any) -> bool:
    """0 is not False and True is not 1, though Python has them equal; 0.0 is 0."""
    return given == accepted and isinstance(given, bool) == isinstance(accepted, bool)


class StreamOptions(BaseModel):
    """``continuous_usage_stats`` puts the usage so far into every chunk."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampling(BaseModel):
    """What both kinds of completion take. ``temperature`` 0 is greedy; without a seed every call draws anew."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(default_factory=lambda: secrets.randbits(63), ge=-(1 << 63), lt=1 << 63)
    max_tokens: int | None = Field(None, ge=1)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(default=[], max_length=4)

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        """Drop nulls and what does not bear on the text; refuse what the engine cannot do."""
        if not isinstance(data, dict):
            raise ApiError(400, "the request body must be a JSON object")
        for name, accepted in NEUTRAL.items():
            if name in data and not any(_same(data[name], value) for value in accepted):
                raise ApiError(400, f"{name}={data[name]!r} is not supported by this engine", param=name)
        data = {k: v for k, v in data.items() if v is not None and k not in NEUTRAL and k not in IGNORED}
        if isinstance(data.get("stop"), str):
            data["stop"] = [data["stop"]]
        if "max_completion_tokens" in data:
            data["max_tokens"] = data.pop("max_completion_tokens")
        return data


class Part(BaseModel):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "user", "assistant"]
    content: Text | list[Part]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=1000)


class CompletionRequest(Sampling):
    """One prompt: text, or its token ids."""

    prompt: Text | list[int]


class Shape:
    """The objects of one answer, ``chat.completion`` or ``text_completion``, whole or in chunks."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat, self._model, self._created = chat, model, int(time.time())
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._answer("chat.completion", content, reason, usage)

    def chunk(self, text: str | None, reason: str | None = None, usage: dict[str, int] | None = None) -> dict[str, Any]:
        """``text`` None: a chunk that only tells the usage."""
        content = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self._answer("chat.completion.chunk", None if text is None else content, reason, usage)

    def opening(self) -> dict[str, Any]:
        return self._answer("chat.completion.chunk", {"delta": {"role": "assistant", "content": ""}}, None, None)

    def _answer(
        self, kind: str, content: dict[str, Any] | None, reason: str | None, usage: dict[str, int] | None
    ) -> dict[str, Any]:
        choices = [{"index": 0, **content, "logprobs": None, "finish_reason": reason}] if content else []
        base = {"id": self._id, "created": self._created, "model": self._model, "choices": choices, "usage": usage}
        return base | {"object": kind if self.chat else "text_completion"}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
