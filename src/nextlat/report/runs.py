"""Finished, evaluated run directories read into memory: everything that tables, plots and the page
are made of."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from nextlat.errors import NextLatError
from nextlat.evaluation import RESULTS, SCORES, read_results
from nextlat.scores import Score, mean_score
from nextlat.tasks.hmm import BELIEFS
from nextlat.training.run_directory import read_metrics, read_record

MAP = "map.json"


@dataclass(frozen=True, eq=False)
class Beliefs:
    """beliefs.json: `true` and `decoded` (places, states) beliefs, and the share of variance
    explained (R\N{SUPERSCRIPT TWO})."""

    true: np.ndarray
    decoded: np.ndarray
    r2: float


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory.

    Attributes:
        directory: where it lies. task, objective, horizon, seed: as in results.json.
        record: run.json. log: the lines of metrics.jsonl.
        metrics: name -> value; stderr: name -> standard error over items, where it is known.
        scores: name -> `Score` with what every item contributed, for the metrics that have items.
        curves, decoding: as in results.json. map: the content of map.json. beliefs: that of
            beliefs.json. None where there is none.
    """

    directory: Path
    task: str
    objective: str
    horizon: int
    seed: int
    record: dict[str, Any]
    log: list[dict[str, Any]]
    metrics: dict[str, float]
    stderr: dict[str, float]
    scores: dict[str, Score]
    curves: dict[str, list[float]]
    decoding: dict[str, Any]
    map: dict[str, Any] | None
    beliefs: Beliefs | None

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as `Recipe.to_dict` gave it."""
        return self.record["recipe"]


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read run directories; one that is named twice counts once. The logs that a comparison leaves
    beside its runs are passed over, so that `runs/*` names them all.

    Raises:
        NextLatError: none is given; one is no run, not finished, not evaluated or corrupt; or they
            cannot be compared because they lived in different worlds or were measured differently.
    """
    places = {
        path.resolve(): path
        for path in map(Path, paths)
        if not (path.suffix == ".log" and path.is_file())
    }
    if not places:
        raise NextLatError("there are no runs to report on: name at least one run directory.")
    runs = [_read_run(path) for path in places.values()]
    for run in runs:
        first = next(other for other in runs if other.task == run.task)
        if run.record["task"]["fingerprint"] != first.record["task"]["fingerprint"]:
            raise NextLatError(
                f"{first.directory} and {run.directory} were trained in different worlds: report on them separately."
            )
        if keys := [
            key
            for key, value in first.recipe["task"].items()
            if run.recipe["task"].get(key) != value
        ]:
            raise NextLatError(
                f"{first.directory} and {run.directory} were measured differently (task.{', task.'.join(keys)}): "
                "report on them separately."
            )
    return runs


def _read_run(path: Path) -> Run:
    record = read_record(path)
    if record is None:
        raise NextLatError(
            f"{path} is not a run directory (no run.json): name one that 'nextlat train' made."
        )
    if record["status"] != "finished":
        raise NextLatError(
            f"the run {path} is not finished: give the command that started it again, then 'nextlat evaluate {path}'."
        )
    again = f"run 'nextlat evaluate {path}' again"
    try:
        [entry] = read_results(path)
        values = {name: float(value) for name, value in entry["metrics"].items()}
        run = Run(
            directory=path,
            task=str(entry["task"]),
            objective=str(entry["objective"]),
            horizon=int(entry["horizon"]),
            seed=int(entry["seed"]),
            record=record,
            log=read_metrics(path),
            metrics={name: value for name, value in values.items() if not name.endswith("_stderr")},
            stderr={
                name.removesuffix("_stderr"): value
                for name, value in values.items()
                if name.endswith("_stderr")
            },
            scores=_read_scores(path / SCORES),
            curves={name: [float(x) for x in curve] for name, curve in entry["curves"].items()},
            decoding=dict(entry["decoding"]),
            map=_read_artifact(path / MAP),
            beliefs=_read_beliefs(path / BELIEFS),
        )
        recipe = run.recipe
        found, expected = (
            (run.task, run.objective, run.seed),
            (recipe["task"]["name"], recipe["objective"], recipe["seed"]),
        )
        fingerprint = record["task"]["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NextLatError(
            f"the results in {path} are corrupt ({type(error).__name__}: {error}): {again}."
        ) from error
    if found != expected or not isinstance(fingerprint, str):
        raise NextLatError(f"{path / RESULTS} is of another run than {path / 'run.json'}: {again}.")
    for name, score in run.scores.items():
        if not np.isclose(score.value, run.metrics.get(name, np.nan), rtol=1e-6, atol=1e-9):
            raise NextLatError(
                f"{path / SCORES} and {path / RESULTS} do not belong together ({name} differs): {again}."
            )
    return run


def _read_scores(path: Path) -> dict[str, Score]:
    if not path.exists():
        return {}
    try:
        return {name: mean_score(items) for name, items in sorted(load_file(path).items())}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _read_artifact(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _read_beliefs(path: Path) -> Beliefs | None:
    content = _read_artifact(path)
    if content is None:
        return None
    try:
        true, decoded = (np.array(content[name], dtype=np.float64) for name in ("true", "decoded"))
        r2 = float(content["r2"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {type(error).__name__}: {error}") from error
    if (
        true.ndim != 2
        or true.shape != decoded.shape
        or not np.isfinite([*true.flat, *decoded.flat, r2]).all()
    ):
        raise ValueError(
            f"{path.name}: true and decoded beliefs of shapes {true.shape} and {decoded.shape}"
        )
    return Beliefs(true, decoded, r2)
