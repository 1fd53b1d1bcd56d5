"""Tools in the two formats that Llama's and SmolLM2's models were taught: messages to a template, text to calls.

A template that knows ``tools`` (Llama 3.1's) gets them and writes its own instructions; the model answers with
``{"name": ..., "parameters": {...}}``. A ChatML template that does not (SmolLM2's) gets a system message with the
format of SmolLM2's model card; the model answers with ``<tool_call>[{"name": ..., "arguments": {...}}]</tool_call>``.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from llama_engine.errors import InputError
from llama_engine.grammar import json_grammar
from llm_demo.messages import Message, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
INSTRUCTIONS = """You can call functions to answer. These are available, each with a JSON schema of its arguments:

<tools>{tools}</tools>

To call some of them, answer with nothing but a JSON list of the calls, between these tags:

<tool_call>[{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}]</tool_call>

When no function helps, answer in words."""


class ToolFormat:
    """How the model behind ``template`` is told of tools and calls them. Raises :class:`InputError` if it cannot be."""

    def __init__(self, template: str, tools: list[Tool], *, parallel: bool = True) -> None:
        self.native = re.search(r"\btools\b", template) is not None
        if tools and not self.native and "<|im_start|>" not in template:
            raise InputError("tools are not supported by this model: its chat template has no format for them")
        self._parallel = parallel
        self._tools = [tool.model_dump(exclude_none=True) for tool in tools]
        self.names = {tool.function.name for tool in tools}

    def for_template(self, messages: list[Message]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools as the template takes them."""
        rows = [self._row(message) for message in messages]
        if not self._tools or self.native:
            return rows, self._tools or None
        system = INSTRUCTIONS.format(tools=json.dumps(self._tools, ensure_ascii=False))
        if rows[0]["role"] == "system":
            rows[0] = {"role": "system", "content": f"{rows[0]['content']}\n\n{system}"}
        else:
            rows.insert(0, {"role": "system", "content": system})
        return rows, None

    def _row(self, message: Message) -> dict[str, Any]:
        row: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
        }
        calls = [
            {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
            for call in message.tool_calls or []
        ]
        if calls and self.native:
            row["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        elif calls:
            row["content"] += f"{OPEN}{json.dumps(calls, ensure_ascii=False)}{CLOSE}"
        return row

    def grammar(self, tools: list[Tool]) -> str:
        """An answer that calls one of ``tools``, or in SmolLM2's format several."""
        arguments = "parameters" if self.native else "arguments"
        calls = []
        for tool in tools:
            properties = {
                "name": {"const": tool.function.name},
                arguments: tool.function.parameters or {"type": "object"},
            }
            required = {"required": [*properties], "additionalProperties": False}
            calls.append({"type": "object", "properties": properties, **required})
        if self.native:
            return json_grammar({"anyOf": calls})
        most = {} if self._parallel else {"maxItems": 1}
        return json_grammar({"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}, OPEN, CLOSE)

    def may_call(self, text: str) -> bool:
        """Whether an answer that begins so may be a call of a tool."""
        text = text.lstrip()
        return bool(self.names) and (text.startswith("{") or text[: len(OPEN)] == OPEN[: len(text)])

    def calls(self, text: str) -> list[dict[str, Any]]:
        """The calls that an answer consists of, as OpenAI has them; none if it is anything else."""
        found: list[dict[str, Any]] = []
        parts = re.findall(f"{OPEN}(.*?)(?:{CLOSE}|$)", text, re.DOTALL) or [text]
        for part in parts:
            for value in _values(part):
                call = _call(value, self.names)
                if call is None:
                    return []
                found.append(call)
        return found if self._parallel else found[:1]


def _values(text: str) -> list[Any]:
    """JSON values one after the other, with ``;`` between them or in a list; ``[None]`` for anything else."""
    decoder, values = json.JSONDecoder(), []
    text = text.strip()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return [None]
        values += value if isinstance(value, list) else [value]
        text = text[end:].lstrip("; \n")
    return values


def _call(value: Any, names: set[str]) -> dict[str, Any] | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    function = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
