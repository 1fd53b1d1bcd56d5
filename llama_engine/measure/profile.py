"""Runs made for a profiler: NVTX ranges around warm-up, prefill and every decode step; PyTorch's profiler without nsys.

Nothing here is used for a speed: a profiled run is slower than a run.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import nvtx
import torch
from torch.profiler import record_function

from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import RunError
from llama_engine.files import write_text
from llama_engine.measure import protocol
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.generation import Stack
from llama_engine.measure.nsight import SUBMITS
from llama_engine.measure.result import check_output
from llama_engine.measure.stacks import PHASES, TransformersStack
from llama_engine.measure.workload import Workload, add_arguments, add_engine_arguments, workload_of


@contextmanager
def mark(name: str) -> Iterator[None]:
    """A range that Nsight Systems and PyTorch's profiler both see."""
    with nvtx.annotate(name), record_function(name):
        yield


def main(doc: str | None, *, engine: bool) -> None:
    """Both NVTX scripts: warm up, run once marked, and write what the profile reader needs."""
    parser = protocol.parser_for(doc, f"build/{'trt' if engine else 'baseline'}_nvtx.json")
    add_arguments(parser)
    if engine:
        add_engine_arguments(parser)
    parser.set_defaults(output_tokens=64, warmup=1, runs=1, prefill_tokens=0, batch=[])
    parser.add_argument("--torch-profiler", action="store_true", help="profile with PyTorch, for where nsys is missing")
    args = parser.parse_args()
    check_output(args.output, args.force, args.model_dir, *([args.engine_dir] if engine else []))
    device = protocol.use_device(args.device, args.threads)
    info = load_engine_json(args.engine_dir, backend=args.backend) if engine else None
    workload = workload_of(args, info)
    stack: Stack
    if info:
        stack = protocol.open_engine(args.engine_dir, info, device=device, threads=args.threads)
    else:
        stack = TransformersStack(args.model_dir, device)
    run(stack, workload, device, args.output, torch_profiler=args.torch_profiler)


def run(stack: Stack, workload: Workload, device: str, output: Path, *, torch_profiler: bool) -> None:
    """Generate once under ranges, after a warm-up, and write to ``output`` what was run."""
    prompt, new_tokens = workload.prompts(workload.input_tokens)[0], workload.output_tokens
    with mark("warm-up"):
        for _ in range(max(1, workload.warmup)):
            stack.generate(prompt, new_tokens)
    info = {
        "stack": stack.name,
        "model": workload.model,
        "workload": {"input_tokens": workload.input_tokens, "output_tokens": new_tokens, "concurrency": 1},
        "environment": fingerprint(device),
        "engine": stack.about or None,
        "profile": None,
    }
    profiler = torch.profiler.profile() if torch_profiler else nullcontext()
    with profiler:
        with stack.marked(mark):
            stack.generate(prompt, new_tokens)
        if device == "cuda":
            torch.cuda.synchronize()
    if torch_profiler:
        info["profile"] = summarize(list(profiler.events()), cuda=device == "cuda")
    write_text(output, json.dumps(info, indent=1) + "\n")


def summarize(events: list[Any], *, cuda: bool) -> dict[str, Any]:
    """The figures of :func:`llama_engine.measure.nsight.read_export` that PyTorch's profiler can give, the rest None.

    Without a GPU the operators of PyTorch stand for kernels; code outside PyTorch shows as "native code".
    """
    kind = torch.autograd.DeviceType
    steps = [e.time_range for e in events if e.name == "decode" and e.device_type == kind.CPU]
    if not steps:
        raise RunError("the profiler recorded no decode step")
    first, last, count = min(x.start for x in steps), max(x.end for x in steps), len(steps)
    ranges = {"decode", "prefill", "warm-up", "embedding", "lm_head", *PHASES.values()}
    work: defaultdict[str, list[float]] = defaultdict(list)
    launches: Counter[str] = Counter()
    for event in events:
        if not first <= event.time_range.start <= last or event.name in ranges:
            continue
        if call := SUBMITS.match(event.name):
            launches[call[1]] += 1
        elif cuda and event.device_type == kind.CUDA:
            work[event.name].append(event.time_range.elapsed_us())
        elif not cuda and event.name.startswith("aten::"):
            work[event.name].append(event.self_cpu_time_total)
    seen, calls, span = sum(map(sum, work.values())), sum(map(len, work.values())), last - first
    if not cuda:
        work["native code and Python"] = [max(0.0, span - seen)]
    total = sum(map(sum, work.values()))
    ranked = sorted(work.items(), key=lambda item: -sum(item[1]))[:10]
    return {
        "tokens": count,
        "launches": launches.total() if cuda else None,
        "launches_per_token": launches.total() / count if cuda else None,
        "graph_replays": launches["GraphLaunch"] if cuda else None,
        "kernels_per_token": calls / count if cuda else None,
        "operators_per_token": None if cuda else calls / count,
        "gpu_busy_share": seen / span if cuda else None,
        "top_kernels": [{"name": name, "share": sum(t) / total, "calls": len(t)} for name, t in ranked],
    }
