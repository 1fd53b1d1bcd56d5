"""Errors a user can cause, what kind each is, and the one place where they become a line on stderr and an exit code.

Exit codes: 0 success, 1 failure while running, 2 usage or input error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from enum import Enum


class ErrorCode(str, Enum):
    """What kind of error a request met: the same word from the engine's loop to the HTTP answer."""

    INVALID = "invalid_argument"
    CONTEXT_LENGTH = "context_length_exceeded"
    QUEUE_FULL = "queue_full"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    SHUTTING_DOWN = "shutting_down"
    UNAVAILABLE = "engine_unavailable"  # the server does not answer, or its process died
    NOT_FINITE = "logits_not_finite"
    INTERNAL = "internal"


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, where and what to do."""

    def __init__(self, message: str, code: ErrorCode = ErrorCode.INVALID) -> None:
        super().__init__(message)
        self.code = code


class RunError(RuntimeError):
    """Valid input, but the run failed (server died, disk full, request refused)."""

    def __init__(self, message: str, code: ErrorCode = ErrorCode.INTERNAL) -> None:
        super().__init__(message)
        self.code = code


_CODED = re.compile(rf"\[({'|'.join(code.value for code in ErrorCode)})\] ")


def with_code(error: InputError | RunError) -> str:
    """One line for a protocol that carries text alone: "[queue_full] the queue is full: ..."."""
    return f"[{error.code.value}] {error}"


def split_code(text: str) -> tuple[str, ErrorCode | None]:
    """The message and the code of :func:`with_code`'s line, whatever a server put before it; None if it has none."""
    found = _CODED.search(text)
    return (_CODED.sub("", text, count=1), ErrorCode(found[1])) if found else (text, None)


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` and exit; user-caused errors print one line, never a traceback."""
    try:
        code, message = main() or 0, None
    except InputError as error:
        code, message = 2, str(error)
    except (RunError, OSError) as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    if message is not None:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
