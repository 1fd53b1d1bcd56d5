"""The shell scripts before they start anything: bad arguments, a missing interpreter, a terminal that sources one."""

import os
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


@pytest.mark.parametrize("script", ["run_all.sh", "test.sh", "demo.sh", "serve_triton.sh"])
def test_an_interpreter_that_does_not_exist_is_one_line(script):
    env = {key: value for key, value in os.environ.items() if key != "PY"} | {"LLAMA_ENGINE_PYTHON": "/nope"}
    done = subprocess.run([f"scripts/{script}"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nope is not a Python with PyTorch")
    assert len(done.stderr.splitlines()) == 1
