"""Other engines in this process, where their package is installed: what a tournament sets beside the native engine.

Each takes prompts of token ids and gives answers of exact length, end-of-sequence ignored, stamped token by token.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError
from llama_engine.measure.generation import GenerationRun, now
from llama_engine.measure.stacks import EngineStack, TransformersStack
from llama_engine.native import load_engine
from llama_engine.sampling import SamplingParams


class Peer(Protocol):
    """``most`` is how many requests it takes at once. ``about`` is what a result says of it."""

    most: int
    about: dict[str, Any]

    def generate_batch(
        self, prompts: Sequence[list[int]], new_tokens: Sequence[int], sampling: SamplingParams | None
    ) -> list[GenerationRun]:
        """All prompts at once; prompt i gets ``new_tokens[i]``."""
        ...


class NativePeer(EngineStack):
    """The engine of a directory that scripts/build_engine.py wrote."""

    def __init__(self, directory: Path, device: str, prefix_cache: bool, share: float, **options: Any) -> None:
        options = {"kv_cache_free_gpu_memory_fraction": 0.8 * share, "enable_prefix_cache": prefix_cache} | options
        engine = load_engine(directory, device=device, **options)
        info = load_engine_json(directory)
        about = {"weights_sha256": info.weights_sha256, "kernels": engine.executor.kernels}
        super().__init__(engine, about | {"config": engine.config.to_dict(), "model": info.identity})
        self.most = engine.config.max_batch_size


class TransformersPeer:
    """transformers' ``generate``, one request at a time: eager with its dynamic cache, as the baseline is measured, or
    with a static cache and a compiled decode step, which is its own best."""

    most = 1

    def __init__(self, directory: Path, device: str, prefix_cache: bool, share: float, *, static: bool) -> None:
        if prefix_cache:
            raise InputError("transformers has no prefix cache: leave --prefix-cache or this stack out")
        self.stack = TransformersStack(directory, device)
        self.options: dict[str, Any] = {}
        if static:
            from transformers import CompileConfig

            compiled = CompileConfig(fullgraph=True)
            compiled._compile_all_devices = True  # else a CPU runs uncompiled
            self.options = {"cache_implementation": "static", "compile_config": compiled}
        self.about = {"version": importlib.metadata.version("transformers"), "dtype": str(self.stack.dtype)}
        self.about |= {"cache": "static, compiled" if static else "dynamic, eager"}

    def generate_batch(
        self, prompts: Sequence[list[int]], new_tokens: Sequence[int], sampling: SamplingParams | None
    ) -> list[GenerationRun]:
        options = dict(self.options)
        if sampling:
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            options |= {"top_k": sampling.top_k}
        runs = []
        for prompt, count in zip(prompts, new_tokens):
            run = GenerationRun(now())
            self.stack.stream(prompt, count, lambda ids, run=run: run.add(ids, now()), **options)
            runs.append(run)
        return runs


class LlamaCppPeer:
    """llama.cpp through llama-cpp-python, one request at a time, of a GGUF file."""

    most = 1

    def __init__(self, file: Path, device: str, prefix_cache: bool, share: float, **options: Any) -> None:
        llama_cpp = _package("llama_cpp", "llama-cpp-python")
        options = {"n_ctx": 0, "n_gpu_layers": -1 if device == "cuda" else 0, "verbose": False} | options
        self.model = llama_cpp.Llama(str(file), **options)
        self.prefix_cache = prefix_cache
        self.about = {"version": llama_cpp.__version__, "file": file.name, "options": options}

    def generate_batch(
        self, prompts: Sequence[list[int]], new_tokens: Sequence[int], sampling: SamplingParams | None
    ) -> list[GenerationRun]:
        options: dict[str, Any] = {"temp": 0.0}
        if sampling:
            options = {"temp": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        runs = []
        for prompt, count in zip(prompts, new_tokens):
            if not self.prefix_cache:
                self.model.reset()
            run = GenerationRun(now())
            for token in self.model.generate(prompt, reset=True, **options):
                run.add([int(token)], now())
                if len(run.token_ids) == count:
                    break
            runs.append(run)
        return runs


class VllmPeer:
    """vLLM as it ships: its core steps in a process of its own, so that it does not wait for who reads its tokens. It
    draws without seeds: one per request would take its slower way. VLLM_* variables are its own affair, and told."""

    def __init__(self, directory: Path, device: str, prefix_cache: bool, share: float, **options: Any) -> None:
        self.vllm = _package("vllm", "vllm")
        options = {"gpu_memory_utilization": 0.9 * share, "skip_tokenizer_init": True} | options
        options |= {"enable_prefix_caching": prefix_cache}
        self.engine = self.vllm.LLM(model=str(directory), **options).llm_engine
        self.most = int(options.get("max_num_seqs", 256))
        variables = {key: value for key, value in sorted(os.environ.items()) if key.startswith("VLLM_")}
        self.about = {"version": self.vllm.__version__, "options": options, "variables": variables}
        self.about["flashinfer"] = importlib.util.find_spec("flashinfer") is not None  # its sampler, where it is there

    def generate_batch(
        self, prompts: Sequence[list[int]], new_tokens: Sequence[int], sampling: SamplingParams | None
    ) -> list[GenerationRun]:
        from vllm.sampling_params import RequestOutputKind

        drawn = {"temperature": 0.0}
        if sampling:
            drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1}
        fixed = {"ignore_eos": True, "detokenize": False, "output_kind": RequestOutputKind.DELTA}
        params = [self.vllm.SamplingParams(max_tokens=count, **fixed, **drawn) for count in new_tokens]
        start = now()
        runs = {str(i): GenerationRun(start) for i in range(len(prompts))}
        for name, prompt, each in zip(runs, prompts, params):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, each)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            stamp = now()
            for output in outputs:
                runs[output.request_id].add(list(output.outputs[0].token_ids), stamp)
        return list(runs.values())


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{name} cannot be imported ({error}): install it, or leave this stack out") from None


def open_peer(kind: str, path: Path, device: str, prefix_cache: bool, share: float, options: dict[str, Any]) -> Peer:
    """One of :data:`KINDS`. ``share`` is its part of the GPU's memory. Raises :class:`InputError`."""
    if kind.startswith("transformers"):
        return TransformersPeer(path, device, prefix_cache, share, static=kind.endswith("static"), **options)
    return {"native": NativePeer, "vllm": VllmPeer, "llamacpp": LlamaCppPeer}[kind](
        path, device, prefix_cache, share, **options
    )


KINDS = ("native", "transformers", "transformers-static", "vllm", "llamacpp")
