"""Runs made for a profiler: NVTX ranges around warm-up, prefill and every decode step; PyTorch's profiler without nsys.

Nothing here is used for a speed: a profiled run is slower than a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nvtx
import torch
from torch.profiler import ProfilerActivity, record_function

from llama_engine.errors import RunError
from llama_engine.measure import protocol
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.generation import EngineStack, Stack, TransformersStack, make_prompts
from llama_engine.measure.result import check_output, write_text

PHASES = {"self_attn": "attention", "mlp": "mlp", "input_layernorm": "norm", "post_attention_layernorm": "norm"}


@contextmanager
def mark(name: str) -> Iterator[None]:
    """A range that Nsight Systems and PyTorch's profiler both see."""
    with nvtx.annotate(name), record_function(name):
        yield


def add_arguments(parser: argparse.ArgumentParser, info: str) -> None:
    """The flags of both NVTX scripts."""
    protocol.add_arguments(parser, info)
    parser.set_defaults(output_tokens=64, warmup=1, runs=1, prefill_tokens=0)
    parser.add_argument("--torch-profiler", action="store_true", help="profile with PyTorch, for where nsys is missing")


def run(args: argparse.Namespace, device: str, stack: Stack, about: dict[str, Any]) -> None:
    """Warm up, run once marked, and write what the profile reader needs to ``args.output``."""
    prompt = make_prompts(args.model_dir, args.prompt, args.input_tokens)[0]
    with mark("warm-up"):
        for _ in range(max(1, args.warmup)):
            stack.generate(prompt, args.output_tokens)
    info: dict[str, Any] = {
        "stack": stack.name,
        "model": protocol.model_identity(args.model_dir),
        "workload": {"input_tokens": args.input_tokens, "output_tokens": args.output_tokens, "concurrency": 1},
        "environment": fingerprint(device),
        "engine": about or None,
        "profile": None,
    }
    if args.torch_profiler:
        info["profile"] = torch_profile(stack, prompt, args.output_tokens, device)
    else:
        with marked(stack):
            stack.generate(prompt, args.output_tokens)
        if device == "cuda":
            torch.cuda.synchronize()
    write_text(check_output(args.output, args.force), json.dumps(info, indent=1) + "\n")


def marked(stack: Stack) -> AbstractContextManager[None]:
    """Ranges named prefill and decode around the steps of whatever is generated inside."""
    return marked_baseline(stack) if isinstance(stack, TransformersStack) else marked_engine(stack)


@contextmanager
def marked_baseline(stack: TransformersStack) -> Iterator[None]:
    """Prefill, then decode steps from one forward to the next, so that sampling counts; inside them, the phases."""
    scopes: list[ExitStack] = []
    step = ExitStack()
    hooks = []

    def enter(name: str) -> None:
        scope = ExitStack()
        scope.enter_context(mark(name))
        scopes.append(scope)

    def leave(*_: object) -> None:
        scopes.pop().close()

    def enter_step(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        step.close()
        step.enter_context(mark("decode" if ids.shape[1] == 1 else "prefill"))

    hooks.append(stack.model.register_forward_pre_hook(enter_step, with_kwargs=True))
    parts = {stack.model.lm_head: "lm_head", stack.model.get_input_embeddings(): "embedding"}
    for layer in stack.model.model.layers:
        parts |= {getattr(layer, attribute): name for attribute, name in PHASES.items()}
    for module, name in parts.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        step.close()
        for hook in hooks:
            hook.remove()


@contextmanager
def marked_engine(stack: Stack) -> Iterator[None]:
    """Each engine step is a prefill while a prompt is being read, else a decode step."""
    if not isinstance(stack, EngineStack):  # TensorRT-LLM marks its own phases
        yield
        return
    engine, step = stack.engine, stack.engine.step

    def marked_step() -> Any:
        prefill = any(s.computed < len(s.prompt) for s in engine.scheduler.sequences)
        with mark("prefill" if prefill else "decode"):
            return step()

    engine.step = marked_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del engine.step


def torch_profile(stack: Stack, prompt: list[int], new_tokens: int, device: str) -> dict[str, Any]:
    """The figures of :func:`llama_engine.measure.nsight.read_export` that PyTorch's profiler can give, the rest None.

    Without a GPU the operators of PyTorch stand for kernels; code outside PyTorch shows as "native code".
    """
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        with marked(stack):
            stack.generate(prompt, new_tokens)
        if cuda:
            torch.cuda.synchronize()
    events = list(profiler.events())
    steps = [e for e in events if e.name == "decode" and e.device_type == torch.autograd.DeviceType.CPU]
    if not steps:
        raise RunError("the profiler recorded no decode step")
    first, last = min(e.time_range.start for e in steps), max(e.time_range.end for e in steps)
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    names = {"decode", "prefill", "warm-up", *PHASES.values(), "embedding", "lm_head"}
    work: dict[str, list[float]] = {}
    launches = replays = 0
    for event in events:
        if not first <= event.time_range.start <= last or event.name in names:
            continue
        if event.name.startswith(("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset", "cudaGraphLaunch")):
            launches += 1
            replays += event.name.startswith("cudaGraphLaunch")
        elif event.device_type == wanted and (cuda or event.name.startswith("aten::")):
            spent = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
            work.setdefault(event.name, []).append(spent)
    count, span = len(steps), last - first
    if not cuda:
        seen = sum(map(sum, work.values()))
        work["native code and Python"] = [max(0.0, span - seen)]
    total = sum(map(sum, work.values()))
    ranked = sorted(work.items(), key=lambda item: -sum(item[1]))[:10]
    return {
        "tokens": count,
        "launches": launches if cuda else None,
        "launches_per_token": launches / count if cuda else None,
        "graph_replays": replays if cuda else None,
        "kernels_per_token": sum(map(len, work.values())) / count if cuda else None,
        "operators_per_token": None if cuda else (sum(map(len, work.values())) - 1) / count,
        "gpu_busy_share": total / span if cuda else None,
        "top_kernels": [{"name": n, "share": sum(t) / total, "calls": len(t)} for n, t in ranked],
    }


def main_for(args: argparse.Namespace, engine: bool) -> None:
    """What both scripts do after parsing."""
    check_output(args.output, args.force)
    device = protocol.prepare(args)
    if engine:
        stack, about = protocol.open_engine(args.engine_dir, protocol.backend_of(args), device, args.threads)
        protocol.check_same_model(Path(args.model_dir), about)
    else:
        stack, about = TransformersStack(args.model_dir, device), {}
    run(args, device, stack, about)
