"""Runs made for a profiler: NVTX ranges around warm-up, prefill and every decode step; PyTorch's profiler without nsys.

Nothing here is used for a speed: a profiled run is slower than a run.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import nvtx
import torch
from torch.profiler import record_function

from llama_engine.engine.engine import Engine
from llama_engine.errors import RunError
from llama_engine.files import write_text
from llama_engine.measure import protocol
from llama_engine.measure.environment import fingerprint
from llama_engine.measure.generation import EngineStack, RunnerStack, Stack, TransformersStack, make_prompts
from llama_engine.measure.nsight import SUBMITS
from llama_engine.measure.result import check_output
from llama_engine.runner import ModelRunner

PHASES = {"self_attn": "attention", "mlp": "mlp", "input_layernorm": "norm", "post_attention_layernorm": "norm"}


@contextmanager
def mark(name: str) -> Iterator[None]:
    """A range that Nsight Systems and PyTorch's profiler both see."""
    with nvtx.annotate(name), record_function(name):
        yield


def main(doc: str | None, *, engine: bool) -> None:
    """Both NVTX scripts: warm up, run once marked, and write what the profile reader needs."""
    parser = protocol.parser_for(doc, f"build/{'trt' if engine else 'baseline'}_nvtx.json")
    protocol.add_arguments(parser)
    if engine:
        protocol.add_engine_arguments(parser)
    parser.set_defaults(output_tokens=64, warmup=1, runs=1, prefill_tokens=0, batch=[])
    parser.add_argument("--torch-profiler", action="store_true", help="profile with PyTorch, for where nsys is missing")
    args = parser.parse_args()
    check_output(args.output, args.force, args.model_dir, *([args.engine_dir] if engine else []))
    device = protocol.prepare(args)
    stack = protocol.open_engine(args, device) if engine else TransformersStack(args.model_dir, device)
    prompt = make_prompts(args.model_dir, args.prompt, args.input_tokens)[0]
    with mark("warm-up"):
        for _ in range(max(1, args.warmup)):
            stack.generate(prompt, args.output_tokens)
    info = {
        "stack": stack.name,
        "model": protocol.model_identity(args.model_dir),
        "workload": {"input_tokens": args.input_tokens, "output_tokens": args.output_tokens, "concurrency": 1},
        "environment": fingerprint(device),
        "engine": stack.about or None,
        "profile": None,
    }
    profiler = torch.profiler.profile() if args.torch_profiler else nullcontext()
    with profiler:
        with marked(stack):
            stack.generate(prompt, args.output_tokens)
        if device == "cuda":
            torch.cuda.synchronize()
    if args.torch_profiler:
        info["profile"] = summarize(list(profiler.events()), cuda=device == "cuda")
    write_text(args.output, json.dumps(info, indent=1) + "\n")


def marked(stack: Stack) -> AbstractContextManager[None]:
    """Ranges named prefill and decode around the steps of whatever is generated inside."""
    if isinstance(stack, TransformersStack):
        return marked_baseline(stack)
    if isinstance(stack, EngineStack):
        return marked_engine(stack.engine)
    assert isinstance(stack, RunnerStack)
    return marked_runner(stack.runner)


@contextmanager
def marked_baseline(stack: TransformersStack) -> Iterator[None]:
    """Prefill, then decode steps from one forward to the next, so that sampling counts; inside them, the phases."""
    step, phases = ExitStack(), ExitStack()

    def enter_step(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        step.close()
        step.enter_context(mark("decode" if ids.shape[1] == 1 else "prefill"))

    hooks = [stack.model.register_forward_pre_hook(enter_step, with_kwargs=True)]
    parts = {stack.model.lm_head: "lm_head", stack.model.get_input_embeddings(): "embedding"}
    for layer in stack.model.model.layers:
        parts |= {getattr(layer, attribute): name for attribute, name in PHASES.items()}
    for module, name in parts.items():  # none lies inside another, so one stack holds the one that is open
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: phases.enter_context(mark(name))))
        hooks.append(module.register_forward_hook(lambda *_: phases.close()))
    try:
        yield
    finally:
        step.close()
        for hook in hooks:
            hook.remove()


@contextmanager
def marked_engine(engine: Engine) -> Iterator[None]:
    """Each engine step is a prefill while a prompt is being read, else a decode step."""
    step = engine.step

    def marked_step() -> Any:
        prefill = any(s.computed < len(s.prompt) for s in engine.scheduler.sequences)
        with mark("prefill" if prefill else "decode"):
            return step()

    engine.step = marked_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del engine.step


@contextmanager
def marked_runner(runner: ModelRunner) -> Iterator[None]:
    """All that can be seen of another's steps: the wait for the first tokens is a prefill, each later one a decode."""
    generate = runner.generate

    def marked_generate(*prompts: Any, max_new_tokens: int, **options: Any) -> Iterator[Any]:
        results = iter(generate(*prompts, max_new_tokens=max_new_tokens, **options))
        for step in range(max_new_tokens):  # not until the end: learning that nothing follows is no decode step
            with mark("decode" if step else "prefill"):
                result = next(results, None)
            if result is None:
                return
            yield result

    runner.generate = marked_generate  # type: ignore[method-assign]
    try:
        yield
    finally:
        del runner.generate


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
