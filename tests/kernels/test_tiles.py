import json

import pytest
import torch

from llama_engine.errors import InputError
from llama_engine.model.weights import Linear


def test_a_tuning_of_another_gpu_is_one_warning_and_the_defaults(device):
    from llama_engine.kernels.tiles import Tiles, default_tile

    foreign = {"format_version": 2, "gpu": "other", "tiles": {"qkv/int8/8": {"n": 16}}}
    with pytest.warns(UserWarning, match="for 'other', this GPU is 'this': running untuned") as caught:
        tiles = Tiles(foreign, "this")
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="of another version.*running untuned"):
        Tiles({"format_version": 1, "gpu": "this", "tiles": {"qkv/8": {"n": 16}}}, "this")
    linear = Linear(torch.zeros((64, 512), dtype=torch.int8), torch.zeros(64))
    assert tiles.get("qkv", linear, 5).n == default_tile("qkv", 5).n


def test_damaged_files_are_named(device, tmp_path):
    from llama_engine.kernels import tiles

    assert tiles.load_tuning(tmp_path) is None
    (tmp_path / "tuning.json").write_text("{")
    with pytest.raises(InputError, match=r"tuning\.json is damaged"):
        tiles.load_tuning(tmp_path)
    (tmp_path / "tuning.json").write_text(
        json.dumps({"format_version": 2, "gpu": "this", "tiles": {"qkv/int8/8": {"wat": 1}}})
    )
    with pytest.raises(InputError, match="qkv/int8/8"):
        tiles.Tiles(tiles.load_tuning(tmp_path), "this")


@pytest.mark.parametrize("rows", [65, 128, 200, 256, 512])
def test_no_matrix_of_a_large_batch_leaves_most_of_the_gpu_idle(rows, monkeypatch):
    """An H100 has 132 multiprocessors and holds one such tile in each."""
    from llama_engine.kernels import gemm
    from llama_engine.kernels.tiles import default_tile

    monkeypatch.setattr(gemm, "shared_memory", lambda _: 232448)
    for name, n, k in [("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)]:
        linear = Linear(torch.empty((n, k), dtype=torch.int8, device="meta"), torch.empty(n, device="meta"))
        tile = gemm.fit(default_tile(name, rows), linear, rows)
        assert -(-n // tile.n) * -(-rows // tile.m) * tile.split >= 96


def test_every_bucket_of_rows_is_tuned_for_itself():
    from llama_engine.gpu.buckets import DECODE_BUCKETS
    from llama_engine.gpu.tuner import candidates
    from llama_engine.kernels.tiles import ROW_BUCKETS, default_tile, row_bucket

    assert {row_bucket(rows) for rows in DECODE_BUCKETS} == set(ROW_BUCKETS) - {1024}
    linear = Linear(torch.empty((64, 512), dtype=torch.int8), torch.empty(64))
    for name in ("qkv", "o", "gate_up", "down", "lm_head"):
        for bucket in ROW_BUCKETS:
            tiles = candidates(name, bucket, linear)
            assert tiles[0] == default_tile(name, bucket)
            assert len(set(tiles)) > 2


def test_a_matrix_has_the_tile_of_its_own_scheme(device):
    from llama_engine.kernels.gemm import Tile
    from llama_engine.kernels.tiles import Tiles
    from llama_engine.model.schemes import FP8, FP16

    fp8 = Linear(torch.zeros((64, 512)).to(FP8.weight_dtype), torch.ones(64))
    fp16 = Linear(torch.zeros((64, 512)).half())
    tiles = Tiles(None, "this")
    tiles.set("down", FP8, 8, Tile(8, 16, 64))
    tiles.set("down", FP16, 8, Tile(8, 32, 64))
    assert [tiles.get("down", linear, 5).n for linear in (fp8, fp16, fp8)] == [16, 32, 16]
