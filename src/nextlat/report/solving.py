"""Path-Star: which seeds solve it, and at which step each of them found the branch.

Runs of this task fall into one of two basins, so that their mean says little. A seed solves it if
it gives at least 99 % of the paths exactly. It found the branch at the first evaluation from which
on its held-out loss stays below a tenth of what guessing
the branch costs: guessing one of d arms is ln d nats at one of the l + 1 tokens of an answer (the
path and the end), all others being forced, so the threshold is ln d / (10 (l + 1)). A calibrated
model below it is right at the branch in about 99 % of the graphs for two arms, in 97 % for five.
"""

import math
from dataclasses import dataclass

from nextlat.report.models import Models
from nextlat.report.runs import Run

TASK, METRIC = "path-star", "exact_path_accuracy"
SOLVED = 0.99  # share of exact paths
OF_GUESSING = 0.1  # share of the loss of guessing
HELD_OUT = "eval_next_token"


@dataclass(frozen=True)
class SeedSolving:
    """One seed: whether it solves the task, and the step at which it found the branch (None: not,
    or no evaluation shows it)."""

    solved: bool
    step: int | None


Solving = dict[str, dict[int, SeedSolving]]  # label -> seed -> what became of it


def solving(task: str, models: Models) -> Solving | None:
    """Who solves Path-Star, and when; None for another task, or where it was not measured."""
    found = {
        label: {
            seed: SeedSolving(run.metrics[METRIC] >= SOLVED, found_at(run))
            for seed, run in runs.items()
            if METRIC in run.metrics
        }
        for label, runs in models.items()
    }
    found = {label: seeds for label, seeds in found.items() if seeds}
    return found if task == TASK and found else None


def threshold(run: Run) -> float | None:
    """Held-out loss (nats per token of the answer) below which the branch is found; None where the
    recipe does not tell the graph."""
    settings = run.recipe["task"]
    if not {"arms", "length"} <= settings.keys():
        return None
    return OF_GUESSING * math.log(settings["arms"]) / (settings["length"] + 1)


def found_at(run: Run) -> int | None:
    """The step of the first evaluation from which on all held-out losses are below the threshold."""
    limit = threshold(run)
    step = None
    for line in run.log:
        if limit is not None and isinstance(line.get(HELD_OUT), int | float):
            if line[HELD_OUT] >= limit:
                step = None
            elif step is None:
                step = line["step"]
    return step


def definition() -> str:
    """What it means to solve it, and the step."""
    return (
        f"A seed solves it with at least {SOLVED:.0%} of the paths exact. The step is that of the first evaluation from which on the "
        f"held-out loss stays below {OF_GUESSING:.0%} of what guessing the branch costs."
    )


def sentences(found: Solving) -> list[str]:
    """The same in words."""
    parts = []
    for label, seeds in found.items():
        solved = {seed: one.step for seed, one in seeds.items() if one.solved}
        steps = ", ".join(
            f"{step:,} (seed {seed})" for seed, step in solved.items() if step is not None
        )
        parts.append(
            f"{label} {len(solved)} of {len(seeds)}" + (f", from step {steps}" if steps else "")
        )
    return [f"Seeds that solve it: {'; '.join(parts)}. {definition()}"]
