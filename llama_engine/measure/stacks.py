"""What can be timed: the transformers baseline, the native engine, and TensorRT-LLM's executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from llama_engine.checkpoint.hf import HFModel
from llama_engine.engine.engine import Engine
from llama_engine.errors import RunError
from llama_engine.measure.cost import Cost
from llama_engine.measure.generation import GenerationRun, Mark, now
from llama_engine.sampling import SamplingParams
from llama_engine.trtllm import TensorRTBackend

PHASES = {"self_attn": "attention", "mlp": "mlp", "input_layernorm": "norm", "post_attention_layernorm": "norm"}


class TransformersStack:
    """The baseline: ``AutoModelForCausalLM``, SDPA, fp16 on CUDA and bf16 on a CPU, ``generate`` with a streamer.

    ``compiled``: with a static cache, for which ``generate`` itself compiles the decode step on CUDA; on a CPU, where
    it does not, the forward pass goes through ``torch.compile``.
    """

    name = "transformers"

    def __init__(self, model_dir: Path | str, device: str = "cpu", compiled: bool = False) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig, __version__
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = HFModel(model_dir).config  # refuses what is not a Llama directory, in one line
        self.dtype = torch.float16 if device == "cuda" else torch.bfloat16
        self.device = device
        self.about: dict[str, Any] = {}
        # 4.56 renamed the keyword: older releases do not know the new name, newer ones warn about the old
        keyword = "dtype" if tuple(map(int, __version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
        options = {keyword: self.dtype, "attn_implementation": "sdpa"}
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, **options)
        self.model.to(device).eval()
        # generate() fills unset fields from the model's own generation config: leave it no EOS to stop at
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self.options: dict[str, Any] = {}
        if compiled:
            self.options["cache_implementation"] = "static"
            if device == "cpu":
                self.model.forward = torch.compile(self.model.forward)
        weights = sum(p.nbytes for p in self.model.parameters())
        if not config.tie_word_embeddings:
            weights -= self.model.get_input_embeddings().weight.nbytes  # a gather of one row, not a read of all
        self.cost = Cost.of(config, weights, config.kv_nbytes(self.dtype.itemsize))

    def generate(self, prompt_ids: list[int], new_tokens: int) -> GenerationRun:
        run = GenerationRun(now())
        self.stream(prompt_ids, new_tokens, lambda ids: run.add(ids, now()))
        return run

    @torch.inference_mode()
    def stream(
        self, prompt_ids: list[int], new_tokens: int, on_ids: Callable[[list[int]], None], **options: Any
    ) -> None:
        """transformers' ``generate`` with ``options``; ``on_ids`` gets each token as it is made."""
        ids = torch.tensor([prompt_ids], device=self.device)
        options |= self.options | {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens}
        self.model.generate(ids, streamer=_Streamer(on_ids), **options)

    @contextmanager
    def marked(self, mark: Mark) -> Iterator[None]:
        """Prefill, then decode steps from one forward to the next, so that sampling counts; inside them, the phases."""
        step, phases = ExitStack(), ExitStack()

        def enter_step(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            step.close()
            step.enter_context(mark("decode" if ids.shape[1] == 1 else "prefill"))

        hooks = [self.model.register_forward_pre_hook(enter_step, with_kwargs=True)]
        parts = {self.model.lm_head: "lm_head", self.model.get_input_embeddings(): "embedding"}
        for layer in self.model.model.layers:
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


class _Streamer:
    """A transformers streamer. ``generate`` hands it host tensors, so a CUDA token has been waited for."""

    def __init__(self, on_ids: Callable[[list[int]], None]) -> None:
        self.on_ids, self.prompt_seen = on_ids, False

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt first, then with each new token."""
        if self.prompt_seen:
            self.on_ids(value.reshape(-1).tolist())
        self.prompt_seen = True

    def end(self) -> None:
        """Called after the last token."""


class EngineStack:
    """The native engine in this process."""

    name = "native"

    def __init__(self, engine: Engine, about: dict[str, Any] | None = None) -> None:
        self.engine, self.about = engine, about or {}
        share = engine.model_config.share(engine.config.tp_size)
        self.cost = Cost.of(share, engine.executor.step_nbytes, engine.executor.kv_nbytes_per_token)

    def generate(self, prompt_ids: list[int], new_tokens: int) -> GenerationRun:
        return self.generate_batch([prompt_ids], new_tokens)[0]

    def generate_batch(
        self, prompts: Sequence[list[int]], new_tokens: int | Sequence[int], sampling: SamplingParams | None = None
    ) -> list[GenerationRun]:
        """All prompts at once, each answered with ``new_tokens``, or its own number of them. Every run has the same t0,
        the moment the first was added. Prompt i draws with the seed of ``sampling`` + i."""
        counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
        params = [sampling and dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(len(prompts))]
        start = now()
        runs = {
            self.engine.add_request(prompt, count, params=p): GenerationRun(start)
            for prompt, count, p in zip(prompts, counts, params)
        }
        while self.engine.has_unfinished:
            outputs = self.engine.step()
            stamp = now()
            for output in outputs:
                if isinstance(output.reason, RunError):
                    raise output.reason
                runs[output.request_id].add(output.token_ids, stamp)
        return list(runs.values())

    @contextmanager
    def marked(self, mark: Mark) -> Iterator[None]:
        """Each engine step is a prefill while a prompt is being read, else a decode step."""
        step = self.engine.step

        def marked_step() -> Any:
            prefill = any(s.computed < len(s.prompt) for s in self.engine.scheduler.sequences)
            with mark("prefill" if prefill else "decode"):
                return step()

        self.engine.step = marked_step  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.engine.step


class TensorRTStack:
    """A TensorRT engine in this process, through TensorRT-LLM's executor."""

    name = "tensorrt_llm"

    def __init__(self, backend: TensorRTBackend, cost: Cost, about: dict[str, Any]) -> None:
        self.stream, self.cost, self.about = backend.stream, cost, about

    def generate(self, prompt_ids: list[int], new_tokens: int) -> GenerationRun:
        run = GenerationRun(now())
        for ids in self.stream(prompt_ids, new_tokens):
            run.add(ids, now())
        return run

    @contextmanager
    def marked(self, mark: Mark) -> Iterator[None]:
        """What can be seen of another's steps: the wait for the first tokens is a prefill, each later one a decode."""
        stream = self.stream

        def marked_stream(prompt_ids: list[int], new_tokens: int) -> Iterator[list[int]]:
            results = stream(prompt_ids, new_tokens)
            for step in range(new_tokens):  # not until the end: learning that nothing follows is no decode step
                with mark("decode" if step else "prefill"):
                    ids = next(results, None)
                if ids is None:
                    return
                yield ids

        self.stream = marked_stream  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.stream = stream  # type: ignore[method-assign]
