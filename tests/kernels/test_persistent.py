"""The persistent decode kernel against :class:`TorchModel` on the dequantized weights."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from llama_engine.checkpoint.packing import quantize
from llama_engine.config import EngineConfig, ModelConfig, RopeScaling
from llama_engine.errors import InputError
from llama_engine.kernels import persistent_reference
from llama_engine.kernels.nvrtc import enable_peer_access
from llama_engine.kernels.persistent import HEADERS, SOURCE, PersistentDecode, permute, supported
from llama_engine.model.llama import TorchModel, apply_rope, rms_norm
from llama_engine.model.schemes import FP8, INT4, INT8, Scheme
from llama_engine.model.weights import Linear, random_weights
from tests.split import rank_of

LLAMA_8B = ModelConfig(
    vocab_size=10000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=1,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    max_position_embeddings=4096,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
)
LLAMA_1B = dataclasses.replace(
    LLAMA_8B, hidden_size=2048, intermediate_size=8192, num_layers=4, head_size=64, vocab_size=5000
)
# Nothing divides evenly: rows over blocks, heads over groups of three.
TINY_WIDTHS = {"hidden_size": 96, "intermediate_size": 168, "head_size": 32, "num_heads": 6, "num_kv_heads": 2}
TINY = dataclasses.replace(LLAMA_8B, vocab_size=301, num_layers=3, **TINY_WIDTHS)
LLAMA_3B = dataclasses.replace(LLAMA_8B, hidden_size=3072, intermediate_size=8192, num_heads=24, num_layers=2)


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_other_gpus_than_those_it_has_run_on_are_left_to_the_other_kernels(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    weights = SimpleNamespace(embedding=SimpleNamespace(device=torch.device("cuda")))
    assert not supported(LLAMA_8B, weights)


class Case:
    """A model, slot state with random cached KV, and the reference over a copy of it."""

    def __init__(
        self,
        config: ModelConfig,
        past: list[int],
        int8_head: bool = False,
        device: str = "cuda",
        max_seq_len: int = 2048,
        scheme: Scheme = INT8,
    ) -> None:
        self.config = config
        self.weights = random_weights(config, device, scheme=scheme)
        if int8_head:
            self.weights.lm_head = Linear(*quantize(self.weights.lm_head.weight))
        generator = torch.Generator(device).manual_seed(11)
        blocks, slots = max_seq_len // 64, 9
        count = 1 + len(past) * blocks
        self.engine = EngineConfig(max_batch_size=8, max_seq_len=max_seq_len, tokens_per_block=64, num_kv_blocks=count)
        self.reference = TorchModel(config, self.engine, self.weights)
        for cache in self.reference.kv:
            cache.copy_(torch.randn(cache.shape, device=device, generator=generator))
        self.kv = [cache.clone() for cache in self.reference.kv]
        order = torch.randperm(count - 1, device=device, generator=generator).int() + 1
        self.tables = torch.zeros((slots, blocks), dtype=torch.int32, device=device)
        self.slot_ids = torch.tensor([7, 2, 5, 0][: len(past)], dtype=torch.int32, device=device)
        self.last_token = torch.zeros(slots, dtype=torch.int32, device=device)
        self.position = torch.zeros(slots, dtype=torch.int32, device=device)
        for i, slot in enumerate(self.slot_ids.tolist()):
            self.tables[slot] = order[i * blocks : (i + 1) * blocks]
            self.last_token[slot] = 100 + 17 * i
            self.position[slot] = past[i]
        self.sampled = torch.full((len(past),), -1, dtype=torch.int32, device=device)
        self.logits = torch.full((len(past), config.vocab_size), math.nan, device=device)
        if device == "cuda":
            self.decode = PersistentDecode(config, self.engine, self.weights, self.kv, max_rows=len(past))

    def launch(self, logits: bool = True) -> None:
        state = (self.slot_ids, self.last_token, self.position, self.tables, self.sampled)
        self.decode.launch(*state, self.logits if logits else None)
        torch.cuda.synchronize()

    def expect(self) -> torch.Tensor:
        slots = self.slot_ids.long()
        rows = torch.arange(len(slots), device=slots.device)
        return self.reference.forward(
            self.last_token[slots], self.position[slots], self.slot_ids, self.tables, rows.int()
        )

    def follow(self, grid: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Sampled ids, logits and cache of the step-by-step reference, over copies of the state."""
        last_token, position, kv = self.last_token.clone(), self.position.clone(), [x.clone() for x in self.kv]
        state = (self.slot_ids, last_token, position, self.tables)
        sampled, logits = persistent_reference.decode(self.config, self.weights, kv, *state, grid=grid)
        slots = self.slot_ids.long()
        assert torch.equal(last_token[slots], sampled.int())
        assert torch.equal(position[slots], self.position[slots] + 1)
        return sampled, logits, kv


def close(actual: torch.Tensor, expected: torch.Tensor, what: str, share: float = 1.5 / 128) -> None:
    error = (actual.float() - expected.float()).abs().max().item()
    bound = expected.float().abs().max().item() * share
    assert error <= bound, f"{what}: error {error:.4g} above {bound:.4g}"


def received(words: torch.Tensor, permuted: bool = True, packed: int = 1) -> torch.Tensor:
    """The float32 values that exchanged words carry, in natural order."""
    values = (words & ~255).view(torch.float32)
    if not permuted:
        return values
    out = torch.empty_like(values)
    out[:, permute(torch.arange(values.shape[-1], device=values.device), packed)] = values
    return out


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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "int8_head", "past", "scheme"),
    [
        (LLAMA_1B, False, [70, 3], INT8),
        (LLAMA_3B, True, [129], INT8),
        (LLAMA_1B, True, [70, 3], INT4),
        (LLAMA_8B, False, [129], INT4),
    ],
)
def test_the_kernel_follows_its_reference(
    config: ModelConfig, int8_head: bool, past: list[int], scheme: Scheme
) -> None:
    case = Case(config, past, int8_head, scheme=scheme)
    _, logits, kv = case.follow(case.decode.grid)
    case.launch()
    assert (case.logits - logits).abs().max() < 1e-3 * logits.abs().max()
    for ours, theirs in zip(case.kv, kv):
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [INT8, FP8, INT4], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(
    ("config", "past"), [(LLAMA_8B, [5]), (LLAMA_8B, [5, 300]), (LLAMA_1B, [7]), (LLAMA_3B, [7, 1])]
)
def test_every_matrix_gives_the_references_of_what_it_was_given(
    config: ModelConfig, past: list[int], scheme: Scheme
) -> None:
    """Each from the words that its blocks received, so that no rounding of e4m3 adds up."""
    if scheme is INT4 and config is LLAMA_3B:
        config = dataclasses.replace(config, hidden_size=6144, num_heads=48)
    case = Case(dataclasses.replace(config, num_layers=1), past, scheme=scheme)
    layer, eps, grid, ref = case.weights.layers[0], config.rms_norm_eps, case.decode.grid, persistent_reference
    x = case.weights.embedding[case.last_token[case.slot_ids.long()].long()].float()
    case.launch()
    scratch = case.decode.scratch[len(past)]
    got = {
        name: received(scratch[name], name != "qkv", scheme.packed)
        for name in scratch
        if name not in ("partial", "sync")
    }
    qkv = ref.matrix(ref.norm_inputs(x, layer.input_norm, eps, scheme), layer.qkv, grid)
    x = x + ref.matrix(ref.plain_inputs(got["attended"], scheme), layer.o, grid)
    middle = got["x_attention"]
    hidden = ref.gate_up(ref.norm_inputs(middle, layer.post_norm, eps, scheme), layer.gate_up, grid, 0)
    last = middle + ref.matrix(ref.plain_inputs(got["hidden"], scheme), layer.down, grid)
    logits = ref.lm_head(got["x_mlp"], case.weights, eps, grid)
    share = 1e-3 if scheme is FP8 else 1e-4
    for name, want in {"qkv": qkv, "x_attention": x, "hidden": hidden, "x_mlp": last}.items():
        close(got[name], want, name, share)
    close(case.logits, logits, "lm_head", share)


@pytest.mark.gpu
@pytest.mark.parametrize("past", [[0], [1], [511], [2047, 64]])
def test_every_matrix_of_a_layer(past: list[int]) -> None:
    case = Case(LLAMA_8B, past)
    config, layer, rows = case.config, case.weights.layers[0], len(past)
    slots = case.slot_ids.long()
    x = case.weights.embedding[case.last_token[slots].long()].float()
    positions = case.position[slots].long()
    expected = case.expect()
    case.launch()
    got = case.decode.scratch[rows]
    qkv = F.linear(rms_norm(x, layer.input_norm, config.rms_norm_eps), layer.qkv.dequantize())
    close(received(got["qkv"], False), qkv, "qkv")
    q = qkv[:, : config.q_size].unflatten(-1, (-1, config.head_size))
    q = apply_rope(q, case.reference.cos[positions], case.reference.sin[positions])
    cached = case.reference.kv[0]
    attended = torch.cat(
        [case.reference._attend(q[i : i + 1], cached, case.tables[slots[i]], past[i]) for i in range(rows)]
    )
    close(received(got["attended"]), attended, "attention")
    x = x + F.linear(attended, layer.o.dequantize())
    gate, up = F.linear(rms_norm(x, layer.post_norm, config.rms_norm_eps), layer.gate_up.dequantize()).chunk(2, -1)
    hidden = F.silu(gate) * up
    close(received(got["hidden"]), hidden, "gate_up")
    close(received(got["x_mlp"]), x + F.linear(hidden, layer.down.dequantize()), "down")
    close(case.logits, expected, "lm_head")
    close(case.kv[0], cached, "KV cache")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "int8_head", "past", "scheme"),
    [
        (LLAMA_8B, True, [300], INT8),
        (LLAMA_1B, False, [70, 3], INT8),
        (LLAMA_1B, True, [511, 9], INT8),
        (LLAMA_3B, False, [129], INT8),
        (LLAMA_8B, True, [300], FP8),
        (LLAMA_8B, False, [70, 3], FP8),
        (LLAMA_8B, True, [300, 5], INT4),
        (LLAMA_1B, True, [511], INT4),
    ],
)
def test_a_token_of_every_geometry(config: ModelConfig, int8_head: bool, past: list[int], scheme: Scheme) -> None:
    case = Case(config, past, int8_head, scheme=scheme)
    slots = case.slot_ids.long()
    expected, before = case.expect(), case.position.clone()
    case.launch()
    share = (4 if scheme is FP8 else 1) * 1.5 / 128  # e4m3 activations that round the other way feed others
    close(case.logits, expected, "logits", share)
    for ours, theirs in zip(case.kv, case.reference.kv):
        close(ours, theirs, "KV cache", share)
    assert torch.equal(case.sampled, case.logits.argmax(-1).int())
    assert torch.equal(case.last_token[slots], case.sampled)
    before[slots] += 1
    assert torch.equal(case.position, before)
    assert case.decode.scratch[len(past)]["sync"].tolist() == [1] + [0] * 159, "one launch, the other counters at zero"


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [INT8, FP8, INT4], ids=lambda scheme: scheme.name)
def test_a_graph_repeats_eager_launches_and_the_dummy_slot_stays(scheme: Scheme) -> None:
    tokens = []
    for graphed in (False, True):
        case = Case(dataclasses.replace(LLAMA_1B, num_layers=2), [60, 500], scheme=scheme)
        case.slot_ids[1] = 8
        case.position[8] = 0
        case.tables[8] = 0
        if graphed:
            state = [t.clone() for t in (case.last_token, case.position, *case.kv)]
            case.launch(False)  # warm up
            for tensor, saved in zip((case.last_token, case.position, *case.kv), state):
                tensor.copy_(saved)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                arguments = (case.slot_ids, case.last_token, case.position, case.tables, case.sampled)
                case.decode.launch(*arguments)
        run = []
        for _ in range(300):  # the exchanged words' 8-bit flags wrap
            graph.replay() if graphed else case.launch(False)
            run.append(int(case.sampled[0]))
        tokens.append(run)
        assert case.position[7] == 360
        assert case.position[8] == 0
        assert case.last_token[8] == 0
    assert tokens[0] == tokens[1]


@pytest.mark.gpu
def test_wrong_arguments_are_one_clear_line() -> None:
    case = Case(dataclasses.replace(LLAMA_1B, num_layers=1), [3])
    with pytest.raises(InputError, match="decodes"):
        case.decode.launch(torch.zeros(3).int().cuda(), case.last_token, case.position, case.tables, case.sampled)
    with pytest.raises(InputError, match="position must be"):
        case.decode.launch(case.slot_ids, case.last_token, case.position.long(), case.tables, case.sampled)


@pytest.mark.gpu
@pytest.mark.parametrize("int8_head", [False, True])
@pytest.mark.parametrize("values", [(math.inf, math.inf), (math.inf, -math.inf), (math.nan, 1.0)])
@pytest.mark.parametrize(("config", "scheme"), [(LLAMA_1B, INT8), (LLAMA_8B, INT8), (LLAMA_1B, FP8), (LLAMA_1B, INT4)])
def test_values_that_are_not_finite_cost_their_own_row_its_token_alone(
    config: ModelConfig, values: tuple[float, float], int8_head: bool, scheme: Scheme
) -> None:
    """In one dimension of one KV head of one row's cache, so that most of what follows is still numbers."""
    case, healthy = (Case(config, [70, 33], int8_head, scheme=scheme) for _ in range(2))
    healthy.launch()
    block = case.tables[case.slot_ids[0], 0].long()
    case.kv[0][1, block, 1, :2, 5] = torch.tensor(values, dtype=torch.float16, device="cuda")
    case.launch()
    assert case.sampled.tolist() == [-1, healthy.sampled[1].item()]
    assert case.last_token[case.slot_ids.long()].tolist() == [0, healthy.sampled[1].item()]
    assert not case.logits[0].isfinite().any()
    assert torch.equal(case.logits[1], healthy.logits[1])
    case.launch()  # the slot's next token is embedded without a fault, and its row stays what it is
    healthy.launch()
    assert case.sampled.tolist() == [-1, healthy.sampled[1].item()]


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


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("past", [[300], [5, 900]])
@pytest.mark.parametrize("int8_head", [False, True])
def test_two_gpus_follow_the_reference(past, int8_head):
    """Launches one after another, so that words of one are not taken for those of another."""
    case = Case(LLAMA_1B, past, int8_head)
    heads, engine = LLAMA_1B.num_kv_heads // 2, dataclasses.replace(case.engine, tp_size=2)
    devices = [torch.device("cuda", rank) for rank in (0, 1)]
    decodes, states = [], []
    for rank, device in enumerate(devices):
        weights = rank_of(case.weights, LLAMA_1B, rank, 2, device)
        kv = [x[:, :, rank * heads : (rank + 1) * heads].to(device).contiguous() for x in case.kv]
        decodes.append(PersistentDecode(LLAMA_1B.share(2), engine, weights, kv, len(past), rank=rank))
        names = ("slot_ids", "last_token", "position", "tables", "sampled", "logits")
        states.append([getattr(case, name).to(device).clone() for name in names])
    enable_peer_access(*devices), enable_peer_access(*devices[::-1])
    for decode in decodes:
        decode.connect(decodes, [state[-1] for state in states])
        decode.reset()
    torch.cuda.synchronize(0), torch.cuda.synchronize(1)
    for _ in range(5):
        want = case.expect()
        for decode, state, device in zip(decodes, states, devices):
            with torch.cuda.device(device):
                decode.launch(*state)
        torch.cuda.synchronize(0), torch.cuda.synchronize(1)
        close(states[0][-1], want, "logits")
        for a, b in zip(*states):
            assert torch.equal(a.cpu(), b.cpu())
        assert torch.equal(states[0][4].long(), states[0][-1].argmax(-1))
        case.last_token.copy_(states[0][1]), case.position.copy_(states[0][2])  # the reference follows
