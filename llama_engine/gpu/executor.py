"""The asynchronous executor of a CUDA GPU: one graph replay a decode step, prefill in graphs or eagerly.

A step's decodes run as one replay of their batch bucket's graph, its prefill chunks as a second pass. Rows never see
each other and with INT8 matrices every kernel's result for a row is independent of the batch, so a request's tokens do
not depend on what ran beside it (batches of 1 or 2 run the persistent kernel, whose attention rounds differently; FP8
and 16-bit matrices sum in an order that depends on the number of rows).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.engine.step import Step
from llama_engine.errors import InputError, RunError
from llama_engine.gpu import buckets
from llama_engine.gpu.batch import Batch
from llama_engine.gpu.chain import GpuModel
from llama_engine.gpu.draw import Draw
from llama_engine.gpu.handle import CudaHandle, Pass, run_together
from llama_engine.gpu.ragged import RaggedInputs
from llama_engine.kernels import persistent, tiles
from llama_engine.kernels.tiles import Tiles, gpu_name
from llama_engine.model.sampler import logprobs
from llama_engine.model.weights import EngineWeights
from llama_engine.sampling import SamplingParams


class CudaExecutor:
    """Implements :class:`llama_engine.engine.executor.Executor`.

    ``kernels``: "auto", "streaming" (no persistent kernel) or "tiled" (the Triton-language ones alone); other
    words are refused by :func:`llama_engine.native.make_executor`.

    Raises :class:`InputError` for a model no kernel runs, :class:`RunError` without memory for a KV cache.
    """

    asynchronous = True

    def __init__(
        self,
        config: ModelConfig,
        engine: EngineConfig,
        weights: EngineWeights,
        *,
        tuning: dict | None = None,
        kernels: str = "auto",
        graphs: bool = True,
        rank: int = 0,
    ) -> None:
        self.device = weights.embedding.device
        self._cuda = self.device.type == "cuda"  # else Triton's interpreter
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None
        table = Tiles(tuning, gpu_name(self.device))
        self.model = model = GpuModel(config, engine, weights, table, kernels != "tiled", rank)
        self.engine_config = engine
        self.num_kv_blocks = model.kv[0].shape[1]
        self.step_nbytes = weights.step_nbytes
        self.kv_nbytes_per_token = config.kv_nbytes(engine.kv_element_nbytes)
        self._batch = Batch(model, engine)
        self._drawing = Draw(model, engine, self._batch)
        self.persistent: persistent.PersistentDecode | None = None
        if (
            kernels == "auto"
            and self._cuda
            and engine.kv_cache == "fp16"
            and persistent.supported(config, model.weights)
        ):
            try:
                self.persistent = persistent.PersistentDecode(config, engine, model.weights, model.kv, rank=rank)
            except RunError as error:
                warnings.warn(f"{error}; decoding with the other kernels", stacklevel=2)
        parts = ("persistent", self.persistent), ("streaming", model.linears.streaming)
        used = [name for name, part in parts if part]
        self.kernels = "cuda-" + "+".join([*used, "tiled"])
        self._tried: set[tuple[int, ...]] = set()
        self._decode_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._prefill_graphs: dict[tuple[int, int], list[torch.cuda.CUDAGraph]] = {}
        self._mixed_graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._mixed_buckets = buckets.mixed(engine, model.x.shape[0])
        self._inputs = RaggedInputs(
            engine, model.attention, model.dummy_slot, buckets.PREFILL_BUCKETS[-1], buckets.PREFILL_CHUNKS[-1]
        )
        if graphs and self._cuda and engine.tp_size == 1:  # ranks must know each other first
            self.capture()

    # -- requests ---------------------------------------------------------------------------------------------------

    def bind(
        self, slot: int, params: SamplingParams, prompt: Sequence[int] | None = (), output: Sequence[int] = ()
    ) -> None:
        with torch.cuda.stream(self._stream):
            self._drawing.bind(slot, params, prompt, output)

    def rebind(self, slot: int, params: SamplingParams) -> None:
        self.bind(slot, params, None)

    def set_block_table(self, slot: int, blocks: Sequence[int]) -> None:
        self._batch.new_tables[slot] = np.asarray(blocks, dtype=np.int32)

    def submit(self, step: Step) -> CudaHandle:
        return run_together([self], step)[0]

    def stages(self, step: Step) -> Iterator[None]:
        """:meth:`submit`, whose handle is returned, in stages; ``yield`` parts what launches kernels that exchange with
        other ranks from all else (:func:`run_together`)."""
        decodes = [i for i, chunk in enumerate(step.chunks) if chunk.tokens is None]
        prefills = [i for i, chunk in enumerate(step.chunks) if chunk.tokens is not None]
        self._batch.upload_tables()
        passes = []
        if mixed := self._mixed_shape(step, decodes, prefills):
            passes.append((yield from self._mixed(step, decodes, prefills, *mixed)))
        else:
            if decodes:
                passes.append((yield from self._decode(step, decodes)))
            if prefills:
                passes.append((yield from self._prefill(step, prefills)))
        event = torch.cuda.Event() if self._cuda else None
        if event is not None:
            event.record()
        return CudaHandle(passes, event, self.model.exchange)

    # -- decode -----------------------------------------------------------------------------------------------------

    def _decode(self, step: Step, indices: list[int]) -> Generator[None, None, Pass]:
        chunks = [step.chunks[i] for i in indices]
        bucket = self._batch.name(chunks)
        yield
        if bucket in self._decode_graphs:
            self._decode_graphs[bucket].replay()
        else:
            self._decode_kernels(bucket)
        yield
        logits = self._rows(indices) if step.logits != "none" else {}
        return self._pass(indices, logits, self._drawing.draw(step, indices))

    def _decode_kernels(self, bucket: int) -> None:
        slots, sampled = self._batch.slots[:bucket], self._batch.sampled[:bucket]
        if self.persistent and bucket in self.persistent.row_counts:
            m = self.model
            self.persistent.launch(slots, m.last_token, m.position, m.block_tables, sampled, m.logits[:bucket])
        else:
            self.model.decode(slots, sampled)

    # -- prefill ----------------------------------------------------------------------------------------------------

    def _prefill(self, step: Step, indices: list[int]) -> Generator[None, None, Pass]:
        chunks = [step.chunks[i] for i in indices]
        total = sum(chunk.length for chunk in chunks)
        if total > self.engine_config.max_num_tokens:
            raise InputError(f"a step of {total} tokens exceeds max_num_tokens {self.engine_config.max_num_tokens}")
        key = buckets.bucket_of(total, buckets.PREFILL_BUCKETS), buckets.bucket_of(len(chunks), buckets.PREFILL_CHUNKS)
        graphs = None if step.every_row else self._prefill_graphs.get(key)
        if graphs is not None:
            self._ragged(chunks, *key)
            yield
            for graph in graphs:
                graph.replay()
                yield
        else:
            inputs = self._ragged(chunks, total, None)
            yield from self._eager(inputs, step.every_row)
        sampling = [i for i, chunk in zip(indices, chunks) if chunk.samples]
        logits: dict[int, torch.Tensor] = {}
        if step.logits == "last":
            logits = self._rows(sampling)
        scored = {}
        if step.every_row:
            every = torch.empty((total, self.model.config.vocab_size), dtype=torch.float32, device=self.device)
            which = torch.arange(total, dtype=torch.int32, device=self.device)
            yield
            self.model.all_logits(which, every, len(sampling))
            yield
            rows = dict(zip(indices, every.split([chunk.length for chunk in chunks])))
            logits = rows if step.logits == "all" else logits
            for i, tokens in step.scored.items():
                params, targets = self._drawing.params[step.chunks[i].slot], torch.tensor(tokens, device=self.device)
                parts = logprobs(rows[i][: len(tokens)], targets, params.logprobs)
                scored[i] = params, [self._batch.to_host(part) for part in parts]
        return self._pass(sampling, logits, self._drawing.draw(step, sampling), scored)

    def _eager(self, inputs: tuple[torch.Tensor, ...], every_row: bool, decodes: int = 0) -> Iterator[None]:
        """A prefill without a graph, of a rank a few layers at a time, so that none gets far ahead of its peers."""
        layers, split = self.model.config.num_layers, self.model.exchange is not None
        cuts = [*range(buckets.FIRST_LAYERS, layers, buckets.FIRST_LAYERS)] if split else []
        parts = [slice(*ends) for ends in zip([None, *cuts], [*cuts, None])]

        def run(part: slice) -> None:
            self.model.prefill(*inputs, self._batch.sampled, every_row=every_row, part=part, decodes=decodes)

        # A kernel's first launch may wait for the device, and the device for a peer, whose turn is after this rank's.
        # So kernels that no graph has run are first run alone; what that leaves in the cache is written again. A kernel
        # is compiled for tiles, and for whether the rows after the decodes begin at 16 bytes.
        shapes = tiles.row_bucket(inputs[0].numel()), tiles.row_bucket(inputs[4].shape[1])
        kind = (*shapes, every_row, min(decodes, 1), decodes % 4 == 0)
        if split and self._cuda and kind not in self._tried:
            self._tried.add(kind)
            state = self.model.last_token, self.model.position
            before = [values.clone() for values in state]
            torch.cuda.synchronize(self.device)
            yield
            with self._alone():
                for part in parts:
                    run(part)
            for values, old in zip(state, before):
                values.copy_(old)
            torch.cuda.synchronize(self.device)
        yield
        for part in parts:
            run(part)
            yield

    # -- both in one pass -------------------------------------------------------------------------------------------

    def _mixed_shape(self, step: Step, decodes: list[int], prefills: list[int]) -> tuple[int, int, int | None] | None:
        """Rows of decodes, of prefill and chunks of the one pass that holds a step, if one does: a graph's, or those of
        the step itself, with None, where the prefill is too long for a graph."""
        if not decodes or not prefills or step.every_row:
            return None
        tokens = sum(step.chunks[i].length for i in prefills)
        fitting = (b for b in self._mixed_buckets if len(decodes) <= b[0] and tokens <= b[1])
        if len(prefills) <= buckets.MIXED_CHUNKS and (bucket := next(fitting, None)):
            return *bucket, buckets.MIXED_CHUNKS
        return (len(decodes), tokens, None) if tokens > buckets.PREFILL_BUCKETS[-1] else None

    def _mixed(
        self, step: Step, decodes: list[int], prefills: list[int], before: int, tokens: int, chunks: int | None
    ) -> Generator[None, None, Pass]:
        first, rest = ([step.chunks[i] for i in part] for part in (decodes, prefills))
        inputs = self._ragged(rest, tokens, chunks, first, before)
        graph = self._mixed_graphs.get((before, tokens)) if chunks else None
        if graph is not None:
            yield
            graph.replay()
            yield
        else:
            yield from self._eager(inputs, True, before)
        sampling = [*decodes, *(i for i in prefills if step.chunks[i].samples)]
        logits = self._rows(sampling) if step.logits == "last" else {}
        return self._pass(sampling, logits, self._drawing.draw(step, sampling))

    def _mixed_kernels(self, decodes: int, inputs: tuple[torch.Tensor, ...]) -> None:
        self.model.prefill(*inputs, self._batch.sampled, every_row=True, decodes=decodes)

    def _ragged(self, *batch: Any) -> tuple[torch.Tensor, ...]:
        host, views = self._inputs.pack(*batch)
        self._batch.upload(self._inputs.buffer, host)
        return views

    # -- graphs -----------------------------------------------------------------------------------------------------

    def capture(self) -> None:
        """Capture the graphs of every bucket; until then all runs eagerly."""
        with torch.cuda.stream(self._stream):
            self._capture_all()

    def _alone(self) -> contextlib.ExitStack:
        """A context in which kernels wait for no other rank."""
        stack = contextlib.ExitStack()
        for part in (self.model.exchange, self.persistent):
            if part is not None:
                stack.enter_context(part.alone())
        return stack

    def _capture_all(self) -> None:
        first = min(buckets.FIRST_LAYERS, self.model.config.num_layers - 1)
        for bucket in self._batch.buckets:
            self._decode_graphs[bucket] = self._capture(lambda b=bucket: self._decode_kernels(b))
            self._drawing.graphs[bucket] = self._capture(lambda b=bucket: self._drawing.kernel(b))
        for tokens in buckets.PREFILL_BUCKETS:
            for chunks in buckets.PREFILL_CHUNKS:
                if tokens > self.model.x.shape[0] or chunks > min(tokens, self.engine_config.max_batch_size):
                    continue
                views = self._inputs.blank(tokens, chunks)
                self._prefill_graphs[tokens, chunks] = [
                    self._capture(lambda v=views, p=part: self.model.prefill(*v, self._batch.sampled, part=p))
                    for part in (slice(0, first), slice(first, None))
                ]

        for bucket in self._mixed_buckets:
            views = self._inputs.blank(bucket[1], buckets.MIXED_CHUNKS, bucket[0])
            self._mixed_graphs[bucket] = self._capture(lambda b=bucket, v=views: self._mixed_kernels(b[0], v))

    def _capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        with self._alone():
            run()  # compiles and loads the kernels
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run()
        return graph

    def _rows(self, chunks: list[int]) -> dict[int, torch.Tensor]:
        """Copies of the logits ``[1, vocab]`` of the chunks that were sampled from."""
        return {chunk: row.clone()[None] for chunk, row in zip(chunks, self.model.logits)}

    def _pass(self, sampling: list[int], logits: dict[int, torch.Tensor], *logprobs: Any) -> Pass:
        return Pass(sampling, self._batch.to_host(self._batch.sampled[: len(sampling)]), logits, *logprobs)
