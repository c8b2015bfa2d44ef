"""Whole or not at all: what is left on the disk when a write fails or stops in the middle."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nextlat.errors import NextLatError
from nextlat.files import (
    TEMPORARY,
    atomic_directory,
    move_into,
    remove_unfinished,
    write_errors,
    write_json,
    write_text,
)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, for every library in this process: as near to a
    full disk as a test gets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_write_replaces_the_whole_text(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "a much longer first text")
    write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "second"
    assert names(tmp_path) == {"a.txt"}


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_failed_write_keeps_the_old_text_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    write_text(tmp_path / "a.txt", "old")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(NextLatError, match=r"cannot write .*a\.txt: No space left on device"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_json_never_holds_what_other_readers_refuse(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})


def test_place_below_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        NextLatError,
        match=r"cannot write .*: Not a directory; free some space or choose another place\.",
    ):
        write_text(tmp_path / "file" / "a.txt", "text")


def test_directory_appears_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-2"
    with atomic_directory(target) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "a").write_text("a")
        assert not target.exists()
        assert staging.parent == tmp_path  # the same file system, or the rename would be a copy
    assert names(tmp_path) == {"checkpoint-2/sub/a"}


def write_then_stop(path: Path) -> None:
    path.write_text("new")
    raise KeyboardInterrupt


def test_directory_that_fails_leaves_the_old_one_and_no_half(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-2"
    with atomic_directory(target) as staging:
        (staging / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as staging:
        write_then_stop(staging / "a")
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == {"checkpoint-2/a"}
    with atomic_directory(target) as staging:
        (staging / "b").write_text("newer")
    assert names(tmp_path) == {"checkpoint-2/b"}


def test_files_of_a_whole_move_with_the_deciding_one_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = tmp_path / f"{TEMPORARY}export"
    (staging / "nextlat").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "nextlat/config.json", "zz"):
        (staging / name).write_text("new")
    (tmp_path / "run.json").write_text("kept")
    order: list[str] = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        order.append(str(Path(target).relative_to(tmp_path)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    move_into(staging, tmp_path, last="config.json")
    assert order[-1] == "config.json"
    assert names(tmp_path) == {
        "run.json",
        "config.json",
        "model.safetensors",
        "nextlat/config.json",
        "zz",
    }


def test_unfinished_work_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY}checkpoint-4").mkdir()
    (tmp_path / f"{TEMPORARY}checkpoint-4" / "a").write_text("")
    (tmp_path / f"{TEMPORARY}run.json").write_text("")
    (tmp_path / "run.json").write_text("")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """A directory of a stranger's may hold links that lead out of it."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    for folder in (outside, inside / f"{TEMPORARY}export/nextlat"):
        folder.mkdir(parents=True)
        (folder / "a").write_text(folder.name)
    (inside / f"{TEMPORARY}export/last").write_text("")
    for name in ("a", f"{TEMPORARY}{os.getpid()}-a", "nextlat", f"{TEMPORARY}old"):
        target = outside if name in ("nextlat", f"{TEMPORARY}old") else outside / "a"
        (inside / name).symlink_to(target)
    write_text(inside / "a", "new")
    move_into(inside / f"{TEMPORARY}export", inside, "last")
    remove_unfinished(inside)
    assert names(outside) == {"a"} and (outside / "a").read_text() == "outside"
    assert names(inside) == {"a", "last", "nextlat/a"}
    assert (inside / "nextlat/a").read_text() == "nextlat"


def test_libraries_that_fail_to_write_end_in_the_same_sentence(tmp_path: Path) -> None:
    weights = torch.zeros(100_000)
    writers = {
        "a.safetensors": lambda path: save_file({"a": weights}, path),
        "a.pt": lambda path: torch.save(weights, path),
        "a.bin": lambda path: path.write_bytes(b"0" * 400_000),
    }
    for name, write in writers.items():
        sentence = f"cannot write .*{name}: .*; free some space"
        with (
            largest_file(100_000),
            pytest.raises(NextLatError, match=sentence),
            write_errors(tmp_path / name),
        ):
            write(tmp_path / name)
    for name in ("a.safetensors", "a.pt"):
        with pytest.raises(NextLatError, match="cannot write"), write_errors(tmp_path / name):
            writers[name](tmp_path / "missing" / name)


def test_other_faults_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), write_errors(tmp_path):
        raise RuntimeError("shapes do not match")
