import pytest

from tests.results import write_folder


@pytest.fixture
def folder(tmp_path):
    """A complete machine's results in a repository of its own."""
    return write_folder(tmp_path / "results" / "box")
