"""What is settled before anything is measured."""

import argparse
import dataclasses

import pytest

from llama_engine.checkpoint import hf
from llama_engine.engine_dir import load_engine_json
from llama_engine.errors import InputError
from llama_engine.measure import workload


@pytest.fixture
def parsed(tiny_model, tiny_engine):
    """The workload of these flags, for the tiny engine or none."""

    def run(*flags, engine=True):
        parser = argparse.ArgumentParser()
        parser.add_argument("--model-dir", default=tiny_model)
        workload.add_arguments(parser)
        if engine:
            workload.add_engine_arguments(parser)
        info = load_engine_json(tiny_engine) if engine else None
        return workload.workload_of(parser.parse_args(list(map(str, flags))), info)

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), r"--output-tokens: 32 prompt tokens \+ 512 new tokens exceed this engine's max_seq_len 256"),
        (("--output-tokens", 225), r"--output-tokens: 32 prompt tokens \+ 225"),
        (("--input-tokens", 255, "--output-tokens", 1), r"--output-tokens: 255 prompt tokens \+ 2"),  # the wake run
        (("--output-tokens", 8), r"--prefill-tokens: 1024 prompt tokens \+ 2 new tokens"),
        (("--output-tokens", 8, "--prefill-tokens", 255), r"--prefill-tokens: 255 prompt tokens \+ 2"),
        (
            ("--output-tokens", 8, "--prefill-tokens", 0, "--batch", 2),
            r"--batch-output-tokens: 32 prompt tokens \+ 256 new tokens",
        ),
    ],
)
def test_sequences_longer_than_the_engines_are_refused_before_it_is_loaded(parsed, flags, message):
    with pytest.raises(InputError, match=message):
        parsed(*flags)


def test_sequences_as_long_as_the_engines_are_taken(parsed):
    wanted = parsed("--output-tokens", 224, "--prefill-tokens", 254)
    assert wanted.batch == ()  # 8 at once and more are above this engine's 4, so --batch-output-tokens is not looked at
    wanted = parsed("--output-tokens", 224, "--prefill-tokens", 0, "--batch", 4, "--batch-output-tokens", 224)
    assert wanted.batch == (4,)


@pytest.mark.parametrize("name", workload.LEAST)
def test_a_count_below_its_least_is_refused_by_the_flags_name(tiny_model, name):
    least = workload.LEAST[name]
    assert getattr(workload.Workload(tiny_model, **{name: least}), name) == least
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} must be at least {least}, got {least - 1}"):
        workload.Workload(tiny_model, **{name: least - 1})


def test_the_flags_have_the_defaults_of_the_workload(parsed, tiny_model):
    assert parsed(engine=False) == workload.Workload(tiny_model)


def test_it_stays_as_it_was_checked_and_hashes_its_model_once(tiny_model, monkeypatch):
    wanted, calls = workload.Workload(tiny_model), []
    monkeypatch.setattr(workload, "model_identity", lambda path: calls.append(path) or hf.model_identity(path))
    assert wanted.model == wanted.model == hf.model_identity(tiny_model)
    assert calls == [tiny_model]
    with pytest.raises(dataclasses.FrozenInstanceError):
        wanted.runs = 0
