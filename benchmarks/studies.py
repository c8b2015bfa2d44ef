"""Train what a question needs, seed by seed: `python benchmarks/studies.py STUDY [--seeds 0 1 2]`.

The studies are declared in study_plans.py, each with its question and what was expected before it
was run. A built-in recipe in a study's place asks what one change of it does to NextLat:

    python benchmarks/studies.py text-small objectives.nextlat.warmup_steps=0
    python benchmarks/studies.py path-star run.precision=bf16 --seeds 0 1 2 3 4 --jobs 1  # a GPU

Every variant is trained with every seed, all variants of one seed before the next. Stopped
anywhere, the same command goes on where it was, and `--collect` trains nothing. Prints a Markdown
table, one line for every variant with the value of every seed, and writes STUDY.json (metrics,
learning curves) and STUDY.png into --results after every seed. What is in that file already is not
trained again, so that a study can be divided among machines and its runs be deleted.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from nextlat.errors import NextLatError
from nextlat.files import write_json
from nextlat.report.comparison import HELD_OUT, solved_at
from nextlat.report.runs import Run, read_runs
from nextlat.terminal import watch
from nextlat.training.recipe import load_recipe
from nextlat.training.sweep import Job, check_seeds
from study_plans import FOUND_AT, SECONDS, STUDIES, Study, Variant, one_change

CURVES = ("next_token", "kl", HELD_OUT, "eval_kl")  # of metrics.jsonl, kept in the JSON
DIGITS = 4  # significant ones of the curves
Seeds = dict[int, dict[str, Any]]  # seed -> metrics and curves


def jobs(study: Study, seeds: Sequence[int], out: Path) -> dict[str, dict[int, Job]]:
    """Variant -> seed -> the run.

    Raises:
        NextLatError: a recipe or setting that cannot be, or bad seeds.
    """
    check_seeds(seeds)
    return {
        name: {seed: job(study, name, one, seed, out) for seed in seeds}
        for name, one in study.variants.items()
    }


def job(study: Study, name: str, one: Variant, seed: int, out: Path) -> Job:
    """One run of a variant."""
    steps = load_recipe(one.recipe, one.settings, objective=one.objective, seed=seed).steps
    folder = out / name.replace(" ", "-").replace("/", "-")
    label = f"{name} s{seed}"
    return Job(one.recipe, one.objective, seed, steps, folder / f"s{seed}", one.settings, label)


def about(name: str, one: Variant) -> dict[str, Any]:
    """What a row says of its variant: seeds of rows that say the same belong together."""
    return {
        "variant": name,
        "recipe": one.recipe,
        "objective": one.objective,
        "settings": [*one.settings],
    }


def known(path: Path) -> dict[str, dict[str, Any]]:
    """Variant -> its row in STUDY.json; empty where there is no such file yet."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["variants"]
    return {
        row["variant"]: {**row, "seeds": {int(s): one for s, one in row["seeds"].items()}}
        for row in rows
    }


def seeds_known(study: Study, name: str, path: Path) -> Seeds:
    """What STUDY.json has of a variant as the study declares it now."""
    row = known(path).get(name, {})
    if any(row.get(key) != value for key, value in about(name, study.variants[name]).items()):
        return {}
    return row["seeds"]


def collect(
    study: Study, planned: Mapping[str, Mapping[int, Job]], path: Path
) -> list[dict[str, Any]]:
    """A row for each variant: its settings, and of each finished seed, here or in the STUDY.json at
    `path`, the metrics and curves."""
    rows = []
    for name, by_seed in planned.items():
        done = {seed: job.directory for seed, job in by_seed.items() if job.done}
        runs = {seed: read_runs([directory])[0] for seed, directory in done.items()}
        seeds = seeds_known(study, name, path)
        new = {seed: measured(run, study.metrics) for seed, run in runs.items()}
        seeds = {seed: seeds.get(seed, {}) | new.get(seed, {}) for seed in sorted({*seeds, *new})}
        one = about(name, study.variants[name])
        rows.append({**one, "seeds": seeds})
    return rows


def keep(study: Study, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows, between those of other variants that the file has, and the picture."""
    new = {row["variant"]: row for row in rows if row["seeds"]}
    every = [*(known(path) | new).values()]
    if every:
        said = {key: getattr(study, key) for key in ("title", "question", "expected")}
        write_json(path, {**said, "variants": every})
        picture(every, study, path.with_suffix(".png"))


def measured(run: Run, metrics: Sequence[str]) -> dict[str, Any]:
    """The metrics of a run, and its learning curves as {name: [[steps], [values]]}."""
    curves = {name: run.curve(name) for name in CURVES}
    return {
        **{key: value(run, key) for key in metrics},
        "curves": {
            name: [list(map(int, steps)), [float(f"{x:.{DIGITS}g}") for x in values]]
            for name, (steps, values) in curves.items()
            if steps.size
        },
    }


def value(run: Run, key: str) -> float | None:
    """A metric of a run by its key, the step from which on it solves its task, or the seconds of
    training; None: not measured, or never solved."""
    if key == FOUND_AT:
        solved = run.result.task.solved
        return None if solved is None else solved_at(run, solved.loss_below)
    if key == SECONDS:
        return float(max(run.curve("seconds")[1], default=float("nan")))
    return run.metrics[key].value if key in run.metrics else None


def table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Markdown: a line for every variant, a column for every metric, in it the seeds in order."""
    lines = ["| | " + " | ".join(key.replace("_", " ") for key in metrics) + " |"]
    lines.append("|---" * (1 + len(metrics)) + "|")
    for row in rows:
        cells = [", ".join(text(one.get(key)) for one in row["seeds"].values()) for key in metrics]
        lines.append(f"| {row['variant']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(number: float | None) -> str:
    """Steps and seconds as whole numbers, everything else with three decimals."""
    if number is None:
        return "-"
    return f"{number:,.0f}" if isinstance(number, int) or number > 100 else f"{number:.3f}"


def picture(rows: Sequence[Mapping[str, Any]], study: Study, path: Path) -> None:
    """Held-out cross-entropy by step, a panel for every variant and a line for every seed."""
    shown = [row for row in rows if row["seeds"]]
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.2 * columns, 2.4 * lines), sharex=False, squeeze=False
    )
    for ax, row in zip(axes.flat, shown, strict=False):
        for seed, one in row["seeds"].items():
            ax.plot(*one["curves"][HELD_OUT], linewidth=1, marker=".", label=f"seed {seed}")
        ax.set_title(row["variant"], fontsize=9)
        ax.set_yscale("log")
        ax.tick_params(labelsize=7)
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("steps", fontsize=9)
    figure.supylabel("held-out cross-entropy, nats", fontsize=9)
    figure.suptitle(study.title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help=f"{', '.join(STUDIES)}; or a recipe, built in or a file")
    parser.add_argument("settings", nargs="*", help="overrides for every variant, key=value")
    parser.add_argument("--variants", nargs="+", help="default: all that there are")
    parser.add_argument("--metrics", nargs="+", help="default: those that the study is about")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="default: those on which settings are chosen"
    )
    parser.add_argument("--jobs", type=int, help="at a time; default: one for every core")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=Path("studies"), help="of the runs")
    parser.add_argument("--results", type=Path, help="of the JSON and picture; default: OUT")
    given = parser.parse_intermixed_args()
    study = STUDIES.get(given.study) or one_change(given.study)
    study = study.with_settings(given.settings).of(given.variants, given.metrics)
    name = Path(given.study).stem
    planned = jobs(study, given.seeds or study.seeds, given.out / name)
    path = (given.results or given.out) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = {*study.metrics}
    have = {
        variant: {s for s, one in seeds_known(study, variant, path).items() if needed <= one.keys()}
        for variant in planned
    }
    for seed in () if given.collect else given.seeds or study.seeds:
        todo = [by[seed] for variant, by in planned.items() if seed not in have[variant]]
        try:
            watch([job for job in todo if not job.done], given.jobs)
        finally:
            keep(study, collect(study, planned, path), path)
    rows = collect(study, planned, path)
    keep(study, rows, path)
    print(table(rows, study.metrics))


if __name__ == "__main__":
    try:
        main()
    except NextLatError as error:
        sys.exit(str(error))
