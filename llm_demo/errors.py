"""How the gateway refuses and fails: OpenAI's error shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

    @classmethod
    def of_validation(cls, errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
        """The most exact of pydantic's errors about ``body``, under the name that its field has in the request."""
        if errors[0]["type"] == "json_invalid":
            where = errors[0]["loc"][-1]
            return cls(400, f"The body is not valid JSON: {errors[0]['ctx']['error']} at character {where}.")
        path, error = max(((_path(error["loc"][1:], body), error) for error in errors), key=lambda pair: len(pair[0]))
        name = ".".join(map(str, path))
        return cls(400, f"{name or 'body'}: {error['msg']}", param=name or None)

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _path(location: Sequence[str | int], body: Any) -> list[str | int]:
    """The keys and indices of ``location`` that lead into ``body``, or to what lacks in it: not the names of a type."""
    path: list[str | int] = []
    for part in location:
        if isinstance(body, Mapping) and (part in body or part is location[-1]):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        path.append(part)
    return path
