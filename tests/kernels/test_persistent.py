"""The persistent decode kernel against :class:`TorchModel` on the dequantized weights."""

from __future__ import annotations

import dataclasses
import inspect
import re
from types import SimpleNamespace

import pytest
import torch

from llama_engine.config import EngineConfig
from llama_engine.errors import InputError
from llama_engine.kernels import persistent_reference
from llama_engine.kernels.persistent import HEADERS, SOURCE, PersistentDecode, permute, supported
from llama_engine.model.schemes import FP8, INT4, INT8, Scheme
from llama_engine.model.weights import random_weights
from tests.kernels.cases import LLAMA_1B, LLAMA_8B, TINY, Case, close
from tests.split import rank_of


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_other_gpus_than_those_it_has_run_on_are_left_to_the_other_kernels(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weights = SimpleNamespace(embedding=SimpleNamespace(device=torch.device("cuda")))
    assert not supported(LLAMA_8B, weights)


@pytest.mark.parametrize("packed", [1, 2])
def test_permute_is_the_order_of_the_kernel(packed: int) -> None:
    for k in (2048, 4096, 6144, 8192, 14336) if packed == 2 else (1024, 2048, 3072, 4096, 14336):
        words = k // (1024 * packed)
        vector = 4 if words % 4 == 0 else 2 if words % 2 == 0 else 1
        order = torch.arange(k)
        byte, half = (order, 0) if packed == 1 else (order // 128 * 64 + order % 64, order // 64 % 2)
        inside = byte % (128 * vector)
        where = (byte - inside) * packed + half * 128 * vector + order % 4
        where += inside % (4 * vector) // 4 * 128 + inside // (4 * vector) * 4
        assert torch.equal(permute(order, packed)[where], order)


def test_a_cpu_is_not_supported() -> None:
    config = dataclasses.replace(LLAMA_1B, num_layers=1, hidden_size=1024, intermediate_size=1024, vocab_size=64)
    weights = random_weights(config, "cpu")
    assert not supported(config, weights)
    with pytest.raises(InputError, match="cannot run"):
        PersistentDecode(config, EngineConfig(), weights, [])


def test_every_row_of_a_matrix_has_one_block_and_blocks_stream_the_same() -> None:
    for n, grid in ((6144, 132), (4096, 132), (14336, 132), (301, 7), (8, 8)):
        streamed = [0] * grid
        for turn in range(grid):
            parts = [persistent_reference.part_of(block, n, turn, grid) for block in range(grid)]
            assert [row for part in parts for row in part] == list(range(n))
            streamed = [total + len(part) for total, part in zip(streamed, parts)]
        assert len(set(streamed)) == 1


@pytest.mark.parametrize("grid", [1, 7, 16])
@pytest.mark.parametrize(("int8_head", "past"), [(False, [0]), (False, [37]), (True, [63, 130])])
@pytest.mark.parametrize("scheme", [INT8, FP8, INT4], ids=lambda scheme: scheme.name)
def test_the_reference_step_by_step_is_the_model(grid: int, int8_head: bool, past: list[int], scheme: Scheme) -> None:
    changes = {"int4": {"hidden_size": 128, "intermediate_size": 192}, "fp8": {"num_layers": 1}}
    config = dataclasses.replace(TINY, **changes.get(scheme.name, {}))
    case = Case(config, past, int8_head, device="cpu", max_seq_len=192, scheme=scheme)
    expected, before = case.expect(), [x.clone() for x in case.kv]
    sampled, logits, kv = case.follow(grid)
    # fp16 keys may round the other way; so may e4m3 activations, which differ by a sixteenth then
    bound = 3e-2 if scheme is FP8 else 1e-3
    assert (logits - expected).abs().max() < bound * expected.abs().max()
    assert torch.equal(sampled, expected.argmax(-1))
    for ours, theirs, old in zip(kv, case.reference.kv, before):
        assert (ours - theirs).abs().max() < 2 * bound * theirs.abs().max()
        assert ((ours != old).sum((0, 2, 4)) > 0).sum() == len(past)  # a position for each row, and no other


def test_words_and_digits_are_what_the_kernel_holds() -> None:
    x = torch.randn(3, 4096, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e-6], [1.0], [1e6]])
    words = persistent_reference.word(x)
    assert not (words.view(torch.int32) & 255).any()
    assert ((words - x).abs() <= x.abs() * 2.0**-16).all()
    x[2] = 0
    digits = persistent_reference.plain_inputs(x, INT8)
    assert all(plane.min() >= -128 and plane.max() <= 127 for plane in (digits.high, digits.low))
    fixed = 256 * digits.high + digits.low
    assert fixed.abs().amax(-1).tolist() == [32512, 32512, 0]
    assert ((fixed * digits.scale[:, None] - x).abs() <= digits.scale[:, None] * 0.501).all()


def test_the_reference_names_what_is_in_the_kernel() -> None:
    sources = {path.name: path.read_text() for path in (SOURCE, *HEADERS)}
    stages = [x for _, x in inspect.getmembers(persistent_reference, inspect.isfunction)]
    stages = [
        x for x in stages if x.__module__ == persistent_reference.__name__ and x is not persistent_reference.decode
    ]
    assert len(stages) > 10
    for stage in stages:
        doc = " ".join(stage.__doc__.split())
        names, file = re.search(r"((?:``\w+``(?:,| with PAIRED)? ?(?:in )?)+)(persistent\w*\.cuh?)", doc).groups()
        for name in re.findall(r"``(\w+)``", names):
            assert re.search(rf"\b{name}\b", sources[file]), f"{stage.__name__}: no {name} in {file}"


def test_two_ranks_of_the_step_by_step_reference_are_the_whole_one():
    config = dataclasses.replace(TINY, vocab_size=302)
    case = Case(config, [70, 3], device="cpu", max_seq_len=128)
    _, want, kv = case.follow(4)
    heads = config.num_kv_heads // 2
    ranks = [rank_of(case.weights, config, rank, 2) for rank in (0, 1)]
    caches = [[x[:, :, rank * heads : (rank + 1) * heads].clone() for x in case.kv] for rank in (0, 1)]
    state = (case.slot_ids, case.last_token, case.position, case.tables)
    sampled, logits = persistent_reference.decode_split(config.share(2), ranks, caches, *state, grid=4)
    assert torch.equal(sampled, logits.argmax(-1))
    close(logits, want, "logits", 1e-3)
    for whole, *parts in zip(kv, *caches):
        close(torch.cat(parts, dim=2), whole, "cache", 2e-3)
