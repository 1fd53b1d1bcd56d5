r"""Say what this machine has for either engine, and what is missing, a verdict a line.

Purpose: find out before a long run why it would stop; nothing is changed, installed or loaded onto a GPU.
Method:  ok: there; note: works, within a limit that is named; missing: the path stops here, with what helps. Needs no
         package beside Python; what it cannot look into for want of one is said.
Output:  the lines, in colour where rich is installed. Exit code 1 if the path of --backend lacks something.

    python scripts/doctor.py --backend tensorrt_llm --engine-dir engines/llama
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the doctor also comes where nothing is set up

from llama_engine.errors import InputError, run_cli  # noqa: E402
from llama_engine.flags import Parser  # noqa: E402

REQUIREMENTS = {"native": "requirements.txt", "tensorrt_llm": "requirements-trtllm.txt"}
SETUP = {"native": "source scripts/setup.sh", "tensorrt_llm": "source scripts/setup.sh --trtllm"}
EXTRAS = {"grpc": "grpc", "http": "aiohttp"}  # of tritonclient, and the module that shows it
NVIDIAS = ("tensorrt_llm",)  # has a line of its own
Finding = tuple[str, str, str]  # verdict, subject, what was found


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--backend", choices=["auto", *REQUIREMENTS], default="auto", help="whose path (default: both)")
    parser.add_argument("--checkpoint-dir", type=Path, help="a converted checkpoint: whether its bytes fit this GPU")
    parser.add_argument("--engine-dir", type=Path, help="a built engine: what it takes, and whether it loads here")
    args = parser.parse_args()
    backends = [*REQUIREMENTS] if args.backend == "auto" else [args.backend]
    findings = [*machine(), *(line for name in backends for line in PATHS[name]())]
    findings += [*inside("checkpoint", args.checkpoint_dir), *inside("engine", args.engine_dir)]
    show(findings)
    missing = [subject for verdict, subject, _ in findings if verdict == "missing"]
    print(f"{len(missing)} missing: {', '.join(missing)}" if missing else "nothing is missing")
    return 1 if missing and args.backend != "auto" else 0


def show(findings: list[Finding]) -> None:
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        for verdict, subject, said in findings:
            print(f"{verdict:8}{subject:27}{said}")
        return
    colours, console = {"ok": "green", "note": "yellow", "missing": "bold red"}, Console(soft_wrap=True)
    for verdict, subject, said in findings:
        console.print(Text.assemble((f"{verdict:8}", colours[verdict]), f"{subject:27}{said}"))


def machine() -> Iterator[Finding]:
    version = platform.python_version()
    fits = (3, 10) <= sys.version_info[:2] <= (3, 14)
    yield "ok" if fits else "missing", "Python", f"{version}, {sys.executable}" + ("" if fits else ": 3.10 to 3.14")
    yield "ok", "machine", f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    if not importlib.util.find_spec("torch"):
        yield "note", "GPU", "not looked for: PyTorch is missing"
        return
    import torch

    if not torch.cuda.is_available():
        yield "note", "GPU", "none visible: native engines run on the CPU; TensorRT ones are built and run where one is"
        return
    free, total = torch.cuda.mem_get_info()
    arch = "sm{}{}".format(*torch.cuda.get_device_capability())
    yield "ok", "GPU", f"{torch.cuda.get_device_name()}, {arch}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"


def packages(backend: str) -> Iterator[Finding]:
    """Whether what a requirements file lists is installed, and in a version that it allows."""
    file, lacking, other, count = REQUIREMENTS[backend], [], [], 0
    for line in (ROOT / file).read_text().splitlines():
        line, _, marker = line.partition(";")
        found = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?(.*)", line)
        if not found or found[1] in NVIDIAS or not applies(marker):
            continue
        name, extras, wanted = found[1], (found[2] or "").split(","), found[3].strip()
        count += 1
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
            continue
        lacking += [f"{name}[{x}]" for x in extras if x and not importlib.util.find_spec(EXTRAS[x])]
        if wanted and not allows(wanted, version):
            other.append(f"{name} {version} ({wanted})")
    if lacking:
        yield "missing", f"{backend}: packages", f"{', '.join(lacking)}: {SETUP[backend]}"
    else:
        yield "ok", f"{backend}: packages", f"all {count} of {file}"
    if other:
        yield "note", f"{backend}: versions", f"not as tested: {', '.join(other)}"


def applies(marker: str) -> bool:
    """Whether a line is for this Python: what the requirements files say of it, which need no package to be read."""
    found = re.search(r'python_version (<|>=) "3\.(\d+)"', marker)
    return not found or (sys.version_info[1] < int(found[2])) == (found[1] == "<")


def allows(wanted: str, version: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def native() -> Iterator[Finding]:
    yield from packages("native")
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))), None)
    slow = "no C++ compiler: a CPU runs PyTorch operations, which are slower (install g++)"
    yield "ok" if compiler else "note", "native: CPU kernel", compiler or slow
    try:
        from llama_engine.serving import wheel

        root = wheel.wheel()
        runs = wheel.interpreter(root)
    except ImportError as error:
        yield "note", "native: Triton", f"not looked for: {error.name} is missing"
    except InputError as error:
        yield "missing", "native: Triton", str(error)
    else:
        other = "" if runs.executable == sys.executable else f", run by {runs.executable}"
        yield "ok", "native: Triton", f"{root}{other}"
        if not runs.numpy1:
            yield (
                "note",
                "native: Triton's text",
                f"NumPy {runs.numpy}: --text needs a Python with NumPy 1 ({wheel.VARIABLE})",
            )


def tensorrt_llm() -> Iterator[Finding]:
    yield from packages("tensorrt_llm")
    try:
        version = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        yield (
            "missing",
            "tensorrt_llm: library",
            "not installed: NVIDIA's container has it, or see requirements-trtllm.txt",
        )
    else:
        known = version.startswith("0.15.")
        build = shutil.which("trtllm-build")
        yield "ok" if known else "note", "tensorrt_llm: library", version + ("" if known else ": written for 0.15.0")
        yield "ok" if build else "missing", "tensorrt_llm: trtllm-build", build or "not on PATH"
    backend = Path("/opt/tritonserver/backends/tensorrtllm")
    docker = (
        "in NVIDIA's container, by docker" if shutil.which("docker") else "where docker or that backend is: not here"
    )
    served = str(backend) if backend.is_dir() else f"served {docker}"
    yield "ok" if backend.is_dir() else "note", "tensorrt_llm: Triton", served


PATHS = {"native": native, "tensorrt_llm": tensorrt_llm}


def inside(what: str, folder: Path | None) -> Iterator[Finding]:
    """Of a checkpoint or an engine: what reads it says what it takes, or why it does not."""
    if folder is None:
        return
    try:
        yield from (checkpoint if what == "checkpoint" else engine)(folder)
    except ImportError as error:
        yield "note", what, f"not looked into: {error.name} is missing"
    except InputError as error:
        yield "missing", what, str(error)


def checkpoint(folder: Path) -> Iterator[Finding]:
    from llama_engine import trtllm
    from llama_engine.checkpoint.packing import layout_for, visible_arch
    from llama_engine.checkpoint.reader import Checkpoint

    source, arch = Checkpoint(folder), visible_arch()
    if source.layout is None:
        yield "ok", "checkpoint", f"{source.quant_algo or source.dtype_name}, for any GPU, {source.tp_size} ranks"
        return
    target, version = source.record["target_arch"], source.version
    said = f"INT8 packed for {target} and TensorRT-LLM {version}, {source.tp_size} ranks; native engines take any"
    yield "ok", "checkpoint", said
    here = importlib.metadata.version("tensorrt_llm") if trtllm.installed() else version
    if arch and layout_for(arch, here) != source.layout:
        fix = f"convert with --target_arch {arch} --trtllm_version {here}"
        yield (
            "missing",
            "checkpoint: layout",
            f"TensorRT-LLM {here} on {arch} needs {layout_for(arch, here).name}: {fix}",
        )


def engine(folder: Path) -> Iterator[Finding]:
    import torch

    from llama_engine import trtllm
    from llama_engine.engine_dir import load_engine_json

    info = load_engine_json(folder, backend="auto")
    limits = info.engine
    yield "ok", "engine", f"{info.identity['name']}, {info.backend}, {limits.max_batch_size} sequences at once"
    yield "ok", "engine: lengths", f"prompts up to {info.max_input_len} tokens, {limits.max_seq_len} with the answer"
    used = limits.kv_tokens(limits.max_batch_size) * info.model.kv_nbytes(limits.kv_element_nbytes)
    budget = f"{used / 1e9:.2f} GB serve all sequences at full length"
    if torch.cuda.is_available():
        share = limits.kv_cache_free_gpu_memory_fraction * torch.cuda.mem_get_info()[0]
        budget += f"; at most {share / 1e9:.2f} GB are taken before the weights lie there"
    yield "ok", "engine: KV cache", budget
    if info.tensorrt_llm:
        trtllm.check_machine(folder, info.tensorrt_llm)
        yield "ok", "engine: built for", f"{info.tensorrt_llm.arch}, TensorRT-LLM {info.tensorrt_llm.version}"


if __name__ == "__main__":
    run_cli(main)
