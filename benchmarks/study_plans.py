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
        "initial scale 0.01": ("backbone.initializer_range=0.01",),
        "initial scale 0.02": ("backbone.initializer_range=0.02",),
        "initial scale 0.04": ("backbone.initializer_range=0.04",),
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
    one = {
        "warmed up over 250 steps": "schedule.warmup_steps=250",
        "clipped at 0.3": "optimizer.gradient_clip=0.3",
        "hardly clipped": "optimizer.gradient_clip=100",
    }
    variants |= {name: Variant(small, (scale + "0.02", x)) for name, x in one.items()}
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


def streets(kind: str) -> Study:
    """Whether the city is known better than rides of this kind need: their detours."""
    recipe = f"city-{kind}"
    longer = ("steps=6000", "schedule.decay_steps=2400")
    variants = {
        "next-token": Variant(recipe, (), "next-token"),
        "d=8": Variant(recipe),
        "d=8, KL weighs 1": Variant(recipe, ("objectives.nextlat.lambda_kl=1.0",)),
        "d=2": Variant(recipe, ("objectives.nextlat.horizon=2",)),
        "next-token, 6,000 steps": Variant(recipe, longer, "next-token"),
        "d=8, 6,000 steps": Variant(recipe, longer),
    }
    off = [f"kind={kind}, probability={p}" for kind in ("random", "least_likely") for p in (0.5,)]
    return Study(
        f"Streets, {kind} paths",
        "Do horizon, weight of the KL or length of training make a transformer, or the dynamics "
        "alone, know the city better than its rides need?",
        "Detours within 3 points of next-token prediction at equal steps, whatever the horizon and "
        "the weight; more for both when trained longer; the dynamics alone below the transformer.",
        (
            "next_token_loss",
            "valid_trajectories",
            *(f"detour_robustness[{x}]" for x in off),
            "valid_trajectories[driver=dynamics]",
            *(f"detour_robustness[driver=dynamics, {x}]" for x in off),
            "effective_latent_rank",
        ),
        variants,
    )


def far_home() -> Study:
    """Rides that end often, in a world in which nothing counts the moves."""
    recipe = "city-far"
    home = "valid_trajectories"
    lengths = ("", "length=16", "length=32")
    return Study(
        "Driving home from farther than in training",
        "Training holds no way of more than eight moves. Who drives home from four times as far?",
        "All within eight moves. Beyond, the transformers lose their way, with positions or "
        "without; the dynamics alone keep place and destination and arrive more often than not.",
        (
            "next_token_loss",
            *(f"{home}[{x}]" if x else home for x in lengths),
            *(f"{home}[{', '.join(filter(None, ('driver=dynamics', x)))}]" for x in lengths),
        ),
        {
            "next-token": Variant(recipe, (), "next-token"),
            "next-token, no positions": Variant(recipe, ("backbone.positions=none",), "next-token"),
            "NextLat": Variant(recipe),
            "NextLat, KL weighs 1": Variant(recipe, ("objectives.nextlat.lambda_kl=1.0",)),
        },
    )


def countdown() -> Study:
    """Whether NextLat, which is behind early, crosses next-token prediction."""
    recipe = "countdown-small"
    longer = ("steps=15000", "schedule.decay_steps=4500", "run.eval_every=500")
    warm = "objectives.nextlat.warmup_steps="
    return Study(
        "Countdown, ten times as long",
        "NextLat is behind after 1,500 steps: does it cross next-token prediction, and where?",
        "With the weights warmed up it comes level with next-token prediction by 15,000 steps and "
        "does not pass it; without a warm-up it stays behind.",
        ("next_token_loss", "solved[targets=seen]", "solved[targets=held-out]"),
        {
            "next-token": Variant(recipe, longer, "next-token"),
            "NextLat": Variant(recipe, longer),
            "NextLat, weights warmed up": Variant(recipe, (*longer, warm + "6000")),
        },
    )


def cost(
    recipe: str,
    metrics: tuple[str, ...],
    horizons: tuple[int, ...],
    expected: str,
    more: Mapping[str, Variant] | None = None,
) -> Study:
    """What each objective gives in one of the demo's worlds, by its horizon, and `more`."""
    variants = {"next-token": Variant(recipe, (), "next-token")}
    for objective, name in (("nextlat", "NextLat"), ("mtp", "MTP"), ("jtp", "JTP")):
        for d in horizons if objective == "nextlat" else horizons[::2]:
            settings = (f"objectives.{objective}.horizon={d}",)
            variants[f"{name} d={d}"] = Variant(recipe, settings, objective)
    variants["BST"] = Variant(recipe, (), "bst")
    return Study(
        f"Horizon and objective in {recipe}",
        "Which objective and horizon should a user take for which purpose?",
        expected,
        (*metrics, "mean_acceptance_length", "next_token_loss", SECONDS),
        {**variants, **(more or {})},
        (10, 11, 12),
    )


def data(
    recipe: str, key: str, sizes: Sequence[int | None], metrics: tuple[str, ...], expected: str
) -> Study:
    """What each distinct training sequence gives: the paper's second claim."""
    variants = {}
    for size in sizes:
        settings = ["run.keep=best", "run.eval_every=100"]
        settings += [f"{key}={size}"] if size else []
        for objective, name in (("next-token", "next-token"), ("nextlat", "NextLat")):
            told = f"{name}, {size:,}" if size else f"{name}, ever new"
            variants[told] = Variant(recipe, tuple(settings), objective)
    return Study(
        f"Data efficiency: {recipe} by {key}",
        "At equal steps, each with the weights of its best evaluation: from how many distinct "
        "sequences does a model know its world?",
        expected,
        ("next_token_loss", *metrics),
        variants,
    )


TWICE = ("steps=3000", "schedule.decay_steps=1200")
BEYOND = "real_rides[length=96]", "real_rides[driver=dynamics, length=96]"
STUDIES = {
    "path-star-basins": path_star(),
    "streets-noisy": streets("noisy"),
    "streets-shortest": streets("shortest"),
    "far-home": far_home(),
    "countdown-long": countdown(),
    "data-path-star": data(
        "path-star-small",
        "task.graphs",
        (1000, 4000, 16_000, 64_000, 200_000),
        ("exact_path_accuracy",),
        "NextLat finds the branch from 64,000 graphs on, fewer are learnt by heart; next-token "
        "prediction from none.",
    ),
    "data-streets": data(
        "city-noisy",
        "task.distinct",
        (1000, 4000, 16_000, 64_000, None),
        ("valid_trajectories", "detour_robustness[kind=random, probability=0.5]"),
        "Both drive from 16,000 rides on; NextLat is ahead by a few points at 1,000 and 4,000.",
    ),
    "data-countdown": data(
        "countdown-small",
        "task.problems",
        (1000, 4000, 16_000, 64_000),
        ("solved[targets=seen]", "solved[targets=held-out]"),
        "NextLat is behind at every size, as it is on all problems after so few steps.",
    ),
    "data-text": data(
        "text-small",
        "task.max_tokens",
        (256_000, 1_024_000, None),
        ("mean_acceptance_length",),
        "Within 1 % of cross-entropy at every size; NextLat overfits later, if anything.",
    ),
    "cost-rrxor": cost(
        "rrxor",
        ("belief_r2", "next_token_kl", "next_token_kl[driver=dynamics, length=96]"),
        (1, 2, 4, 8),
        "The probe's share grows with the horizon and is level from d = 4 on; BST is near NextLat, "
        "MTP between it and next-token prediction; the filter needs d of 2 or more. A tenth of KL "
        "costs a few points; twice the steps bring NextLat nearer to 1 and next-token no nearer.",
        {
            "NextLat d=4, KL weighs 0.1": Variant("rrxor", ("objectives.nextlat.lambda_kl=0.1",)),
            "NextLat d=4, 3,000 steps": Variant("rrxor", TWICE),
            "next-token, 3,000 steps": Variant("rrxor", TWICE, "next-token"),
        },
    ),
    "cost-city": cost(
        "city-arrival",
        BEYOND,
        (1, 2, 4, 8),
        "The dynamics alone need d of 2 or more; no objective lets the transformer drive on.",
    ),
    "cost-path-star": cost(
        "path-star-small",
        (FOUND_AT, "exact_path_accuracy"),
        (1, 2),
        "NextLat, MTP, JTP and BST all find the branch at most seeds, BST soonest.",
    ),
}
