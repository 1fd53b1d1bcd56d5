"""Ends what is left of a server when the process that started it is gone, however it went.

A backend process waits for its dead server for ever, and nothing that runs in the starter survives a kill -9 of it. So
this runs beside them, in the standard library alone; the starter holds its standard input open and writes nothing.

    python lifeline.py PROCESS_GROUP SHARED_MEMORY_PREFIX
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path


def end(group: int, prefix: str) -> None:
    """kill -9 every process of ``group`` and remove its shared memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for region in Path("/dev/shm").glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end(int(sys.argv[1]), sys.argv[2])
