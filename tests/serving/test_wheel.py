"""Which Python runs Triton's models: this one, or another that fits where this one does not."""

import json
import os
import sys

import pytest

from llama_engine.errors import InputError
from llama_engine.serving import wheel

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
SAYS = """#!/bin/sh
echo '{}'
"""


@pytest.fixture
def root(tmp_path):
    """A wheel with backends for Python 3.10 and 3.12."""
    for version in ("3.10", "3.12"):
        stub = wheel.stub_for(tmp_path, version)
        stub.parent.mkdir(parents=True)
        stub.touch()
    return tmp_path


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A PATH without a Python; ``path(name, version, numpy)`` puts one there that describes itself so."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), "/nowhere"]))
    monkeypatch.delenv(wheel.VARIABLE, raising=False)

    def add(name, version, numpy):
        file = folder / name
        file.write_text(SAYS.format(json.dumps([str(file), version, numpy, ["/site"], "/lib"]) if version else ""))
        file.chmod(0o755)
        return str(file)

    return add


def running(monkeypatch, version, numpy):
    monkeypatch.setattr(wheel, "_this", lambda: wheel.Interpreter("this", version, numpy, sys.path, None))


def test_this_python_runs_the_models_where_it_can(root, path, monkeypatch):
    path("python3.12", "3.12", "1.26.4")
    running(monkeypatch, "3.10", "2.2.6")
    assert wheel.interpreter(root).executable == "this"
    running(monkeypatch, "3.10", "1.26.4")
    assert wheel.interpreter(root, text=True).executable == "this"


def test_elsewhere_the_newest_older_python_with_the_packages_does(root, path, monkeypatch):
    running(monkeypatch, "3.14", "2.3.5")
    with pytest.raises(InputError, match=r"no backend for Python 3\.14.*set LLAMA_ENGINE_TRITON_PYTHON"):
        wheel.interpreter(root)
    path("python3.13", "3.13", "2.3.5")  # the wheel has none for it
    path("python3.12", None, None)  # lacks the packages
    last = path("python3.10", "3.10", "2.2.6")
    assert wheel.interpreter(root).executable == last
    newer = path("python3.12", "3.12", "2.3.5")
    assert wheel.interpreter(root).executable == newer
    env = wheel.environment(root, wheel.interpreter(root))
    assert env["PATH"].split(os.pathsep)[0] == str(root / "bin")
    assert env["LD_LIBRARY_PATH"].split(os.pathsep)[0] == "/lib"
    assert env["PYTHONPATH"].split(os.pathsep)[1:] == ["/site"]
    assert wheel.link_backend(root, root / "backends", "3.12").parent.name == "3.12"


def test_text_takes_a_python_with_numpy_1(root, path, monkeypatch):
    running(monkeypatch, "3.12", "2.3.5")
    path("python3.12", "3.12", "2.3.5")
    with pytest.raises(InputError, match=r"text needs NumPy 1, found 2\.3\.5.*Python 3\.10 to 3\.12"):
        wheel.interpreter(root, text=True)
    older = path("python3.10", "3.10", "1.26.4")
    assert wheel.interpreter(root, text=True).executable == older
    assert wheel.interpreter(root).executable == "this"


def test_the_python_that_is_named_goes_first(root, path, monkeypatch):
    running(monkeypatch, "3.10", "1.26.4")
    named = path("mine", "3.12", "1.26.4")
    monkeypatch.setenv(wheel.VARIABLE, named)
    assert wheel.interpreter(root).executable == named
    monkeypatch.setenv(wheel.VARIABLE, path("mine", None, None))
    with pytest.raises(InputError, match="is no Python with torch, numpy"):
        wheel.interpreter(root)


def test_what_a_python_says_of_itself_is_what_this_one_knows(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/not/mine")
    said, known = wheel._ask(sys.executable), wheel._this()
    assert (said.version, said.numpy, said.libraries) == (HERE, known.numpy, known.libraries)
    assert {part for part in known.path if part.endswith("site-packages")} <= {*said.path}
    assert "/not/mine" not in said.path
    monkeypatch.setattr(wheel, "PACKAGES", ("torch", "no_such_package"))
    assert wheel._ask(sys.executable) is None
