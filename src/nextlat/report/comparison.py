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

Nothing is claimed about a metric whose direction is not known, nor about the speed of drafts that
changed the output.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from nextlat.errors import NextLatError
from nextlat.report.glossary import describe, higher_is_better, order
from nextlat.report.models import Models, caveats, first_run, group_models
from nextlat.report.runs import Run
from nextlat.report.solving import solving
from nextlat.scores import Score, mean_score, paired_difference, share_interval

Verdict = Literal["better", "worse", "within noise", "no claim"]

BASELINE = "next-token"
ITEM_ERRORS = 2.0  # standard errors over items beyond which a difference counts
CONFIDENCE = 0.95  # of the interval over seeds


@dataclass(frozen=True)
class Estimate:
    """A metric of one model: the mean over its seeds, the standard error (over seeds; of one seed,
    over items; None where it is unknown), each seed's (value, standard error over items), and of
    shares of items each seed's 95 % interval."""

    value: float
    stderr: float | None
    seeds: dict[int, tuple[float, float | None]]
    intervals: dict[int, tuple[float, float]]


@dataclass(frozen=True)
class SeedDifference:
    """Model minus baseline at one seed, its standard error over items, and the verdict of this seed
    by itself."""

    value: float
    stderr: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Difference:
    """Model minus baseline over the seeds that both have.

    Attributes:
        value: mean difference. ours, theirs: the means that it is the difference of.
        stderr: of the mean difference: over seeds if there are several, over items if there is one;
            None where it is unknown.
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
        models: label -> runs by seed; the baseline first. baseline: its label, None where there is
            no such run.
        metrics: in the order of the glossary.
        caveats: what else differs between the models than the objective, or is missing, one
            sentence each.
    """

    task: str
    fingerprint: str
    models: Models
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
                            {
                                "seed": seed,
                                "objective": run.objective,
                                "horizon": run.horizon,
                                "run": str(run.directory),
                            }
                            for seed, run in runs.items()
                        ]
                        for label, runs in task.models.items()
                    },
                    "caveats": task.caveats,
                    **_solving(task),
                    "metrics": [_finite(asdict(metric)) for metric in task.metrics],
                }
                for task in self.tasks
            ]
        }


def _solving(task: TaskComparison) -> dict[str, Any]:
    found = solving(task.task, task.models)
    return (
        {}
        if found is None
        else {
            "solving": {k: {str(s): asdict(one) for s, one in v.items()} for k, v in found.items()}
        }
    )


def compare(runs: Sequence[Run], baseline: str = BASELINE) -> Comparison:
    """Compare the runs of each task with those of the baseline objective (where there are any).

    Runs that differ in their seed alone are one model.

    Raises:
        NextLatError: no runs; two runs of one recipe and seed; two recipes of the baseline
            objective; scores over different items.
    """
    if not runs:
        raise NextLatError("there are no runs to compare: name at least one run directory.")
    tasks = list(dict.fromkeys(run.task for run in runs))
    return Comparison(
        [_compare_task([run for run in runs if run.task == task], baseline) for task in tasks]
    )


def _compare_task(runs: list[Run], baseline: str) -> TaskComparison:
    models = group_models(runs, baseline)
    base = next(
        (label for label, group in models.items() if first_run(group).objective == baseline), None
    )
    metrics = [
        _compare_metric(name, models, base)
        for name in sorted({name for run in runs for name in run.metrics}, key=order)
    ]
    fingerprint = runs[0].record["task"]["fingerprint"]
    return TaskComparison(runs[0].task, fingerprint, models, base, metrics, caveats(models, base))


def _compare_metric(name: str, models: Models, base: str | None) -> MetricComparison:
    term = describe(name)
    estimates = {
        label: _estimate({seed: run for seed, run in runs.items() if name in run.metrics}, name)
        for label, runs in models.items()
        if any(name in run.metrics for run in runs.values())
    }
    _check_items(name, models, term.counterpart)
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
            pairs = {
                seed: _against_run(run, name, theirs[seed], other)
                for seed, run in ours.items()
                if seed in theirs
            }
            against = f"the transformer of {base}" if term.counterpart else base
        else:
            continue
        if pairs:
            void = name.startswith("decoding_speedup") and any(
                run.decoding.get("identical") is False for run in ours.values()
            )
            found[label] = _difference(pairs, against, None if void else higher_is_better(name))
    return MetricComparison(name, higher_is_better(name), estimates, found)


def _check_items(name: str, models: Models, counterpart: str | None) -> None:
    """Whatever is paired must have been measured on the same items."""
    runs = [run for group in models.values() for run in group.values()]
    sizes = {
        len(run.scores[key].per_item): run
        for run in runs
        for key in (name, counterpart)
        if key in run.scores
    }
    if len(sizes) > 1:
        first, second, *_ = sizes.values()
        raise NextLatError(
            f"{first.directory} and {second.directory} were measured on different items ({name}): "
            "run 'nextlat evaluate' on both again."
        )


def _estimate(runs: dict[int, Run], name: str) -> Estimate:
    seeds = {seed: (run.metrics[name], _known(run.stderr.get(name))) for seed, run in runs.items()}
    values = [value for value, _ in seeds.values()]
    over_seeds = mean_score(values)
    error = _known(over_seeds.stderr) if len(values) > 1 else next(iter(seeds.values()))[1]
    intervals = {
        s: ends
        for s, run in runs.items()
        if name in run.scores and (ends := share_interval(run.scores[name]))
    }
    return Estimate(over_seeds.value, error, seeds, intervals)


Pair = tuple[float, float, Score | None]  # our value, theirs, and the difference over items


def _against_number(run: Run, name: str, reference: float) -> Pair:
    score = run.scores.get(name)
    return (
        run.metrics[name],
        reference,
        None if score is None else mean_score(score.per_item - reference),
    )


def _against_run(run: Run, name: str, other: Run, counterpart: str) -> Pair:
    if name not in run.scores or counterpart not in other.scores:
        return run.metrics[name], other.metrics[counterpart], None
    return (
        run.metrics[name],
        other.metrics[counterpart],
        paired_difference(run.scores[name], other.scores[counterpart]),
    )


def _difference(pairs: dict[int, Pair], against: str, direction: bool | None) -> Difference:
    seeds = {}
    for seed, (ours, theirs, score) in pairs.items():
        error = None if score is None else _known(score.stderr)
        seeds[seed] = SeedDifference(
            ours - theirs, error, verdict(ours - theirs, [(error, ITEM_ERRORS)], direction)
        )
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
    """Standard errors over so many seeds that a mean must exceed: Student's t, 95 %, two-sided (4.3
    of three seeds, 12.7 of two)."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, seeds - 1))


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
    if direction is None or not math.isfinite(value) or any(error is None for error, _ in tests):
        return "no claim"
    if value == 0 or any(
        error is not None and abs(value) <= errors * error for error, errors in tests
    ):
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
