"""The demo: the same transformer trained by next-token and by next-latent prediction, side by side,
one process per core."""

from collections.abc import Sequence
from pathlib import Path

from nextlat.training.jobs import Job, check_seeds
from nextlat.training.recipe import load_recipe

OBJECTIVES = ("nextlat", "next-token")  # the longer job first, so that no core idles at the end
RECIPES = ("city-small", "word-problem-small")


def jobs(out: Path, seeds: Sequence[int]) -> list[Job]:
    """What the demo trains: both objectives, every recipe, every seed.

    Raises:
        NextLatError: a seed below zero, or the same seed twice.
    """
    check_seeds(seeds)
    made = []
    for recipe in RECIPES:
        for seed in seeds:
            for objective in OBJECTIVES:
                loaded = load_recipe(recipe, objective=objective, seed=seed)
                made.append(
                    Job(recipe, objective, seed, loaded.steps, out / "runs" / loaded.run_name)
                )
    return made
