"""Comparisons: one recipe trained by several objectives and seeds, side by side, and measured.

Made of the jobs of `jobs`; what is already there is not made again. An objective that cannot train
on the task is left out with a sentence that says why.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nextlat.batch import IGNORE
from nextlat.errors import NextLatError
from nextlat.objectives import OBJECTIVES
from nextlat.strict import nearest
from nextlat.tasks import Task
from nextlat.training.jobs import Job, check_seeds
from nextlat.training.recipe import Recipe, load_recipe, recipe_horizon
from nextlat.training.run_directory import read_record
from nextlat.training.train import check_same_run, check_trains

LONGEST_FIRST = ("bst", "mtp", "jtp", "nextlat", "next-token")  # so that no core idles at the end
BY_OBJECTIVE_AND_SEED = {"objective": "--objectives", "seed": "--seeds"}

# Objectives that predict tokens beyond the next one from nothing but tokens before them (MTP), or
# tokens that lie before those read (BST): where a label is a function of inputs not read yet, or of
# all before it, there is nothing there to learn.
OF_TOKENS_ONLY = {
    "mtp": "it predicts labels whose inputs it has not read",
    "bst": "it predicts the tokens before a suffix, which here are no labels",
}


@dataclass(frozen=True)
class Plan:
    """What a comparison consists of.

    Attributes:
        jobs: all of them, seed by seed. skipped: objective -> the sentence that says why it is left
            out.
        processes: how many jobs the machine can take at a time.
    """

    jobs: list[Job]
    skipped: dict[str, str]
    processes: int


def plan(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    objectives: str = "all",
    seeds: Sequence[int] = (0,),
    horizon: int | None = None,
    out: Path,
) -> Plan:
    """What to train: every objective that can, with every seed.

    Args:
        recipe: built-in name or path. overrides: as of `load_recipe`; one of `objectives.NAME`
            holds for that objective alone.
        objectives: names with commas between, or "all".
        horizon: d, of every objective that has one (an override of it wins); None = as in the
            recipe, where an objective without a table of its own has the horizon of the recipe's
            objective, or of its NextLat.
        out: the runs go to `out`/runs.

    Raises:
        NextLatError: an unknown objective, an override of one that is not compared or of what is
            compared, bad seeds; whatever is wrong with the recipe; a run directory that holds
            another run; or no objective can train.
    """
    check_seeds(seeds)
    names = _names(objectives)
    _check_overrides(overrides, names)
    settings = {name: _settings(recipe, name, overrides, horizon) for name in names}
    recipes = {
        (name, seed): _load(recipe, name, settings[name], seed) for seed in seeds for name in names
    }
    task = recipes[names[0], seeds[0]].task.build()
    skipped = {name: why for name in names if (why := _obstacle(recipes[name, seeds[0]], task))}
    if len(skipped) == len(names):
        raise NextLatError(" ".join(skipped.values()))
    jobs = []
    for (name, seed), loaded in recipes.items():
        if name in skipped:
            continue
        directory = out / "runs" / loaded.run_name
        check_same_run(read_record(directory), loaded, directory)
        jobs.append(Job(recipe, name, seed, loaded.steps, directory, settings[name]))
    cores = os.cpu_count() or 1
    return Plan(jobs, skipped, max(1, cores // (recipes[names[0], seeds[0]].run.threads or cores)))


def _names(objectives: str) -> list[str]:
    asked = (
        [*OBJECTIVES]
        if objectives == "all"
        else [name.strip() for name in objectives.split(",") if name.strip()]
    )
    for name in asked:
        if name not in OBJECTIVES:
            raise NextLatError(
                f"--objectives {objectives}: unknown objective '{name}': {nearest(name, [*OBJECTIVES])}."
            )
    if not asked:
        raise NextLatError(
            f"--objectives '{objectives}' names none: {nearest('', [*OBJECTIVES])}; or all."
        )
    return sorted(set(asked), key=LONGEST_FIRST.index)


def _belongs_to(override: str) -> str | None:
    """The objective that an override is about, None = all."""
    table, *rest = override.partition("=")[0].strip().split(".")
    return rest[0] if table == "objectives" and rest else None


def _check_overrides(overrides: Sequence[str], names: Sequence[str]) -> None:
    for item in overrides:
        key, name = item.partition("=")[0].strip(), _belongs_to(item)
        if key in BY_OBJECTIVE_AND_SEED:
            raise NextLatError(
                f"'{item}': a comparison has several of them: use {BY_OBJECTIVE_AND_SEED[key]}."
            )
        if name in OBJECTIVES and name not in names:
            raise NextLatError(
                f"'{item}' is of an objective that is not compared: leave it out, or name it in --objectives."
            )


def _settings(
    recipe: str, objective: str, overrides: Sequence[str], horizon: int | None
) -> tuple[str, ...]:
    """The overrides of one objective, its horizon among them if the recipe says too little."""
    own = [
        item
        for item in overrides
        if _belongs_to(item) in (None, objective) or _belongs_to(item) not in OBJECTIVES
    ]
    has_one = "horizon" in OBJECTIVES[objective][0].model_fields
    key = f"objectives.{objective}.horizon"
    if not has_one or any(item.partition("=")[0].strip() == key for item in own):
        return tuple(own)
    if horizon is None:
        common, tables = recipe_horizon(recipe)
        horizon = common if objective not in tables else None
    return tuple(own if horizon is None else [*own, f"{key}={horizon}"])


def _load(recipe: str, objective: str, settings: Sequence[str], seed: int) -> Recipe:
    return load_recipe(recipe, settings, objective=objective, seed=seed)


def _obstacle(recipe: Recipe, task: Task) -> str | None:
    """Why a recipe cannot be trained, in a sentence, or None."""
    row = task.eval_dataset()[0]
    read, asked = row["input_ids"], row["labels"]
    if recipe.objective in OF_TOKENS_ONLY and (read != asked)[asked != IGNORE].any():
        return (
            f"{recipe.objective} is skipped: the labels of {recipe.task_name} are not its tokens, "
            f"and {OF_TOKENS_ONLY[recipe.objective]}."
        )
    try:
        check_trains(recipe, task)
    except NextLatError as error:
        return f"{recipe.objective} is skipped: {error}"
    return None
