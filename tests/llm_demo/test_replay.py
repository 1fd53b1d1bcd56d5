"""Requests as benchmark tools and clients too heavy for the test environment send them, over raw HTTP."""

import json

import httpx
import pytest

from tests.llm_demo.test_gateway import NAME, PARIS

GUIDELLM = {  # 0.8.1
    "model": NAME,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "max_completion_tokens": 16,
    "ignore_eos": True,
    "messages": [{"role": "user", "content": [{"type": "text", "text": PARIS[0]["content"]}]}],
}
AIPERF = {  # 0.13.0, with --extra-inputs ignore_eos:true min_tokens:16
    "messages": PARIS,
    "model": NAME,
    "stream": True,
    "max_completion_tokens": 16,
    "ignore_eos": True,
    "min_tokens": 16,
    "stream_options": {"include_usage": True},
}
LLM = {  # 0.36, with --schema "city str"
    "messages": PARIS,
    "model": NAME,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.0,
    "max_tokens": 16,
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "output",
            "schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
}


def answer(url, body):
    """The text and the last usage of a streamed answer, and how many chunks told one."""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    return "".join(pieces), usages[-1], len(usages)


@pytest.mark.parametrize(("body", "every"), [(GUIDELLM, True), (AIPERF, False)], ids=["guidellm", "aiperf"])
def test_a_benchmark_tool_gets_the_tokens_it_asks_for_and_their_count(gateway, body, every):
    text, usage, usages = answer(gateway, body)
    assert text  # sampled: neither names a temperature
    assert usage["completion_tokens"] == 16  # though most answers are shorter
    assert usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
    assert (usages > 1) == every


def test_a_schema_is_kept_to_when_streamed(gateway):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    text, usage, _ = answer(gateway, LLM)
    assert [*json.loads(text)] == ["city"]
    assert usage["completion_tokens"] <= 16
