import shutil

import pytest


@pytest.fixture
def model(tiny_model, tmp_path):
    """The tiny model's directory, to be damaged or changed."""
    return shutil.copytree(tiny_model, tmp_path / "model")
