"""TensorRT-LLM as a backend: which one ``auto`` means, building with ``trtllm-build``, running with ModelRunnerCpp.

Signatures are those of release 0.15.0 (docs/TENSORRT_LLM.md). Nothing of the package is imported before it is used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from llama_engine.backend import Batch
from llama_engine.checkpoint.build import complete, own_names
from llama_engine.checkpoint.packing import layout_for, visible_arch
from llama_engine.checkpoint.reader import Checkpoint
from llama_engine.checkpoint.unified import recipe_key
from llama_engine.config import EngineConfig, check_request
from llama_engine.engine_dir import TensorRTInfo, load_engine_json
from llama_engine.errors import InputError, RunError
from llama_engine.files import atomic_dir
from llama_engine.model.schemes import FP8_ALL, FP8_ROWWISE, INT4_GROUPS

INSTALL = "source scripts/setup.sh --trtllm says what is missing; or build an engine with --backend native"


def installed() -> bool:
    """Whether the package ``tensorrt_llm`` can be imported; it is not imported."""
    return importlib.util.find_spec("tensorrt_llm") is not None


def pick_backend(backend: str) -> str:
    """Resolve "auto" and say what it became."""
    if backend == "auto":
        backend = "tensorrt_llm" if installed() else "native"
        print(f"backend: {backend} (TensorRT-LLM is {'' if backend == 'tensorrt_llm' else 'not '}installed)")
    return backend


def build_command(
    checkpoint_dir: Path | str, output_dir: Path | str, engine: EngineConfig, flags: dict[str, str]
) -> list[str]:
    """The ``trtllm-build`` command. Always given, because of their defaults: ``--max_seq_len`` (the model's whole
    context), ``--max_input_len`` (1,024 whatever the former says; ModelRunnerCpp refuses longer prompts) and
    ``--output_timing_cache`` (a file in the working directory)."""
    limits = {name: getattr(engine, name) for name in ("max_batch_size", "max_seq_len", "max_num_tokens")}
    limits |= {"max_input_len": engine.max_seq_len, "tokens_per_block": engine.tokens_per_block}
    given = {"checkpoint_dir": checkpoint_dir, "output_dir": output_dir} | flags | limits
    given["output_timing_cache"] = Path(output_dir) / "model.cache"
    return ["trtllm-build", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def check_recipe(source: Checkpoint) -> None:
    """Raise :class:`InputError` for a checkpoint in the native engine's own form."""
    if source.quant_algo == FP8_ALL:
        raise InputError(
            f"{source.dir} holds every linear layer in FP8 ({FP8_ALL}), which is a form of the native engine: convert "
            "with --fp8_recipe nvidia for TensorRT-LLM, or build with --backend native"
        )
    if source.quant_algo == INT4_GROUPS:
        raise InputError(
            f"{source.dir} holds INT4 in groups ({INT4_GROUPS}), which is a form of the native engine: convert with "
            "--weight_only_precision int4 alone for TensorRT-LLM, or build with --backend native"
        )


def build(
    checkpoint_dir: Path, output_dir: Path, engine: EngineConfig, flags: dict[str, str], force: bool = False
) -> None:
    """Run ``trtllm-build``; its output is shown. Raises :class:`InputError` or :class:`RunError`."""
    if not installed() or shutil.which("trtllm-build") is None:
        raise InputError(f"TensorRT-LLM is not installed: {INSTALL}")
    source = Checkpoint(checkpoint_dir)
    check_recipe(source)
    arch, version = visible_arch(), importlib.metadata.version("tensorrt_llm")
    if arch is None:
        raise InputError("trtllm-build needs the GPU that the engine is for, and none is visible")
    if source.quant_algo == FP8_ROWWISE and recipe_key(version) != recipe_key(source.version):
        raise InputError(
            f"{source.dir} was written for TensorRT-LLM {source.version}, installed is {version}, which names the FP8 "
            f"recipe otherwise: convert with --trtllm_version {version}"
        )
    if source.layout:
        # TensorRT-LLM loads INT8 bytes unchecked, so a wrong layout would give wrong answers, not an error.
        needed = layout_for(arch, version)
        if needed != source.layout:
            raise InputError(
                f"{source.dir} is packed as {source.layout.name}, but {arch} and TensorRT-LLM {version} need "
                f"{needed.name}: convert with --target_arch {arch} --trtllm_version {version}, or --quantize_at_build"
            )
    with atomic_dir(output_dir, own_names, inputs=[checkpoint_dir], force=force) as out:
        code = subprocess.run(build_command(checkpoint_dir, out, engine, flags), check=False).returncode
        if code:
            raise RunError(f"trtllm-build failed with exit code {code}; its own messages are above")
        built = TensorRTInfo(arch, version, source.tp_size, source.step_nbytes)
        complete(out, "tensorrt_llm", source, engine, tensorrt_llm=asdict(built))


def check_machine(engine_dir: Path | str, built: TensorRTInfo) -> None:
    """Raise :class:`InputError` unless this process can load an engine that was ``built`` so."""
    if not installed():
        raise InputError(f"TensorRT-LLM is not installed: {INSTALL}")
    here = (visible_arch(), importlib.metadata.version("tensorrt_llm"))
    if here != (built.arch, built.version):
        raise InputError(
            f"{engine_dir} is for {built.arch} and TensorRT-LLM {built.version}, here are {here[0] or 'no GPU'} and "
            f"{here[1]}: build it again on this machine"
        )
    if built.ranks > 1:
        raise InputError(
            f"{engine_dir} is split over {built.ranks} ranks, and this is one process: serve it, which starts "
            f"mpirun -n {built.ranks} (scripts/serve_triton.sh --engine-dir {engine_dir})"
        )


class TensorRTBackend:
    """Implements :class:`llama_engine.backend.Backend` over a TensorRT engine on the first GPU.

    The KV cache takes ``kv_cache_free_gpu_memory_fraction`` (default: the engine's) of what is free when it loads, and
    never more than ``sequences`` (default: its batch size) at full length can use. Raises :class:`InputError`;
    :class:`RunError` if loading fails.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        *,
        kv_cache_free_gpu_memory_fraction: float | None = None,
        sequences: int | None = None,
    ) -> None:
        self.info = load_engine_json(engine_dir, backend="tensorrt_llm")
        self.eos_token_ids = self.info.model.eos_token_ids
        assert self.info.tensorrt_llm
        check_machine(engine_dir, self.info.tensorrt_llm)
        from tensorrt_llm.runtime import ModelRunnerCpp

        limits = self.info.engine
        with _told(f"could not load {engine_dir}"):
            self.runner = ModelRunnerCpp.from_dir(
                str(engine_dir),
                rank=0,
                max_batch_size=limits.max_batch_size,
                max_input_len=limits.max_seq_len,
                max_beam_width=1,
                kv_cache_free_gpu_memory_fraction=float(
                    kv_cache_free_gpu_memory_fraction or limits.kv_cache_free_gpu_memory_fraction
                ),
                max_tokens_in_paged_kv_cache=limits.kv_tokens(sequences or limits.max_batch_size),
                cuda_graph_mode=True,  # as in triton_model_repo
            )

    def answer(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        limit = self.info.engine.max_batch_size
        if len(batch.prompts) > limit:
            raise InputError(f"{len(batch.prompts)} prompts, but the engine was built for {limit} at once")
        for prompt in batch.prompts:
            check_request(self.info.model, self.info.engine, prompt, batch.max_new_tokens)
            self.info.check_input(len(prompt))
        return self._steps(batch)

    def _steps(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        with _told("failed"):
            # ModelRunnerCpp drops keywords it does not know without a word; these are all among those it accepts.
            results = self.runner.generate(
                [torch.tensor(prompt, dtype=torch.int32) for prompt in batch.prompts],
                max_new_tokens=batch.max_new_tokens,
                end_id=batch.end_id,  # -1 cannot occur, so EOS is ignored
                pad_id=batch.pad_id,
                stop_words_list=batch.stop_words,
                temperature=float(batch.params.temperature),
                top_k=int(batch.params.top_k),
                top_p=float(batch.params.top_p),
                random_seed=int(batch.params.seed),
                streaming=batch.streaming,
                return_dict=True,
                output_sequence_lengths=True,
            )
            # TensorRT-LLM pads to the engine's max_seq_len; nothing is beyond the width that was asked for.
            for result in results if batch.streaming else [results]:
                yield result["output_ids"][..., : batch.width].cpu(), result["sequence_lengths"].cpu()

    def stream(self, prompt: list[int], new_tokens: int) -> Iterator[list[int]]:
        """The new ids of one greedy request that ignores EOS, as TensorRT-LLM's executor hands them out.

        This is what NVIDIA's Triton backend reads. ModelRunnerCpp, around the same executor, copies and pads whole
        sequences at every step, which a benchmark would blame on the engine. Raises :class:`RunError`.
        """
        from tensorrt_llm.bindings import executor

        with _told("failed"):
            request = executor.Request(
                input_token_ids=prompt,
                max_tokens=new_tokens,
                streaming=True,
                sampling_config=executor.SamplingConfig(beam_width=1, top_k=1),
                end_id=-1,
                pad_id=0,
            )
            ids, final = self.runner.session.enqueue_requests([request]), False
            try:
                while not final:
                    for response in self.runner.session.await_responses(ids)[0]:
                        if response.has_error():
                            final = True
                            raise RuntimeError(response.error_msg)
                        final = response.result.is_final
                        if new := response.result.output_token_ids[0]:
                            yield new
            finally:
                if not final:  # the caller left early
                    self.runner.session.cancel_request(ids[0])


@contextmanager
def _told(what: str) -> Iterator[None]:
    """TensorRT-LLM's errors as :class:`RunError`."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        raise RunError(f"TensorRT-LLM {what}: {error}") from error
