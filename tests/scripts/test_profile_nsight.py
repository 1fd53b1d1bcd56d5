"""What the profile script refuses before it profiles anything."""

import subprocess

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output-tokens", "1"], "--output-tokens must be at least 2"),
        (["--model-dir", "nowhere"], "nowhere does not exist"),
        (["--engine-dir", "nowhere"], "nowhere is not an engine"),
        (["--output-tokens", "300"], "exceed this engine's max_seq_len"),
        (["--output", ".", "--force"], "is a directory"),
    ],
)
def test_the_profile_script_refuses_bad_input_at_once(tiny_model, tiny_engine, tmp_path, flags, message):
    (tmp_path / "m").symlink_to(tiny_model)  # paths are relative to the current directory, as everywhere
    (tmp_path / "e").symlink_to(tiny_engine)
    command = [ROOT / "scripts/profile_nsight.sh", "--model-dir", "m", "--engine-dir", "e", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
