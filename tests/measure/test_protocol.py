"""What is settled before anything is measured."""

import pytest

from llama_engine.errors import InputError
from llama_engine.measure import protocol


@pytest.fixture
def open_engine(tiny_model, tiny_engine, monkeypatch):
    """``open_engine`` with these flags up to where the engine would be loaded; returns the flags."""

    def run(*flags):
        parser = protocol.parser_for(None, "x")
        protocol.add_arguments(parser)
        protocol.add_engine_arguments(parser)
        where = ("--model-dir", tiny_model, "--engine-dir", tiny_engine)
        args = parser.parse_args(list(map(str, where + flags)))
        with pytest.raises(Loaded):
            protocol.open_engine(args, "cpu")
        return args

    def from_dir(*_, **__):
        raise Loaded

    monkeypatch.setattr(protocol, "load_engine", from_dir)
    return run


class Loaded(Exception):
    pass


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
def test_sequences_longer_than_the_engines_are_refused_before_it_is_loaded(open_engine, flags, message):
    with pytest.raises(InputError, match=message):
        open_engine(*flags)


def test_sequences_as_long_as_the_engines_are_taken(open_engine):
    args = open_engine("--output-tokens", 224, "--prefill-tokens", 254)
    assert args.batch == []  # 8 at once and more are above this engine's 4, so --batch-output-tokens is not looked at
    open_engine("--output-tokens", 224, "--prefill-tokens", 0, "--batch", 4, "--batch-output-tokens", 224)
