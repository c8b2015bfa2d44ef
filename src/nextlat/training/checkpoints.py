"""The checkpoints of a run: which are whole, what is read from them, and how old ones go.

A checkpoint gets its name only when it is complete: damage comes from outside, from a copy that
broke off, or from a failing disk.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from nextlat.errors import NextLatError, first_line
from nextlat.files import TEMPORARY, remove, write_errors
from nextlat.validation import Settings
from nextlat.weights import MODEL_FILES, STATE_FILES, check_sums

SHARDS = "optimizer"  # folder of the optimiser's state, where it was in shards
NEEDED = ("config.json", "nextlat/objective.json", "nextlat/objective.safetensors")
OF_PARAMETER_SHAPE = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
_NAME = re.compile(r"checkpoint-(\d+)")


class _TrainerState(Settings, extra="allow"):
    """What a resumed run takes from trainer_state.json."""

    global_step: int
    num_input_tokens_seen: int
    epoch: float | None
    total_flos: float
    max_steps: int
    num_train_epochs: int | None = None
    train_batch_size: int | None = None
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    log_history: list[dict[str, Any]] = []
    stateful_callbacks: dict[str, Any] = {}


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run by their step, whole or not."""
    found = [path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Optimiser steps done at a checkpoint, from its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def last_complete_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and one sentence about each newer one that is not."""
    faults: list[str] = []
    for checkpoint in reversed(checkpoints(directory)):
        fault = _model_fault(checkpoint) or _state_fault(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint.name} is damaged ({fault})")
    return None, faults


def _model_fault(directory: Path) -> str | None:
    """What is wrong with the files of a saved model, or None."""
    index = directory / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    for path in [*(directory / name for name in NEEDED), *sorted(directory.rglob("*.json"))]:
        fault = None if path.is_file() else "is missing"
        if path.suffix == ".json" and fault is None:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                weights = {*content["weight_map"].values()} if path == index else weights
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                fault = f"is corrupt ({first_line(e)})"
        if fault:
            return f"{path.relative_to(directory)} {fault}"
    for name in [*sorted(weights), "nextlat/objective.safetensors"]:
        try:
            with safe_open(directory / name, "pt"):  # which compares its length with its header
                pass
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, SafetensorError) as error:
            return f"{name} is truncated or corrupt ({first_line(error)})"
    return _sums_fault(directory, MODEL_FILES)


def _sums_fault(directory: Path, patterns: Sequence[str]) -> str | None:
    try:
        check_sums(directory, patterns)
    except NextLatError as error:
        return str(error).partition(":")[0].removeprefix(f"{directory}/")
    return None


def load_state(path: Path, *, mmap: bool = False) -> Any:
    """A file that `torch.save` wrote, read as tensors and plain containers: no code in it is run.

    Args:
        path: of the file.
        mmap: leave the tensors on the disk.

    Raises:
        NextLatError: it is corrupt, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # whose checksums torch does not compare
            if archive.testzip() is not None:
                raise NextLatError("is corrupt")
        with safe_globals():  # numpy's, of the random state
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise NextLatError("is missing") from error
    except UnpicklingError as error:
        raise NextLatError("holds something else than tensors and numbers") from error
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise NextLatError(f"is corrupt ({first_line(error)})") from error


def load_trainer_state(checkpoint: Path) -> TrainerState:
    """trainer_state.json.

    Raises:
        NextLatError: it is missing or corrupt.
    """
    path = checkpoint / "trainer_state.json"
    try:
        _TrainerState.from_json(json.loads(path.read_text(encoding="utf-8")), path.name)
        return TrainerState.load_from_json(str(path))
    except FileNotFoundError as error:
        raise NextLatError(f"{path.name} is missing") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise NextLatError(f"{path.name} is corrupt ({first_line(error)})") from error


def _state_fault(checkpoint: Path) -> str | None:
    """What is wrong with the optimiser's and the Trainer's part of a checkpoint, or None."""
    random_states = [path.name for path in sorted(checkpoint.glob("rng_state*.pth"))]
    for name in ("optimizer.pt", "scheduler.pt", *(random_states or ["rng_state.pth"])):
        try:
            load_state(checkpoint / name, mmap=True)
        except NextLatError as error:
            return f"{name} {error}"
    try:
        state = load_trainer_state(checkpoint)
    except NextLatError as error:
        return str(error).rstrip(".")
    if state.global_step != checkpoint_step(checkpoint):
        return "trainer_state.json is of another step"
    return _sums_fault(checkpoint, STATE_FILES)


def rotate_checkpoints(directory: Path, newest: int, keep: int, spared: Path | None = None) -> None:
    """Delete all but the last checkpoints up to a step, and any beyond it: a run went on from
    before those.

    Args:
        directory: of the run.
        newest: the step.
        keep: how many stay.
        spared: one that stays in any case.
    """
    found = checkpoints(directory)
    known = [path for path in found if checkpoint_step(path) <= newest]
    kept = {*known[max(len(known) - keep, 0) :], spared}
    with write_errors(directory):
        for path in found:
            if path not in kept:
                # Renamed first: a directory that is half deleted must not look like a checkpoint.
                doomed = path.with_name(f"{TEMPORARY}{path.name}-old")
                remove(doomed)
                path.replace(doomed)
                remove(doomed)


@contextmanager
def of_this_run(path: Path) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever torch makes of what it was not made for
        raise NextLatError(
            f"{path} is not of this run ({first_line(error)}): remove {path.parent} to go on from "
            "the checkpoint before it, or choose another run directory."
        ) from error


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Compare what torch does not compare before it computes with it.

    Raises:
        ValueError: the state belongs to other parameters or another optimiser.
    """
    groups = optimizer.state_dict()["param_groups"]  # parameters by their numbers
    for own, other in zip(groups, state["param_groups"], strict=True):
        if own["params"] != other["params"]:
            raise ValueError("it is of a model with other parameters")
        for key, value in other.items():  # the learning rate follows from the schedule
            same = type(value) is type(own[key]) and (key == "lr" or value == own[key])
            if not same:
                raise ValueError(f"its {key} is {value!r} and not {own[key]!r}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stateless = all(group.get("momentum") == 0 for group in groups)  # plain SGD
    if not state["state"] and not stateless:
        raise ValueError("it is empty")
    if not state["state"].keys() <= {*range(len(parameters))}:
        raise ValueError("it is of a model with other parameters")
    for index, values in state["state"].items():
        tensors = {name: x for name, x in values.items() if isinstance(x, torch.Tensor)}
        own = parameters[index]
        for name in OF_PARAMETER_SHAPE & tensors.keys():
            x = tensors[name]
            if (x.shape, x.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"{name} of parameter {index} is {tuple(x.shape)} {x.dtype}, the parameter "
                    f"{tuple(own.shape)} {own.dtype}"
                )
        if "exp_avg" in values and not (
            {"exp_avg", "exp_avg_sq"} <= tensors.keys()
            and torch.as_tensor(values["step"]).ndim == 0
            and torch.as_tensor(values["step"]).is_floating_point()
        ):
            raise ValueError(f"the state of parameter {index} is not whole")
