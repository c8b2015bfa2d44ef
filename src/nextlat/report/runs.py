"""Finished, evaluated run directories read into memory, checked, and grouped into models: runs that
differ in their seed alone."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nextlat.errors import NextLatError
from nextlat.objectives import OBJECTIVES
from nextlat.results import RESULTS, SCORES, MeasuredMetric, Result, read_results, read_scores
from nextlat.scores import Score
from nextlat.training.run_directory import differences, read_finished, read_metrics


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory.

    Attributes:
        directory: where it lies.
        record: run.json.
        log: the lines of metrics.jsonl.
        result: its entry in results.json.
        scores: key of a metric -> what every item contributed, for the metrics that have items.
    """

    directory: Path
    record: dict[str, Any]
    log: list[dict[str, Any]]
    result: Result
    scores: Mapping[str, Score]

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as `Recipe.to_dict` gave it."""
        return self.record["recipe"]

    @cached_property
    def metrics(self) -> dict[str, MeasuredMetric]:
        """Key -> metric, in the order of results.json."""
        return {metric.key: metric for metric in self.result.metrics}

    def value(self, key: str) -> float:
        """Of a metric, NaN where it is not finite."""
        value = self.metrics[key].value
        return math.nan if value is None else value

    def curve(self, name: str) -> np.ndarray:
        """(2, points) steps and values of what metrics.jsonl logged under a name."""
        points = [
            (line["step"], line[name])
            for line in self.log
            if isinstance(line.get(name), int | float)
        ]
        return np.array(points, dtype=np.float64).reshape(-1, 2).T


Models = dict[str, dict[int, Run]]  # label -> seed -> run


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read run directories; one that is named twice counts once. The logs that a comparison leaves
    beside its runs are passed over, so that `runs/*` names them all.

    Args:
        paths: of the directories.

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
        first = next(other for other in runs if other.result.task.name == run.result.task.name)
        both = f"{first.directory} and {run.directory} were"
        if run.record["task"]["fingerprint"] != first.record["task"]["fingerprint"]:
            raise NextLatError(f"{both} trained in different worlds: report on them separately.")
        if keys := ", ".join(differences(first.recipe["task"], run.recipe["task"], "task")):
            raise NextLatError(f"{both} measured differently ({keys}): report on them separately.")
    return runs


def _read_run(path: Path) -> Run:
    made = "name one that 'nextlat train' made"
    record = read_finished(path, made, f"then 'nextlat evaluate {path}'")
    again = f"run 'nextlat evaluate {path}' again"
    results = read_results(path)
    if len(results) != 1:
        raise NextLatError(f"{path / RESULTS} is of {len(results)} runs and not of one: {again}.")
    run = Run(path, record, read_metrics(path), results[0], read_scores(path))
    recipe, result = run.recipe, run.result
    expected = (recipe["task"]["name"], recipe["objective"], recipe["seed"])
    if (result.task.name, result.objective.name, result.seed) != expected:
        raise NextLatError(f"{path / RESULTS} is of another run than {path / 'run.json'}: {again}.")
    for key, score in run.scores.items():
        value = run.value(key) if key in run.metrics else math.inf
        if not np.isclose(score.value, value, rtol=1e-6, atol=1e-9, equal_nan=True):
            raise NextLatError(
                f"{path / SCORES} and {path / RESULTS} do not belong together ({key} differs): "
                f"{again}."
            )
    return run


def group_models(runs: list[Run], baseline: str) -> Models:
    """The models of one task, the baseline first, the others by objective and horizon.

    A label is the title of the objective with its horizon and, where several models share that, the
    settings in which their recipes differ.

    Args:
        runs: of one task.
        baseline: name of the objective that the others are compared with.

    Of several recipes of the baseline objective, that one is the baseline which is most like the
    other models.

    Raises:
        NextLatError: two runs of one recipe and seed; several recipes of the baseline objective of
            which no single one is most like the others.
    """
    order = [baseline, *OBJECTIVES]

    def position(run: Run) -> tuple[int, str, int, int]:
        objective = run.result.objective
        place = order.index(objective.name) if objective.name in order else len(order)
        return place, objective.name, objective.horizon, run.result.seed

    groups: dict[str, dict[int, Run]] = {}
    for run in sorted(runs, key=position):
        group = groups.setdefault(json.dumps(_model_recipe(run), sort_keys=True), {})
        if run.result.seed in group:
            raise NextLatError(
                f"{group[run.result.seed].directory} and {run.directory} are runs of one recipe "
                "and seed: name one of them."
            )
        group[run.result.seed] = run
    alike: dict[str, list[dict[int, Run]]] = {}
    for group in groups.values():
        objective = first_run(group).result.objective
        horizon = f" d={objective.horizon}" if objective.horizon else ""
        alike.setdefault(objective.title + horizon, []).append(group)
    models: Models = {}
    others = [group for group in groups.values() if not _is_of(group, baseline)]

    def foreign(group: dict[int, Run]) -> int:
        """Settings but those of the objective in which it differs from models of others."""
        return sum(len(_unlike(first_run(group), first_run(other))) for other in others)

    for name, found in alike.items():
        if len(found) > 1 and _is_of(found[0], baseline):
            found.sort(key=foreign)
        recipes = [_model_recipe(first_run(group)) for group in found]
        keys = dict.fromkeys(key for one in recipes for key in differences(recipes[0], one))
        if len(found) > 1 and _is_of(found[0], baseline) and foreign(found[0]) == foreign(found[1]):
            raise NextLatError(
                f"the {baseline} runs are of {len(found)} recipes (they differ in "
                f"{', '.join(keys)}): name those of one."
            )
        for recipe, group in zip(recipes, found, strict=True):
            apart = [f"{key.split('.')[-1]}={look_up(recipe, key)}" for key in keys]
            models[", ".join([name, *apart])] = group
    return models


def caveats(models: Models, base: str | None) -> list[str]:
    """What keeps the comparison with the baseline from being one of objectives alone, or complete:
    one sentence each.

    Args:
        models: of one task.
        base: label of the baseline; None = there is none.
    """
    if base is None:
        return ["There is no baseline run here, so nothing is compared."]
    found = []
    theirs = first_run(models[base])
    for label, runs in models.items():
        ours = first_run(runs)
        for key in _unlike(theirs, ours):
            a, b = look_up(_model_recipe(ours), key), look_up(_model_recipe(theirs), key)
            found.append(f"Not trained alike: {key} is {a} for {label} and {b} for {base}.")
        if alone := sorted(models[base].keys() ^ runs.keys()):
            seeds = f"Seed{'s' * (len(alone) > 1)} {', '.join(map(str, alone))}"
            found.append(
                f"{seeds} of {label} or {base} not on both sides: left out of the differences."
            )
    return found


def first_run(runs: dict[int, Run]) -> Run:
    """One run of a model, for what is the same in all."""
    return next(iter(runs.values()))


def _is_of(group: dict[int, Run], objective: str) -> bool:
    return first_run(group).result.objective.name == objective


def _unlike(one: Run, other: Run) -> list[str]:
    """Dotted keys, but those of the objective, in which the recipes of two models differ."""
    keys = differences(_model_recipe(one), _model_recipe(other))
    return [key for key in keys if not key.startswith("objective")]


def _model_recipe(run: Run) -> dict[str, Any]:
    """What defines a model: its recipe without the seed and what cannot change the result."""
    left_out = ("seed", "gradient_accumulation", "run")
    kept = {key: value for key, value in run.recipe.items() if key not in left_out}
    return {**kept, "precision": run.recipe["run"]["precision"]}


def look_up(table: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        table = table.get(key) if isinstance(table, Mapping) else None
    return table
