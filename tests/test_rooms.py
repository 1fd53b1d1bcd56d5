"""The floor plan of docs/DESIGN.md: which room may import which, no circles, and readers of JSON without PyTorch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "llama_engine"
# A room may import those named here, and itself. Modules at the top of the package are rooms of one module.
BASE = {"errors", "config", "files", "tensor_files", "sampling", "engine_dir"}
ROOMS = {
    "errors": set(),
    "config": {"errors"},
    "files": {"errors"},
    "tensor_files": {"errors"},
    "sampling": {"errors"},
    "engine_dir": {"errors", "config", "files"},
    "device": {"errors"},
    "flags": set(),
    "model": BASE,
    "checkpoint": BASE | {"model"},
    "engine": BASE,
    "kernels": BASE | {"model"},
    "cpu": BASE | {"model", "engine"},
    "gpu": BASE | {"model", "engine", "kernels"},
    "native": BASE | {"backend", "device", "model", "engine", "kernels", "cpu", "gpu"},
    "backend": {"sampling"},
    "tokenizer": {"errors"},
    "grammar": {"errors"},
    "trtllm": BASE | {"backend", "checkpoint", "model"},
    "runner": BASE | {"backend", "native", "trtllm"},
    "serving": BASE | {"device", "engine"},
    "measure": BASE | {"device", "flags", "model", "checkpoint", "engine", "native", "trtllm", "serving", "report"},
    "report": BASE | {"measure"},
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path):
    """The library's modules that this one imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "llama_engine":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def room_of(module):
    return module.split(".")[1] if "." in module else ""


def test_every_room_imports_only_what_the_plan_allows():
    wrong = []
    for module, path in MODULES.items():
        room = room_of(module)
        if not room:
            continue
        for imported in imports_of(path):
            other = room_of(imported)
            if other and other != room and other not in ROOMS[room]:
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_no_module_imports_itself_by_a_detour():
    TopologicalSorter({m: set(imports_of(p)) - {m, "llama_engine"} for m, p in MODULES.items()}).prepare()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("llama_engine.engine_dir", ("torch",)),
        ("llama_engine.serving.client", ("torch",)),
        ("llama_engine.serving.router", ("torch",)),
        ("llama_engine.serving.repository", ("torch",)),
        ("llama_engine.engine.scheduler", ("torch",)),
    ],
)
def test_light_modules_stay_light(module, absent):
    code = f"import {module}, sys; print(*(m for m in {absent!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_plan_names_every_room():
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name[0] != "_"}
    assert rooms == set(ROOMS)
    described = (ROOT / "docs" / "DESIGN.md").read_text()
    assert not [room for room in ROOMS if f"`{room}" not in described]


def test_type_checkers_see_what_runs():
    assert not [m for m, path in MODULES.items() if "TYPE_CHECKING" in path.read_text()]


def test_the_check_sees_a_circle(tmp_path: Path):
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from llama_engine.engine import engine\n")
    assert list(imports_of(path)) == ["llama_engine.engine.engine"]
