"""Differences between trained models, with their errors, and what may be claimed from them.

Models of the same task are compared with a baseline seed by seed and item by item (pairs, walks,
rows: every model meets the same ones). A verdict is given by this rule and no other:

- one seed: better or worse if the difference is more than twice its standard error over items. The
  error then knows nothing of other seeds. A number without items (a speed) proves nothing from one
  seed;
- several seeds: better or worse if the mean difference lies outside its 95 % interval over seeds
  (Student's t, the differences paired by seed) and, where there are items, is more than twice its
  standard error over items too: seeds share the items;
- all else is within the noise.

Nothing is claimed about a metric of which neither direction is better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from nextlat.errors import NextLatError
from nextlat.report.runs import Models, Run, caveats, first_run, group_models
from nextlat.results import Metric, Solved, TaskFacts
from nextlat.scores import Score, mean_score, paired_difference

Verdict = Literal["better", "worse", "within noise", "no claim"]  # in the order of the report

BASELINE = "next-token"  # name of the objective that the others are compared with
NEXT_TOKEN = "next_token"  # name in metrics.jsonl of the part of the loss that every objective has
HELD_OUT = f"eval_{NEXT_TOKEN}"
ITEM_ERRORS = 2.0  # standard errors over items beyond which a difference counts
CONFIDENCE = 0.95  # of the interval over seeds


@dataclass(frozen=True)
class Estimate:
    """A metric of one model. Errors are None where they are unknown."""

    value: float  # mean over its seeds
    stderr: float | None  # over seeds; of one seed, over items
    seeds: dict[int, tuple[float, float | None]]  # value and standard error over items
    intervals: dict[int, tuple[float, float]]  # 95 %, of shares of items, by seed


@dataclass(frozen=True)
class SeedDifference:
    """The difference at one seed, its standard error over items, and the verdict of this seed by
    itself."""

    value: float
    stderr: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Difference:
    """Model minus baseline over the seeds that both have."""

    value: float  # mean difference
    ours: float  # mean of the model
    theirs: float  # mean of the baseline, or the fixed value that stands for it
    stderr: float | None  # of the mean difference: over several seeds, or else over items
    items: int  # how many the error of each seed is over; 0 = it has none
    against: str  # what is on the other side
    seeds: dict[int, SeedDifference]
    verdict: Verdict


@dataclass(frozen=True)
class MetricComparison:
    """One metric of all models (by label) and what it differs by from the baseline's."""

    metric: Metric
    estimates: dict[str, Estimate]
    differences: dict[str, Difference]


@dataclass(frozen=True)
class SeedSolving:
    """Whether a seed solves the task, and the step of the first evaluation from which on all
    held-out losses say so (None: never, or no evaluation shows it)."""

    solved: bool
    step: int | None


@dataclass(frozen=True)
class TaskComparison:
    """All models of one task."""

    task: TaskFacts
    models: Models  # the baseline first
    baseline: str | None  # its label, None where there is no such run
    metrics: list[MetricComparison]  # in the order of the task
    solving: dict[str, dict[int, SeedSolving]]  # by label and seed; empty where that is no question
    caveats: list[str]  # see `runs.caveats`

    @property
    def runs(self) -> list[Run]:
        """Those of all models."""
        return [run for group in self.models.values() for run in group.values()]

    @property
    def seeds(self) -> list[int]:
        """Those of all models."""
        return sorted({run.result.seed for run in self.runs})


def compare(runs: Sequence[Run], baseline: str = BASELINE) -> list[TaskComparison]:
    """Compare the runs of each task with those of the baseline objective (where there are any).

    Args:
        runs: of one task or several; those that differ in their seed alone are one model.
        baseline: name of the objective that the others are compared with.

    Raises:
        NextLatError: no runs; two runs of one recipe and seed; two recipes of the baseline
            objective; scores over different items.
    """
    if not runs:
        raise NextLatError("there are no runs to compare: name at least one run directory.")
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(run.result.task.name, []).append(run)
    return [_compare_task(group, baseline) for group in by_task.values()]


def _compare_task(runs: list[Run], baseline: str) -> TaskComparison:
    models = group_models(runs, baseline)
    first, group = next(iter(models.items()))
    base = first if first_run(group).result.objective.name == baseline else None
    facts = runs[0].result.task
    keys: list[str] = []  # in an order that agrees with that of every run
    for run in runs:
        place = 0
        for key in run.metrics:
            if key not in keys:
                keys.insert(place, key)
            place = keys.index(key) + 1
    return TaskComparison(
        task=facts,
        models=models,
        baseline=base,
        metrics=[_compare_metric(key, models, base) for key in keys],
        solving={} if facts.solved is None else _solving(facts.solved, models),
        caveats=caveats(models, base),
    )


def _compare_metric(key: str, models: Models, base: str | None) -> MetricComparison:
    having = {
        label: measured
        for label, runs in models.items()
        if (measured := {seed: run for seed, run in runs.items() if key in run.metrics})
    }
    # A run may declare that its value proves nothing (a speed bought with another output).
    declared = [run.metrics[key] for runs in having.values() for run in runs.values()]
    metric = next((m for m in declared if m.higher_is_better is not None), declared[0])
    _check_items({key, metric.counterpart or key}, models)
    fixed = metric.reference is not None
    against = metric.reference_name if fixed else f"{metric.counterpart_name} {base}".strip()
    theirs = models.get(base or "", {})
    found: dict[str, Difference] = {}
    for label, runs in having.items():
        beside = {seed: _pair(run, metric, theirs.get(seed)) for seed, run in runs.items()}
        pairs = {seed: pair for seed, pair in beside.items() if pair is not None}
        if pairs and label != base:
            clear = all(runs[seed].metrics[key].higher_is_better is not None for seed in pairs)
            found[label] = _difference(pairs, against, metric.higher_is_better if clear else None)
    return MetricComparison(metric, {k: _estimate(v, key) for k, v in having.items()}, found)


def _check_items(keys: set[str], models: Models) -> None:
    """Whatever is paired must have been measured on the same items."""
    runs = [run for group in models.values() for run in group.values()]
    sizes = {
        len(run.scores[key].per_item): run for run in runs for key in keys if key in run.scores
    }
    if len(sizes) > 1:
        first, second, *_ = sizes.values()
        raise NextLatError(
            f"{first.directory} and {second.directory} were measured on different items "
            f"({min(keys)}): run 'nextlat evaluate' on both again."
        )


def _estimate(runs: dict[int, Run], key: str) -> Estimate:
    seeds = {seed: (run.value(key), run.metrics[key].stderr) for seed, run in runs.items()}
    over_seeds = mean_score([value for value, _ in seeds.values()])
    error = _error(over_seeds) if len(seeds) > 1 else next(iter(seeds.values()))[1]
    found = {seed: run.metrics[key].interval for seed, run in runs.items()}
    intervals = {seed: interval for seed, interval in found.items() if interval is not None}
    return Estimate(over_seeds.value, error, seeds, intervals)


Pair = tuple[float, float, Score | None]  # our value, theirs, and the difference over items


def _pair(run: Run, metric: Metric, other: Run | None) -> Pair | None:
    """A run beside the fixed value of a metric, or else beside a run of the baseline."""
    ours, counterpart = run.scores.get(metric.key), metric.counterpart or metric.key
    if metric.reference is not None:
        score = ours and mean_score(ours.per_item - metric.reference)
        return run.value(metric.key), metric.reference, score
    if other is None or counterpart not in other.metrics:
        return None
    theirs = other.scores.get(counterpart)
    score = paired_difference(ours, theirs) if ours and theirs else None
    return run.value(metric.key), other.value(counterpart), score


def _difference(pairs: dict[int, Pair], against: str, direction: bool | None) -> Difference:
    seeds = {}
    for seed, (ours, theirs, score) in pairs.items():
        change, error = ours - theirs, _error(score)
        seeds[seed] = SeedDifference(
            change, error, verdict(change, [(error, ITEM_ERRORS)], direction)
        )
    per_item = [score.per_item for _, _, score in pairs.values() if score]
    joint = mean_score(np.mean(per_item, axis=0)) if len(per_item) == len(pairs) else None
    mean = mean_score([difference.value for difference in seeds.values()])
    stderr = _error(joint)
    tests = [(stderr, ITEM_ERRORS)]
    has_items = stderr is not None
    if len(pairs) > 1:
        # Student's t, two-sided: 12.7 standard errors of two seeds, 4.3 of three.
        limit = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(pairs) - 1))
        stderr = _error(mean)
        tests = [(stderr, limit), *(tests if has_items else [])]
    return Difference(
        value=mean.value,
        ours=float(np.mean([ours for ours, _, _ in pairs.values()])),
        theirs=float(np.mean([theirs for _, theirs, _ in pairs.values()])),
        stderr=stderr,
        items=len(joint.per_item) if joint and has_items else 0,
        against=against,
        seeds=seeds,
        verdict=verdict(mean.value, tests, direction),
    )


def verdict(
    value: float, tests: Sequence[tuple[float | None, float]], direction: bool | None
) -> Verdict:
    """What a difference allows to be said.

    Args:
        value: the difference.
        tests: (standard error, how many of them it must exceed); all must be passed. An unknown
            error allows no claim.
        direction: whether higher is better; None allows no claim.
    """
    limits = [errors * error for error, errors in tests if error is not None]
    if direction is None or not math.isfinite(value) or len(limits) < len(tests):
        return "no claim"
    if abs(value) <= max(limits, default=0.0):
        return "within noise"
    return "better" if (value > 0) == direction else "worse"


def _solving(solved: Solved, models: Models) -> dict[str, dict[int, SeedSolving]]:
    found: dict[str, dict[int, SeedSolving]] = {}
    for label, runs in models.items():
        for seed, run in runs.items():
            if solved.metric in run.metrics:
                enough = run.value(solved.metric) >= solved.at_least
                one = SeedSolving(enough, solved_at(run, solved.loss_below))
                found.setdefault(label, {})[seed] = one
    return found


def solved_at(run: Run, loss_below: float | None) -> int | None:
    """The step of the first evaluation from which on all held-out losses are below a limit.

    Args:
        run: whose metrics.jsonl is looked at.
        loss_below: the limit, in nats; None = there is none, and no step.
    """
    if loss_below is None:
        return None
    steps, losses = run.curve(HELD_OUT)
    unsolved = np.flatnonzero(losses >= loss_below)
    return next(map(int, steps[unsolved.max(initial=-1) + 1 :]), None)


def _error(score: Score | None) -> float | None:
    """Its standard error, None where it is unknown."""
    return score.stderr if score and math.isfinite(score.stderr) else None
