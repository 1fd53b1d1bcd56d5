"""What a chat request consists of: messages, tools and the form of the answer, as OpenAI has them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(max_length=1 << 20)]


class Strict(BaseModel):
    """JSON's types as they are: no "2" for 2, no true for 1."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Part(Strict):
    type: Literal["text"]
    text: Text


class Function(Strict):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    arguments: Text

    @model_validator(mode="after")
    def _check_arguments(self) -> Function:
        try:
            if isinstance(json.loads(self.arguments), dict):
                return self
        except (ValueError, RecursionError):
            pass
        raise ValueError("arguments must be a JSON object in a string")


class ToolCall(Strict):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: Function


class Message(BaseModel):
    """``developer`` is ``system`` to a template. Other fields, such as ``name``, have no place in one."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of the {self.role} makes no tool_calls")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool's message needs tool_call_id")
        return self

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


class FunctionTool(Strict):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    name: str


class NamedChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class Schema(Strict):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w-]+$")
    description: Text | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """``json_schema`` is kept to always, strict or not."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("json_schema belongs to type json_schema, which needs it")
        return self

    @property
    def schema_object(self) -> dict[str, Any] | None:
        """None: any text."""
        if self.type == "text":
            return None
        return self.json_schema.content if self.json_schema else {"type": "object"}


class Tool(Strict):
    type: Literal["function"]
    function: FunctionTool
