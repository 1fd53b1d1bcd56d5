"""What an engine directory gains from the machine it is on: a compiled CPU kernel, tuned GPU kernels.

Both are optional. An engine moved to another machine compiles at its first load, or runs untuned.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llama_engine.errors import RunError
from llama_engine.kernels import cpu


def prepare(engine_dir: Path) -> list[str]:
    """Compile and tune for this machine; one line a thing done or left out."""
    lines = []
    try:
        library = cpu.compile_library(engine_dir / "kernels")
        lines.append(f"CPU kernel: {library.name}" if library else "CPU kernel: no C++ compiler, PyTorch operations")
    except RunError as error:
        lines.append(f"CPU kernel: {error}")
    if torch.cuda.is_available():
        from llama_engine.kernels.tuning import tune_engine

        lines.append(tune_engine(engine_dir))
    return lines
