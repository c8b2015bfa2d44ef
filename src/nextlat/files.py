"""Files and directories that are either wholly there or not there at all.

Everything is written under a temporary name in the directory where it is to lie, flushed to the
disk, and renamed: a process that is killed at any moment leaves the old state or the new one, and
at worst a temporary that the next run removes.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nextlat.errors import NextLatError

TEMPORARY = ".nextlat-tmp-"  # prefix of what is unfinished, and may be deleted when nobody writes

# What torch.save says where it fails to write, in a RuntimeError.
_OF_TORCH = ("PytorchStreamWriter", "inline_container", "iostream", "cannot be opened", "not exist")


@contextmanager
def write_errors(
    path: Path, way_out: str = "free some space or choose another place"
) -> Iterator[None]:
    """Turn a failed write (full disk, no permission, no such directory) into one sentence.

    Args:
        path: what is written.
        way_out: the end of the sentence.

    Raises:
        NextLatError: naming `path`, the operating system's reason and the way out.
    """
    try:
        yield
    except OSError as error:
        raise NextLatError(f"cannot write {path}: {error.strerror or error}; {way_out}.") from error
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
        raise NextLatError(f"cannot write {path}: {reason}; {way_out}.") from error
    except RuntimeError as error:
        if not any(mark in str(error) for mark in _OF_TORCH):
            raise
        raise NextLatError(
            f"cannot write {path}: the file could not be written in full; {way_out}."
        ) from error


def cache_directory() -> Path:
    """Where things are kept that would take long to make again, and may be deleted whenever nothing
    runs: $NEXTLAT_CACHE, or `nextlat` in the user's cache directory."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NEXTLAT_CACHE") or Path(user, "nextlat"))


@contextmanager
def sole_maker(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock, or wait for it. The operating system releases it when a process ends, however it
    ends.

    Args:
        path: a file for it, made if need be.
        waiting: called before waiting for another process.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; what two processes make at once is equal
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def named_directory(name: str | Path) -> Path:
    """A path that a directory can have.

    Raises:
        NextLatError: it is empty, too long, or not valid UTF-8.
    """
    try:
        str(name).encode()  # not every library can write anywhere else
        Path(name).exists()
    except (OSError, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not valid UTF-8"
        raise NextLatError(f"{name} cannot be a directory: {reason}.") from error
    if not str(name):
        raise NextLatError("a directory without a name was given: name one, or '.'.")
    return Path(name)


def sync(path: Path) -> None:
    """Force one file, or the entries of one directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Force everything under a directory to the disk, files first, the directory itself last."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def write_text(path: Path, text: str) -> None:
    """Replace (or make) a text file atomically.

    Raises:
        NextLatError: the file cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with write_errors(path):
        try:
            remove(temporary)  # whatever lies there, a link that leads elsewhere too
            with temporary.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> None:
    """`write_text` of JSON; NaN and infinity are refused, since other readers of JSON do not know
    them."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def staging_directory(target: Path) -> Path:
    """Where the directory `target` is put together before it gets its name."""
    return target.with_name(f"{TEMPORARY}{target.name}")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty staging directory that becomes `target` when the block ends well, and vanishes
    when it does not.

    Raises:
        NextLatError: something in it cannot be written; an older `target` is untouched.
    """
    staging = staging_directory(target)
    with write_errors(target):
        try:
            remove(staging)
            staging.mkdir(parents=True)
            yield staging
            sync_tree(staging)
            remove(target)
            staging.replace(target)
            sync(target.parent)
        except BaseException:
            remove(staging)
            raise


def move_into(staging: Path, directory: Path, last: str) -> None:
    """Move the files of a staging directory, each atomically, into a directory that holds other
    things too.

    Args:
        staging: see there.
        directory: where the files go.
        last: the file without which nobody takes the others for a whole; it is moved when they are
            safely in place.

    Raises:
        OSError: see `write_errors`.
    """
    sync_tree(staging)
    files = [path.relative_to(staging) for path in sorted(staging.rglob("*")) if path.is_file()]
    first = [file for file in files if file != Path(last)]
    for file in first:
        folder = (directory / file).parent
        if folder != directory and folder.is_symlink():
            folder.unlink()  # which would lead elsewhere
        folder.mkdir(parents=True, exist_ok=True)
        (staging / file).replace(directory / file)
    for folder in {directory, *((directory / file).parent for file in first)}:
        sync(folder)
    (staging / last).replace(directory / last)
    sync(directory)
    remove(staging)


def remove(path: Path) -> None:
    """Delete a file or a directory with all in it; one that is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(directory: Path) -> None:
    """Delete what an interrupted write left in a directory. For the one process that writes there.

    Raises:
        NextLatError: it cannot be deleted.
    """
    with write_errors(directory):
        for path in directory.glob(f"{TEMPORARY}*"):
            remove(path)
