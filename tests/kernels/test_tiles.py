import json

import pytest
import torch

from llama_engine.errors import InputError


def test_a_tuning_of_another_gpu_is_one_warning_and_the_defaults(device):
    from llama_engine.kernels.tiles import Tiles, default_tile
    from llama_engine.model.weights import Linear

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


def test_a_matrix_has_the_tile_of_its_own_scheme(device):
    from llama_engine.kernels.gemm import Tile
    from llama_engine.kernels.tiles import Tiles
    from llama_engine.model.schemes import FP8, FP16
    from llama_engine.model.weights import Linear

    fp8 = Linear(torch.zeros((64, 512)).to(FP8.weight_dtype), torch.ones(64))
    fp16 = Linear(torch.zeros((64, 512)).half())
    tiles = Tiles(None, "this")
    tiles.set("down", FP8, 8, Tile(8, 16, 64))
    tiles.set("down", FP16, 8, Tile(8, 32, 64))
    assert [tiles.get("down", linear, 5).n for linear in (fp8, fp16, fp8)] == [16, 32, 16]
