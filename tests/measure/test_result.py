import json

import pytest

from llama_engine.errors import InputError
from llama_engine.measure import result


def make(**changes):
    arguments = {
        "model": {"name": "m", "source": "pretrained", "sha256": "0" * 64},
        "workload": {"input_tokens": 1, "output_tokens": 2},
        "environment": {"cpu": {}, "gpu": None, "software": {}, "git": {}, "fingerprint": "f"},
        "samples": {"latency_s": [1.0] * 5, "output_tokens": [2] * 5},
    }
    return result.new_result("baseline", "transformers", **(arguments | changes))


def test_round_trip(tmp_path):
    path = result.write_result(tmp_path / "deep" / "a.json", make())
    assert result.load_result(path) == make()
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_existing_output_needs_force(tmp_path):
    path = result.write_result(tmp_path / "a.json", make())
    with pytest.raises(InputError, match="--force"):
        result.write_result(path, make())
    result.write_result(path, make(), force=True)
    with pytest.raises(InputError, match="is a directory"):
        result.check_output(tmp_path, force=True)


def test_force_replaces_a_measurement_alone_and_not_in_an_input(tmp_path):
    path = tmp_path / "in" / "config.json"
    path.parent.mkdir()
    path.write_text('{"model": {}}')
    with pytest.raises(InputError, match="is no measurement, so --force does not replace it"):
        result.write_result(path, make(), force=True)
    assert path.read_text() == '{"model": {}}'
    for output in (path, path.parent / "new.json"):
        with pytest.raises(InputError, match="overlaps the input"):
            result.check_output(output, True, path.parent)
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    for _ in range(2):
        result.write_result(tmp_path / "link.json", make(), force=True)
    assert (tmp_path / "link.json").is_symlink()
    assert result.load_result(tmp_path / "a.json") == make()


def test_a_file_is_no_folder_of_results(tmp_path):
    assert result.check_folder(tmp_path / "new") == tmp_path / "new"
    assert result.check_folder(tmp_path) == tmp_path
    with pytest.raises(InputError, match="is a file"):
        result.check_folder(result.write_result(tmp_path / "a.json", make()))


def test_invalid_runs_are_stamped():
    made = make(samples={"latency_s": [1.0], "output_tokens": [3]})
    assert made["validity"]["status"] == "INVALID"
    assert len(made["validity"]["reasons"]) == 2


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"schema_version": "0"}, "schema_version"),
        ({"benchmark": "other"}, "benchmark"),
        ({"model": {"name": "m", "source": "stolen", "sha256": None}}, "model/source"),
        ({"samples": {"ttft_ms": [-1.0]}}, "samples/ttft_ms/0"),
        ({"validity": {"status": "INVALID", "reasons": []}}, "validity/reasons"),
        ({"validity": {"status": "VALID", "reasons": ["but"]}}, "validity/reasons"),
        ({"speedup": {"latency": {"ratio": 2.0}}}, "speedup/latency"),
    ],
)
def test_the_schema_refuses(change, where):
    with pytest.raises(InputError, match=f"x: {where}"):
        result.validate(make() | change, "x")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = result.write_result(tmp_path / "a.json", make())
    with pytest.raises(ValueError, match="JSON compliant"):
        result.write_result(path, make(summary={"mbu": float("nan")}), force=True)
    assert result.load_result(path) == make()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["{", json.dumps({"benchmark": "baseline"})])
def test_unreadable_files_name_themselves(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.json"):
        result.load_result(path)
    with pytest.raises(InputError, match="holds no result files"):
        result.load_folder(tmp_path / "nothing")
