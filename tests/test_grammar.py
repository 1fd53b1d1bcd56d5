"""Grammars: what they let through, and that an engine's answers keep to them and disturb nobody."""

import json

import jsonschema
import numpy as np
import pytest

from llama_engine.engine.step import Chunk, Step
from llama_engine.errors import InputError
from llama_engine.grammar import Grammars, json_grammar
from llama_engine.native import load_engine
from llama_engine.sampling import SamplingParams
from llama_engine.tokenizer import ChatTokenizer
from tests.tokenizers_small import SHAPES

pytest.importorskip("llguidance", reason="llguidance is not installed")
VOCABULARY, END = 512, 269  # <|eot_id|>
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ages": {"type": "array", "items": {"enum": [1, 22]}}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}
SCHEMA["properties"]["ages"] |= {"maxItems": 3}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return SHAPES["llama3"](tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def grammars(directory):
    return Grammars(directory, VOCABULARY, [END])


def follow(grammars, grammar, ids):
    """How many of the ids are let through, and whether the answer is complete then."""
    state = grammars.compile(grammar)
    for n, token in enumerate(ids):
        if state.forbidden()[token]:
            return n, False
        state.advance(token)
    return len(ids), not state.forbidden()[END]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"name": "the", "ages": [1, 22]}', True),
        ('{"name": "the", "ages": []}', True),
        ('{"name": "the"}', False),
        ('{"name": "the", "ages": [3]}', False),
        ('{  "name": "the", "ages": []}', False),
        ("the", False),
    ],
)
def test_what_fits_the_schema_gets_through(grammars, directory, text, fits):
    ids = ChatTokenizer(directory).backend.encode(text, add_special_tokens=False).ids
    n, complete = follow(grammars, json_grammar(SCHEMA), ids)
    assert (n == len(ids) and complete) == fits
    enclosed = ChatTokenizer(directory).backend.encode(f"<{text}>", add_special_tokens=False).ids
    assert (follow(grammars, json_grammar(SCHEMA, "<", ">"), enclosed)[0] == len(enclosed)) == fits


@pytest.mark.parametrize(
    "bad", ["start: (", json_grammar({"type": "nope"}), json_grammar({"$ref": "http://x.example/y"})]
)
def test_what_is_no_grammar_is_refused(grammars, bad):
    with pytest.raises(InputError, match="the grammar is refused"):
        grammars.compile(bad)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_answers_keep_to_their_grammar_and_others_stay_as_they_are(
    tiny_engine, grammars, directory, kernels, asynchronous
):
    engine = load_engine(tiny_engine, device="cpu", kernels=kernels)
    engine.executor.asynchronous = asynchronous
    hot = [SamplingParams(1.0, seed=seed, logprobs=0) for seed in range(3)]

    def run(*asked):
        """Tokens and reason of each (params, with a grammar) that run together."""
        found = {}
        for params, kept in asked:
            grammar = grammars.compile(json_grammar(SCHEMA)) if kept else None
            sequence = engine.make_request([5, 9], 60, params=params, stop_token_ids=[END], grammar=grammar)
            engine.add(sequence)
            found[sequence.request_id] = [[], None]
        while engine.has_unfinished:
            for output in engine.step():
                found[output.request_id][0] += output.token_ids
                found[output.request_id][1] = output.reason
        return [*found.values()]

    plain = run((hot[0], False))[0]
    together = run((hot[0], False), *((params, True) for params in (*hot, SamplingParams())))
    assert together[0] == plain
    assert together[1:4] == [run((params, True))[0] for params in hot]
    complete = 0
    for tokens, reason in together[1:]:
        text = ChatTokenizer(directory).decode([token for token in tokens if token != END])
        if reason == "stop":
            jsonschema.validate(json.loads(text), SCHEMA)
            complete += 1
    assert complete > 0


@pytest.mark.parametrize("params", [SamplingParams(masked=True), SamplingParams(1.0, seed=3, masked=True)])
def test_a_gpu_s_executor_samples_nothing_forbidden(params):
    from tests.gpu.pairs import TINY, blocks_of, make_pair

    for executor in make_pair():
        for slot, p in enumerate((params, SamplingParams())):
            executor.bind(slot, p)
            executor.set_block_table(slot, blocks_of(slot))
        prompts = Chunk(0, 0, [3, 4]), Chunk(1, 0, [3, 4])
        free = executor.submit(Step(prompts)).tokens()
        forbidden = np.ones(TINY.vocab_size, np.bool_)
        forbidden[[7, 70]] = False
        first = executor.submit(Step(prompts, forbidden={0: forbidden})).tokens()
        assert first[0] in (7, 70)
        assert first[1] == free[1]
        step = Step((Chunk(1, 2), Chunk(0, 2)), forbidden={1: ~forbidden})
        assert executor.submit(step).tokens()[1] not in (7, 70)
        executor.bind(0, SamplingParams())
