"""Differences between trained models, with their errors, and what may be claimed from them.

Models of the same task are compared with a baseline seed by seed and item by item (pairs, walks, rows: every model meets the same
ones). A verdict is given by this rule and no other:

- one seed: better or worse if the difference is more than twice its standard error over items. The error then knows nothing of
  other seeds. A number without items (a speed) proves nothing from one seed;
- several seeds: better or worse if the mean difference lies outside its 95 % interval over seeds (Student's t, the differences
  paired by seed) and, where there are items, is more than twice its standard error over items too: seeds share the items;
- all else is within the noise.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from nextlat.errors import NextLatError
from nextlat.metrics import Score, mean_score, paired_difference
from nextlat.recipe import differences
from nextlat.report.glossary import describe, higher_is_better, order
from nextlat.report.runs import Run

Verdict = Literal["better", "worse", "within noise", "no claim"]

BASELINE = "next-token"
TITLES = {"next-token": "next-token", "nextlat": "NextLat"}
ITEM_ERRORS = 2.0  # standard errors over items beyond which a difference counts
CONFIDENCE = 0.95  # of the interval over seeds


@dataclass(frozen=True)
class Estimate:
    """A metric of one model: the mean over its seeds, the standard error (over seeds; of one seed, over items; None where it is
    unknown), and each seed's (value, standard error over items)."""

    value: float
    stderr: float | None
    seeds: dict[int, tuple[float, float | None]]


@dataclass(frozen=True)
class SeedDifference:
    """Model minus baseline at one seed, its standard error over items, and the verdict of this seed by itself."""

    value: float
    stderr: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Difference:
    """Model minus baseline over the seeds that both have.

    Attributes:
        value: mean difference. ours, theirs: the means that it is the difference of.
        stderr: of the mean difference: over seeds if there are several, over items if there is one; None where it is unknown.
        item_stderr: over items, whatever the seeds; None without items. items: how many there are.
        against: what is on the other side.
        seeds: the differences of the seeds.
        verdict: see the module.
    """

    value: float
    ours: float
    theirs: float
    stderr: float | None
    item_stderr: float | None
    items: int
    against: str
    seeds: dict[int, SeedDifference]
    verdict: Verdict


@dataclass(frozen=True)
class MetricComparison:
    """One metric of all models (by label) and what it differs by from the baseline's."""

    name: str
    higher_is_better: bool | None
    estimates: dict[str, Estimate]
    differences: dict[str, Difference]


@dataclass(frozen=True)
class TaskComparison:
    """All models of one task.

    Attributes:
        task: its name. fingerprint: of its world.
        models: label -> runs by seed; the baseline first. baseline: its label, None where there is no such run.
        metrics: in the order of the glossary.
        caveats: what else differs between the models than the objective, or is missing, one sentence each.
    """

    task: str
    fingerprint: str
    models: dict[str, dict[int, Run]]
    baseline: str | None
    metrics: list[MetricComparison]
    caveats: list[str]


@dataclass(frozen=True)
class Comparison:
    """The tasks of a report."""

    tasks: list[TaskComparison]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: numbers that are not finite are None."""
        return {
            "tasks": [
                {
                    "task": task.task,
                    "fingerprint": task.fingerprint,
                    "baseline": task.baseline,
                    "models": {
                        label: [
                            {"seed": seed, "objective": run.objective, "horizon": run.horizon, "run": str(run.directory)}
                            for seed, run in runs.items()
                        ]
                        for label, runs in task.models.items()
                    },
                    "caveats": task.caveats,
                    "metrics": [_finite(asdict(metric)) for metric in task.metrics],
                }
                for task in self.tasks
            ]
        }


def compare(runs: Sequence[Run], baseline: str = BASELINE) -> Comparison:
    """Compare the runs of each task with those of the baseline objective (where there are any).

    Runs that differ in their seed alone are one model.

    Raises:
        NextLatError: no runs; two runs of one recipe and seed; two recipes of the baseline objective; scores over different items.
    """
    if not runs:
        raise NextLatError("there are no runs to compare: name at least one run directory.")
    tasks = list(dict.fromkeys(run.task for run in runs))
    return Comparison([_compare_task([run for run in runs if run.task == task], baseline) for task in tasks])


def _compare_task(runs: list[Run], baseline: str) -> TaskComparison:
    models = _models(runs, baseline)
    base = next((label for label, seeds in models.items() if next(iter(seeds.values())).objective == baseline), None)
    metrics = [
        _compare_metric(name, models, base) for name in sorted({name for run in runs for name in run.metrics}, key=order)
    ]
    fingerprint = runs[0].record["task"]["fingerprint"]
    return TaskComparison(runs[0].task, fingerprint, models, base, metrics, _caveats(models, base))


# ---- which runs are one model ----


def _model_recipe(run: Run) -> dict[str, Any]:
    """What defines a model: its recipe without the seed, and without what cannot change the result."""
    left_out = ("seed", "gradient_accumulation", "run")
    kept = {key: value for key, value in run.recipe.items() if key not in left_out}
    return {**kept, "precision": run.recipe["run"]["precision"]}


def _models(runs: list[Run], baseline: str) -> dict[str, dict[int, Run]]:
    """label -> seed -> run, the baseline first, the others by objective and horizon."""
    groups: dict[str, dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: (run.objective != baseline, run.objective, run.horizon, run.seed)):
        group = groups.setdefault(json.dumps(_model_recipe(run), sort_keys=True), {})
        if run.seed in group:
            raise NextLatError(
                f"{group[run.seed].directory} and {run.directory} are runs of one recipe and seed: name one of them."
            )
        group[run.seed] = run
    alike: dict[str, list[dict[int, Run]]] = {}
    for group in groups.values():
        run = next(iter(group.values()))
        name = TITLES.get(run.objective, run.objective) + (f" d={run.horizon}" if run.horizon else "")
        alike.setdefault(name, []).append(group)
    models: dict[str, dict[int, Run]] = {}
    for name, found in alike.items():
        recipes = [_model_recipe(next(iter(group.values()))) for group in found]
        keys = list(dict.fromkeys(key for recipe in recipes[1:] for key in differences(recipes[0], recipe)))
        first = next(iter(found[0].values()))
        if len(found) > 1 and first.objective == baseline:
            raise NextLatError(
                f"the {baseline} runs are of {len(found)} recipes (they differ in {', '.join(keys)}): name those of one."
            )
        for recipe, group in zip(recipes, found, strict=True):
            label = ", ".join([name, *(f"{key.split('.')[-1]}={_look_up(recipe, key)}" for key in keys)])
            models[label if label not in models else f"{label} ({len(models)})"] = group
    return models


def _look_up(table: Mapping[str, Any], dotted: str) -> Any:
    value: Any = table
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _caveats(models: dict[str, dict[int, Run]], base: str | None) -> list[str]:
    found = []
    if base is None:
        return [f"There is no {BASELINE} run here, so nothing is compared."] if len(models) else []
    own = models[base]
    for label, runs in models.items():
        a, b = (_model_recipe(next(iter(group.values()))) for group in (own, runs))
        for key in differences(a, b):
            if not key.startswith("objective"):
                found.append(f"Not trained alike: {key} is {_look_up(b, key)} for {label} and {_look_up(a, key)} for {base}.")
        if alone := sorted(own.keys() ^ runs.keys()):
            seeds = ", ".join(map(str, alone))
            found.append(
                f"Seed{'s' * (len(alone) > 1)} {seeds} of {label} or {base} not on both sides: left out of the differences."
            )
    return found


# ---- one metric ----


def _compare_metric(name: str, models: dict[str, dict[int, Run]], base: str | None) -> MetricComparison:
    term = describe(name)
    estimates = {
        label: _estimate({seed: run for seed, run in runs.items() if name in run.metrics}, name)
        for label, runs in models.items()
        if any(name in run.metrics for run in runs.values())
    }
    found: dict[str, Difference] = {}
    for label, runs in models.items():
        if label == base:
            continue
        ours = {seed: run for seed, run in runs.items() if name in run.metrics}
        if term.reference is not None:
            pairs = {seed: _against_number(run, name, term.reference) for seed, run in ours.items()}
            against = term.reference_name
        elif base is not None:
            other = term.counterpart or name
            theirs = {seed: run for seed, run in models[base].items() if other in run.metrics}
            pairs = {seed: _against_run(run, name, theirs[seed], other) for seed, run in ours.items() if seed in theirs}
            against = f"the transformer of {base}" if term.counterpart else base
        else:
            continue
        if pairs:
            found[label] = _difference(name, pairs, against)
    return MetricComparison(name, higher_is_better(name), estimates, found)


def _estimate(runs: dict[int, Run], name: str) -> Estimate:
    seeds = {seed: (run.metrics[name], _known(run.stderr.get(name))) for seed, run in runs.items()}
    values = [value for value, _ in seeds.values()]
    over_seeds = mean_score(values)
    return Estimate(over_seeds.value, _known(over_seeds.stderr) if len(values) > 1 else next(iter(seeds.values()))[1], seeds)


Pair = tuple[float, float, Score | None]  # our value, theirs, and the difference over items


def _against_number(run: Run, name: str, reference: float) -> Pair:
    score = run.scores.get(name)
    return run.metrics[name], reference, None if score is None else mean_score(score.per_item - reference)


def _against_run(run: Run, name: str, other: Run, counterpart: str) -> Pair:
    score = None
    if name in run.scores and counterpart in other.scores:
        try:
            score = paired_difference(run.scores[name], other.scores[counterpart])
        except ValueError as error:
            raise NextLatError(
                f"{run.directory} and {other.directory} were measured on different items ({name}): run 'nextlat evaluate' on both again."
            ) from error
    return run.metrics[name], other.metrics[counterpart], score


def _difference(name: str, pairs: dict[int, Pair], against: str) -> Difference:
    direction = higher_is_better(name)
    seeds = {}
    for seed, (ours, theirs, score) in pairs.items():
        error = None if score is None else _known(score.stderr)
        seeds[seed] = SeedDifference(ours - theirs, error, verdict(ours - theirs, [(error, ITEM_ERRORS)], direction))
    per_item = [score.per_item for _, _, score in pairs.values() if score is not None]
    joint = mean_score(np.mean(per_item, axis=0)) if len(per_item) == len(pairs) else None
    item_stderr = None if joint is None else _known(joint.stderr)
    mean = mean_score([difference.value for difference in seeds.values()])
    stderr, tests = item_stderr, [(item_stderr, ITEM_ERRORS)]
    if len(pairs) > 1:
        stderr = _known(mean.stderr)
        tests = [(stderr, seed_errors(len(pairs))), *(tests if item_stderr is not None else [])]
    return Difference(
        value=mean.value,
        ours=float(np.mean([ours for ours, _, _ in pairs.values()])),
        theirs=float(np.mean([theirs for _, theirs, _ in pairs.values()])),
        stderr=stderr,
        item_stderr=item_stderr,
        items=0 if joint is None else len(joint.per_item),
        against=against,
        seeds=seeds,
        verdict=verdict(mean.value, tests, direction),
    )


def seed_errors(seeds: int) -> float:
    """Standard errors over so many seeds that a mean must exceed: Student's t, 95 %, two-sided (4.3 of three seeds, 12.7 of two)."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, seeds - 1))


def verdict(value: float, tests: Sequence[tuple[float | None, float]], direction: bool | None) -> Verdict:
    """What a difference allows to be said.

    Args:
        value: the difference.
        tests: (standard error, how many of them it must exceed); all must be passed. An unknown error allows no claim.
        direction: whether higher is better; None allows no claim.
    """
    if direction is None or not math.isfinite(value) or any(error is None for error, _ in tests):
        return "no claim"
    if value == 0 or any(error is not None and abs(value) <= errors * error for error, errors in tests):
        return "within noise"
    return "better" if (value > 0) == direction else "worse"


def _known(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
