"""The native engine: add requests, step, read tokens. In-flight batching over any executor."""

from __future__ import annotations

import itertools
from collections import abc
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, NamedTuple

from llama_engine.config import EngineConfig, ModelConfig, check_request
from llama_engine.engine.executor import Executor, StepHandle
from llama_engine.engine.kv_cache import BlockManager
from llama_engine.engine.scheduler import DrainFirst, Grammar, Plan, Scheduler, Sequence
from llama_engine.engine.step import Step
from llama_engine.errors import ErrorCode, InputError, RunError
from llama_engine.sampling import NOT_FINITE, Logprobs, SamplingParams

FinishReason = Literal["stop", "length"]


class Output(NamedTuple):
    """New tokens of one request, and why it ended, if it did: a word, or the error that this request alone met."""

    request_id: int
    token_ids: list[int]
    reason: FinishReason | RunError | None = None
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    logprobs: list[Logprobs] | None = None  # of token_ids, if SamplingParams.logprobs asks for them
    prompt_logprobs: list[Logprobs] | None = None  # with the first token, if SamplingParams.prompt_logprobs asks

    @property
    def finished(self) -> bool:
        return self.reason is not None


class Engine:
    """Not thread-safe: one owner calls everything (see :class:`llama_engine.engine.loop.EngineLoop`)."""

    def __init__(self, model_config: ModelConfig, config: EngineConfig, executor: Executor) -> None:
        self.model_config, self.config, self.executor = model_config, config, executor
        self.scheduler = Scheduler(config, BlockManager(executor.num_kv_blocks, config.tokens_per_block))
        self.tokens_generated = 0
        self.steps = 0
        self._requests: dict[int, Sequence] = {}
        self._ids = itertools.count()
        self._inflight: tuple[Plan, StepHandle] | None = None

    def add_request(
        self,
        prompt: abc.Sequence[int],
        max_new_tokens: int,
        *,
        params: SamplingParams | None = None,
        stop_token_ids: Iterable[int] = (),
        min_tokens: int = 0,
    ) -> int:
        """Queue a request and return its id. Raises :class:`InputError` for one that can never run."""
        asked = {"params": params, "stop_token_ids": stop_token_ids, "min_tokens": min_tokens}
        sequence = self.make_request(prompt, max_new_tokens, **asked)
        self.add(sequence)
        return sequence.request_id

    def make_request(
        self,
        prompt: abc.Sequence[int],
        max_new_tokens: int,
        *,
        params: SamplingParams | None = None,
        stop_token_ids: Iterable[int] = (),
        min_tokens: int = 0,
        output: abc.Sequence[int] = (),
        grammar: Grammar | None = None,
    ) -> Sequence:
        """A checked request for :meth:`add`. The one method that any thread may call.

        ``output`` is what another engine has already made of the answer: this one goes on behind it, as after a
        preemption, with ``max_new_tokens`` more. Draws and penalties are those of an answer that was never broken off.
        ``grammar`` belongs to this request alone; its answer ends where nothing more may follow. None of
        ``stop_token_ids`` comes before the answer has ``min_tokens``, of which ``output`` is a part.
        """
        self.validate([*prompt, *output] if output else prompt, max_new_tokens)
        for token in output if grammar else ():
            grammar.advance(token)
        params, ends, limit = params or SamplingParams(), frozenset(stop_token_ids), len(output) + max_new_tokens
        params.check_vocabulary(self.model_config.vocab_size)
        if not (isinstance(min_tokens, int) and 0 <= min_tokens <= limit):
            raise InputError(f"min_tokens must be an integer in [0, {limit}], the answer's limit; got {min_tokens!r}")
        if min_tokens and grammar:
            raise InputError("min_tokens and a grammar contradict each other: the grammar says where the answer ends")
        if grammar:
            params = replace(params, masked=True)
        held, released = params, None
        banned = [(token,) for token in ends if 0 <= token < self.model_config.vocab_size]
        if banned and min_tokens > len(output):
            held, released = replace(params, bad_words=(*params.bad_words, *banned)), params
        return Sequence(
            next(self._ids),
            list(prompt),
            limit,
            held,
            ends,
            grammar,
            min_tokens,
            released,
            output=list(output),
            sampled=len(output),
        )

    def add(self, sequence: Sequence) -> None:
        self._requests[sequence.request_id] = sequence
        self.scheduler.add(sequence)

    def validate(self, prompt: abc.Sequence[int], max_new_tokens: int) -> None:
        """Raise :class:`InputError`, with the numbers, unless the request can run on this engine."""
        check_request(self.model_config, self.config, prompt, max_new_tokens)
        total = len(prompt) + max_new_tokens
        blocks = self.scheduler.blocks
        if blocks.blocks_for(total) > blocks.usable:
            raise InputError(
                f"{total} tokens need {blocks.blocks_for(total)} KV blocks of {self.config.tokens_per_block} tokens; "
                f"the cache has {blocks.usable}",
                ErrorCode.CONTEXT_LENGTH,
            )

    def cancel(self, request_id: int) -> bool:
        """Drop a request and free its blocks; False when it is unknown or already finished."""
        sequence = self._requests.pop(request_id, None)
        if sequence is None:
            return False
        self.scheduler.finish(sequence)
        return True

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests) or self._inflight is not None

    def step(self) -> list[Output]:
        """Run one step and return what became known. On an asynchronous executor that is the step before."""
        try:
            return self._step()
        except BaseException:  # whatever ended it: blocks may be registered that were never written
            self.scheduler.reset_prefix_cache()
            raise

    def _step(self) -> list[Output]:
        outputs: list[Output] = []
        try:
            plan = self.scheduler.schedule()
        except DrainFirst:
            outputs, self._inflight = self._read(self._inflight), None
            plan = self.scheduler.schedule()
        previous, self._inflight = self._inflight, self._submit(plan) if plan else None
        if not self.executor.asynchronous:
            previous, self._inflight = self._inflight, None
        return outputs + self._read(previous)

    def _submit(self, plan: Plan) -> tuple[Plan, StepHandle]:
        for sequence in plan.admitted:
            self.executor.bind(sequence.slot, sequence.params, sequence.prompt, sequence.output)
        for sequence in plan.released:
            self.executor.rebind(sequence.slot, sequence.params)
        for sequence in plan.grown:
            self.executor.set_block_table(sequence.slot, sequence.table)
        self.steps += 1
        scored = {
            i: following
            for i, (sequence, chunk) in enumerate(plan.work)
            if chunk.tokens is not None
            and sequence.scoring
            and (following := sequence.prompt[chunk.start + 1 : chunk.start + chunk.length + 1])
        }
        forbidden = {
            i: sequence.grammar.forbidden()
            for i, (sequence, chunk) in enumerate(plan.work)
            if chunk.samples and sequence.grammar is not None
        }
        chunks = tuple(chunk for _, chunk in plan.work)
        return plan, self.executor.submit(Step(chunks, scored=scored, forbidden=forbidden))

    def _read(self, step: tuple[Plan, StepHandle] | None) -> list[Output]:
        if step is None:
            return []
        plan, handle = step
        for i, scores in handle.scored().items():
            sequence, chunk = plan.work[i]
            sequence.prompt_logprobs[chunk.start :] = scores
        sampling = [sequence for sequence, chunk in plan.work if chunk.samples]
        outputs = []
        for sequence, token, logprobs in zip(sampling, handle.tokens(), handle.logprobs()):
            if sequence.finished:
                continue  # cancelled, or stopped while this step was already on its way
            reason: FinishReason | RunError | None = None
            tokens = []
            if isinstance(token, Exception):
                reason = RunError(f"no token could be sampled: {type(token).__name__}: {token}")
            elif token == NOT_FINITE:
                made = len(sequence.output)
                reason = RunError(
                    f"the model's logits are not finite after {len(sequence.prompt)} prompt and {made} new tokens: its "
                    "activations, or keys and values in the fp16 cache, overflow on this text",
                    ErrorCode.NOT_FINITE,
                )
                self.scheduler.reset_prefix_cache()  # its blocks may hold what is not finite
            else:
                tokens = [token]
                sequence.output.append(token)
                self.tokens_generated += 1
                if token in sequence.stop_token_ids or (sequence.grammar and sequence.grammar.advance(token)):
                    reason = "stop"
                elif len(sequence.output) == sequence.max_new_tokens:
                    reason = "length"
            if reason:
                self.scheduler.finish(sequence)
                del self._requests[sequence.request_id]
            given = [logprobs] if logprobs and tokens else None
            first = sequence.params.prompt_logprobs and len(sequence.output) == len(tokens)
            scores = sequence.prompt_logprobs if first else None
            outputs.append(Output(sequence.request_id, tokens, reason, sequence.cached_tokens or 0, given, scores))
        return outputs
