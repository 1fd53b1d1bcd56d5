"""Requests and engines that cannot run are refused in one clear line."""

import pytest
import torch

from llama_engine.device import pick_device
from llama_engine.engine_dir import WEIGHTS_FILE
from llama_engine.errors import InputError
from llama_engine.native import load_engine


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
