"""OpenAI's requests, with what clients of vLLM widely send: what is accepted, and what is refused by name."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from llama_engine.sampling import MAX_LOGPROBS
from llm_demo.errors import ApiError
from llm_demo.messages import Message, NamedChoice, ResponseFormat, Strict, Text, Tool

MAX_CHOICES = 128  # of one prompt
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id"}


def _same(given: Any, accepted: Any) -> bool:
    """0 is not False and True is not 1, though Python has them equal; 0.0 is 0."""
    return given == accepted and isinstance(given, bool) == isinstance(accepted, bool)


class StreamOptions(Strict):
    """``continuous_usage_stats`` puts the usage so far into every chunk; obfuscation evens out their sizes."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Sampling(Strict):
    """What both kinds of completion take. ``temperature`` 0 is greedy; without a seed every call draws anew.

    ``NEUTRAL`` are accepted at these values only: nothing asked for is silently ignored. ``ENGINE_ONLY`` the baseline
    cannot do.
    """

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "prompt_logprobs": (),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
    }
    ENGINE_ONLY: ClassVar[tuple[str, ...]] = (
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "min_tokens",
        "ignore_eos",
    )
    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=1 << 31, description="-1 and 0: all")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=1e-6, le=1e6)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
    ] = Field(default={}, max_length=512)
    seed: int = Field(default_factory=lambda: secrets.randbits(63), ge=-(1 << 63), lt=1 << 63)
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(default=[], max_length=4)
    stop_token_ids: list[TokenId] = Field(default=[], max_length=64)
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, data: Any) -> Any:
        """Drop nulls and what does not bear on the text; refuse what the engine cannot do."""
        if not isinstance(data, dict):
            raise ApiError(400, "the request body must be a JSON object")
        data = {name: value for name, value in data.items() if value is not None and name not in IGNORED}
        for name, accepted in cls.NEUTRAL.items():
            if name in data and not any(_same(data[name], value) for value in accepted):
                raise ApiError(400, f"{name}={_short(data[name])} is not supported by this engine", param=name)
            data.pop(name, None)
        if isinstance(data.get("stop"), str):
            data["stop"] = [data["stop"]]
        return data

    @model_validator(mode="after")
    def _check_together(self) -> Sampling:
        if self.limit is not None and self.min_tokens > self.limit:
            raise ApiError(400, f"min_tokens={self.min_tokens} is more than {self.limit} at most", param="min_tokens")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """What :meth:`_refuse_by_name` accepts besides the fields: nulls, a stop string, neutral values."""
        schema = handler.resolve_ref_schema(handler(core))
        optional = set(schema["properties"]) - set(schema["required"])
        properties = {
            name: {"anyOf": [prop, {"type": "null"}]} if name in optional else prop
            for name, prop in schema["properties"].items()
        }
        properties["stop"]["anyOf"].append({"type": "string", "minLength": 1, "maxLength": 256})
        properties |= {name: {"enum": [None, *values]} for name, values in cls.NEUTRAL.items()}
        properties |= {name: {} for name in IGNORED}
        return schema | {"properties": properties}

    @property
    def limit(self) -> int | None:
        """New tokens at most; None: as many as fit."""
        return self.max_tokens

    @property
    def candidates(self) -> int:
        """Answers made to a prompt; the ``n`` most likely are given."""
        return self.n

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes before the answer."""
        return False

    @property
    def gives_ids(self) -> bool:
        """Whether token ids come beside the text."""
        return False

    @property
    def scores(self) -> int | None:
        """How many of the most likely tokens are wanted beside each token's log-probability; None: not even that."""
        return None

    def engine_options(self, vocab_size: int, seed: int) -> dict[str, Any]:
        """Inputs of Triton's ``tensorrt_llm`` model that say how to sample; greedy without any."""
        options: dict[str, Any] = {}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "runtime_top_p": self.top_p, "random_seed": seed % (1 << 64)}
            options |= {"runtime_top_k": self.top_k} if self.top_k > 0 else {}
            options |= {"min_p": self.min_p} if self.min_p else {}
        neutral = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
        options |= {name: getattr(self, name) for name, value in neutral.items() if getattr(self, name) != value}
        if self.scores is not None:
            options |= {"return_log_probs": True, "top_logprobs": self.scores}
            options |= {"return_prompt_log_probs": True} if self.echoes else {}
        if self.logit_bias:
            bias = [0.0] * vocab_size
            for key, value in self.logit_bias.items():
                if int(key) >= vocab_size:
                    message = f"logit_bias names token {key}, the vocabulary has 0 to {vocab_size - 1}"
                    raise ApiError(400, message, param="logit_bias")
                bias[int(key)] = value
            options["embedding_bias"] = bias
        return options


class ChatRequest(Sampling):
    """``max_tokens`` is the older name of ``max_completion_tokens``."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = Sampling.NEUTRAL | {
        "add_special_tokens": (False,),
        "audio": (),
        "continue_final_message": (False,),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] = Field(default=[], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    response_format: ResponseFormat = Field(ResponseFormat(type="text"))
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _check_limits(self) -> ChatRequest:
        if self.max_tokens and self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens are two names of one limit: give one of them"
            raise ApiError(400, message, code="invalid_parameter_combination", param="max_tokens")
        if self.tool_choice not in ("none", "auto") and not self.must_call:
            raise ApiError(400, "tool_choice asks for a call of a tool that is not in tools", param="tool_choice")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if self.min_tokens and (self.must_call or self.response_format.schema_object is not None):
            message = "a response_format or a tool that must be called says where the answer ends: not with min_tokens"
            raise ApiError(400, message, param="min_tokens")
        return self

    @property
    def scores(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def must_call(self) -> list[Tool]:
        """The tools of which one has to be called, if any has."""
        if isinstance(self.tool_choice, NamedChoice):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def active_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools


class CompletionRequest(Sampling):
    """One prompt or several, each of them text or token ids."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = Sampling.NEUTRAL | {
        "add_special_tokens": (True,),
        "response_format": ({"type": "text"},),
        "suffix": ("",),
    }
    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=2048)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    max_tokens: int = Field(16, ge=0, description="0 with echo only")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    return_token_ids: bool = False

    @model_validator(mode="after")
    def _check_echo_and_best(self) -> CompletionRequest:
        if not self.max_tokens and not self.echo:
            raise ApiError(400, "max_tokens=0 makes sense with echo only", param="max_tokens")
        if self.best_of and self.best_of < self.n:
            raise ApiError(400, f"best_of={self.best_of} is less than n={self.n}", param="best_of")
        if self.best_of and self.best_of > self.n and self.stream:
            raise ApiError(400, "best_of knows the best at the end only: not with stream", param="best_of")
        return self

    @property
    def candidates(self) -> int:
        return self.best_of or self.n

    @property
    def echoes(self) -> bool:
        return self.echo

    @property
    def gives_ids(self) -> bool:
        return self.return_token_ids

    @property
    def scores(self) -> int | None:
        return self.logprobs if self.logprobs is not None or self.candidates == self.n else 0

    @property
    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
