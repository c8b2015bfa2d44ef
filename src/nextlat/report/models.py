"""Which runs are seeds of one model, what each model is called, and what besides the objective sets
models apart."""

import json
from collections.abc import Mapping
from typing import Any

from nextlat.errors import NextLatError
from nextlat.report.runs import Run
from nextlat.training.recipe import differences

TITLES = {
    "next-token": "next-token",
    "nextlat": "NextLat",
    "mtp": "MTP",
    "jtp": "JTP",
    "bst": "BST",
}  # in the order of the report

Models = dict[str, dict[int, Run]]  # label -> seed -> run


def group_models(runs: list[Run], baseline: str) -> Models:
    """The models of one task, the baseline first, the others by objective (as in `TITLES`) and
    horizon.

    A label is the objective with its horizon and, where several models share that, the settings in
    which their recipes differ.

    Raises:
        NextLatError: two runs of one recipe and seed; two recipes of the baseline objective.
    """
    groups: dict[str, dict[int, Run]] = {}
    known = [baseline, *TITLES]
    place = {
        run.objective: known.index(run.objective) if run.objective in known else len(known)
        for run in runs
    }
    for run in sorted(
        runs, key=lambda run: (place[run.objective], run.objective, run.horizon, run.seed)
    ):
        group = groups.setdefault(json.dumps(_model_recipe(run), sort_keys=True), {})
        if run.seed in group:
            raise NextLatError(
                f"{group[run.seed].directory} and {run.directory} are runs of one recipe and seed: name one of them."
            )
        group[run.seed] = run
    alike: dict[str, list[dict[int, Run]]] = {}
    for group in groups.values():
        run = first_run(group)
        name = TITLES.get(run.objective, run.objective) + (
            f" d={run.horizon}" if run.horizon else ""
        )
        alike.setdefault(name, []).append(group)
    models: Models = {}
    for name, found in alike.items():
        recipes = [_model_recipe(first_run(group)) for group in found]
        keys = list(
            dict.fromkeys(key for recipe in recipes[1:] for key in differences(recipes[0], recipe))
        )
        if len(found) > 1 and first_run(found[0]).objective == baseline:
            raise NextLatError(
                f"the {baseline} runs are of {len(found)} recipes (they differ in {', '.join(keys)}): name those of one."
            )
        for recipe, group in zip(recipes, found, strict=True):
            models[
                ", ".join(
                    [name, *(f"{key.split('.')[-1]}={_look_up(recipe, key)}" for key in keys)]
                )
            ] = group
    return models


def caveats(models: Models, base: str | None) -> list[str]:
    """What keeps the comparison with the baseline from being one of objectives alone, or complete:
    one sentence each."""
    if base is None:
        return ["There is no baseline run here, so nothing is compared."]
    found = []
    for label, runs in models.items():
        ours, theirs = _model_recipe(first_run(runs)), _model_recipe(first_run(models[base]))
        for key in differences(theirs, ours):
            if not key.startswith("objective"):
                a, b = _look_up(ours, key), _look_up(theirs, key)
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


def _model_recipe(run: Run) -> dict[str, Any]:
    """What defines a model: its recipe without the seed, and without what cannot change the result."""
    left_out = ("seed", "gradient_accumulation", "run")
    kept = {key: value for key, value in run.recipe.items() if key not in left_out}
    return {**kept, "precision": run.recipe["run"]["precision"]}


def _look_up(table: Mapping[str, Any], dotted: str) -> Any:
    value: Any = table
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
