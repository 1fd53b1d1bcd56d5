import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_engine import files, tensor_files
from llama_engine.errors import InputError, RunError
from llama_engine.files import atomic_dir, check_apart
from llama_engine.tensor_files import TensorFileWriter, parallel, row_chunks


def own(path):
    """Directories with a file "a" or "b" are this test's, and hold nothing else."""
    return ("a", "b") if (path / "a").exists() or (path / "b").exists() else ()


def write(output, text, **options):
    with atomic_dir(output, own, **options) as partial:
        (partial / "a").write_text(text)


def test_a_directory_appears_whole_and_replaces_only_with_force(tmp_path):
    target = tmp_path / "out"
    with atomic_dir(target, own) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(InputError, match="--force"), atomic_dir(target, own):
        pass
    with atomic_dir(target, own, force=True) as partial:
        (partial / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_directory_and_nothing_else(tmp_path):
    target = tmp_path / "out"
    with atomic_dir(target, own) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_dir(target, own, force=True) as partial:
        (partial / "missing" / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _write_and_wait(target, ready):
    with atomic_dir(target, own) as partial:
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
    with pytest.raises(InputError, match="another process is writing"), atomic_dir(target, own):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not target.exists()
    with atomic_dir(target, own) as partial:
        assert list(partial.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_what_is_recognised_is_replaced(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    write(target, "into an empty directory")
    write(target, "again", force=True)
    (target / "nested").mkdir()
    with pytest.raises(InputError, match="out also holds nested, which this command did not write: move that away"):
        write(target, "lost", force=True)
    (target / "nested").rmdir()
    (target / "a").rename(target / "thesis.tex")
    with pytest.raises(InputError, match="out was not written by this command, so it is never replaced"):
        write(target, "lost", force=True)
    assert (target / "thesis.tex").read_text() == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("elsewhere", ["/dev/shm", None])
def test_a_link_is_followed_every_time_to_another_disk_too(tmp_path, elsewhere):
    with tempfile.TemporaryDirectory(dir=elsewhere) as disk:
        link, target = tmp_path / "link", Path(disk) / "deep/out"
        link.symlink_to(target)
        for text in ("1", "2", "3"):
            write(link, text, force=text != "1")
            assert link.readlink() == target
            assert (target / "a").read_text() == text
            files.write_text(target.parent / "b", "old")
        (tmp_path / "b").symlink_to(target.parent / "b")
        files.write_text(tmp_path / "b", "new")
        assert (target.parent / "b").read_text() == "new"
        assert sorted(path.name for path in target.parent.iterdir()) == ["b", "out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "link"]


def test_places_that_cannot_be_written_are_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="file is a file, not a directory"):
        write(tmp_path / "file", "", force=True)
    with pytest.raises(InputError, match="file is not a directory: choose another place for out"):
        write(tmp_path / "file/out", "")
    with pytest.raises(InputError, match="loop cannot be written"):
        write(tmp_path / "loop", "")
    write(tmp_path / "full", "1")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    for name in ("full", "empty"):
        with pytest.raises(InputError, match="is a mount point, which cannot be replaced: choose a directory inside"):
            write(tmp_path / name, "2", force=True)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_run_killed_between_its_renames_loses_nothing(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(InputError, match="already exists: give --force"):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out/a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "output", [".", "in", "in/deep/out", "in/../in", "link", "link/out", "tolink", "blobs", "elsewhere/../blobs"]
)
def test_an_output_that_overlaps_an_input_is_refused(tmp_path, output):
    # "in" is as in Hugging Face's cache: its files are links to other places.
    for name in ("in", "blobs", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "blobs/1").write_text("weights")
    (tmp_path / "in/model.safetensors").symlink_to("../blobs/1")
    (tmp_path / "in/gone").symlink_to("../blobs/2")
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "tolink").symlink_to("link")
    for given in ("in", "link", "tolink"):
        with pytest.raises(InputError, match=f"the output .* overlaps the input .*{given} .*: choose another place$"):
            check_apart(tmp_path / output, [tmp_path / given])
    assert check_apart(tmp_path / "in2", [tmp_path / "in"]) == tmp_path / "in2"
    assert check_apart(tmp_path / "elsewhere", [tmp_path / "in", tmp_path / "none"]) == tmp_path / "elsewhere"


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
        atomic_dir(tmp_path / "out", own) as out,
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
def test_row_chunks_cover_all_rows_from_multiples_of_four(rows, columns):
    chunks = list(row_chunks(rows, columns))
    assert [row for start, stop in chunks for row in range(start, stop)] == list(range(rows))
    assert all(start % 4 == 0 for start, _ in chunks)
    assert all((stop - start) * columns <= max(tensor_files.CHUNK_ELEMENTS, 4 * columns) for start, stop in chunks)
