"""A run directory on disk: its record `run.json`, its metrics, its checkpoints, and who may write
there.

runs/city-small-nextlat-d1-s0/
    config.json model.safetensors generation_config.json tokenizer...   a plain Hugging Face model
    nextlat/          objective.json objective.safetensors              what the objective added
    run.json          recipe, command, versions, seed, device, status, ...; see `Record`
    metrics.jsonl     one line per logging step
    checkpoint-200/   the same layout, optimizer.pt scheduler.pt rng_state.pth trainer_state.json
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import transformers
from pydantic import Field, TypeAdapter, model_validator

from nextlat.errors import NextLatError, first_line
from nextlat.files import write_errors
from nextlat.training.checkpoints import checkpoints
from nextlat.validation import Settings, check_format, read_json

RECORD, METRICS, FORMAT = "run.json", "metrics.jsonl", 1
_LINE = TypeAdapter(
    dict[str, Annotated[int, Field(ge=-(2**53), le=2**53)] | float | None],
    config={"strict": True, "allow_inf_nan": False},
)


class RecordedTask(Settings, extra="allow"):
    """Its name, in the recipe with its settings."""

    name: str


class RecordedRecipe(Settings, extra="allow"):
    """What a reader of run.json may rely on; `Recipe.from_dict` checks all of it."""

    task: RecordedTask
    objective: str
    objectives: dict[str, dict[str, Any]]
    steps: Annotated[int, Field(ge=1)]
    seed: int


class World(Settings):
    """The task of a run, and the fingerprint of its world."""

    name: str = ""
    fingerprint: str


class Record(Settings):
    """run.json.

    Attributes:
        format: of this file.
        status: running, or finished: trained to the end and exported.
        recipe_name: of its file.
        recipe: every setting, as `Recipe.to_dict` gives it.
        seed: that of the recipe.
        task: its name, and the fingerprint of its world.
        command: that started the run.
        versions: of the packages it was started with.
        git: commit of this package, `+` appended where files were changed; None outside of its
            repository.
        device: it was started on.
        threads: of torch.
        processes: that shared the batch.
        parameters: of the transformer ("lm") and of the objective.
        started: UTC.
        resumed_at: optimiser steps from which it went on.
        steps: optimiser steps, of a finished run, as all that follow are.
        kept: the step whose weights they are.
        tokens: trained on, padding left out.
        seconds: of training.
        finished: UTC.
    """

    format: Literal[1] = 1
    status: Literal["running", "finished"]
    recipe_name: str = ""
    recipe: RecordedRecipe
    seed: int = 0
    task: World
    command: list[str] = []
    versions: dict[str, str] = {}
    git: str | None = None
    device: str = ""
    threads: int = 0
    processes: int = 1
    parameters: dict[str, int] = {}
    started: str = ""
    resumed_at: list[int] = []
    steps: int = 0
    kept: int | None = None
    tokens: int = 0
    seconds: float = Field(default=0.0, ge=0)
    finished: str = ""

    @model_validator(mode="after")
    def _is_of_its_recipe(self) -> Self:
        recipe, finished = self.recipe, self.status == "finished"
        if self.seed != recipe.seed or (finished and self.steps != recipe.steps):
            raise ValueError("it contradicts its own recipe")
        return self


def read_record(directory: Path) -> dict[str, Any] | None:
    """run.json of a directory, checked against `Record`, or None where there is none.

    Raises:
        NextLatError: it cannot be read, is not the record of a run, or one of another version.
    """
    path, way_out = directory / RECORD, "restore it or choose another run directory"
    try:
        content = read_json(path, way_out)
    except FileNotFoundError:
        return None
    if isinstance(content, dict):
        check_format(content.get("format"), FORMAT, path, way_out)
    return Record.from_json(content, f"{path} is damaged, {way_out}").model_dump(mode="json")


def read_finished(directory: Path, otherwise: str, then: str) -> dict[str, Any]:
    """run.json of a run that has been trained to its end.

    Raises:
        NextLatError: see `read_record`; there is no run (`otherwise` ends the sentence), or it is
            not finished (`then` does).
    """
    record = read_record(directory)
    if record is None:
        raise NextLatError(f"{directory} is not a run directory (no {RECORD}): {otherwise}.")
    if record["status"] != "finished":
        raise NextLatError(
            f"the run {directory} is not finished: give the command that started it again, {then}."
        )
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
    names = ("config.json", "model.safetensors", "nextlat", METRICS)
    for path in [*(directory / name for name in names), *checkpoints(directory)]:
        if path.exists():
            raise NextLatError(
                f"{directory} holds {path.name} but no {RECORD}: choose another run directory."
            )


_locks: set[int] = set()  # descriptors


@cache
def _leave_locks_to_this_process() -> None:
    """Processes that prepare rows outlive a killed one by seconds: the lock must not."""

    def release() -> None:
        while _locks:
            os.close(_locks.pop())

    os.register_at_fork(after_in_child=release)


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
    _leave_locks_to_this_process()
    with write_errors(directory, "choose another place"):
        descriptor = os.open(directory, os.O_RDONLY)
    _locks.add(descriptor)
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
        _locks.discard(descriptor)
        os.close(descriptor)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last one that was cut off; none if there is no such
    file.

    Raises:
        NextLatError: it cannot be read, or a line is none of this package.
    """
    path = Path(directory) / METRICS
    if not path.is_file():
        return []
    try:
        texts = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise NextLatError(f"cannot read {path}: {error.strerror}.") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = _LINE.validate_json(text)
            if not isinstance(line.get("step"), int):
                raise ValueError("it names no step")
        except ValueError as error:
            raise NextLatError(
                f"line {number} of {path} is damaged ({first_line(error)}): restore or delete it."
            ) from error
        lines.append(line)
    return lines


def last_metrics(directory: Path) -> dict[str, Any] | None:
    """The last line of metrics.jsonl of a run that may be writing it now; None if there is none."""
    try:
        with (directory / METRICS).open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
            texts = file.read().split(b"\n")[:-1]
        line = _LINE.validate_json(texts[-1])
    except (OSError, ValueError, IndexError):
        return None
    return line if isinstance(line.get("step"), int) else None


def provenance(device: torch.device) -> dict[str, Any]:
    """What a run was made with: command line, versions, git commit, device, threads."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "nextlat": version("nextlat"),
        },
        "git": _git_commit(),
        "device": f"{device.type} ({name or platform.machine()})",
        "threads": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    """The commit that this package is run from, `+` appended when tracked files were changed; None
    outside of its repository."""
    file = Path(__file__)

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments], cwd=file.parent, capture_output=True, text=True, timeout=10
        )

    try:
        commit = git("rev-parse", "HEAD")
        if commit.returncode or not git("ls-files", file.name).stdout.strip():
            return None
        changed = git("diff", "--quiet", "HEAD").returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed else "")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], table: str = "") -> list[str]:
    """Dotted keys in which two recipes, as `to_dict` gives them, differ."""
    keys = []
    for key in {**old, **new}:
        full, a, b = f"{table}.{key}".lstrip("."), old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differences(a, b, full)
        elif a != b:
            keys.append(full)
    return keys
