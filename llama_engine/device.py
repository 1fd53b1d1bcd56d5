"""Which device a script runs on; ``python -m llama_engine.device auto`` prints it."""

from __future__ import annotations

import os
import sys

import pynvml
import torch

from llama_engine.errors import InputError, RunError, run_cli


def pick_device(device: str) -> torch.device:
    """Resolve auto, cpu or cuda. Raises :class:`InputError` when CUDA is asked for and absent."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA GPU is visible to PyTorch: use --device cpu, or check nvidia-smi and the torch build")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def use_own_gpu(index: int) -> None:
    """Leave this process only the ``index``-th of the GPUs that it sees; without GPUs nothing happens. For one of
    several processes on a machine, before CUDA starts: it reads ``CUDA_VISIBLE_DEVICES`` once. Raises :class:`RunError`
    where there are fewer GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:  # PyTorch's own count would start CUDA
        pynvml.nvmlInit()
        gpus = visible.split(",") if visible else [*map(str, range(pynvml.nvmlDeviceGetCount()))]
    except pynvml.NVMLError:
        return
    if visible == "" or not gpus:
        return
    if index >= len(gpus):
        raise RunError(f"instance {index} of the engine finds {len(gpus)} GPUs: give at most one instance a GPU")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index]


if __name__ == "__main__":
    run_cli(lambda: print(pick_device(sys.argv[1]).type))
