"""The shell scripts before they start anything: bad arguments, a missing interpreter, a terminal that sources one."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "auto, cpu or cuda"),
        (["--name", "../elsewhere"], "lower-case"),
        (["--bogus"], "--bogus"),
        (["--name"], "needs a value"),
        (["--lm-head", "nope"], "checkpoint or int8"),
    ],
)
def test_run_all_refuses_bad_arguments_in_one_line(arguments, message):
    done = subprocess.run(["./scripts/run_all.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("python", "said"), [(sys.executable, f"0 {sys.executable}"), ("/nope", "2 ")])
def test_setup_sourced_from_a_terminal_leaves_it_open_and_as_it_was(python, said):
    shell = 'was=$(set +o); source scripts/setup.sh; echo "$? $PY"; false; [ "$was" = "$(set +o)" ] && echo same'
    env = os.environ | {"LLAMA_ENGINE_PYTHON": python}
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{said}\nsame\n"


PIP_NOTES_WHAT_IT_IS_ASKED = """#!/bin/sh
[ "$1 $2" = "-m pip" ] || exec REAL "$@"
while [ $# -gt 0 ]; do case $1 in -c | -r) cat "$2" >LOG"$1" ;; esac; shift; done
"""


@pytest.fixture
def container(tmp_path):
    """A PATH whose python3 is this one, has PyTorch, and whose pip only writes down what it is to do."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python3"
    text = PIP_NOTES_WHAT_IT_IS_ASKED.replace("REAL", sys.executable).replace("LOG", str(tmp_path / "pip"))
    python.write_text(text)
    python.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in ("PY", "LLAMA_ENGINE_PYTHON")}
    return kept | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}


def bash(text, env, cwd=ROOT):
    return subprocess.run(["bash", "-c", text], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_setup_for_tensorrt_llm_adds_to_the_python_that_is_there(container, tmp_path):
    done = bash('source scripts/setup.sh --trtllm; echo "$? $PY"', container)
    assert "TensorRT-LLM's Python: python3; what it has stays as it is" in done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 python3"  # not the interpreter of .venv
    assert lines[-2].endswith("1 missing: tensorrt_llm: library") or "tensorrt_llm: packages" in lines[-2]
    fixed, wanted = ((tmp_path / f"pip-{flag}").read_text() for flag in "cr")
    assert f"torch=={importlib.metadata.version('torch')}" in fixed.splitlines()
    assert "tritonclient[grpc,http]" in wanted.splitlines()
    names = {re.split(r"[^\w-]", line)[0] for line in wanted.splitlines()}
    assert not {"tensorrt_llm", "torch", "transformers"} & names  # NVIDIA's, and what is there


def test_a_python_with_tensorrt_llm_goes_before_the_environment_of_setup(container, tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/python.sh", tmp_path / "scripts")
    own = tmp_path / ".venv/bin/python"
    own.parent.mkdir(parents=True)
    own.symlink_to(tmp_path / "bin/python3")
    for path, said in ((ROOT, own), (ROOT / "tests/standin", "python3")):
        done = bash('source scripts/python.sh; echo "$PY"', container | {"PYTHONPATH": str(path)}, tmp_path)
        assert done.stdout == f"{said}\n", done.stderr


def test_setup_knows_one_flag():
    done = bash("scripts/setup.sh --trt", os.environ)
    assert (done.returncode, done.stderr) == (2, "error: unknown argument --trt (--trtllm is the only one)\n")


@pytest.mark.parametrize("script", ["run_all.sh", "test.sh", "demo.sh", "serve_triton.sh"])
def test_an_interpreter_that_does_not_exist_is_one_line(script):
    env = {key: value for key, value in os.environ.items() if key != "PY"} | {"LLAMA_ENGINE_PYTHON": "/nope"}
    done = subprocess.run([f"scripts/{script}"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nope is not a Python with PyTorch")
    assert len(done.stderr.splitlines()) == 1
