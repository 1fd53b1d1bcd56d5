"""The persistent decode kernel against :class:`TorchModel` on the dequantized weights."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from llama_engine.checkpoint.packing import quantize
from llama_engine.config import EngineConfig, ModelConfig, RopeScaling
from llama_engine.errors import InputError
from llama_engine.kernels.persistent import PersistentDecode, permute, supported
from llama_engine.model.llama import TorchModel, apply_rope, rms_norm
from llama_engine.model.weights import Linear, random_weights

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
LLAMA_3B = dataclasses.replace(LLAMA_8B, hidden_size=3072, intermediate_size=8192, num_heads=24, num_layers=2)


class Case:
    """A model, slot state with random cached KV, and the reference over a copy of it."""

    def __init__(self, config: ModelConfig, past: list[int], int8_head: bool = False) -> None:
        self.config = config
        self.weights = random_weights(config, "cuda")
        if int8_head:
            self.weights.lm_head = Linear(*quantize(self.weights.lm_head.weight))
        generator = torch.Generator("cuda").manual_seed(11)
        blocks, slots = 2048 // 64, 9
        count = 1 + len(past) * blocks
        self.engine = EngineConfig(max_batch_size=8, max_seq_len=2048, tokens_per_block=64, num_kv_blocks=count)
        self.reference = TorchModel(config, self.engine, self.weights)
        for cache in self.reference.kv:
            cache.copy_(torch.randn(cache.shape, device="cuda", generator=generator))
        self.kv = [cache.clone() for cache in self.reference.kv]
        order = torch.randperm(count - 1, device="cuda", generator=generator).int() + 1
        self.tables = torch.zeros((slots, blocks), dtype=torch.int32, device="cuda")
        self.slot_ids = torch.tensor([7, 2, 5, 0][: len(past)], dtype=torch.int32, device="cuda")
        self.last_token = torch.zeros(slots, dtype=torch.int32, device="cuda")
        self.position = torch.zeros(slots, dtype=torch.int32, device="cuda")
        for i, slot in enumerate(self.slot_ids.tolist()):
            self.tables[slot] = order[i * blocks : (i + 1) * blocks]
            self.last_token[slot] = 100 + 17 * i
            self.position[slot] = past[i]
        self.sampled = torch.full((len(past),), -1, dtype=torch.int32, device="cuda")
        self.logits = torch.full((len(past), config.vocab_size), math.nan, device="cuda")
        self.decode = PersistentDecode(config, self.engine, self.weights, self.kv, max_rows=len(past))

    def launch(self, logits: bool = True) -> None:
        state = (self.slot_ids, self.last_token, self.position, self.tables, self.sampled)
        self.decode.launch(*state, self.logits if logits else None)
        torch.cuda.synchronize()

    def expect(self) -> torch.Tensor:
        slots = self.slot_ids.long()
        rows = torch.arange(len(slots), device="cuda")
        return self.reference.forward(
            self.last_token[slots], self.position[slots], self.slot_ids, self.tables, rows.int()
        )


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (actual.float() - expected.float()).abs().max().item()
    bound = expected.float().abs().max().item() / 128 * 1.5
    assert error <= bound, f"{what}: error {error:.4g} above {bound:.4g}"


def received(words: torch.Tensor, permuted: bool = True) -> torch.Tensor:
    """The float32 values that exchanged words carry, in natural order."""
    values = (words & ~255).view(torch.float32)
    if not permuted:
        return values
    out = torch.empty_like(values)
    out[:, permute(torch.arange(values.shape[-1], device=values.device))] = values
    return out


def test_permute_is_the_order_of_the_kernel() -> None:
    for k in (1024, 2048, 3072, 4096, 14336):
        vector = 4 if k % 4096 == 0 else 2 if k % 2048 == 0 else 1
        order = torch.arange(k)
        inside = order % (128 * vector)
        where = order - inside + inside % (4 * vector) // 4 * 128 + inside // (4 * vector) * 4 + order % 4
        assert torch.equal(permute(order)[where], order)


def test_a_cpu_is_not_supported() -> None:
    config = dataclasses.replace(LLAMA_1B, num_layers=1, hidden_size=1024, intermediate_size=1024, vocab_size=64)
    weights = random_weights(config, "cpu")
    assert not supported(config, weights)
    with pytest.raises(InputError, match="cannot run"):
        PersistentDecode(config, EngineConfig(), weights, [])


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
    ("config", "int8_head", "past"),
    [(LLAMA_8B, True, [300]), (LLAMA_1B, False, [70, 3]), (LLAMA_1B, True, [511, 9]), (LLAMA_3B, False, [129])],
)
def test_a_token_of_every_geometry(config: ModelConfig, int8_head: bool, past: list[int]) -> None:
    case = Case(config, past, int8_head)
    slots = case.slot_ids.long()
    expected, before = case.expect(), case.position.clone()
    case.launch()
    close(case.logits, expected, "logits")
    for ours, theirs in zip(case.kv, case.reference.kv):
        close(ours, theirs, "KV cache")
    assert torch.equal(case.sampled, case.logits.argmax(-1).int())
    assert torch.equal(case.last_token[slots], case.sampled)
    before[slots] += 1
    assert torch.equal(case.position, before)
    assert case.decode.scratch[len(past)]["sync"].tolist() == [1] + [0] * 159, "one launch, the other counters at zero"


@pytest.mark.gpu
def test_a_graph_repeats_eager_launches_and_the_dummy_slot_stays() -> None:
    tokens = []
    for graphed in (False, True):
        case = Case(dataclasses.replace(LLAMA_1B, num_layers=2), [60, 500])
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
@pytest.mark.parametrize("config", [LLAMA_1B, LLAMA_8B])
def test_values_that_are_not_finite_cost_their_own_row_its_token_alone(
    config: ModelConfig, values: tuple[float, float], int8_head: bool
) -> None:
    """In one dimension of one KV head of one row's cache, so that most of what follows is still numbers."""
    case, healthy = (Case(config, [70, 33], int8_head) for _ in range(2))
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
