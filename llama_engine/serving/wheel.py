"""``tritonserver`` out of the wheel ``nvidia-pytriton``: where it lies, its backend, its environment."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import sysconfig
from pathlib import Path

from llama_engine.errors import InputError
from llama_engine.serving.repository import REPOSITORY

INSTALL = "pip install --no-deps nvidia-pytriton==0.7.0 (Linux on x86-64 or arm64)"


def wheel() -> Path:
    """The folder of ``nvidia-pytriton`` that holds bin/tritonserver. Raises :class:`InputError` in one line."""
    spec = importlib.util.find_spec("pytriton")
    root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if root is None or not (root / "tritonserver/bin/tritonserver").is_file():
        here = f"{sys.platform} {platform.machine()}"
        raise InputError(f"Triton Inference Server is not available on {here} here: {INSTALL}")
    return root


def link_backend(root: Path, backends: Path) -> Path:
    """Put the Python backend for the running Python into ``backends``; returns its stub. Raises :class:`InputError`."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise InputError(f"this Triton has no Python backend for Python {version}: use Python 3.10 to 3.12")
    parts = root / "tritonserver/backends/python"
    (backends / "python").mkdir(parents=True)
    for part in (parts / "libtriton_python.so", parts / "triton_python_backend_utils.py", stub):
        (backends / "python" / part.name).symlink_to(part)
    return stub


def own_backends(backends: Path) -> tuple[str, ...]:
    """What :func:`link_backend` writes; nothing for any other directory."""
    return ("python",) if (backends / "python/libtriton_python.so").is_symlink() else ()


def environment(root: Path) -> dict[str, str]:
    """The server's environment: this Python first on PATH, where the stub looks for it, and its libpython."""
    libraries = [str(root.parent / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        libraries.insert(0, str(sysconfig.get_config_var("LIBDIR")))
    paths = {
        "PATH": [str(Path(sys.executable).parent), os.environ.get("PATH", "")],
        "LD_LIBRARY_PATH": libraries,
        "PYTHONPATH": [str(REPOSITORY.parent), *sys.path],
    }
    # LC_ALL: the stub reads what a compiler says as ASCII, whatever the locale
    return os.environ | {name: os.pathsep.join(filter(None, parts)) for name, parts in paths.items()} | {"LC_ALL": "C"}
