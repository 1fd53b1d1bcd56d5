"""The engine end to end: tokens equal transformers', batches change nothing, blocks never leak."""

import math
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama_engine.errors import InputError
from llama_engine.native import load_engine
from llama_engine.sampling import SamplingParams
from tests.engine.tools import DelayedExecutor, check_invariants, finish, generate
from tests.model.test_llama import dequantized_transformers

PROMPTS = (
    "What is the capital of France? Answer briefly.",
    "Write one sentence about the sea.",
    "List three prime numbers.",
    "Why is the sky blue?",
)


def chat_ids(model_dir, text):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_greedy_tokens_are_those_of_transformers_on_the_dequantized_weights(smollm2_model, smollm2_engine):
    """Up to near ties: 15-bit activations move a logit by 0.01 to 0.02 (RMS); the order of sums does the rest."""
    reference = dequantized_transformers(smollm2_model, smollm2_engine)
    engine = load_engine(smollm2_engine, device="cpu")
    for text in PROMPTS:
        prompt, stop = chat_ids(smollm2_model, text), engine.model_config.eos_token_ids
        tokens = generate(engine, prompt, 48, stop_token_ids=stop)
        assert len(tokens) > 2
        assert len(tokens) == 48 or tokens[-1] in stop
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        behind = logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert behind.max() < 0.05


def test_paris(smollm2_model, smollm2_engine):
    engine = load_engine(smollm2_engine, device="cpu")
    prompt = chat_ids(smollm2_model, PROMPTS[0])
    tokens = generate(engine, prompt, 32, stop_token_ids=engine.model_config.eos_token_ids)
    text = AutoTokenizer.from_pretrained(smollm2_model).decode(tokens, skip_special_tokens=True)
    assert text.strip() == "The capital of France is Paris."


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_alone_and_in_a_full_batch_gives_the_same_tokens(tiny_engine, kernels):
    rng = random.Random(1)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (5, 40, 17, 63, 1, 90)]
    penalized = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.3}
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=1.5, top_k=20, logprobs=2),
        SamplingParams(**penalized, bad_words=((7,),)),
        SamplingParams(temperature=0.9, top_p=0.9, min_p=0.01, **penalized),
        SamplingParams(temperature=2.0, logit_bias=((11, 4.0), (12, -3.0))),
    ]
    alone = []
    for prompt, param in zip(prompts, params):
        engine = load_engine(tiny_engine, device="cpu", kernels=kernels)
        alone.append(generate(engine, prompt, 40, params=param))
    engine = load_engine(tiny_engine, device="cpu", kernels=kernels)
    ids = [engine.add_request(prompt, 40, params=param) for prompt, param in zip(prompts, params)]
    together = finish(engine, check=True)
    assert [together[i] for i in ids] == alone


@pytest.fixture(scope="module")
def innocents(tiny_engine):
    """An engine, and requests with the answers it gives each of them alone."""
    engine = load_engine(tiny_engine, device="cpu")
    requests = [([5, 6], SamplingParams()), ([9] * 20, SamplingParams(0.8, seed=3)), ([1], SamplingParams(1.5, 20))]
    return engine, [(prompt, params, generate(engine, prompt, 12, params=params)) for prompt, params in requests]


ANY = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.none(), st.text(max_size=2))


@settings(deadline=None, max_examples=60)
@given(
    params=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 2) | st.floats(0, 1e-30) | st.floats(1e30) | ANY,
            "top_k": st.integers(0, 600) | ANY,
            "top_p": st.floats(0, 1) | st.floats(0, 1e-30) | ANY,
            "seed": st.integers(0, 2**64 - 1) | ANY,
        },
    ),
    new=st.integers(-2, 20) | ANY,
    prompt=st.lists(st.integers(0, 511), max_size=20) | st.lists(ANY, max_size=3),
)
@example({"temperature": 1e-45}, 12, [3])
@example({"temperature": 1.0, "top_p": 1e-300}, 12, [3])
@example({"temperature": 1.0, "seed": 0.5}, 12, [3])
@example({}, math.nan, [3])
@example({}, 12, [3, 4.5])
def test_whatever_one_request_asks_for_the_others_get_the_answers_they_get_alone(innocents, params, new, prompt):
    engine, requests = innocents
    ids = [engine.add_request(prompt, 12, params=params) for prompt, params, _ in requests]
    try:
        ids.append(engine.add_request(prompt, new, params=SamplingParams(**params)))
    except InputError:
        new = 0
    tokens = finish(engine)
    assert [tokens[i] for i in ids[:3]] == [expected for _, _, expected in requests]
    assert len(tokens.get(ids[-1], [])) == (new or 12)
    assert engine.scheduler.blocks.used == 0


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_chat_with_cached_turns_says_what_it_says_without(tiny_engine, kernels):
    warm, cold = (
        load_engine(tiny_engine, device="cpu", kernels=kernels, enable_prefix_cache=cached) for cached in (True, False)
    )
    rng, chat = random.Random(2), []
    for turn in range(5):
        chat += [rng.randrange(512) for _ in range(20)]
        params = SamplingParams(temperature=0.9 if turn % 2 else 0.0, seed=turn)
        said = generate(warm, chat, 21, params=params)
        assert generate(cold, chat, 21, params=params) == said
        chat += said
    found = [
        (engine.scheduler.prefix_cache_hit_tokens, engine.scheduler.prefix_cache_query_tokens)
        for engine in (warm, cold)
    ]
    # turn t asks 41 t + 20 tokens; of those before it, all but the last one said have their keys in blocks of 16
    assert found == [(sum((41 * t - 1) // 16 * 16 for t in (1, 2, 3, 4)), sum(41 * t + 20 for t in range(5))), (0, 0)]


def test_preemption_recomputes_the_same_tokens(tiny_engine):
    prompts = [[(7 * i + j) % 512 for j in range(30)] for i in range(4)]
    roomy = load_engine(tiny_engine, device="cpu")
    repeating = SamplingParams(frequency_penalty=0.5, repetition_penalty=1.5)  # depends on what has been said
    wordy = SamplingParams(1.0, seed=2, top_k=2, bad_words=tuple((i, j) for i in range(32) for j in range(8)))
    params = [SamplingParams(), repeating, SamplingParams(temperature=0.8, seed=5, presence_penalty=1.0), wordy]
    expected = [roomy.add_request(prompt, 100, params=p) for prompt, p in zip(prompts, params)]
    expected_tokens = finish(roomy)
    tight = load_engine(tiny_engine, device="cpu", num_kv_blocks=18)
    ids = [tight.add_request(prompt, 100, params=p) for prompt, p in zip(prompts, params)]
    tokens = finish(tight, check=True)
    assert tight.scheduler.preemptions > 0
    assert [tokens[i] for i in ids] == [expected_tokens[i] for i in expected]
    assert tight.scheduler.blocks.used == 0


def random_load(engine, steps, seed):
    """Arrivals, half of them alike, cancellations and stops at random; invariants after every step. Tokens of what
    finished."""
    rng = random.Random(seed)
    common = [rng.randrange(512) for _ in range(100)]
    jobs, tokens, finished = {}, {}, {}
    for step in range(steps):
        if rng.random() < 0.25 and len(jobs) < 12:
            prompt = [rng.randrange(512) for _ in range(rng.choice((1, 3, 15, 16, 17, 60, 130)))]
            prompt = [*common[: rng.choice((0, 0, 40, 100))], *prompt][:130]
            new = rng.randint(1, 60)
            hot, said = rng.choice((0.0, 0.9)), rng.choice((0.0, 0.0, 0.7))
            params = SamplingParams(hot, top_p=0.95, seed=step, frequency_penalty=said)
            stops = tuple(rng.sample(range(512), 8)) if rng.random() < 0.3 else ()
            fewest = rng.choice((0, new // 2))
            request = engine.add_request(prompt, new, params=params, stop_token_ids=stops, min_tokens=fewest)
            jobs[request] = (prompt, new, params, stops, fewest)
        if jobs and rng.random() < 0.03:
            request = rng.choice(sorted(jobs))
            engine.cancel(request)
            del jobs[request]
            tokens.pop(request, None)
        for output in engine.step():
            assert output.request_id in jobs
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finished:
                finished[output.request_id] = (jobs.pop(output.request_id), tokens.pop(output.request_id))
        check_invariants(engine)
    for request in list(jobs):
        engine.cancel(request)
    while engine.has_unfinished:
        engine.step()
    check_invariants(engine)
    return finished


@pytest.mark.parametrize("asynchronous", [False, True])
def test_random_load_keeps_every_invariant_and_every_answer(tiny_engine, asynchronous):
    engine = load_engine(tiny_engine, device="cpu", num_kv_blocks=16, enable_prefix_cache=True)
    if asynchronous:
        engine.executor = DelayedExecutor(engine.executor)
    finished = random_load(engine, 1500, seed=5)
    assert engine.scheduler.preemptions > 0
    assert engine.scheduler.prefix_cache_hit_tokens > 1000
    assert engine.scheduler.blocks.used == 0
    assert len(finished) > 50
    alone = load_engine(tiny_engine, device="cpu")
    for (prompt, new, params, stops, fewest), tokens in random.Random(0).sample(sorted(finished.values(), key=str), 25):
        assert generate(alone, prompt, new, params=params, stop_token_ids=stops, min_tokens=fewest) == tokens


def test_without_a_compiler_the_engine_runs_on_torch_and_agrees(tiny_engine, monkeypatch):
    monkeypatch.setattr("llama_engine.cpu.fused.compile_library", lambda directory: None)
    fallback = load_engine(tiny_engine, device="cpu")
    assert fallback.executor.kernels == "torch"
    monkeypatch.undo()
    fused = load_engine(tiny_engine, device="cpu")
    assert fused.executor.kernels.startswith("cpu-")
    tokens = [generate(engine, [5, 6, 7], 30) for engine in (fallback, fused)]
    # Random weights make near-ties, which the two roundings may break differently later on.
    assert tokens[0][:5] == tokens[1][:5]
    assert len(tokens[0]) == 30


def test_max_batch_size_bounds_the_running_set(tiny_engine):
    engine = load_engine(tiny_engine, device="cpu")
    assert engine.config.max_batch_size == 4
    for i in range(9):
        engine.add_request([i + 1], 8)
    running = set()
    while engine.has_unfinished:
        engine.step()
        running.add(len(engine.scheduler.running))
    assert max(running) == 4
