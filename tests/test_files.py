import multiprocessing
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from llama_engine import files, tensor_files
from llama_engine.errors import InputError, RunError
from llama_engine.files import atomic_dir
from llama_engine.tensor_files import TensorFileWriter, parallel, row_chunks


def test_a_directory_appears_whole_and_replaces_only_with_force(tmp_path):
    target = tmp_path / "out"
    with atomic_dir(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(InputError, match="--force"), atomic_dir(target):
        pass
    with atomic_dir(target, force=True) as partial:
        (partial / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_directory_and_nothing_else(tmp_path):
    target = tmp_path / "out"
    with atomic_dir(target) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_dir(target, force=True) as partial:
        (partial / "missing" / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _write_and_wait(target, ready):
    with atomic_dir(target) as partial:
        (partial / "a").write_text("half")
        ready.set()
        time.sleep(60)


def test_a_killed_writer_leaves_no_output_and_the_next_starts_clean(tmp_path):
    target = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_write_and_wait, args=(target, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="another process is writing"), atomic_dir(target):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not target.exists()
    with atomic_dir(target) as partial:
        assert list(partial.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.md"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "half of a pair: \ud800")
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.json is missing"),
        (b"{", "a.json is not valid JSON: Expecting property name"),
        (b'{"a": "\xff"}', "a.json is not valid JSON: 'utf-8' codec can't decode"),
        (b"[1]", "a.json holds a JSON list, expected an object"),
    ],
)
def test_unreadable_json_names_its_file(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        files.read_json(path)


def test_tensors_written_in_pieces_and_out_of_order_read_back(tmp_path):
    data = torch.randn(100, 7).half()
    scale = torch.arange(100, dtype=torch.float32)
    specs = {"w": (torch.float16, (100, 7)), "s": (torch.float32, (100,))}
    writer = TensorFileWriter(tmp_path / "t.safetensors", specs, {"k": "v"})
    parallel(lambda i: writer.write("w", i, data[i : i + 10]), range(90, -1, -10))
    writer.write("s", 50, scale[50:])
    writer.write("s", 0, scale[:50])
    with pytest.raises(ValueError, match=r"the file holds torch.float16"):
        writer.write("w", 0, scale)
    back = load_file(tmp_path / "t.safetensors")
    assert torch.equal(back["w"], data)
    assert torch.equal(back["s"], scale)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files.os, "posix_fallocate", full)
    with (
        pytest.raises(RunError, match=r"cannot write .*t.safetensors .*No space left on device"),
        atomic_dir(tmp_path / "out") as out,
    ):
        TensorFileWriter(out / "t.safetensors", {"w": (torch.float16, (4, 4))}, {})
    assert list(tmp_path.iterdir()) == []


def test_parallel_stops_at_the_first_error_and_restores_the_threads():
    before = torch.get_num_threads()

    def fail(item):
        if item == 3:
            raise InputError("three")

    with pytest.raises(InputError, match="three"):
        parallel(fail, range(10))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 1 << 21), (1000, 1 << 20), (5, 1 << 30)])
def test_row_chunks_cover_all_rows_from_even_starts(rows, columns):
    chunks = list(row_chunks(rows, columns))
    assert [row for start, stop in chunks for row in range(start, stop)] == list(range(rows))
    assert all(start % 2 == 0 for start, _ in chunks)
    assert all((stop - start) * columns <= max(tensor_files.CHUNK_ELEMENTS, 2 * columns) for start, stop in chunks)
