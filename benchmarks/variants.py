"""What one change of NextLat's recipe does, seed by seed: `python benchmarks/variants.py RECIPE
[key=value ...] [--seeds 10 11 12]`.

Every variant changes one thing of the recipe and is trained with every seed, beside next-token
prediction. Stopped anywhere, the same command goes on where it was; what is finished is not trained
again. Prints a Markdown table, one line for every variant with the value of every seed, and writes
the same as variants.json into --out DIR, where the runs lie too.

What decides whether a seed solves Path-Star (`nextlat.report.comparison`), on a CPU; on a GPU the
paper's graph, and another of its size:

    python benchmarks/variants.py path-star-small batch_size=64 steps=2500 python
    benchmarks/variants.py path-star run.precision=bf16 --seeds 0 1 2 3 4 --jobs 1 python
    benchmarks/variants.py path-star run.precision=bf16 task.arms=2 --seeds 0 1 2 3 4 --jobs 1

What a language model pays for NextLat, beginning with the published setting:

    python benchmarks/variants.py text-small objectives.nextlat.warmup_steps=0
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nextlat.errors import NextLatError
from nextlat.files import write_json
from nextlat.report.comparison import solved_at
from nextlat.report.runs import Run, read_runs
from nextlat.terminal import watch
from nextlat.training.recipe import load_recipe
from nextlat.training.sweep import Job, check_seeds

NEXT_TOKEN, OF_NEXTLAT = "next-token", "objectives.nextlat."
FOUND_AT = "found_at"  # of Path-Star: the step
METRICS = {
    "path-star": ("exact_path_accuracy", FOUND_AT),
    "text": ("next_token_loss", "mean_acceptance_length", "effective_latent_rank"),
}
METRICS_OF_OTHERS = ("next_token_loss",)


def variants(name: str, settings: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Name -> settings: one thing changed at a time, without what the recipe has already. Warm-ups
    are shares of the run."""
    recipe = load_recipe(name, settings)
    some = max(1, recipe.steps // 20)
    changes: dict[str, tuple[str, ...]] = {
        "lambdas warmed up": (f"objectives.nextlat.warmup_steps={2 * some}",),
        "lambdas warmed up slowly": (f"objectives.nextlat.warmup_steps={8 * some}",),
        "learning rate warmed up": (f"schedule.warmup_steps={2 * some}",),
        "dynamics start at zero": ("objectives.nextlat.zero_init=true",),
        "separate norms": ("objectives.nextlat.separate_norms=true",),
        "no KL": ("objectives.nextlat.lambda_kl=0",),
        "half the initial scale": ("backbone.initializer_range=0.01",),
        "twice the initial scale": ("backbone.initializer_range=0.04",),
        "hardly clipped": ("optimizer.gradient_clip=100",),
        "clipped at 1": ("optimizer.gradient_clip=1",),
        "clipped at 0.3": ("optimizer.gradient_clip=0.3",),
    }
    new = {
        key: more
        for key, more in changes.items()
        if load_recipe(name, [*settings, *more]).to_dict() != recipe.to_dict()
    }
    return {NEXT_TOKEN: (), "as in the recipe": (), **new}


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a built-in recipe, or a file")
    parser.add_argument(
        "settings", nargs="*", help="overrides of the recipe that hold for every variant, key=value"
    )
    parser.add_argument("--variants", nargs="+", help="default: all that there are")
    parser.add_argument(
        "--metrics", nargs="+", help="of results.json; default: those that the task is about"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[10, 11, 12],
        help="default: 10 11 12, which no other table reports",
    )
    parser.add_argument(
        "--jobs", type=int, help="models trained at a time; default: one for every core"
    )
    parser.add_argument("--out", type=Path, help="default: variants/RECIPE")
    arguments = parser.parse_intermixed_args()
    check_seeds(arguments.seeds)
    out = arguments.out or Path("variants") / Path(arguments.recipe).stem
    known = variants(arguments.recipe, arguments.settings)
    chosen = arguments.variants or [*known]
    if unknown := [name for name in chosen if name not in known]:
        raise NextLatError(f"there is no variant '{unknown[0]}': {', '.join(known)}.")
    jobs = {
        name: plan(
            arguments.recipe, name, (*arguments.settings, *known[name]), arguments.seeds, out
        )
        for name in chosen
    }
    watch([job for group in jobs.values() for job in group if not job.done], arguments.jobs)
    found = {
        name: {run.result.seed: run for run in read_runs([job.directory for job in group])}
        for name, group in jobs.items()
    }
    task = load_recipe(arguments.recipe, arguments.settings).task_name
    metrics = arguments.metrics or METRICS.get(task, METRICS_OF_OTHERS)
    rows = [row(name, jobs[name][0].settings, runs, metrics) for name, runs in found.items()]
    print_table(rows, metrics)
    write_json(out / "variants.json", rows)


def plan(
    recipe: str, name: str, settings: tuple[str, ...], seeds: Sequence[int], out: Path
) -> list[Job]:
    """The runs of one variant; next-token prediction takes no settings of NextLat."""
    objective = "nextlat"
    if name == NEXT_TOKEN:
        objective, settings = (
            NEXT_TOKEN,
            tuple(one for one in settings if not one.startswith(OF_NEXTLAT)),
        )
    steps = load_recipe(recipe, settings, objective=objective).steps
    folder = out / name.replace(" ", "-")
    return [
        Job(recipe, objective, seed, steps, folder / f"s{seed}", settings, f"{name} s{seed}")
        for seed in seeds
    ]


def row(
    name: str, settings: Sequence[str], runs: dict[int, Run], metrics: Sequence[str]
) -> dict[str, object]:
    """The metrics of every seed of a variant; None: not measured, or never found."""
    seeds = {seed: {metric: value(run, metric) for metric in metrics} for seed, run in runs.items()}
    return {"variant": name, "settings": [*settings], "seeds": seeds}


def value(run: Run, metric: str) -> float | None:
    """A metric of a run by its key, or the step from which on it solves the task."""
    if metric == FOUND_AT:
        solved = run.result.task.solved
        return None if solved is None else solved_at(run, solved.loss_below)
    return run.metrics[metric].value if metric in run.metrics else None


def print_table(rows: Sequence[dict[str, object]], metrics: Sequence[str]) -> None:
    """One line for every variant, one column for every metric, in it the seeds in their order."""
    print("| | " + " | ".join(name.replace("_", " ") for name in metrics) + " |")
    print("|---" * (1 + len(metrics)) + "|")
    for line in rows:
        seeds: dict[int, dict[str, float | None]] = line["seeds"]  # type: ignore[assignment]
        cells = [", ".join(text(one[metric]) for one in seeds.values()) for metric in metrics]
        print(f"| {line['variant']} | " + " | ".join(cells) + " |")


def text(number: float | None) -> str:
    """Steps as whole numbers, everything else with three decimals."""
    if number is None:
        return "-"
    return f"{number:,.0f}" if isinstance(number, int) else f"{number:.3f}"


if __name__ == "__main__":
    try:
        main()
    except NextLatError as error:
        sys.exit(str(error))
