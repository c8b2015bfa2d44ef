"""The studies of studies.py: questions, what was expected, and what is trained to find out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nextlat.errors import NextLatError
from nextlat.training.recipe import load_recipe

FOUND_AT = "found_at"  # the step from which on a task is solved
SECONDS = "seconds"  # of training
OF_NEXTLAT = "objectives.nextlat."
METRICS = {
    "path-star": ("exact_path_accuracy", FOUND_AT),
    "text": ("next_token_loss", "mean_acceptance_length", "effective_latent_rank"),
}


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        recipe: built-in name or path.
        settings: overrides of it.
        objective: of the run.
    """

    recipe: str
    settings: tuple[str, ...] = ()
    objective: str = "nextlat"


@dataclass(frozen=True)
class Study:
    """A question and the runs that answer it.

    Attributes:
        title: a line.
        question: what is to be found out.
        expected: what we thought before it was run.
        metrics: keys of results.json, or FOUND_AT, or SECONDS; the table's columns.
        variants: name -> what is trained.
        seeds: settings are chosen on these, none of which is reported elsewhere.
    """

    title: str
    question: str
    expected: str
    metrics: tuple[str, ...]
    variants: Mapping[str, Variant]
    seeds: tuple[int, ...] = (10, 11, 12)

    def with_settings(self, settings: Sequence[str]) -> "Study":
        """With overrides for every variant; those of NextLat are for NextLat's alone."""

        def changed(one: Variant) -> Variant:
            own = [x for x in settings if one.objective == "nextlat" or x[:19] != OF_NEXTLAT]
            return replace(one, settings=(*own, *one.settings))

        return replace(self, variants={k: changed(one) for k, one in self.variants.items()})

    def of(self, variants: Sequence[str] | None, metrics: Sequence[str] | None) -> "Study":
        """Some of the variants, and other metrics.

        Raises:
            NextLatError: a variant that there is not.
        """
        for name in variants or ():
            if name not in self.variants:
                raise NextLatError(f"there is no variant '{name}': {', '.join(self.variants)}.")
        chosen = {name: self.variants[name] for name in variants or self.variants}
        return replace(self, variants=chosen, metrics=tuple(metrics or self.metrics))


def one_change(name: str) -> Study:
    """Of any recipe: one thing changed at a time, without what the recipe has already. Warm-ups are
    shares of the run."""
    recipe = load_recipe(name)
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
        key: Variant(name, settings)
        for key, settings in changes.items()
        if load_recipe(name, settings).to_dict() != recipe.to_dict()
    }
    first = {"next-token": Variant(name, (), "next-token"), "as in the recipe": Variant(name)}
    return Study(
        f"{name}, one change at a time",
        "What does one change of the recipe do?",
        "",
        METRICS.get(recipe.task_name, ("next_token_loss",)),
        first | new,
    )


def path_star() -> Study:
    """Which initial scale, warm-up, clipping and precision lets every seed find the branch."""
    small = "path-star-small"
    scale = "backbone.initializer_range="
    variants = {f"scale {x}": Variant(small, (scale + x,)) for x in ("0.01", "0.02", "0.04")}
    variants |= {"scale 0.005": Variant(small, (scale + "0.005",))}
    variants |= {
        "warmed up over 250 steps": Variant(small, ("schedule.warmup_steps=250",)),
        "clipped at 0.3": Variant(small, ("optimizer.gradient_clip=0.3",)),
        "hardly clipped": Variant(small, ("optimizer.gradient_clip=100",)),
    }
    return Study(
        "Path-Star G(2,3): which runs find the branch",
        "Which initial scale, warm-up and clipping lets every seed find the branch, and how early "
        "can one tell?",
        "0.01 solves ten of ten, 0.02 eight or nine, 0.04 and 0.005 nearly all; a slower warm-up "
        "fewer; clipping changes little. In runs that escape the KL rises before the loss falls.",
        (FOUND_AT, "exact_path_accuracy"),
        variants,
        tuple(range(10, 20)),
    )


STUDIES = {"path-star-basins": path_star()}
