"""The engine end to end: tokens equal transformers', batches change nothing, blocks never leak."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama_engine.device import pick_device
from llama_engine.engine.step import Chunk, Step
from llama_engine.engine_dir import WEIGHTS_FILE
from llama_engine.errors import InputError
from llama_engine.native import load_engine
from llama_engine.sampling import SamplingParams
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


def check_invariants(engine):
    """Block tables, slots and positions must not contradict each other."""
    scheduler = engine.scheduler
    scheduler.blocks.check(sequence.table for sequence in scheduler.sequences)
    slots = [sequence.slot for sequence in scheduler.running]
    assert len(set(slots)) == len(slots)
    assert all(slot >= 0 for slot in slots)
    for sequence in scheduler.running:
        assert scheduler.blocks.blocks_for(sequence.computed) <= len(sequence.table)
    assert not any(sequence.table or sequence.slot >= 0 for sequence in scheduler.waiting)


def finish(engine, check=False):
    """Step until idle; all tokens by request id."""
    tokens = {}
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        if check:
            check_invariants(engine)
    return tokens


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


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_logprobs_come_with_the_tokens_that_ask_for_them(tiny_engine, kernels):
    engine = load_engine(tiny_engine, device="cpu", kernels=kernels)
    asking = SamplingParams(temperature=0.8, repetition_penalty=1.5, logprobs=20)
    requests = [engine.add_request([5, 9, 2], 6, params=p) for p in (asking, SamplingParams())]
    outputs = [output for _ in range(20) for output in engine.step()]
    assert all(output.logprobs is None for output in outputs if output.request_id == requests[1])
    found = [output for output in outputs if output.request_id == requests[0]]
    assert len(found) == 6
    sequence = [5, 9, 2]
    for output in found:
        engine.executor.set_block_table(0, [1])
        expected = engine.executor.submit(Step((Chunk(0, 0, sequence),), "last")).logits()[0].log_softmax(0)
        (given,), (token,) = output.logprobs, output.token_ids
        assert given.token == pytest.approx(expected[token].item(), abs=1e-3)
        assert [value for _, value in given.top] == pytest.approx(expected.topk(20).values.tolist(), abs=1e-3)
        assert [expected[i].item() for i, _ in given.top] == pytest.approx([v for _, v in given.top], abs=1e-3)
        sequence.append(token)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_bad_word_of_several_tokens_is_never_said(tiny_engine, kernels):
    engine, prompt = load_engine(tiny_engine, device="cpu", kernels=kernels), [5, 9, 2]
    free = generate(engine, prompt, 60)
    words = ((free[9], free[10]), tuple(free[20:25]), tuple(prompt + free[:2]), (free[30] ^ 1, free[30]))
    said = generate(engine, prompt, 60, params=SamplingParams(bad_words=words[:1]))
    assert said[:10] == free[:10]
    assert said[10] != free[10]
    assert generate(engine, prompt, 60, params=SamplingParams(bad_words=words[3:])) == free
    said = prompt + generate(engine, prompt, 60, params=SamplingParams(bad_words=words))
    assert said[:4] == prompt + free[:1]
    assert said[4] != free[1]  # its word begins in the prompt
    assert not any(tuple(said[i : i + len(word)]) == word for word in words for i in range(63))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_prompt_is_scored_as_its_tokens_are_when_they_are_made(tiny_engine, kernels, monkeypatch):
    """In chunks, beside others, with its prefix cached, and after a preemption half-way."""
    monkeypatch.setattr("llama_engine.engine.scheduler.SCORED_TOKENS", 16)
    engine = load_engine(tiny_engine, device="cpu", kernels=kernels, enable_prefix_cache=True)
    engine.add_request([5, 9, 2], 50, params=SamplingParams(temperature=0.8, seed=4, logprobs=3))
    made = [output for _ in range(60) for output in engine.step()]
    text = [5, 9, 2, *(output.token_ids[0] for output in made)]
    asking = SamplingParams(logprobs=3, prompt_logprobs=True)
    for preempted in (False, True):
        other = engine.add_request([7, 7], 30)
        request = engine.add_request(text, 4, params=asking)
        outputs = engine.step() + engine.step()
        if preempted:
            engine.scheduler._preempt(engine.scheduler.running[-1])
        while engine.has_unfinished:
            outputs += engine.step()
        assert all(output.prompt_logprobs is None for output in outputs if output.request_id == other)
        first, *rest = (output for output in outputs if output.request_id == request)
        assert all(output.prompt_logprobs is None for output in rest)
        assert len(first.prompt_logprobs) == len(text) - 1
        for scored, output in zip(first.prompt_logprobs[2:], made):
            assert scored.token == pytest.approx(output.logprobs[0].token, abs=1e-3)
            assert dict(scored.top) == pytest.approx(dict(output.logprobs[0].top), abs=1e-3)
    assert engine.add_request(text, 4) is not None
    assert engine.step()[0].cached_tokens == 48  # which a prompt that is scored may not skip


def test_a_token_that_does_not_exist_cannot_be_biased(tiny_engine):
    engine = load_engine(tiny_engine, device="cpu")
    with pytest.raises(InputError, match="names token 512, the vocabulary has 0 to 511"):
        engine.add_request([1], 1, params=SamplingParams(bad_words=((512,),)))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_end_comes_before_the_fewest_tokens(tiny_engine, kernels, asynchronous):
    """As an answer whose ends are banned, broken off at min_tokens and gone on with; beside others, and preempted."""
    engine, prompt, new, fewest = load_engine(tiny_engine, device="cpu", kernels=kernels), [5, 9, 2], 60, 12
    if asynchronous:
        engine.executor = DelayedExecutor(engine.executor)
    said = {"repetition_penalty": 1.2, "frequency_penalty": 0.5}
    for params in (
        SamplingParams(),
        SamplingParams(1.0, seed=4, logit_bias=((7, 3.0),), bad_words=((3,), (1, 2)), **said, logprobs=1),
    ):
        free = generate(engine, prompt, new, params=params)
        ends = [free[0], free[5], free[40], 7]  # one has a bias, too
        banned = dataclasses.replace(params, bad_words=(*params.bad_words, *((end,) for end in ends)))
        first = generate(engine, prompt, fewest, params=banned)
        rest = engine.make_request(prompt, new - fewest, params=params, stop_token_ids=ends, output=first)
        engine.add(rest)
        whole = first + finish(engine)[rest.request_id]
        assert whole[-1] in ends or len(whole) == new
        asked = {"params": params, "stop_token_ids": ends, "min_tokens": fewest}
        assert generate(engine, prompt, new, **asked) == whole != free
        assert generate(engine, prompt, fewest, **asked) == first
        resumed = engine.make_request(prompt, new - 8, **asked, output=first[:8])
        engine.add(resumed)
        assert first[:8] + finish(engine)[resumed.request_id] == whole
        for broken_off in (6, 13):
            others = [engine.add_request([7, i], 30, params=params) for i in range(2)]
            request, tokens = engine.add_request(prompt, new, **asked), []
            for step in range(200):
                running = engine.scheduler.running
                if step == broken_off and not asynchronous:
                    engine.scheduler._preempt(next(s for s in running if s.request_id == request))
                tokens += [t for output in engine.step() if output.request_id == request for t in output.token_ids]
            assert tokens == whole
            assert not engine.has_unfinished, others


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"min_tokens": 9}, r"min_tokens must be an integer in \[0, 8\], the answer's limit; got 9"),
        ({"min_tokens": -1}, "min_tokens must be"),
        ({"min_tokens": 1.0}, "min_tokens must be"),
        ({"min_tokens": 1, "grammar": object()}, "min_tokens and a grammar contradict"),
        (
            {"min_tokens": 1, "params": SamplingParams(logit_bias=tuple((i, 1.0) for i in range(512)))},
            "what min_tokens holds back name 513 tokens",
        ),
    ],
)
def test_fewest_tokens_that_cannot_be_kept_to_are_refused(tiny_engine, asked, message):
    engine = load_engine(tiny_engine, device="cpu", kernels="torch")
    engine.model_config = dataclasses.replace(engine.model_config, vocab_size=1024)
    with pytest.raises(InputError, match=message):
        engine.make_request([1], 8, stop_token_ids=[600], **asked)


def test_an_end_that_is_no_token_needs_no_holding_back(tiny_engine):
    engine = load_engine(tiny_engine, device="cpu")
    free = generate(engine, [5], 6)
    assert generate(engine, [5], 6, stop_token_ids=[-1, 512, 1 << 31], min_tokens=3) == free


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


def generate(engine, prompt, new, **options):
    """One request to its end; its tokens."""
    request = engine.add_request(prompt, new, **options)
    return finish(engine)[request]


class DelayedExecutor:
    """Makes a host executor look asynchronous: results appear only when asked for, as on a GPU."""

    def __init__(self, inner):
        self._inner = inner
        self.asynchronous = True

    def __getattr__(self, name):
        return getattr(self._inner, name)


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


def test_stop_token_ends_a_request_and_reason_says_so(tiny_engine):
    engine = load_engine(tiny_engine, device="cpu")
    free = generate(engine, [1, 2, 3], 20)
    engine.add_request([1, 2, 3], 20, stop_token_ids=(free[4],))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    stop_at = free.index(free[4])
    assert [token for output in outputs for token in output.token_ids] == free[: stop_at + 1]
    assert (outputs[-1].finished, outputs[-1].reason) == (True, "stop")
    engine.add_request([1, 2, 3], 1)
    (output,) = engine.step()
    assert (output.finished, output.reason) == (True, "length")


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([], 4, "empty"),
        ([1], 0, "at least 1"),
        ([1], -3, "at least 1"),
        ([1] * 250, 7, "max_seq_len 256"),
        ([1, 512], 4, "token id 512"),
        ([-1], 4, "token id -1"),
    ],
)
def test_requests_that_can_never_run_are_refused_with_the_numbers(tiny_engine, prompt, new, message):
    engine = load_engine(tiny_engine, device="cpu")
    with pytest.raises(InputError, match=message):
        engine.add_request(prompt, new)
    assert not engine.has_unfinished


def test_request_larger_than_the_cache_is_refused(tiny_engine):
    engine = load_engine(tiny_engine, device="cpu", num_kv_blocks=4)
    with pytest.raises(InputError, match="need 4 KV blocks of 16 tokens; the cache has 3"):
        engine.add_request([1] * 40, 24)


def test_damaged_engines_and_absent_devices_are_one_clear_error(tiny_engine, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"build_engine\.sh"):
        load_engine(tmp_path)
    for file in tiny_engine.iterdir():
        if file.is_file() and file.name != WEIGHTS_FILE:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / WEIGHTS_FILE).write_bytes(b"short")
    with pytest.raises(InputError, match="does not belong"):
        load_engine(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cpu"):
        pick_device("cuda")
    with pytest.raises(InputError, match="auto, cpu or cuda"):
        pick_device("tpu")


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
