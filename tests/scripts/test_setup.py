"""What set-up chooses, says and asks for, with interpreters and installers that only write down what they are to do."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PYTHON = """#!/bin/sh
case "$1 $2" in
  "--version ") echo "Python 3.MINOR.0" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") shift 2; echo "pip of 3.MINOR: $*" >>"$LOG" ;;
  *) exec REAL -c 'import sys; sys.version_info = (3, MINOR, 0); exec(sys.argv.pop(1))' "$2" ;;
esac
"""
UV = """#!/bin/sh
echo "uv $*" >>"$LOG"
exit CODE
"""
TORCH = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
needs_no_gpu = pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has an NVIDIA GPU")


@pytest.fixture
def setup(tmp_path):
    """``setup({"python3": 14}, uv=0, PYTHON=...)``: what set-up says and asked for on a machine with those."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "scripts").mkdir()
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml", "scripts/setup.sh"):
        shutil.copy(ROOT / name, tmp_path / name)

    def place(name, text):
        file = tmp_path / "bin" / name
        file.write_text(text)
        file.chmod(0o755)

    def run(pythons, uv=None, **env):
        absent = {f"python3{minor}": None for minor in ("", ".10", ".11", ".12", ".13", ".14")}
        for name, minor in (absent | pythons).items():
            text = PYTHON.replace("MINOR", str(minor)).replace("REAL", sys.executable)
            place(name, text if minor else "#!/bin/sh\nexit 127\n")
        place("uv", UV.replace("CODE", str(127 if uv is None else uv)))
        log = tmp_path / "log"
        log.write_text("")
        env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "LOG": str(log)} | env
        command = ["bash", "scripts/setup.sh"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
        return done, log.read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("pythons", "named", "chosen"),
    [
        ({"python3": 11, "python3.13": 13}, "", "3.11"),
        ({"python3": 14, "python3.13": 13, "python3.10": 10}, "", "3.13"),
        ({"python3": 14, "python3.12": 12}, "", "3.12"),
        ({"python3": 9, "python3.14": 14}, "", "3.14"),
        ({"python3": 11, "python3.14": 14}, "python3.14", "3.14"),
        ({"python3": 15, "python3.10": 10}, "python3", "3.10"),
    ],
)
def test_it_takes_a_python_that_triton_knows_unless_another_is_named_or_alone(setup, pythons, named, chosen):
    done, asked = setup(pythons, PYTHON=named)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"setting up .venv with Python {chosen}.0")
    assert any(line.startswith(f"pip of {chosen}: install") and "-r requirements.txt" in line for line in asked)


def test_without_a_python_that_fits_it_says_so_in_one_line(setup):
    done, asked = setup({"python3": 9})
    assert (done.returncode, asked) == (2, [])
    assert (
        done.stderr == "error: Python 3.10 to 3.14 is needed and none was found; name one with PYTHON=/path/to/python\n"
    )


@needs_no_gpu
@pytest.mark.parametrize(("uv", "installer"), [(0, "uv"), (1, "pip"), (None, "pip")])
def test_pytorch_comes_from_uv_where_that_works_and_else_from_pip(setup, tmp_path, uv, installer):
    done, asked = setup({"python3": 12}, uv)
    assert done.returncode == 0, done.stderr
    assert "GB to download" in done.stdout.splitlines()[0]
    torch = [line for line in asked if TORCH in line]
    assert torch[-1].startswith(installer)
    assert torch[0] == f"uv pip install -q --python {tmp_path}/.venv/bin/python --torch-backend=auto {TORCH}"
    assert len(torch) == 1 + (installer == "pip")
    assert asked.index(torch[-1]) < next(i for i, line in enumerate(asked) if "-r requirements.txt" in line)
