"""What decides whether a seed solves Path-Star: `python benchmarks/path_star.py [RECIPE] [key=value ...] [--seeds 10 11 12]`.

Every variant changes one thing of the recipe and is trained with every seed. Stopped anywhere, the same command goes on where it was;
what is finished is not trained again. Prints, for every variant, the seeds that solve the task and the step at which each of them found
the branch (`nextlat.report.solving`), and writes the same as JSON with --out DIR, where the runs lie too.

On a CPU: the default recipe, path-star-small. On a GPU the paper's graph, and others of its size:

    python benchmarks/path_star.py path-star run.precision=bf16 --seeds 0 1 2 3 4 --jobs 1
    python benchmarks/path_star.py path-star run.precision=bf16 task.arms=2 --seeds 0 1 2 3 4 --jobs 1
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nextlat.errors import NextLatError
from nextlat.files import write_json
from nextlat.jobs import Job, check_seeds, watch
from nextlat.recipe import load_recipe
from nextlat.report.runs import read_runs
from nextlat.report.solving import METRIC, found_at

NEXT_TOKEN = "next-token"


def variants(name: str, settings: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Name -> settings: one thing changed at a time, without what the recipe has already. Warm-ups are shares of the run."""
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
    new = {key: more for key, more in changes.items() if load_recipe(name, [*settings, *more]).to_dict() != recipe.to_dict()}
    return {NEXT_TOKEN: (), "as in the recipe": (), **new}


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="path-star-small", help="default: path-star-small")
    parser.add_argument("settings", nargs="*", help="overrides of the recipe that hold for every variant, key=value")
    parser.add_argument("--variants", nargs="+", help="default: all that there are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12], help="default: 10 11 12, which no table reports")
    parser.add_argument("--jobs", type=int, help="models trained at a time; default: one for every core")
    parser.add_argument("--out", type=Path, help="default: path-star/RECIPE")
    arguments = parser.parse_intermixed_args()
    check_seeds(arguments.seeds)
    out = arguments.out or Path("path-star") / Path(arguments.recipe).stem
    known = variants(arguments.recipe, arguments.settings)
    chosen = arguments.variants or [*known]
    if unknown := [name for name in chosen if name not in known]:
        raise NextLatError(f"there is no variant '{unknown[0]}': {', '.join(known)}.")
    jobs = {name: plan(arguments.recipe, name, (*arguments.settings, *known[name]), arguments.seeds, out) for name in chosen}
    todo = [job for group in jobs.values() for job in group if not job.done]
    watch(todo, arguments.jobs)
    rows = [row(name, group) for name, group in jobs.items()]
    print_table(rows)
    write_json(out / "variants.json", rows)


def plan(recipe: str, name: str, settings: tuple[str, ...], seeds: Sequence[int], out: Path) -> list[Job]:
    """The runs of one variant."""
    objective = NEXT_TOKEN if name == NEXT_TOKEN else "nextlat"
    steps = load_recipe(recipe, settings, objective=objective).steps
    folder = out / name.replace(" ", "-")
    return [Job(recipe, objective, seed, steps, folder / f"s{seed}", settings, f"{name} s{seed}") for seed in seeds]


def row(name: str, jobs: Sequence[Job]) -> dict[str, object]:
    """What became of every seed of a variant."""
    runs = read_runs([job.directory for job in jobs])
    return {
        "variant": name,
        "settings": list(jobs[0].settings),
        "seeds": {
            run.seed: {"exact": run.metrics[METRIC], "found_at": found_at(run), "seconds": run.record.get("seconds")}
            for run in runs
        },
    }


def print_table(rows: Sequence[dict[str, object]]) -> None:
    """One line for every variant: share of exact paths, and the step at which the branch was found, seed by seed."""
    for found in rows:
        seeds: dict[int, dict[str, float | None]] = found["seeds"]  # type: ignore[assignment]
        each = [
            f"{one['exact']:.3f} ({'-' if one['found_at'] is None else format(one['found_at'], ',.0f')})"
            for one in seeds.values()
        ]
        print(f"{found['variant']:<28}" + "".join(f"{text:<18}" for text in each))
    print("share of exact paths (step from which on the branch is found)")


if __name__ == "__main__":
    try:
        main()
    except NextLatError as error:
        sys.exit(str(error))
