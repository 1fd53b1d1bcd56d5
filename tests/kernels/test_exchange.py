"""What ranks exchange: kernels whose peers have already arrived, and a whole rank that takes itself for both."""

import dataclasses

import pytest
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.engine.step import Chunk, Step
from llama_engine.errors import InputError
from llama_engine.model.schemes import FP16, INT8
from llama_engine.model.weights import Linear, random_weights
from llama_engine.sampling import SamplingParams
from tests.split import rank_of

pytest.importorskip("triton")

from llama_engine.kernels import quant
from llama_engine.kernels.exchange import PROGRAMS, Exchange

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, HIDDEN, COLUMNS = 40, 96, 4500  # more rows than are sent; FEW are
FEW = 5
CONFIG = ModelConfig(192, 64, 192, 1, 4, 2, 32, 128)
ENGINE = EngineConfig(max_batch_size=4, max_seq_len=64, max_num_tokens=64, tokens_per_block=16, num_kv_blocks=17)


@pytest.fixture
def pair():
    """Two ranks on one device, their peers' flags ahead of the first three exchanges."""
    ranks = [Exchange(DEVICE, rank, 2, 128, HIDDEN, COLUMNS) for rank in (0, 1)]
    for rank in ranks:
        rank.connect(ranks)
    generator = torch.Generator().manual_seed(3)
    for rank in ranks:
        rank.flags.fill_(3)
        for buffer in rank._buffers:
            buffer[:ROWS] = torch.randn(buffer[:ROWS].shape, generator=generator)
    return ranks


def arrive(pair, rank, name, turn, rows):
    """What the other rank has sent to ``rank``."""
    peer = pair[1 - rank.rank]
    words = peer.sum(name).mine[:rows].view(torch.int32).long() & 0xFFFFFFFF
    rank.sum(name).inbox[peer.rank, :rows] = words | turn << 32


def test_few_rows_are_sent_to_every_rank(pair):
    x = torch.randn((FEW, HIDDEN), generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    for name in ("o", "down"):
        parts = [rank.sum(name).mine[:FEW].clone() for rank in pair]
        want = ((x.float() + parts[0].float()) + parts[1].float()).half()
        for turn in (1, 2):
            for rank in pair:
                rank.count.fill_(turn - 1)
                rank.count[PROGRAMS] = 0
                arrive(pair, rank, name, turn, FEW)
                got = x.clone()
                quant.add_rows(got, (rank, rank.sum(name)), FEW)
                assert torch.equal(got, want)
                assert rank.count[: FEW + 1].tolist() == [turn] * FEW + [turn - 1]
                sent = pair[1 - rank.rank].sum(name).inbox[rank.rank, :FEW]
                assert torch.equal(sent >> 32, torch.full_like(sent, turn))
                assert torch.equal(sent.int().view(torch.float16).view(FEW, HIDDEN), parts[rank.rank])
            assert not any(rank.error.item() for rank in pair)


@pytest.mark.parametrize("name", ["o", "down"])
@pytest.mark.parametrize("first", [0, 1])
def test_both_ranks_add_the_same_parts_in_the_same_order(pair, name, first):
    x = torch.randn((ROWS, HIDDEN), generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    gain = (torch.rand(HIDDEN, generator=torch.Generator().manual_seed(2)) + 0.5).half().to(DEVICE)
    want = ((x.float() + pair[0].sum(name).mine[:ROWS].float()) + pair[1].sum(name).mine[:ROWS].float()).half()
    results = []
    for rank in (first, 1 - first):
        mine, out = x.clone(), torch.zeros_like(x)
        quant.norm(mine, gain, 1e-5, out, None, ROWS, add=(pair[rank], pair[rank].sum(name)))
        assert torch.equal(mine, want)
        results.append(out)
        again = x.clone()
        quant.add_rows(again, (pair[rank], pair[rank].sum(name)), ROWS)
        assert torch.equal(again, want)
    assert torch.equal(*results)
    for rank in pair:
        assert rank.count[:ROWS].tolist() == [2] * ROWS
        assert rank.flags[0, :ROWS].tolist() == [2] * ROWS  # what the other has said
        assert not rank.count[ROWS:].any()
        assert not rank.error.any()


def test_columns_of_all_ranks_are_put_side_by_side_with_their_maxima(pair):
    pair[1]._buffers[2][2, 4400] = 50.0
    pair[0]._buffers[2][3, 17] = float("nan")
    whole = torch.cat([rank.logits(0).mine[:ROWS] for rank in pair], dim=1)
    for rank in pair:
        out = torch.zeros((ROWS, 2 * COLUMNS), device=DEVICE)
        best, index = torch.zeros(256, device=DEVICE), torch.zeros(256, dtype=torch.int32, device=DEVICE)
        tiles = rank.gather_logits(rank.logits(0), out, (best, index), ROWS)
        assert torch.equal(out.nan_to_num(7), whole.nan_to_num(7))
        best, index = best[: ROWS * tiles].view(ROWS, tiles), index[: ROWS * tiles].view(ROWS, tiles)
        top = best.argmax(1)
        found = index.gather(1, top[:, None])[:, 0].tolist()
        expected = whole.nan_to_num(1e9).argmax(1).tolist()
        assert found == expected
        assert found[2] == COLUMNS + 4400
        assert best[3].max() == float("inf")


@pytest.mark.parametrize("rows", [FEW, ROWS])
def test_a_peer_that_never_comes_is_an_error_and_no_hang(pair, rows):
    x = torch.zeros((ROWS, HIDDEN), dtype=torch.float16, device=DEVICE)
    for rank in pair:
        rank.reset()
    pair[0].count[PROGRAMS] = 1  # as after a first wait in vain: the next ones are short
    quant.add_rows(x, (pair[0], pair[0].sum("o")), rows)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert pair[0].error.item() == 1
    assert pair[1].error.item() == 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("rows", [FEW, ROWS])
def test_ranks_on_two_streams_wait_for_each_other(pair, graphs, rows):
    """Rounds of o and down: what one rank adds may come from no other round of its peer."""
    streams, rounds = [torch.cuda.Stream() for _ in pair], 50
    for rank in pair:
        rank.reset()
    x = [torch.zeros((rows, HIDDEN), dtype=torch.float16, device=DEVICE) for _ in pair]
    seen = [torch.zeros((2 * rounds, rows, HIDDEN), dtype=torch.float16, device=DEVICE) for _ in pair]

    def run(i, first, count):
        rank = pair[i]
        for turn in range(first, first + count):
            parts = rank.sum(("o", "down")[turn % 2])
            parts.mine[:rows].fill_(turn % 16 + 100 * i)
            x[i].zero_()
            quant.add_rows(x[i], (rank, parts), rows)
            seen[i][turn] = x[i]

    def both(step):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                step(i)

    with pair[0].alone():  # loads the kernels, while nobody waits
        run(0, 0, 2)
    torch.cuda.synchronize()
    for rank in pair:
        rank.reset()
    torch.cuda.synchronize()
    if graphs:
        captured = [torch.cuda.CUDAGraph() for _ in pair]
        for i, graph in enumerate(captured):
            with torch.cuda.graph(graph, stream=streams[i]):
                run(i, 0, 2 * rounds)
        torch.cuda.synchronize()
        for _ in range(3):
            both(lambda i: captured[i].replay())
    else:
        for first in range(0, 2 * rounds, 10):
            both(lambda i, first=first: run(i, first, 10))
    torch.cuda.synchronize()
    assert not any(rank.error.item() for rank in pair)
    want = torch.tensor([2 * (turn % 16) + 100 for turn in range(2 * rounds)], dtype=torch.float16, device=DEVICE)
    for found in seen:
        assert torch.equal(found, want[:, None, None].expand_as(found))


def test_more_rows_than_flags_are_refused():
    with pytest.raises(InputError, match="exchange at most 32768 tokens a step"):
        Exchange(DEVICE, 0, 2, 40000, HIDDEN, COLUMNS)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [INT8, FP16])
def test_a_rank_alone_is_a_model_whose_sums_are_twice_its_own(scheme):
    """All of a rank's chain but the peers: partial sums, their exchange, the logits' columns and the greedy token."""
    from llama_engine.gpu.executor import CudaExecutor

    share = CONFIG.share(2)
    weights = rank_of(random_weights(CONFIG, DEVICE, scheme=scheme), CONFIG, 1, 2)
    engine = dataclasses.replace(ENGINE, tp_size=2)
    alone = CudaExecutor(share, engine, weights, graphs=False, rank=1)

    def twice(linear):
        if linear.scale is None:
            return Linear(linear.weight * 2)
        return Linear(linear.weight, linear.scale * 2)

    layers = [dataclasses.replace(layer, o=twice(layer.o), down=twice(layer.down)) for layer in weights.layers]
    head = Linear(torch.cat([weights.lm_head.weight] * 2))
    doubled = dataclasses.replace(weights, layers=layers, lm_head=head)
    whole = CudaExecutor(share, ENGINE, doubled, graphs=False)
    steps = [
        Step((Chunk(0, 0, [5, 9, 33, 2, 70]), Chunk(2, 0, list(range(20)), samples=False)), "all"),
        Step((Chunk(0, 5), Chunk(2, 20, list(range(7)))), "last"),
        Step((Chunk(2, 27), Chunk(0, 6)), "last"),
    ]
    for executor in (alone, whole):
        for slot in range(4):
            executor.bind(slot, SamplingParams(temperature=float(slot == 2), seed=4))
            executor.set_block_table(slot, [1 + 4 * slot + i for i in range(4)])
    for step in steps:
        got, want = alone.submit(step), whole.submit(step)
        assert (got.logits() - want.logits()).abs().max() < 0.01 * want.logits().abs().max()
        assert got.tokens() == want.tokens()
