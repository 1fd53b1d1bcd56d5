"""Requests to token ids, and Triton's or the baseline's ids back to the choices of an answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from llama_engine.config import check_request
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import ErrorCode, InputError, RunError
from llama_engine.grammar import Grammars, json_grammar
from llama_engine.serving.client import NewTokens
from llama_engine.serving.router import Discover, Router
from llama_engine.tokenizer import ChatTokenizer, stop_inputs
from llm_demo.answers import Piece, Usage
from llm_demo.api import ChatRequest, Sampling
from llm_demo.baseline import Baseline
from llm_demo.choice import Choice, best, merged
from llm_demo.errors import DOWN, ApiError
from llm_demo.other import OtherServer
from llm_demo.tools import ToolFormat


class Gateway:
    """One engine behind Triton and, with ``model_dir``, its baseline. Raises :class:`InputError`.

    ``triton_urls`` are its replicas, of ``instances`` engines each; ``discover`` tells, again and again, which there
    are now.
    """

    def __init__(
        self,
        engine_dir: Path,
        *triton_urls: str,
        model_dir: Path | None,
        device: str,
        discover: Discover | None = None,
        others: Sequence[str] = (),
        instances: int = 1,
    ) -> None:
        self.info = load_engine_json(engine_dir, backend="auto")
        self.engine_dir, self.tokenizer = engine_dir, ChatTokenizer(engine_dir)
        self._grammars: Grammars | None = None  # the first that is asked for takes a second
        self.triton_urls, self.discover, self.instances = triton_urls, discover, instances
        self.baseline = Baseline(model_dir, device) if model_dir else None
        self.name = self.info.model.name
        self.models = [self.name, *([f"{self.name}:baseline"] if model_dir else [])]
        self.others = {other.name: other for other in map(OtherServer, others)}
        if taken := self.others.keys() & set(self.models):
            raise InputError(f"--other may not be named {taken.pop()}, which is a model of this gateway")
        self.models += self.others
        self.counts: Counter[str] = Counter()
        self.running = 0

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.client = Router.of(self.info, self.triton_urls, self.discover, self.instances)
        yield
        await self.client.close()
        for other in self.others.values():
            await other.http.aclose()
        if self.baseline:
            await self.baseline.close()

    def check(self, request: Sampling) -> None:
        """Raise :class:`ApiError` for a model that is not there, or for what only the engine can do."""
        self.check_model(request.model)
        if request.model != self.name:
            for name in request.ENGINE_ONLY:
                if getattr(request, name) not in (type(request).model_fields[name].default, -1):
                    raise ApiError(400, f"{name} is not supported by the baseline, ask {self.name}", param=name)
            if request.scores is not None:
                raise ApiError(400, f"logprobs are not made by the baseline, ask {self.name}", param="logprobs")

    def check_model(self, name: str) -> None:
        if name not in self.models:
            message = f"The model {name!r} does not exist; there is {' and '.join(self.models)}."
            raise ApiError(404, message, code="model_not_found", param="model")

    async def encode(self, request: Sampling, tools: ToolFormat | None) -> list[list[int]]:
        """Ids of a request's prompts, off the event loop: a long text takes a while."""
        if isinstance(request, ChatRequest):
            messages, described = tools.for_template(request.messages)
            options = request.chat_template_kwargs | {"add_generation_prompt": request.add_generation_prompt}
            return [await asyncio.to_thread(self.tokenizer.encode_chat, messages, tools=described, **options)]
        encode = self.tokenizer.encode
        texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
        encoded = iter(await asyncio.to_thread(lambda: [encode(text) for text in texts]))
        return [next(encoded) if isinstance(prompt, str) else prompt for prompt in request.prompts]

    def room(self, prompt: list[int], request: Sampling) -> int:
        """How many tokens may be made. Raises :class:`ApiError` where prompt and answer do not fit."""
        where = "messages" if isinstance(request, ChatRequest) else "prompt"
        limit, asked = self.info.engine.max_seq_len, request.limit
        try:
            check_request(self.info.model, self.info.engine, prompt, asked or 1)
        except InputError as error:
            message = str(error)
            if error.code is ErrorCode.CONTEXT_LENGTH:
                more = f" and {asked} are asked for" if asked else ""
                message = (
                    f"This model's context is {limit} tokens; the prompt has {len(prompt)}{more}. Shorten one of them."
                )
            raise ApiError(400, message, code=error.code.value, param=where) from None
        room = limit - len(prompt) if asked is None else asked
        if request.min_tokens > room:
            raise ApiError(400, f"min_tokens={request.min_tokens} is more than the {room} that fit", param="min_tokens")
        return room

    async def ids(
        self, prompt: list[int], max_tokens: int, request: Sampling, seed: int, grammar: str | None
    ) -> AsyncIterator[NewTokens]:
        """New ids from the model the request names, cut before one that ends the answer. Leaving early cancels."""
        ends = [*(() if request.ignore_eos else self.tokenizer.eos_token_ids), *request.stop_token_ids]
        if request.model == self.name:
            options = stop_inputs(ends) | request.engine_options(self.info.model.vocab_size, seed)
            options |= {"min_length": request.min_tokens} if ends and request.min_tokens else {}
            options |= {"grammar": grammar} if grammar else {}
            source = self.client.generate(prompt, max_tokens, streaming=True, **options)
        else:
            sampling = {"temperature": request.temperature, "top_p": request.top_p, "seed": seed % (1 << 64)}
            source = self.baseline.generate(prompt, max_tokens, eos=ends, **sampling)
        async with contextlib.aclosing(source):
            async for ids in source:
                new = ids if isinstance(ids, NewTokens) else NewTokens(ids)
                end = next((i for i, token in enumerate(new) if token in ends), None)
                if end is not None:
                    del new[end:]
                    new.logprobs = new.logprobs and new.logprobs[:end]
                yield new
                if end is not None:
                    return

    async def answer(self, request: Sampling) -> AsyncIterator[tuple[Piece, Usage]]:
        """Pieces of all choices as they come, each with the usage so far. Raises :class:`ApiError`."""
        self.check(request)
        self.running += 1
        try:
            tools = self.tool_format(request)
            grammar = await self.grammar(request, tools)
            prompts = await self.encode(request, tools)
            rooms = [self.room(prompt, request) for prompt in prompts]
            usage = Usage(sum(map(len, prompts)))
            self.counts["prompt_tokens_total"] += usage.prompt_tokens
            choices = [
                Choice(self, request, tools, grammar, usage, prompt=prompt, room=room, number=number)
                for prompt, room in zip(prompts, rooms)
                for number in range(request.candidates)
            ]
            source = merged([choice.pieces(index) for index, choice in enumerate(choices)])
            if request.candidates > request.n:
                source = best(source, choices, request.candidates, request.n)
            async with contextlib.aclosing(source) as pieces:
                async for piece in pieces:
                    yield piece, usage
        except (InputError, RunError) as error:
            raise ApiError.of(error) from None
        finally:
            self.running -= 1

    def tool_format(self, request: Sampling) -> ToolFormat | None:
        if not isinstance(request, ChatRequest):
            return None
        try:
            return ToolFormat(self.tokenizer.template, request.active_tools, parallel=request.parallel_tool_calls)
        except InputError as error:
            raise ApiError(400, str(error), param="tools") from None

    async def grammar(self, request: Sampling, tools: ToolFormat | None) -> str | None:
        """What the answer must look like, checked. Raises :class:`ApiError`."""
        if not isinstance(request, ChatRequest):
            return None
        schema, name = request.response_format.schema_object, "response_format"
        text = None if schema is None else json_grammar(schema)
        if request.must_call:
            text, name = tools.grammar(request.must_call), "tools"
        if text is None:
            return None
        if request.model != self.name:
            raise ApiError(400, f"the baseline keeps to no {name}, ask {self.name}", param=name)
        try:
            if self._grammars is None:
                sizes = self.info.model.vocab_size, self.tokenizer.eos_token_ids
                self._grammars = await asyncio.to_thread(Grammars, self.engine_dir, *sizes)
            await asyncio.to_thread(self._grammars.compile, text)
        except InputError as error:
            raise ApiError(400, str(error), param=name) from None
        return text

    def state(self, ready: bool) -> dict[str, Any]:
        return {
            "status": "ok" if ready else "unavailable",
            "message": "" if ready else DOWN,
            "models": self.models,
            "source": self.info.model.source,
            "max_seq_len": self.info.engine.max_seq_len,
            "baseline_loaded": self.baseline is not None and self.baseline.loaded,
        }

    def metrics(self) -> str:
        rows = [f"llm_demo_{name} {value:g}" for name, value in sorted(self.counts.items())]
        rows += [f"llm_demo_{name} {value:g}" for name, value in self.client.metrics().items()]
        return "\n".join([*rows, f"llm_demo_requests_running {self.running}", ""])
