"""Makes the tokens of one text again and again in forked processes that die by SIGKILL at chosen
moments; a script for test_corpus.

Forked, so that torch is imported once. A moment is the n-th of the operations that change the disk.
Prints JSON: the operations of an unbroken run; whether the files are the same after a kill at every
`step`-th of them; what became of two processes at once, and of one that waited for another that was
killed.
"""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from nextlat.tasks.text import corpus, documents, text


def in_a_fork(settings: dict[str, Any], cache: Path, before: Callable[[str], None]) -> int:
    """The number of a process that makes the tokens; `before` is called before every operation."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ["NEXTLAT_CACHE"] = str(cache)
        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (os, "mkdir"),
            (os, "unlink"),
            (corpus, "save_file"),
        ):
            watched(owner, name, before)
        task = text.TextConfig(**settings).build()
        (cache / f"fingerprint-{os.getpid()}").write_text(task.fingerprint())
        code = 0
    finally:
        os._exit(code)


def watched(owner: Any, name: str, before: Callable[[str], None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(name)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def ended(child: int) -> int:
    """0, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def files(cache: Path) -> dict[str, bytes]:
    """All of them, of shards the arrays: a dataset has several ways to say where it is."""
    found = {}
    for path in sorted((cache / "corpora").rglob("*")):
        if path.suffix == ".safetensors":
            arrays = load_file(path)
            found[str(path.relative_to(cache))] = b"".join(arrays[x].tobytes() for x in arrays)
        elif path.is_file():
            found[str(path.relative_to(cache))] = path.read_bytes()
    return found


def main(settings: dict[str, Any], folder: Path, step: int) -> None:
    corpus.SHARD, documents.DOCUMENTS, documents.CHARACTERS = 300, 4, 256
    gc.freeze()

    def made(cache: str, die_at: int | None = None) -> list[str]:
        done: list[str] = []
        log = (folder / f"{cache}.log").open("w", buffering=1)

        def before(name: str) -> None:
            if len(done) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(name)
            log.write(f"{name}\n")

        status = ended(in_a_fork(settings, folder / cache, before))
        assert status == (0 if die_at is None else -signal.SIGKILL), (cache, die_at, status)
        return (folder / f"{cache}.log").read_text().split()

    operations = made("whole")
    expected = files(folder / "whole")
    same = []
    for number in range(0, len(operations), step):
        cache = f"killed-{number}"
        made(cache, number)
        if number % (3 * step) == 0:  # and once more, soon after
            again = made_or_killed(settings, folder / cache, 5)
            assert again in (0, -signal.SIGKILL)
        made(cache)
        same.append(files(folder / cache) == expected)

    slowly: Callable[[str], None] = lambda name: time.sleep(0.02)  # noqa: E731
    both = [in_a_fork(settings, folder / "both", slowly) for _ in range(2)]
    both_well = [ended(child) for child in both] == [0, 0]
    first = in_a_fork(settings, folder / "heir", slowly)
    while not list((folder / "heir").rglob("000001.safetensors")):
        time.sleep(0.005)
    heir = in_a_fork(settings, folder / "heir", slowly)
    time.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    statuses = [ended(first), ended(heir)]
    print(
        json.dumps(
            {
                "operations": operations,
                "files": [*expected],
                "same": same,
                "both": both_well and files(folder / "both") == expected,
                "heir": statuses == [-signal.SIGKILL, 0] and files(folder / "heir") == expected,
            }
        )
    )


def made_or_killed(settings: dict[str, Any], cache: Path, die_at: int) -> int:
    done: list[str] = []

    def before(name: str) -> None:
        if len(done) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(name)

    return ended(in_a_fork(settings, cache, before))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
