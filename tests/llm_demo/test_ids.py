"""Token ids beside the text, and where another replica went on: what the failover benchmark reads from a stream."""

import asyncio

import httpx
import pytest

from llama_engine.serving.client import NewTokens
from llama_engine.serving.openai_target import OpenAITarget
from llama_engine.serving.target import Ask
from llm_demo.app import create_app
from llm_demo.gateway import Gateway
from llm_demo.server import listen, serving

PROMPT = [300, 301, 302]


class Replicas:
    """Answers every request with ids 400, 401, 402; another replica went on after the second."""

    async def generate(self, prompt, new_tokens, *, streaming, **options):
        assert prompt == PROMPT
        yield NewTokens([400, 401])
        last = NewTokens([402])
        last.resumed_after = 2
        yield last

    async def ready(self):
        return True

    async def close(self):
        pass


@pytest.fixture(scope="module")
def url(worded_engine):
    gateway = Gateway(worded_engine, model_dir=None, device="cpu")
    with listen("127.0.0.1", 0) as door, serving(create_app(gateway, api_key=None, local_only=True), door):
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        httpx.get(f"{url}/v1/models", timeout=60)  # it has begun
        gateway.client = Replicas()
        yield url


def test_a_target_reads_ids_and_where_an_answer_went_on(url):
    async def go():
        extra = {"return_token_ids": True, "stream_options": {"include_usage": True}}
        target = OpenAITarget(url, chat=False, decode=str, model="synthetic-tiny", extra=extra)
        events = [event async for event in target.stream(Ask((("user", tuple(PROMPT)),), 3))]
        await target.close()
        return events

    events = asyncio.run(go())
    assert [list(event.ids) for event in events if event.ids] == [[400, 401], [402]]
    assert [event.tokens for event in events if event.ids] == [2, 1]
    assert all(event.text for event in events if event.ids)
    assert events[-1].usage["resumed_after"] == 2
    assert events[-1].usage["completion_tokens"] == 3


def test_ids_come_only_where_asked_for(url):
    asked = {"model": "synthetic-tiny", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "ignore_eos": True}

    def choice(**more):
        return httpx.post(f"{url}/v1/completions", json=asked | more, timeout=60).json()["choices"][0]

    given = choice(return_token_ids=True)
    assert (given["prompt_token_ids"], given["token_ids"]) == (PROMPT, [400, 401, 402])
    assert not {"prompt_token_ids", "token_ids"} & choice().keys()
