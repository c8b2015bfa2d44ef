"""A run directory on disk: its record `run.json`, its metrics, its checkpoints, and who may write
there.

runs/city-small-nextlat-d1-s0/
    config.json model.safetensors generation_config.json tokenizer...   the trained model, a plain Hugging Face directory
    nextlat/          objective.json objective.safetensors              what the objective added
    run.json          recipe, command, versions, git commit, seed, device, ...; status running or finished
    metrics.jsonl     one line per logging step
    checkpoint-200/   the same layout, and optimizer.pt scheduler.pt rng_state.pth trainer_state.json
"""

import json
import os
import platform
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import nextlat
from nextlat.errors import NextLatError
from nextlat.files import TEMPORARY, remove, sync, write_errors, write_text

RECORD, METRICS = "run.json", "metrics.jsonl"
MODEL_FILES = ("config.json", "nextlat/objective.json", "nextlat/objective.safetensors")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def read_record(directory: Path) -> dict[str, Any] | None:
    """run.json of a directory, or None where there is none.

    Raises:
        NextLatError: it cannot be read, or is not the record of a run.
    """
    path = directory / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NextLatError(
            f"{path} is corrupt ({error}): restore it, or choose another run directory."
        ) from error
    whole = (
        isinstance(record, dict) and "status" in record and isinstance(record.get("recipe"), dict)
    )
    if not whole or "fingerprint" not in (record.get("task") or ()):
        raise NextLatError(f"{path} is not the record of a run: choose another run directory.")
    return record


def is_finished(directory: str | Path) -> bool:
    """Whether a directory holds a run that has been trained to its end (`train` then returns at
    once).

    Raises:
        NextLatError: see `read_record`.
    """
    record = read_record(Path(directory))
    return record is not None and record["status"] == "finished"


def refuse_foreign_directory(directory: Path) -> None:
    """Nothing that a run did not make may be overwritten.

    Raises:
        NextLatError: there is no run.json, but files of the names that a run would write.
    """
    for name in ("config.json", "model.safetensors", "nextlat", METRICS):
        if (directory / name).exists():
            raise NextLatError(
                f"{directory} holds a {name} but no {RECORD}: choose another run directory."
            )
    if found := checkpoints(directory):
        raise NextLatError(
            f"{directory} holds {found[-1].name} but no {RECORD}: choose another run directory."
        )


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Hold a lock on the directory, which the operating system releases when the process ends,
    however it ends.

    Raises:
        NextLatError: another process is training there.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; two runs in one directory are then not noticed
        yield
        return
    with write_errors(directory, "choose another place"):
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NextLatError(
                f"another process is training in {directory}: wait for it, or choose another one."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run by their step, whole or not."""
    found = [path for path in directory.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Optimiser steps done at a checkpoint, from its name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def last_complete_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and one sentence about each newer one that is not.

    A checkpoint gets its name only when it is complete: damage comes from outside, a copy that
    broke off, a failing disk.
    """
    faults: list[str] = []
    for checkpoint in reversed(checkpoints(directory)):
        fault = model_fault(checkpoint) or _state_fault(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint.name} is damaged ({fault})")
    return None, faults


def model_fault(directory: Path) -> str | None:
    """What is wrong with the files of a saved model (not with the numbers in them), or None."""
    index = directory / "model.safetensors.index.json"
    for path in [*(directory / name for name in MODEL_FILES), *sorted(directory.rglob("*.json"))]:
        if (
            fault := _json_fault(path)
            if path.suffix == ".json"
            else None
            if path.is_file()
            else "is missing"
        ):
            return f"{path.relative_to(directory)} {fault}"
    weights = (
        set(json.loads(index.read_text())["weight_map"].values())
        if index.is_file()
        else {"model.safetensors"}
    )
    for name in [*sorted(weights), "nextlat/objective.safetensors"]:
        if fault := _safetensors_fault(directory / name):
            return f"{name} {fault}"
    return None


def _json_fault(path: Path) -> str | None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"is corrupt ({error})"
    return None


def _safetensors_fault(path: Path) -> str | None:
    """The header says how long the file must be: https://huggingface.co/docs/safetensors (format)."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                return "is truncated"
            length = struct.unpack("<Q", start)[0]
            size = path.stat().st_size
            if 8 + length > size:
                return "is truncated"
            header = json.loads(file.read(length))
        end = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
            default=0,
        )
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is corrupt ({error})"
    return None if 8 + length + end == size else "is truncated"


def _archive_fault(path: Path) -> str | None:
    """torch.save writes zip archives, with a checksum for every tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            return None if archive.testzip() is None else "is corrupt"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return f"is corrupt ({error})"


def _state_fault(checkpoint: Path) -> str | None:
    """What is wrong with the optimiser's and the Trainer's part of a checkpoint, or None."""
    random_states = sorted(path.name for path in checkpoint.glob("rng_state*.pth")) or [
        "rng_state.pth"
    ]
    for name in ("optimizer.pt", "scheduler.pt", *random_states):
        if fault := _archive_fault(checkpoint / name):
            return f"{name} {fault}"
    if fault := _json_fault(checkpoint / "trainer_state.json"):
        return f"trainer_state.json {fault}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    if not isinstance(state, dict) or state.get("global_step") != checkpoint_step(checkpoint):
        return "trainer_state.json is of another step"
    return None


def rotate_checkpoints(directory: Path, newest: int, keep: int) -> None:
    """Delete all but the last `keep` checkpoints up to step `newest`, and any beyond it (a run went
    on from before those)."""
    found = checkpoints(directory)
    known = [path for path in found if checkpoint_step(path) <= newest]
    kept = known[max(len(known) - keep, 0) :]
    with write_errors(directory):
        for path in found:
            if path not in kept:
                # Renamed first: a directory that is half deleted must not look like a checkpoint.
                doomed = path.with_name(f"{TEMPORARY}{path.name}-old")
                remove(doomed)
                path.replace(doomed)
                remove(doomed)


class MetricsLog:
    """metrics.jsonl: one JSON object per line, appended to as training goes.

    Args:
        directory: of the run. step: where this process takes up the run; lines of later steps,
            which it will write again, and a last line cut off by a kill are removed. first: whether
            this is the process that writes it.
    """

    def __init__(self, directory: Path, step: int, *, first: bool = True) -> None:
        self._path = directory / METRICS
        lines = read_metrics(directory)
        kept = [line for line in lines if line["step"] <= step]
        self.seconds: float = max(
            (line["seconds"] for line in kept if "seconds" in line), default=0.0
        )
        if first and self._path.exists():
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: dict[str, Any]) -> None:
        """Write one line, at once."""
        with write_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Force the lines to the disk: before a checkpoint that relies on them."""
        if self._path.exists():
            sync(self._path)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last one that was cut off; none if there is no such
    file."""
    path = Path(directory) / METRICS
    lines = []
    for text in (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    ):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def provenance(device: torch.device) -> dict[str, Any]:
    """What a run was made with: command line, versions, git commit of this code, device, threads."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "nextlat": nextlat.__version__,
        },
        "git": _git_commit(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    """The commit this package was run from, `+` appended when tracked files were changed; None
    outside its repository."""
    here = Path(__file__).parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", Path(__file__).name],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        )
        if not tracked.stdout.strip() or commit.returncode:
            return None
        changed = subprocess.run(
            ["git", "diff", "--quiet", "HEAD"], cwd=here, capture_output=True, timeout=10
        ).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")
