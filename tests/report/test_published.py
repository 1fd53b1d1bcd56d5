"""What the repository publishes: every result fits the schema, and report, pictures and README agree with it."""

from pathlib import Path

import pytest

from llama_engine.errors import InputError
from llama_engine.measure.result import load_result

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted(path for path in (ROOT / "results").glob("*/*.json") if path.parent.name != "local")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_published_results_are_valid_json_of_the_schema(path):
    load_result(path)


def test_nothing_published_is_stale(run_script):
    done = run_script("scripts/plot_results.py", "--check")
    assert done.returncode == 0, done.stderr


def test_a_foreign_json_would_be_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"tokens_per_second": 9000}')
    with pytest.raises(InputError, match=r"x\.json: .*required"):
        load_result(tmp_path / "x.json")
