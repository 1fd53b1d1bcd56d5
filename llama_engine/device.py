"""Which device a script runs on; ``python -m llama_engine.device auto`` prints it."""

from __future__ import annotations

import sys

import torch

from llama_engine.errors import InputError, run_cli


def pick_device(device: str) -> torch.device:
    """Resolve auto, cpu or cuda. Raises :class:`InputError` when CUDA is asked for and absent."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA GPU is visible to PyTorch: use --device cpu, or check nvidia-smi and the torch build")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


if __name__ == "__main__":
    run_cli(lambda: print(pick_device(sys.argv[1]).type))
