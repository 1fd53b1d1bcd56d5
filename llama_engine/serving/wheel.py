"""``tritonserver`` out of the wheel ``nvidia-pytriton``: where it lies, and the Python that its backend runs.

That is this Python, where the wheel has a backend for it. Elsewhere, and where text is served under NumPy 2, it is
another with the engine's packages: what ``LLAMA_ENGINE_TRITON_PYTHON`` names, else the newest on PATH.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_engine.errors import InputError, run_cli
from llama_engine.serving.repository import REPOSITORY

INSTALL = "pip install --no-deps nvidia-pytriton==0.7.0 (Linux on x86-64 or arm64)"
VARIABLE = "LLAMA_ENGINE_TRITON_PYTHON"
NEWEST_FIRST = ("3.13", "3.12", "3.11", "3.10")
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "llguidance", "rich")  # that the models import
ASK = """
import importlib.metadata as m, importlib.util as u, json, sys, sysconfig as c
if all(map(u.find_spec, sys.argv[1:])):
    libraries = c.get_config_var("LIBDIR") if c.get_config_var("Py_ENABLE_SHARED") else None
    print(json.dumps([sys.executable, "%d.%d" % sys.version_info[:2], m.version("numpy"), sys.path, libraries]))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python with the engine's packages. ``libraries`` is where its libpython lies, if that is a file of its own."""

    executable: str
    version: str
    numpy: str
    path: list[str]
    libraries: str | None

    @property
    def numpy1(self) -> bool:
        return self.numpy.startswith("1.")


def wheel() -> Path:
    """The folder of ``nvidia-pytriton`` that holds bin/tritonserver. Raises :class:`InputError` in one line."""
    spec = importlib.util.find_spec("pytriton")
    root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if root is None or not (root / "tritonserver/bin/tritonserver").is_file():
        here = f"{sys.platform} {platform.machine()}"
        raise InputError(f"Triton Inference Server is not available on {here} here: {INSTALL}")
    return root


def stub_for(root: Path, version: str) -> Path:
    return root / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub"


def interpreter(root: Path, *, text: bool = False) -> Interpreter:
    """The Python for the models; with ``text`` one with NumPy 1. Raises :class:`InputError` where there is none."""
    for found in _candidates():
        if stub_for(root, found.version).is_file() and (found.numpy1 or not text):
            return found
    this = _this()
    fix = f"set {VARIABLE} to a Python {{}} in which requirements.txt is installed"
    if not stub_for(root, this.version).is_file():
        lacks = f"this Triton has no backend for Python {this.version}, and none that it has one for was found"
        raise InputError(f"{lacks}: {fix.format('3.10 to 3.13' if not text else '3.10 to 3.12')}")
    raise InputError(
        f"serving text needs NumPy 1, found {this.numpy}: this Triton's Python backend was built for NumPy 1 and loses "
        f"strings under NumPy 2; {fix.format('3.10 to 3.12')}. Token ids work with both"
    )


def _candidates() -> Iterator[Interpreter]:
    if named := os.environ.get(VARIABLE):
        if not (found := _ask(named)):
            raise InputError(f"{VARIABLE}={named} is no Python with {', '.join(PACKAGES)}")
        yield found
        return
    yield _this()
    yield from filter(None, (_ask(f"python{version}") for version in NEWEST_FIRST))


def _this() -> Interpreter:
    shared = sysconfig.get_config_var("Py_ENABLE_SHARED")
    libraries = str(sysconfig.get_config_var("LIBDIR")) if shared else None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Interpreter(sys.executable, version, np.__version__, sys.path, libraries)


def _ask(python: str) -> Interpreter | None:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run([python, "-c", ASK, *PACKAGES], env=env, capture_output=True, text=True, check=False)
        return Interpreter(*json.loads(done.stdout))
    except (OSError, ValueError):
        return None


def link_backend(root: Path, backends: Path, version: str) -> Path:
    """Put the Python backend for Python ``version`` into ``backends``; returns its stub."""
    stub = stub_for(root, version)
    parts = root / "tritonserver/backends/python"
    (backends / "python").mkdir(parents=True)
    for part in (parts / "libtriton_python.so", parts / "triton_python_backend_utils.py", stub):
        (backends / "python" / part.name).symlink_to(part)
    return stub


def own_backends(backends: Path) -> tuple[str, ...]:
    """What :func:`link_backend` writes; nothing for any other directory."""
    return ("python",) if (backends / "python/libtriton_python.so").is_symlink() else ()


def environment(root: Path, python: Interpreter) -> dict[str, str]:
    """The server's environment: that Python first on PATH, where the stub looks for it, and its libpython."""
    libraries = [str(root.parent / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
    paths = {
        "PATH": [str(Path(python.executable).parent), os.environ.get("PATH", "")],
        "LD_LIBRARY_PATH": [python.libraries or "", *libraries],
        "PYTHONPATH": [str(REPOSITORY.parent), *python.path],
    }
    # LC_ALL: the stub reads what a compiler says as ASCII, whatever the locale
    return os.environ | {name: os.pathsep.join(filter(None, parts)) for name, parts in paths.items()} | {"LC_ALL": "C"}


def main() -> int:
    """``python -m llama_engine.serving.wheel``: the Python that a server would run, or why there is none."""
    print(interpreter(wheel()).executable)
    return 0


if __name__ == "__main__":
    run_cli(main)
