"""The persistent decode kernel on a GPU, against its step-by-step reference and the model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from llama_engine.config import ModelConfig
from llama_engine.errors import InputError
from llama_engine.kernels import persistent_reference
from llama_engine.kernels.nvrtc import enable_peer_access
from llama_engine.kernels.persistent import PersistentDecode
from llama_engine.model.llama import apply_rope, rms_norm
from llama_engine.model.schemes import FP8, INT4, INT8, Scheme
from tests.kernels.cases import LLAMA_1B, LLAMA_3B, LLAMA_8B, Case, close, received
from tests.split import rank_of


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
