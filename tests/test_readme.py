"""The commands of README and docs/USAGE.md: the steps run for real with short settings, every other flag must exist."""

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from llama_engine.checkpoint.prepare import prepare_synthetic
from llama_engine.serving.server import free_port
from tests.conftest import ROOT

PAGES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/USAGE.md")]
RUNS = "--output-tokens 8 --warmup 0 --runs 2 --prefill-tokens 0"
BATCH = "--batch 2 --batch-output-tokens 8 --batch-runs 1"
SHORT = {
    "baseline.py": RUNS,
    "benchmark_optimized.py": f"{RUNS} {BATCH}",
    "compare.py": f"{RUNS} {BATCH}",
    "accuracy.py": "--quick --window 128 --greedy-prompts 1 --greedy-tokens 8 --text short.txt",
    "benchmark_determinism.py": "--prompts 4 --input-tokens 64 --output-tokens 8 --runs 1",
    "benchmark_triton.py": "--concurrency 1 2 --output-tokens 8",
    "profile_nsight.sh": "--output-tokens 8",
}


def commands(block):
    """The commands of a shell block, continued lines joined, comments and ``source`` dropped."""
    joined = re.sub(r"\\\n\s*", " ", block)
    lines = (line.split(" #")[0].strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith(("#", "source"))]


BLOCKS = [commands(block) for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)]
STEPS = next(block for block in BLOCKS if any("prepare_model" in line for line in block))
ALONE = next(block for block in BLOCKS if any("baseline.py" in line for line in block))
SERVE = next(block for block in BLOCKS if any("triton_client" in line for line in block))


def script_of(line):
    """The script that a command runs, from the repository's root."""
    return next(word for word in shlex.split(line) if word.endswith((".py", ".sh"))).removeprefix("./")


def once_each(scripts):
    """Without repetitions behind each other: the same script with other flags, or in the other branch of an ``if``."""
    return [script for script, _ in itertools.groupby(scripts)]


def runnable(line, work, model=None):
    """The command with its outputs moved to ``work`` and short settings added, as an argument list; of ``model``
    instead of the default one."""
    for folder in ("results/local", "engines/", "checkpoints/"):
        line = line.replace(folder, f"{work}/{folder}")
    words = shlex.split(line.replace("$PY", sys.executable))
    script = script_of(line)
    if "/benchmarks/" in f"/{script}" or "profile" in script:
        if "--engine-dir" not in words and "baseline" not in script:
            words += ["--engine-dir", f"{work}/engines/smollm2-135m-instruct"]
        words += shlex.split(SHORT.get(os.path.basename(script), "").replace("short.txt", f"{work}/short.txt"))
        if model and "benchmark_triton" not in script:
            words += ["--model-dir", str(model)]
    return [str(model) if model and word == "models/smollm2-135m-instruct" else word for word in words]


def test_the_steps_are_those_of_run_all():
    text = re.sub(r"\\\n\s*", " ", (ROOT / "scripts/run_all.sh").read_text(encoding="utf-8"))
    run = re.findall(r'^(?:model=\$\(|\s*)(?:"\$PY" |\./)((?:scripts|benchmarks)/\w+\.(?:py|sh))', text, re.MULTILINE)
    assert len(run) >= 10
    assert once_each(map(script_of, STEPS)) == once_each(run)


@pytest.fixture
def help_of(run_script):
    def read(script):
        same = script.removesuffix(".sh") + ".py"  # what such a script passes its flags to
        done = run_script(same if (ROOT / same).is_file() else script, "--help")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return read


@pytest.mark.parametrize("tiny", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tiny", "smollm2"])
def test_step_by_step_commands_run_in_order(tmp_path, smollm2_model, tiny):
    # Two windows, whose perplexity is far from the gate's limit: a 16-bit forward takes some CPUs ten seconds each.
    (tmp_path / "short.txt").write_text((ROOT / "benchmarks/data/alice.txt").read_text(encoding="utf-8")[3218:4204])
    model = prepare_synthetic("tiny", tmp_path / "models", words=True) if tiny else None
    lines = [line for line in STEPS if "--no-streaming" not in line] if tiny else STEPS + ALONE
    for line in lines:
        command = runnable(line, tmp_path, model)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        # A busy machine may make a load INVALID, which the script says and reports as 1.
        judged = "benchmark_triton" in line and done.returncode == 1 and "INVALID" in done.stdout
        assert done.returncode == 0 or judged, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    results = tmp_path / "results/local"
    assert (results / "PERFORMANCE_REPORT.md").stat().st_size > 1000
    for picture in ("executive_summary", "performance_comparison", "triton_scaling", "ttft_percentiles"):
        assert (results / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_serve_and_ask(smollm2_engine, run_script):
    serve, ask = (line.replace("engines/smollm2-135m-instruct", str(smollm2_engine)) for line in SERVE)
    serve = shlex.split(serve.rstrip(" &"))
    server = subprocess.Popen(serve, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        words = shlex.split(ask.replace("$PY", sys.executable))
        answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)  # it waits for the server
        assert answer.returncode == 0, answer.stderr
        assert any("ready" in line for line in server.stdout)
        assert "Paris" in answer.stdout
        over_http = run_script(*words[1:], "--protocol", "http")
        assert over_http.stdout == answer.stdout
        ports = ("--http-port", free_port(), "--grpc-port", free_port())
        second = run_script("scripts/serve_triton.py", *serve[1:], *ports)
        assert second.returncode == 2
        assert "cannot use metrics port 8002" in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 130)


@pytest.mark.parametrize("line", [line for block in BLOCKS for line in block if ".sh" in line or ".py" in line])
def test_every_flag_exists(line, help_of):
    script, flags = script_of(line), [word for word in shlex.split(line) if word.startswith("--")]
    assert os.access(ROOT / script, os.R_OK if script.endswith(".py") else os.X_OK)
    text = help_of(script) if flags else ""
    for flag in flags:
        assert flag in text, f"{script} has no {flag}"


def test_the_readme_needs_two_commands():
    assert BLOCKS[0] == ["./scripts/run_all.sh", "./scripts/test.sh"]
