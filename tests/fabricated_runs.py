"""Run directories as training and evaluation leave them, made up: for tests of what is built from
them."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nextlat.results import (
    RESULTS,
    SCORES,
    Chart,
    Line,
    Mark,
    MeasuredMetric,
    Measurement,
    Metric,
    ObjectiveFacts,
    Picture,
    Published,
    PublishedFigures,
    Result,
    Results,
    Saying,
    Solved,
    TaskFacts,
)
from nextlat.scores import mean_score
from nextlat.tasks.streets.map import map_record, reconstruct
from nextlat.tasks.streets.sources import generate_city

ITEMS = 200
FIVE = ("next-token", "nextlat", "mtp", "jtp", "bst")
TITLES = {"next-token": "next-token", "nextlat": "NextLat"}
PARTS = {  # of the loss: title, and how high it begins
    "nextlat": {
        "next_h": ("Next latent state (Smooth L1)", 0.4),
        "kl": ("KL of predicted and true next token", 0.6),
    },
    "mtp": {"multi_token": ("Tokens beyond the next, nats", 1.2)},
    "jtp": {"multi_token": ("Tokens beyond the next, nats", 1.0)},
    "bst": {
        "pairs": ("Pairs: next and previous token", 4.0),
        "pairs_next": ("Pairs: next token, nats", 2.0),
        "pairs_previous": ("Pairs: previous token, nats", 2.0),
    },
}
NETWORK = generate_city(rows=5, columns=5, seed=0)
PLAIN = "plain KV-cached decoding"
DEFINED = {"definition": "Defined in a sentence.", "source": "somebody"}


def accuracy(predictor: str, length: int) -> Metric:
    """Of the word problem: the dynamics alone are compared with the baseline's transformer."""
    other = {"predictor": "transformer", "length": length}
    alone = predictor == "dynamics"
    return Metric(
        name="accuracy",
        title=f"{predictor.capitalize()}, {length} elements",
        parameters={"predictor": predictor, "length": length},
        counterpart=Metric(name="accuracy", title="", parameters=other).key if alone else None,
        counterpart_name="the transformer of" if alone else "",
        note="The dynamics alone are compared with a transformer." if alone else "",
    )


def equation(place: int, split: str) -> Metric:
    """Of Countdown: in a chart, and no finding."""
    at = {"place": place, "targets": split}
    return Metric(name="true_equation", title=f"Equation {at}", parameters=at, headline=False)


def _metrics() -> Iterable[Metric]:
    yield Metric(
        name="next_token_loss",
        title="Held-out cross-entropy",
        unit="nats",
        higher_is_better=False,
        items="held-out rows",
        **DEFINED,
    )
    for name, noun in {
        "next_token_test": "share of legal next tokens",
        "valid_trajectories": "share of valid trajectories",
        "sequence_compression": "",
        "detour_robustness": "robustness to random detours",
    }.items():
        title = name.replace("_", " ").capitalize()
        yield Metric(name=name, title=title, noun=noun, items="pairs", published=name, **DEFINED)
    for name in ("identical_continuations", "detour_robustness_least_likely"):
        yield Metric(name=name, title=name.replace("_", " ").capitalize(), **DEFINED)
    yield Metric(
        name="effective_latent_rank",
        title="Effective latent rank",
        unit="number",
        higher_is_better=False,
        published="effective_latent_rank",
        **DEFINED,
    )
    for name, headline in (("exact_path_accuracy", True), ("exact_path_accuracy_sampled", True)):
        yield Metric(
            name=name,
            title=name.replace("_", " "),
            headline=headline,
            published="exact_path_accuracy",
        )
    yield Metric(name="solved_seen", title="Solved, seen targets", published="solved")
    yield Metric(name="solved_held_out", title="Solved, held-out targets", published="solved")
    yield Metric(name="belief_r2", title="Belief state", unit="number")
    yield Metric(name="next_token_kl", title="KL", unit="nats", higher_is_better=False)
    yield Metric(
        name="entropy_floor", title="Entropy", unit="nats", higher_is_better=None, headline=False
    )
    yield Metric(name="consistency_error", title="Consistency", higher_is_better=False)
    yield Metric(name="perplexity", title="Perplexity", unit="number", higher_is_better=False)
    against_plain = {"reference": 1.0, "reference_name": PLAIN}
    yield Metric(
        name="mean_acceptance_length",
        title="Mean acceptance length",
        unit="number",
        **against_plain,
    )
    yield Metric(
        name="accepted_tokens_per_cycle",
        title="Accepted tokens per cycle",
        unit="number",
        headline=False,
        note="Accepted tokens are the acceptance length minus the transformer's own token.",
    )
    yield Metric(name="decoding_speedup", title="Decoding speed", unit="factor", **against_plain)
    for predictor in ("transformer", "dynamics"):
        yield from (accuracy(predictor, length) for length in (8, 16, 24))
    yield from (equation(place, split) for place in (1, 2) for split in ("seen", "held-out"))


METRICS = {metric.key: metric for metric in _metrics()}
CITY = {  # metric -> (next-token, NextLat)
    "next_token_loss": (0.985, 0.981),
    "next_token_test": (0.998, 0.999),
    "valid_trajectories": (0.90, 0.97),
    "sequence_compression": (0.62, 0.70),
    "identical_continuations": (0.55, 0.56),
    "detour_robustness": (0.55, 0.72),
    "detour_robustness_least_likely": (0.41, 0.40),
    "effective_latent_rank": (28.4, 21.2),
}


def _figures(title: str, values: Mapping[str, float], **more: Any) -> PublishedFigures:
    return PublishedFigures(title=title, by_method=dict(values), **more)


MANHATTAN = Published(
    setting="a whole city",
    source="a paper",
    figures={
        "next_token_test": _figures(
            "Next-token test", {"GPT": 1.0, "MTP": 1.0, "JTP": 1.0, "NextLat": 1.0}
        ),
        "valid_trajectories": _figures(
            "Valid trajectories", {"GPT": 0.970, "MTP": 0.981, "JTP": 0.971, "NextLat": 0.987}
        ),
        "sequence_compression": _figures(
            "Compression", {"GPT": 0.65, "MTP": 0.64, "JTP": 0.32, "NextLat": 0.71, "truth": 1.0}
        ),
        "effective_latent_rank": _figures(
            "Rank", {"GPT": 160.1, "MTP": 57.7, "JTP": 215.8, "NextLat": 52.7}, unit="number"
        ),
        "detour_robustness": _figures("Detours", {"GPT": 0.85, "MTP": 0.95, "NextLat": 0.95}),
    },
)
LOSS_OF_BRANCH = 0.1 * math.log(2) / 4  # a tenth of guessing one of two arms, in four tokens
TASKS = {
    facts.name: facts
    for facts in (
        TaskFacts(name="streets", title="Streets of a city", published=MANHATTAN),
        TaskFacts(name="word-problem", title="Word problem"),
        TaskFacts(
            name="path-star",
            title="Path-Star",
            solved=Solved(
                metric="exact_path_accuracy",
                at_least=0.99,
                loss_below=LOSS_OF_BRANCH,
                definition="A seed solves it with nearly all paths exact.",
            ),
            published=Published(
                setting="larger graphs",
                source="a paper",
                sayings=[
                    Saying(
                        methods=("NextLat",),
                        text="near 100 % on G(2, 10)",
                        of="exact_path_accuracy",
                    ),
                    Saying(
                        methods=("BST",), text="starts to fail on G(7, 7)", of="exact_path_accuracy"
                    ),
                    Saying(methods=("GPT", "MTP", "JTP"), text="failed", of="exact_path_accuracy"),
                    Saying(methods=("GPT",), text="is not about anything measured"),
                ],
            ),
        ),
        TaskFacts(
            name="countdown",
            title="Countdown",
            published=Published(
                setting="four numbers",
                source="a paper",
                figures={
                    "solved": _figures(
                        "Problems solved",
                        {"GPT": 0.331, "BST": 0.423}
                        | {f"NextLat d={d}": x for d, x in ((1, 0.548), (4, 0.576), (8, 0.587))},
                    )
                },
            ),
        ),
        TaskFacts(name="hmm", title="Hidden Markov model"),
        TaskFacts(name="text", title="Text"),
    )
}


def write_run(
    directory: Path,
    objective: str = "nextlat",
    seed: int = 0,
    *,
    task: str = "streets",
    items: Mapping[str, ArrayLike] | None = None,
    numbers: Mapping[str, float | None] | None = None,
    declared: Iterable[Metric] = (),
    changes: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    task_facts: TaskFacts | None = None,
    **entry: Any,
) -> Path:
    """A finished and evaluated run.

    Args:
        directory: to be made.
        objective: one of `FIVE`, or another name.
        seed: of the run.
        task: one of `TASKS`.
        items: key of a metric -> what each item contributed.
        numbers: key of a metric -> its value (None: not finite), for metrics without items.
        declared: metrics that are not in `METRICS`, or other than there.
        changes: of the recipe, dotted.
        record: of run.json.
        facts: of the objective in results.json.
        task_facts: of the task there; None = as in `TASKS`.
        entry: of results.json.
    """
    horizon = 0 if objective in ("next-token", "bst") else 2
    horizon = (changes or {}).get(f"objectives.{objective}.horizon", horizon)
    recipe: dict[str, Any] = {
        "task": {"name": task, "tests": ITEMS},
        "objective": objective,
        "steps": 400,
        "batch_size": 16,
        "gradient_accumulation": 1,
        "seed": seed,
        "backbone": {"layers": 2, "width": 32},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"name": "wsd"},
        "run": {"precision": "fp32", "log_every": 10},
        "objectives": {objective: {"horizon": horizon, "lambda_kl": 0.1} if horizon else {}},
    }
    for dotted, value in (changes or {}).items():
        *path, last = dotted.split(".")
        table = recipe
        for key in path:
            table = table[key]
        table[last] = value
    directory.mkdir(parents=True)
    _dump(
        directory / "run.json",
        {
            "status": "finished",
            "recipe_name": "city-small",
            "recipe": recipe,
            "seed": seed,
            "task": {"name": task, "fingerprint": "0123456789abcdef"},
            "command": f"nextlat train city-small --objective {objective} --seed {seed}".split(),
            "versions": {"python": "3.11.2", "torch": "2.13.0", "nextlat": "0.1.0"},
            "git": None,
            "device": "cpu (x86_64)",
            "threads": 1,
            "parameters": {"lm": 123456, "objective": 7890},
            "steps": recipe["steps"],
            "tokens": 819200,
            "seconds": 61.5,
            **(record or {}),
        },
    )
    known = METRICS | {metric.key: metric for metric in declared}
    scores = {key: mean_score(np.asarray(values, float)) for key, values in (items or {}).items()}
    with (directory / SCORES).open("wb") as file:
        np.savez(file, **{key: score.per_item for key, score in scores.items()})
    metrics = [
        *(Measurement(known[key], score).record() for key, score in scores.items()),
        *(
            MeasuredMetric(**known[key].model_dump(), value=value)
            for key, value in (numbers or {}).items()
        ),
    ]
    parts = PARTS.get(objective, {})
    result = Result(
        task=task_facts or TASKS[task],
        objective=ObjectiveFacts(
            **{
                "name": objective,
                "title": TITLES.get(objective, objective.upper()),
                "published_as": "GPT"
                if objective == "next-token"
                else TITLES.get(objective, objective.upper()),
                "horizon": horizon,
                "parts": {name: title for name, (title, _) in parts.items()},
                **(facts or {}),
            }
        ),
        seed=seed,
        steps=recipe["steps"],
        metrics=metrics,
        **entry,
    )
    _dump(directory / RESULTS, Results(runs=[result]).model_dump(mode="json"))
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(10, recipe["steps"] + 1, 10):
        loss = 1 + 3 * np.exp(-step / 60) + 0.02 * rng.normal() - 0.02 * bool(horizon)
        height = {name: begin * np.exp(-step / 80) + 0.1 for name, (_, begin) in parts.items()}
        rest = {"learning_rate": 1e-3, "tokens": 2048 * step}
        lines.append({"step": step, "loss": loss, "next_token": loss, **height, **rest})
        if step % 100 == 0:
            lines.append({"step": step, "eval_loss": loss, "eval_next_token": loss + 0.02})
    write_log(directory, lines)
    return directory


def write_log(directory: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """metrics.jsonl of a run."""
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_city_run(directory: Path, objective: str, seed: int) -> Path:
    """One run with every metric of the street task, decoding and a map; NextLat is ahead as in
    `CITY`, plus chance."""
    nextlat = objective == "nextlat"
    luck = np.random.default_rng((seed, nextlat))
    hard = np.random.default_rng(7).random((len(CITY), ITEMS))
    items = {}
    for (name, values), difficulty in zip(CITY.items(), hard, strict=True):
        value = values[nextlat]
        if METRICS[name].unit == "share":
            limit = value + 0.03 * luck.normal()
            items[name] = (difficulty + 0.1 * luck.normal(size=ITEMS) < limit).astype(float)
        else:
            noise = 0.02 * luck.normal() + 0.05 * (difficulty - 0.5)
            items[name] = value * (1 + noise + 0.02 * luck.normal(size=ITEMS))
    numbers: dict[str, float] = {}
    charts: list[Chart] = []
    if nextlat:
        length = 3.1 + 0.2 * luck.normal()
        numbers = {
            "mean_acceptance_length": length,
            "accepted_tokens_per_cycle": length - 1,
            "decoding_speedup": 1.7 + 0.1 * luck.normal(),
        }
        accepted = [round(0.9**place + 0.02 * float(luck.normal()), 4) for place in range(1, 9)]
        chart = Chart(
            name="acceptance",
            title="Drafted tokens accepted",
            x="position in the draft",
            lines=[Line(values=accepted, dots=True)],
            alt="Share of drafted tokens accepted, {models}.",
        )
        charts.append(chart)
    picture = Picture(kind="map", file="map.json", title="The city in the model's head")
    path = write_run(
        directory,
        objective,
        seed,
        items=items,
        numbers=numbers,
        charts=charts,
        pictures=[picture],
    )
    rides = []
    for _ in range(60):
        here = source = int(luck.integers(len(NETWORK)))
        moves = []
        for _ in range(int(luck.integers(3, 9))):
            legal = NETWORK.legal_moves[here]
            moves.append(int(luck.choice(legal[legal >= 0])))
            here = int(NETWORK.targets[here, moves[-1]])
        if luck.random() < (0.05 if nextlat else 0.4):
            moves[-1] = int(luck.integers(8))
        rides.append((source, here, moves))
    _dump(path / "map.json", map_record(NETWORK, reconstruct(NETWORK, rides)))
    return path


def write_word_problem_run(directory: Path, objective: str, seed: int) -> Path:
    """One run of the word problem: the transformers fail beyond eight elements, the dynamics model
    does not."""
    x = np.arange(1, 25)
    curves = {
        "transformer": np.where(x <= 8, 0.98, 0.2 + 0.78 * np.exp(-(x - 8) / 2)) - 0.005 * seed
    }
    if objective == "nextlat":
        curves["dynamics"] = 0.99 - 0.008 * x - 0.01 * seed
    chart = Chart(
        name="accuracy",
        title="Accuracy by position",
        x="elements read",
        lines=[Line(values=values.tolist(), series=name) for name, values in curves.items()],
        alt="Accuracy of {models} by the number of elements read.",
        marks=[Mark(text="trained up to here", x=8), Mark(text="chance", y=1 / 5)],
    )
    items = {
        accuracy(name, length).key: np.arange(ITEMS) < round(ITEMS * values[length - 1])
        for name, values in curves.items()
        for length in (8, 16, 24)
    }
    return write_run(directory, objective, seed, task="word-problem", items=items, charts=[chart])


def write_path_star_run(
    directory: Path, objective: str, seed: int, losses: Mapping[int, float], exact: float
) -> Path:
    """One run of G(2, 3) with these held-out losses by step and this share of exact paths."""
    paths = np.arange(ITEMS) < round(ITEMS * exact)
    items = {
        "exact_path_accuracy": paths,
        "exact_path_accuracy_sampled": paths,
        "next_token_loss": np.full(ITEMS, 0.2),
    }
    chart = Chart(
        name="accuracy",
        title="Accuracy by node",
        x="node of the path",
        lines=[Line(values=[1.0, exact, 1.0], dots=True)],
        alt="Accuracy of {models} by node of the path.",
        marks=[Mark(text="chance", y=0.5, start=1.75, end=2.25)],
    )
    path = write_run(directory, objective, seed, task="path-star", items=items, charts=[chart])
    log = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    held_out = [
        {"step": step, "eval_loss": loss, "eval_next_token": loss} for step, loss in losses.items()
    ]
    write_log(path, [*(line for line in log if "eval_loss" not in line), *held_out])
    return path


def write_countdown_run(directory: Path, objective: str, seed: int, solved: float) -> Path:
    """One run with two equations; held-out targets are solved half as often as those seen in
    training."""
    shares = {"solved_seen": solved, "solved_held_out": solved / 2}
    lines = {"seen": [0.9 + 0.1 * solved, 0.3 + 0.7 * solved], "held-out": [0.9, 0.3]}
    shares |= {
        equation(place, split).key: values[place - 1]
        for place in (1, 2)
        for split, values in lines.items()
    }
    chart = Chart(
        name="equations",
        title="True equations",
        x="equation",
        lines=[Line(values=values, series=split, dots=True) for split, values in lines.items()],
        alt="Share of true equations of {models}.",
    )
    items = {name: np.arange(ITEMS) < round(ITEMS * share) for name, share in shares.items()}
    return write_run(directory, objective, seed, task="countdown", items=items, charts=[chart])


def write_hmm_run(directory: Path, objective: str, seed: int, r2: float, states: int = 3) -> Path:
    """One run of the hidden Markov model whose state tells this much of the belief; the first
    positions are the corners of the simplex."""
    luck = np.random.default_rng(seed)
    items = {
        "belief_r2": r2 + 0.02 * luck.normal(size=ITEMS),
        "next_token_kl": 0.01 * luck.random(ITEMS),
        "entropy_floor": np.linspace(0.9, 1.1, ITEMS),
    }
    if objective == "nextlat":
        items["consistency_error"] = 0.1 + 0.01 * luck.random(ITEMS)
    pictures = [Picture(kind="simplex", file="beliefs.json"), Picture(file="never-drawn.json")]
    path = write_run(directory, objective, seed, task="hmm", items=items, pictures=pictures)
    true = np.concatenate([np.eye(states), np.random.default_rng(0).dirichlet(np.ones(states), 40)])
    decoded = true + (1 - r2) * (luck.dirichlet(np.ones(states), len(true)) - 1 / states)
    beliefs = {"r2": r2, "true": true.round(5).tolist(), "decoded": decoded.round(5).tolist()}
    _dump(path / "beliefs.json", beliefs)
    return path


def write_text_run(directory: Path, objective: str, seed: int, ahead: float) -> Path:
    """One run of the text task whose probes are so many nats better at 20 tokens ahead, and not at
    all at one."""
    offsets = np.arange(20)
    curve = 3 + 2 * (1 - np.exp(-offsets / 4)) + 0.05 * seed - ahead * offsets / 19
    chart = Chart(
        name="probes",
        title="Linear probes of the state",
        x="tokens ahead",
        unit="nats",
        lines=[Line(values=curve.tolist(), dots=True)],
        alt="Cross-entropy of linear probes of {models}.",
        minus_baseline=True,
        linear_within=0.1,
    )
    items = {
        "perplexity": np.full(ITEMS, 12.0 + seed),
        "effective_latent_rank": np.full(ITEMS, 40.0),
    }
    return write_run(directory, objective, seed, task="text", items=items, charts=[chart])


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2))
