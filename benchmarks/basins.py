"""Which Path-Star runs fall into the shortcut, told early: `python benchmarks/basins.py STUDY.json
--out docs/path-star/basins.json`, after `studies.py path-star-basins`.

A model that walks every arm and guesses the branch has a loss of ln(arms) / length nats a token.
Every run passes by there. What tells whether it stays is the KL at that moment, when the next-token
loss first comes down to NEAR times that of guessing: where the dynamics still foretell the
next-token distribution badly, the latent losses pull the run through; where they have become good
at it, nothing does, and the run waits on the plateau for a chance.

Told of every run: that KL, the verdict, and the steps that it waited, until its loss was FAR times
that of guessing. The limit (and NEAR) is chosen on the seeds from 10 on, between the runs that wait
longer than LONG steps and the others, and judged on those below.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import binomtest

from nextlat.files import write_json
from nextlat.training.recipe import load_recipe

NEAR, FAR = 1.15, 0.5  # times the loss of guessing
LONG = 250  # steps
CHOSEN_FROM = 10  # seeds


def passes(curve: Sequence[Sequence[float]], level: float) -> float:
    """The step at which a curve first comes down to a level, infinite if it never does."""
    steps, values = np.asarray(curve, dtype=float)
    below = np.flatnonzero(values <= level)
    if not below.size:
        return math.inf
    i = int(below[0])
    if i == 0:
        return float(steps[0])
    share = (values[i - 1] - level) / (values[i - 1] - values[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def told(row: dict[str, Any], seed: str, one: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of one run; None if it never came near the loss of guessing."""
    task: Any = load_recipe(row["recipe"], row["settings"], objective=row["objective"]).task
    guessing = math.log(task.arms) / task.length
    loss, kl = one["curves"]["next_token"], one["curves"]["kl"]
    near, far = passes(loss, NEAR * guessing), passes(loss, FAR * guessing)
    if math.isinf(near):
        return None
    return {
        "variant": row["variant"], "seed": int(seed), "guessing": round(guessing, 4),
        "step": round(near), "kl": float(f"{np.interp(near, *kl):.3g}"),
        "waited": None if math.isinf(far) else round(far - near),
        "found_at": one["found_at"], "exact": one["exact_path_accuracy"],
    }  # fmt: skip


def waits(run: dict[str, Any]) -> bool:
    return run["waited"] is None or run["waited"] > LONG


def chosen_limit(runs: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """The KL that divides those that wait from the others with the fewest errors, and how many;
    between two runs, at the geometric mean."""
    kls = sorted(run["kl"] for run in runs)
    limits = [math.sqrt(a * b) for a, b in itertools.pairwise(kls)]
    errors = [sum((run["kl"] < x) != waits(run) for run in runs) for x in limits]
    best = int(np.argmin(errors))
    return limits[best], errors[best]


def shares(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each variant, how many found the branch, with a 95 % interval (Wilson)."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(run["variant"] for run in runs):
        of = [run for run in runs if run["variant"] == name]
        solved = sum(run["found_at"] is not None for run in of)
        ci = binomtest(solved, len(of)).proportion_ci(method="wilson")
        interval = [round(ci.low, 3), round(ci.high, 3)]
        found[name] = {"found": solved, "of": len(of), "interval": interval}
    return found


def picture(
    runs: Sequence[dict[str, Any]], curves: dict[Any, Any], limit: float, path: Path
) -> None:
    """Left: every run's way, loss to the left and KL upwards; right: how long it waited."""
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["variant"] for r in runs))}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for run in runs:
        one, colour = curves[run["variant"], run["seed"]], colours[run["variant"]]
        after = slice(list(one["kl"][1]).index(max(one["kl"][1][:20])), None)
        style = "--" if waits(run) else "-"
        left.plot(one["next_token"][1][after], one["kl"][1][after], style, color=colour, lw=0.8)
        waited = run["waited"] if run["waited"] is not None else 3000
        mark = "o" if run["found_at"] is not None else "x"
        right.plot(run["kl"], max(waited, 10), mark, color=colour, ms=5)
    guessing = runs[0]["guessing"]
    left.axvline(NEAR * guessing, color="0.6", lw=0.8)
    left.text(NEAR * guessing * 1.03, 2.2e-3, "the verdict", rotation=90, fontsize=8, color="0.4")
    left.axvline(guessing, color="0.6", lw=0.8, ls=":")
    left.text(guessing * 0.86, 2.2e-3, "branch guessed", rotation=90, fontsize=8, color="0.4")
    left.plot([NEAR * guessing], [limit], "k_", ms=14)
    left.set(xscale="log", yscale="log", xlim=(0.8, 4e-3), ylim=(2e-3, 0.6))
    left.set(xlabel="next-token loss, nats", ylabel="KL, nats", title="From right to left in time")
    left.invert_xaxis()
    left.set_xlim(4e-3, 0.8)
    right.axvline(limit, color="k", lw=0.8)
    right.set(xscale="log", yscale="log", xlabel="KL at the verdict, nats")
    right.set_xticks(
        [0.03, 0.05, 0.1, 0.2, 0.3], ["0.03", "0.05", "0.1", "0.2", "0.3"], minor=False
    )
    right.set_xticks([], minor=True)
    right.set(ylabel="steps waited on the plateau", title="x: not found within the run")
    for name, colour in colours.items():
        right.plot([], [], "o", color=colour, label=name)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="STUDY.json of studies.py path-star-basins")
    parser.add_argument("--out", type=Path, required=True, help="JSON; the picture lies beside it")
    args = parser.parse_args(arguments)
    runs, curves = list[dict[str, Any]](), dict[Any, Any]()
    for row in json.loads(args.study.read_text())["variants"]:
        for seed, one in row["seeds"].items():
            if (run := told(row, seed, one)) is not None:
                runs.append(run)
                curves[run["variant"], run["seed"]] = one["curves"]
    choice = [run for run in runs if run["seed"] >= CHOSEN_FROM]
    judged = [run for run in runs if run["seed"] < CHOSEN_FROM]
    limit, errors = chosen_limit(choice)
    for run in runs:
        run["verdict"] = "waits" if run["kl"] < limit else "goes on"
        waited = "never" if run["waited"] is None else run["waited"]
        print(
            f"{run['variant']:>24} seed {run['seed']:<2} step {run['step']:>4} KL {run['kl']:.3f} "
            f"{run['verdict']:<8} waited {waited} found at {run['found_at']}"
        )
    wrong = sum((run["kl"] < limit) != waits(run) for run in judged)
    print(f"limit {limit:.4f}: {errors} of {len(choice)} wrong where chosen, ", end="")
    print(f"{wrong} of {len(judged)} on the other seeds")
    summary = {"limit": round(limit, 4), "near": NEAR, "far": FAR, "long": LONG,
               "chosen_on": {"runs": len(choice), "wrong": errors},
               "judged_on": {"runs": len(judged), "wrong": wrong},
               "shares": {"chosen": shares(choice), "reported": shares(judged)}}  # fmt: skip
    write_json(args.out, {**summary, "runs": runs})
    picture(runs, curves, limit, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
