"""Errors a user can cause, and the one place where they become a line on stderr and an exit code.

Exit codes: 0 success, 1 failure while running, 2 usage or input error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, where and what to do."""


class RunError(RuntimeError):
    """Valid input, but the run failed (server died, disk full, request refused)."""


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
