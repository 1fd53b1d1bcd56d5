"""OpenAI's API as a target: chunks as servers send them, what they refuse, and how it is found out."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from llama_engine.errors import InputError, RunError
from llama_engine.sampling import SamplingParams
from llama_engine.serving.client import RequestFailed
from llama_engine.serving.null_server import null_server
from llama_engine.serving.openai_target import OpenAITarget
from llama_engine.serving.target import Ask, describe_target

ASK = Ask((("system", (5,)), ("user", (7, 8))), 3)
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def chunk(text, finish=None, **more):
    return {"choices": [{"text": text, "finish_reason": finish}], **more}


def spoken(ids):
    return " ".join(map(str, ids))


@asynccontextmanager
async def serving(events, *, refuse=(), refusal=400, status=200, done=True, **options):
    """A target at a server that streams ``events``, and answers ``refusal`` where a body holds a name of ``refuse``."""
    bodies = []

    async def answer(request):
        body = await request.json()
        bodies.append(body)
        for name in refuse:
            if name in json.dumps(body) or (name == "ids" and isinstance(body.get("prompt"), list)):
                said = "prompt: Input should be a valid string" if name == "ids" else f"Extra inputs: {name}"
                return web.json_response({"error": {"message": said}}, status=refusal)
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for event in events:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        if done:
            await response.write(b"data: [DONE]\n\n")
        return response

    async def models(_):
        return web.json_response({"data": [{"id": "m"}, {"id": "n"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", answer)
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/"
    target = OpenAITarget(url, **{"chat": False, "decode": spoken, "model": "m"} | options)
    target.bodies = bodies
    try:
        yield target
    finally:
        await target.close()
        await runner.cleanup()


def ask(events, request=ASK, **options):
    async def run():
        async with serving(events, **options) as target:
            return [event async for event in target.stream(request)], target.bodies[-1]

    return asyncio.run(run())


def test_counts_in_chunks_are_taken_as_differences():
    events = [chunk(" a", usage=USAGE | {"completion_tokens": 2}), chunk("", "length", usage=USAGE),
              {"choices": [], "usage": USAGE}]  # fmt: skip
    got, body = ask(events)
    assert [event.tokens for event in got] == [2, 1, None]
    assert got[-1].usage == {"prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 4}
    assert got[1].finish == "length"
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == ([5, 7, 8], 3, 0)


def test_chat_has_roles_and_skips_the_opening_chunk():
    opening = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]}
    got, body = ask([opening, thought, {"choices": [{"delta": {}, "finish_reason": "stop"}]}], chat=True)
    assert [event.text for event in got] == ["hm", ""]
    assert body["messages"] == [{"role": "system", "content": "5"}, {"role": "user", "content": "7 8"}]


def test_sampling_and_extra_fields_go_into_the_body(monkeypatch):
    drawn = Ask(ASK.messages, 3, SamplingParams(0.7, 20, 0.9, 5))
    _, body = ask([chunk("a", "length")], drawn, extra={"min_p": 0.1})
    assert {key: body[key] for key in ("temperature", "top_k", "top_p", "seed", "min_p")} == {
        "temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5, "min_p": 0.1}  # fmt: skip


@pytest.mark.parametrize(
    ("events", "options", "message"),
    [
        ([{"error": {"message": "out of memory"}}], {}, "out of memory"),
        ([chunk("a")], {"done": False}, "without .DONE."),
        ([], {"refuse": ["max_tokens"]}, "HTTP 400: Extra inputs: max_tokens"),
        ([], {"status": 503}, "HTTP 503"),
        ([[1]], {}, "not a JSON object"),
    ],
)
def test_what_goes_wrong_is_a_failed_request(events, options, message):
    with pytest.raises(RequestFailed, match=message):
        ask(events, **options)


@pytest.mark.parametrize(
    ("refuse", "left"),
    [
        ([], []),
        (["ignore_eos"], ["ignore_eos"]),
        (["ids"], ["prompt ids"]),
        (["stream_options", "ids"], ["continuous_usage_stats", "include_usage", "prompt ids"]),
    ],
)
def test_what_a_server_refuses_is_found_out_and_left_out(refuse, left):
    async def run():
        refusal = 500 if "ids" in refuse else 400  # as llama-cpp-python has it
        async with serving([chunk("a", "length")], refuse=refuse, refusal=refusal, model=None) as target:
            await target.prepare()
            assert [event async for event in target.stream(ASK)]
            return describe_target(target), target.bodies[-1]

    about, body = asyncio.run(run())
    assert sorted(about["refused"]) == left
    assert about["model"] == "m"
    assert about["prompt_as"] == ("text" if "ids" in refuse else "ids")
    assert ("ignore_eos" in body) == ("ignore_eos" not in refuse)


def test_a_server_that_refuses_everything_is_no_target():
    async def run():
        async with serving([], refuse=["max_tokens"]) as target:
            await target.prepare()

    with pytest.raises(RunError, match="refuses a request of 2 tokens: HTTP 400"):
        asyncio.run(run())


def test_the_key_comes_from_the_environment(monkeypatch):
    seen = []

    async def answer(request):
        seen.append(request.headers.get("Authorization"))
        return web.json_response({"data": [{"id": "m"}]})

    async def run():
        app = web.Application()
        app.router.add_get("/v1/models", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        target = OpenAITarget(f"http://127.0.0.1:{runner.addresses[0][1]}", chat=True, decode=spoken, key_variable="K")
        assert await target.ready()
        await target.close()
        await runner.cleanup()

    monkeypatch.setenv("K", "secret")
    asyncio.run(run())
    assert seen == ["Bearer secret"]


def test_no_server_and_no_url():
    async def run(url):
        target = OpenAITarget(url, chat=True, decode=spoken)
        try:
            assert not await target.ready()
            await target.prepare()
        finally:
            await target.close()

    with pytest.raises(RunError, match="no server answers at http"):
        asyncio.run(run("http://127.0.0.1:9"))
    with pytest.raises(InputError, match="--url"):
        asyncio.run(run("localhost:8000"))


@pytest.mark.parametrize("chat", [True, False])
def test_the_null_server_sends_a_chunk_a_token(chat):
    async def run():
        async with null_server() as url:
            target = OpenAITarget(url, chat=chat, decode=spoken, model="null", key_variable="")
            streamed = [event async for event in target.stream(ASK)]
            whole = [event async for event in target.stream(ASK, streaming=False)]
            await target.close()
            return streamed, whole

    streamed, whole = asyncio.run(run())
    assert [event.text for event in streamed if event.text] == [" a"] * 3
    assert streamed[-1].usage["completion_tokens"] == whole[0].tokens == 3
    assert whole[0].text == " a a a"
