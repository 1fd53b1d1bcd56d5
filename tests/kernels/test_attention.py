import pytest
import torch

from llama_engine.config import EngineConfig, ModelConfig
from llama_engine.kernels.quant import quantize_reference
from llama_engine.model.llama import TorchModel, apply_rope
from llama_engine.model.schemes import KV_DTYPES
from tests.repeats import quick

CACHES = pytest.mark.parametrize(("cache", "tokens_per_block"), [("fp16", 16), ("fp8", 64)])
SHAPES = quick(
    [{}, {"keys": 32, "rows": 32}, {"keys": 16, "tma": True}, {"keys": 16, "part": 32, "programs": 64}],
    *({}, {"keys": 16, "part": 32, "programs": 64}),
)
NEAR = {"fp16": 4e-3, "fp8": 0.13}  # an e4m3 value may be rounded to either side


def _setup(device, heads, kv_heads, head_size, contexts, tokens_per_block=16, max_seq_len=1024, cache="fp16", **shapes):
    """Random KV for sequences of the given cached lengths, in shuffled blocks."""
    from llama_engine.kernels.attention import PagedAttention

    config = ModelConfig(32, heads * head_size, 32, 1, heads, kv_heads, head_size, max_seq_len)
    engine = EngineConfig(len(contexts), max_seq_len, max_seq_len, tokens_per_block, kv_cache=cache)
    max_blocks = engine.max_blocks_per_sequence
    num_blocks = 1 + len(contexts) * max_blocks
    order = (torch.randperm(num_blocks - 1) + 1).to(torch.int32)
    tables = torch.zeros((len(contexts) + 1, max_blocks), dtype=torch.int32)
    tables[:-1] = order[: len(contexts) * max_blocks].view(len(contexts), max_blocks)
    kv = torch.randn(2, num_blocks, kv_heads, tokens_per_block, head_size).to(KV_DTYPES[cache]).to(device)
    return config, kv, PagedAttention(config, engine, tables.to(device), **shapes)


def _reference(config, attention, kv, qkv, slot, start):
    """Attention in float32 over what the cache holds, after writing the new tokens into a copy of it."""
    n, tpb = qkv.shape[0], attention.engine_config.tokens_per_block
    q, k, v = (
        p.unflatten(-1, (-1, config.head_size)) for p in qkv.split((config.q_size, config.kv_size, config.kv_size), -1)
    )
    span = torch.arange(start, start + n, device=kv.device)
    q = apply_rope(q, attention.cos[span], attention.sin[span])
    k = apply_rope(k, attention.cos[span], attention.sin[span])
    table = attention.block_tables[slot]
    kv[0, table[span // tpb].long(), :, span % tpb] = k.to(kv.dtype)
    kv[1, table[span // tpb].long(), :, span % tpb] = v.to(kv.dtype)
    model = TorchModel.__new__(TorchModel)
    model.tokens_per_block, model.dtype, model.device = tpb, torch.float32, kv.device
    return model._attend(q.float(), kv, table, start)


@CACHES
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(8, 2, 128), (9, 3, 64), (4, 2, 32)])
def test_decode_over_the_block_table(device, heads, kv_heads, head_size, tokens_per_block, cache):
    lengths = [0, 255, 256, 700]
    config, kv, attention = _setup(device, heads, kv_heads, head_size, lengths, tokens_per_block, cache=cache)
    position = torch.tensor([*lengths, 0], dtype=torch.int32, device=device)
    slots = torch.tensor([3, 1, 0, 2, 4], dtype=torch.int32, device=device)
    qkv = torch.randn(5, config.qkv_size, device=device).half()
    expected_kv = kv.clone()
    want = torch.cat(
        [_reference(config, attention, expected_kv, qkv[r : r + 1], s, lengths[s]) for r, s in enumerate([3, 1, 0, 2])]
    )
    digits = torch.zeros((2, 16, config.q_size), dtype=torch.int8, device=device)
    scale = torch.zeros(16, device=device)
    attention.decode(qkv, kv, slots, position, digits, scale, 5)
    got = (digits[0].int() * 256 + digits[1].int())[:4] * scale[:4, None]
    assert (got - want).abs().max() < 4e-3 * want.abs().max()
    mine, theirs = kv[:, 1:].float(), expected_kv[:, 1:].float()  # block 0 belongs to the padding row
    assert torch.allclose(mine, theirs, rtol=NEAR[cache], atol=4e-3)
    alone = torch.zeros_like(digits)
    attention.decode(qkv, kv, slots, position, alone, scale, 1)
    assert torch.equal(alone[:, 0], digits[:, 0])


@CACHES
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), quick([(8, 2, 128), (9, 3, 64), (4, 2, 48)], (9, 3, 64)))
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_in_chunks_matches_the_whole(device, heads, kv_heads, head_size, tokens_per_block, cache, shape):
    from llama_engine.kernels.attention import PrefillShape

    config, kv, attention = _setup(
        device,
        *(heads, kv_heads, head_size, [0, 0], tokens_per_block),
        max_seq_len=128,
        cache=cache,
        prefill_shape=PrefillShape(**shape),
    )
    lengths = {0: 75, 1: 20}
    qkv = torch.randn(95, config.qkv_size, device=device).half()
    expected_kv = kv.clone()
    want = torch.cat(
        [
            _reference(config, attention, expected_kv, qkv[:75], 0, 0),
            _reference(config, attention, expected_kv, qkv[75:], 1, 0),
        ]
    )

    def run(parts):
        out = torch.full((95, config.q_size), float("nan"), dtype=torch.float16, device=device)
        filled = kv.clone()
        for part in parts:
            rows = torch.cat([torch.arange(a, b) + 75 * slot for slot, a, b in part]).to(device)
            slots = torch.cat([torch.full((b - a,), slot) for slot, a, b in part]).to(device, torch.int32)
            positions = torch.cat([torch.arange(a, b) for _, a, b in part]).to(device, torch.int32)
            tiles, first = [(0, 0, 0, 0)], 0
            for slot, a, b in part:
                tiles += attention.tiles(first, a, b - a, slot)
                first += b - a
            tile_table = torch.tensor(tiles, dtype=torch.int32, device=device)
            piece = torch.full((len(rows), config.q_size), float("nan"), dtype=torch.float16, device=device)
            attention.prefill(qkv[rows].contiguous(), filled, slots, positions, tile_table, piece, len(rows))
            out[rows] = piece
        return out, filled

    whole, filled = run([[(0, 0, lengths[0]), (1, 0, lengths[1])]])
    assert (whole.float() - want).abs().max() < 4e-3 * want.abs().max()
    assert torch.allclose(filled.float(), expected_kv.float(), rtol=NEAR[cache], atol=4e-3)
    chunked, chunked_filled = run([[(0, 0, 40)], [(1, 0, 20), (0, 40, 75)]])
    # The interpreter multiplies with a CPU library whose sums may depend on where in a tile a row lies.
    bound = 0.0 if device.type == "cuda" else 1e-3 * want.abs().max()
    assert (chunked.float() - whole.float()).abs().max() <= bound
    assert torch.equal(chunked_filled.float(), filled.float())


@pytest.mark.parametrize("start", [0, 60, 64, 100])
def test_a_context_in_parts_gives_the_same_bits_whoever_walks_them(device, start):
    from llama_engine.kernels.attention import PagedAttention, PrefillShape

    # Rows 60 to 67 lie on both sides of a part's end.
    config, kv, attention = _setup(device, 8, 2, 64, [start], 16, max_seq_len=128)
    qkv = torch.randn(8, config.qkv_size, device=device).half()
    slots = torch.zeros(8, dtype=torch.int32, device=device)
    positions = torch.arange(start, start + 8, dtype=torch.int32, device=device)

    def run(**shape):
        one = PagedAttention(
            config, attention.engine_config, attention.block_tables, prefill_shape=PrefillShape(keys=16, **shape)
        )
        tiles = torch.tensor([*one.tiles(0, start, 8, 0), (0, 0, 0, 0)], dtype=torch.int32, device=device)
        out = torch.full((8, config.q_size), float("nan"), dtype=torch.float16, device=device)
        one.prefill(qkv.clone(), kv.clone(), slots, positions, tiles, out, 8)
        return out

    alone = run(part=32, programs=0, split_tiles=0)
    assert torch.equal(run(part=32, programs=1000), alone)
    assert torch.equal(run(part=32, programs=6 if device.type != "cuda" else 1), alone)
    want = _reference(config, attention, kv.clone(), qkv, 0, start)
    assert (alone.float() - want).abs().max() < 4e-3 * want.abs().max()
    assert (run().float() - want).abs().max() < 4e-3 * want.abs().max()


def test_quantized_output_has_the_documented_scale(device):
    x = torch.randn(2, 64, device=device)
    _, scale = quantize_reference(x)
    assert torch.allclose(scale, x.abs().amax(1) / 32512)


@pytest.mark.gpu
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("context", [0, 2048, 40_960])
def test_long_contexts_against_float32(tma, context):
    from llama_engine.kernels.attention import PrefillShape

    device, rows = torch.device("cuda"), 512
    torch.manual_seed(0)
    config, kv, attention = _setup(device, 32, 8, 128, [0], 64, context + rows, prefill_shape=PrefillShape(tma=tma))
    qkv = torch.randn(rows, config.qkv_size, device=device).half()
    slots = torch.zeros(rows, dtype=torch.int32, device=device)
    positions = torch.arange(context, context + rows, dtype=torch.int32, device=device)
    tiles = torch.tensor(attention.tiles(0, context, rows, 0), dtype=torch.int32, device=device)
    out = torch.full((rows, config.q_size), float("nan"), dtype=torch.float16, device=device)
    cache = kv.clone()
    attention.prefill(qkv.clone(), cache, slots, positions, tiles, out, rows)
    want = torch.cat([_reference(config, attention, cache, qkv[r : r + 1], 0, context + r) for r in range(0, rows, 37)])
    assert (out[::37].float() - want).abs().max() < 4e-3 * want.abs().max()
