"""What OpenAI's clients and benchmark tools ask for, through the real ``openai`` client over the real engine."""

import json
import shutil
import subprocess

import openai
import pytest

from llama_engine.tokenizer import ChatTokenizer
from tests.conftest import ROOT
from tests.llm_demo.test_gateway import NAME, PARIS, STORY

COUNT = "1, 2, 3, 4, 5, 6,"


@pytest.fixture(scope="module")
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(smollm2_model):
    return ChatTokenizer(smollm2_model)


def complete(client, **asked):
    return client.completions.create(**{"model": NAME, "prompt": COUNT, "temperature": 0} | asked)


def text(client, **asked):
    return complete(client, **asked).choices[0].text


def test_a_completion_has_16_tokens_unless_asked_for_others(client):
    assert complete(client).usage.completion_tokens == 16
    assert complete(client, max_tokens=3).usage.completion_tokens == 3


def test_several_prompts_of_either_kind_and_several_choices(client, tokenizer):
    texts = [COUNT, "The capital of France is"]
    alone = [text(client, prompt=prompt, max_tokens=8) for prompt in texts]
    for prompts in (texts, [tokenizer.encode(prompt) for prompt in texts]):
        answer = complete(client, prompt=prompts, max_tokens=8, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
        assert answer.usage.completion_tokens == 32
        assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(prompt)) for prompt in texts)
    streamed = {index: "" for index in range(4)}
    for chunk in complete(client, prompt=texts, max_tokens=8, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [*streamed.values()] == [alone[0], alone[0], alone[1], alone[1]]


def test_choices_of_a_seed_differ_and_come_again(client):
    asked = {"model": NAME, "messages": STORY, "seed": 3, "n": 3, "max_tokens": 8}
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    streamed = dict.fromkeys(range(3), "")
    roles = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        roles += [chunk.choices[0].index] if chunk.choices[0].delta.role else []
    assert [*streamed.values()] == texts
    assert sorted(roles) == [0, 1, 2]


def test_biases_and_penalties_reach_the_sampler(client, tokenizer):
    [seven] = tokenizer.backend.encode("7", add_special_tokens=False).ids
    assert "7" in text(client)
    assert "7" not in text(client, logit_bias={str(seven): -100})
    assert text(client, logit_bias={str(seven): 100}, max_tokens=4) == "7777"
    again = "The fox. The fox."
    penalties = {"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repetition_penalty": 1.5}}
    assert text(client, prompt=again) == " The fox." * 5 + " The"
    for penalty in penalties:
        assert text(client, prompt=again, **penalty).count("The fox") < 3
    plain = text(client, max_tokens=24)
    hot = {"temperature": 2, "seed": 5}
    assert text(client, **hot) != plain[:40]
    for narrow in ({"top_k": 1}, {"min_p": 1}):
        assert plain.startswith(text(client, extra_body=narrow, **hot))


def test_ends_can_be_ignored_and_added(client, tokenizer):
    asked = {"model": NAME, "messages": PARIS, "temperature": 0, "max_tokens": 24}
    short = client.chat.completions.create(**asked)
    assert short.usage.completion_tokens < 24
    long = client.chat.completions.create(**asked, extra_body={"ignore_eos": True, "min_tokens": 24})
    assert long.usage.completion_tokens == 24
    assert long.choices[0].finish_reason == "length"
    assert long.choices[0].message.content.startswith(short.choices[0].message.content)
    [comma] = tokenizer.backend.encode(",", add_special_tokens=False).ids
    ended = complete(client, extra_body={"stop_token_ids": [comma]})
    assert ended.choices[0].text == " 7"
    assert ended.choices[0].finish_reason == "stop"


def test_no_end_comes_before_the_fewest_tokens(client, tokenizer):
    asked = {"model": NAME, "messages": PARIS, "temperature": 0, "max_tokens": 24}
    short = client.chat.completions.create(**asked)
    long = client.chat.completions.create(**asked, extra_body={"min_tokens": 16})
    assert short.usage.completion_tokens < 16 <= long.usage.completion_tokens
    assert long.choices[0].message.content.startswith(short.choices[0].message.content)
    [comma] = tokenizer.backend.encode(",", add_special_tokens=False).ids
    held = complete(client, extra_body={"stop_token_ids": [comma], "min_tokens": 5})
    assert "," not in held.choices[0].text
    assert held.usage.completion_tokens > 5
    ended = complete(client, stop=["8"], extra_body={"min_tokens": 8}, max_tokens=64).choices[0]
    assert (ended.text[:12], ended.text[-6:], ended.finish_reason) == (" 7, 8, 9, 10", " 17, 1", "stop")


def test_usage_in_every_chunk_and_even_sizes(client):
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True}
    chunks = [
        *client.chat.completions.create(model=NAME, messages=PARIS, temperature=0, stream=True, stream_options=options)
    ]
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert counts == sorted(counts)
    assert len(set(counts)) > 4
    rows = [chunk for chunk in chunks if chunk.choices and chunk.usage]
    assert {len(row.choices[0].delta.content or "") + len(row.obfuscation) for row in rows} == {16}


def test_a_developer_is_a_system_and_text_comes_in_parts(client):
    asked = {"model": NAME, "temperature": 0, "max_tokens": 8}
    answers = [
        client.chat.completions.create(messages=[{"role": role, "content": said}, *PARIS], **asked)
        for role in ("system", "developer")
        for said in ("Be brief.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}])
    ]
    assert len({(answer.usage.prompt_tokens, answer.choices[0].message.content) for answer in answers}) == 1


def test_the_baseline_refuses_what_only_the_engine_can(client):
    with pytest.raises(openai.BadRequestError, match="not supported by the baseline") as caught:
        client.chat.completions.create(model=f"{NAME}:baseline", messages=PARIS, frequency_penalty=1)
    assert caught.value.param == "frequency_penalty"


def test_log_probabilities_of_a_chat(client):
    asked = {"model": NAME, "messages": PARIS, "temperature": 0, "max_tokens": 6}
    plain = client.chat.completions.create(**asked).choices[0]
    assert plain.logprobs is None
    for n in (0, 3):
        choice = client.chat.completions.create(**asked, logprobs=True, top_logprobs=n).choices[0]
        assert choice.message.content == plain.message.content
        entries = choice.logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
        assert [len(entry.top_logprobs) for entry in entries] == [n] * len(entries)
        if n:  # greedy: the most likely is the one that was taken
            assert all((e.token, e.logprob) == (e.top_logprobs[0].token, e.top_logprobs[0].logprob) for e in entries)
        streamed = client.chat.completions.create(**asked, logprobs=True, top_logprobs=n, stream=True)
        assert [e for c in streamed if c.choices[0].logprobs for e in c.choices[0].logprobs.content] == entries


def test_a_prompt_is_echoed_with_the_log_probabilities_of_its_tokens(client, tokenizer):
    made = complete(client, max_tokens=6, logprobs=2).choices[0]
    whole = COUNT + made.text
    for prompt in (whole, tokenizer.encode(whole)):
        for n in (0, 1):
            echoed = complete(client, prompt=prompt, max_tokens=n, echo=True, logprobs=2).choices[0]
            assert echoed.text.startswith(whole)
            logprobs = echoed.logprobs
            assert "".join(logprobs.tokens) == echoed.text
            assert [
                echoed.text[at:][: len(t)] for at, t in zip(logprobs.text_offset, logprobs.tokens)
            ] == logprobs.tokens
            assert logprobs.token_logprobs[0] is None
            assert logprobs.top_logprobs[0] is None
            before = len(logprobs.tokens) - n
            assert logprobs.tokens[before - 6 : before] == made.logprobs.tokens
            given = logprobs.token_logprobs[before - 6 : before]
            assert given == pytest.approx(made.logprobs.token_logprobs, abs=0.05)
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs is None
    assert text(client, echo=True).startswith(f"{COUNT} 7,")


def test_the_best_of_several_comes_first(client):
    asked = {"temperature": 1.0, "seed": 1, "max_tokens": 5, "prompt": ["Once upon a", "The sea"]}
    every = complete(client, **asked, n=4, logprobs=0).choices
    mean = [sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs) for choice in every]
    answer = complete(client, **asked, n=2, best_of=4)
    expected = [sorted(range(first, first + 4), key=lambda i: -mean[i])[:2] for first in (0, 4)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [every[i].text for ranked in expected for i in ranked]
    assert answer.choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="not with stream"):
        complete(client, n=1, best_of=2, stream=True)


def test_a_prefix_that_was_there_is_told(client):
    messages = [{"role": "user", "content": "Tell me about the river Rhine. " * 8}]
    asked = {"model": NAME, "messages": messages, "max_tokens": 2}
    cached = [client.chat.completions.create(**asked).usage for _ in range(2)]
    assert cached[0].prompt_tokens_details.cached_tokens < 64 <= cached[1].prompt_tokens_details.cached_tokens
    assert cached[1].prompt_tokens_details.cached_tokens < cached[1].prompt_tokens
    options = {"include_usage": True}
    [*_, last] = client.chat.completions.create(**asked, stream=True, stream_options=options)
    assert last.usage.prompt_tokens_details == cached[1].prompt_tokens_details


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"enum": [20, 30]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
WEATHER |= {"additionalProperties": False}


def test_an_answer_keeps_to_a_json_schema(client):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    asked = {"model": NAME, "messages": [{"role": "user", "content": "Describe a person."}], "max_tokens": 48}
    for temperature in (0, 1.5):
        choice = client.chat.completions.create(**asked, response_format=form, temperature=temperature).choices[0]
        assert choice.finish_reason == "stop"
        person = json.loads(choice.message.content)
        assert [*person] == ["name", "age"]
        assert person["age"] in (20, 30)
    choice = client.chat.completions.create(**asked, response_format={"type": "json_object"}, temperature=0).choices[0]
    assert choice.message.content.startswith("{")
    form["json_schema"]["schema"] = {"type": "no such type"}
    with pytest.raises(openai.BadRequestError, match="Invalid type") as caught:
        client.chat.completions.create(**asked, response_format=form)
    assert caught.value.param == "response_format"


def test_a_tool_that_must_be_called_is_called(client):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    tools = [
        {"type": "function", "function": {"name": name, "description": "Tells the weather", "parameters": WEATHER}}
        for name in ("weather", "forecast")
    ]
    asked = {"model": NAME, "messages": [{"role": "user", "content": "Is it warm in Oslo?"}], "tools": tools}
    named = {"type": "function", "function": {"name": "forecast"}}
    for choice, names in (("required", {"weather", "forecast"}), (named, {"forecast"})):
        answer = client.chat.completions.create(
            **asked, tool_choice=choice, parallel_tool_calls=False, temperature=0, max_tokens=64
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name in names
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    with pytest.raises(openai.BadRequestError, match="not in tools"):
        client.chat.completions.create(**asked, tool_choice=named | {"function": {"name": "other"}})


def test_openais_client_for_node(gateway):
    """Needs Node.js and the package: ``npm install openai``, its node_modules named by ``NODE_PATH``."""
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    node = shutil.which("node")
    if node is None or subprocess.run([node, "-e", "require.resolve('openai')"], capture_output=True).returncode:
        pytest.skip("Node.js has no package openai")
    script = str(ROOT / "tests/llm_demo/foreign_client.cjs")
    done = subprocess.run([node, script, f"{gateway}/v1", NAME], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("openai (npm), ") for line in done.stdout.splitlines()]
    paris = "The capital of France is Paris."
    assert said[:3] == [f"whole: {paris} 7 tokens", f"streamed: {paris} 7 tokens", f"helper: {paris}"]
    assert said[3:5] == ["structured: Paris", "tool: sunny in Paris"]
    assert said[5].count("4 scored") == 2
    errors = ("BadRequestError 400 temperature", "NotFoundError 404 model", "BadRequestError 400 reasoning_effort")
    assert said[6:] == [f"refused: {error}" for error in errors]
