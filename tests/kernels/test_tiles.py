import json

import pytest
import torch

from llama_engine.errors import InputError


def test_a_tuning_of_another_gpu_is_one_warning_and_the_defaults(device):
    from llama_engine.kernels.tiles import Tiles, default_tile
    from llama_engine.model.weights import Linear

    foreign = {"format_version": 1, "gpu": "other", "tiles": {"qkv/8": {"n": 16}}}
    with pytest.warns(UserWarning, match="running untuned") as caught:
        tiles = Tiles(foreign, "this")
    assert len(caught) == 1
    linear = Linear(torch.zeros((64, 512), dtype=torch.int8), torch.zeros(64))
    assert tiles.get("qkv", linear, 5).n == default_tile("qkv", 5).n


def test_damaged_files_are_named(device, tmp_path):
    from llama_engine.kernels import tiles

    assert tiles.load_tuning(tmp_path) is None
    (tmp_path / "tuning.json").write_text("{")
    with pytest.raises(InputError, match=r"tuning\.json is damaged"):
        tiles.load_tuning(tmp_path)
    (tmp_path / "tuning.json").write_text(
        json.dumps({"format_version": 1, "gpu": "this", "tiles": {"qkv/8": {"wat": 1}}})
    )
    with pytest.raises(InputError, match="qkv/8"):
        tiles.Tiles(tiles.load_tuning(tmp_path), "this")
