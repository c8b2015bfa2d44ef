"""Run directories as training and evaluation leave them, made up: for tests of what is built from
them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nextlat.scores import mean_score
from nextlat.tasks.streets.map import map_record, reconstruct
from nextlat.tasks.streets.sources import generate_city

ITEMS = 200
CITY = {  # metric -> (next-token, NextLat)
    "next_token_loss": (0.985, 0.981),
    "next_token_test": (0.998, 0.999),
    "valid_trajectories": (0.90, 0.97),
    "sequence_compression": (0.62, 0.70),
    "identical_continuations": (0.55, 0.56),
    "identical_valid_continuations": (0.54, 0.56),
    "detour_robustness": (0.55, 0.72),
    "detour_robustness_least_likely": (0.41, 0.40),
    "effective_latent_rank": (28.4, 21.2),
}
FIVE = ("next-token", "nextlat", "mtp", "jtp", "bst")
PARTS = {  # of the loss, and how high they begin
    "nextlat": {"next_h": 0.4, "kl": 0.6},
    "mtp": {"multi_token": 1.2},
    "jtp": {"multi_token": 1.0},
    "bst": {"pairs": 4.0, "pairs_next": 2.0, "pairs_previous": 2.0},
}
NETWORK = generate_city(rows=5, columns=5, seed=0)


def write_run(
    directory: Path,
    objective: str = "nextlat",
    seed: int = 0,
    *,
    task: str = "streets",
    items: dict[str, Any] | None = None,
    numbers: dict[str, float] | None = None,
    changes: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    **entry: Any,
) -> Path:
    """A finished and evaluated run.

    Args:
        items: metric -> what each item contributed. numbers: metrics without items.
        changes: of the recipe, dotted. record: of run.json. entry: of results.json.
    """
    horizon = 0 if objective in ("next-token", "bst") else 2
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
    recipe["task"] |= {
        "word-problem": {"group": "Z5", "length": 8},
        "path-star": {"arms": 2, "length": 3},
    }.get(task, {})
    directory.mkdir(parents=True)
    _dump(
        directory / "run.json",
        {
            "status": "finished",
            "recipe_name": "city-small",
            "recipe": recipe,
            "seed": seed,
            "task": {"name": task, "fingerprint": "0123456789abcdef"},
            "command": [
                "nextlat",
                "train",
                "city-small",
                "--objective",
                objective,
                "--seed",
                str(seed),
            ],
            "versions": {"python": "3.11.2", "torch": "2.13.0", "nextlat": "0.1.0"},
            "git": None,
            "device": "cpu (x86_64)",
            "threads": 1,
            "parameters": {"lm": 123456, "objective": 7890},
            "tokens": 819200,
            "seconds": 61.5,
            **(record or {}),
        },
    )
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in (items or {}).items()}
    save_file(arrays, directory / "scores.safetensors")
    metrics = dict(numbers or {})
    for name, values in arrays.items():
        score = mean_score(values)
        metrics |= {name: score.value} | (
            {f"{name}_stderr": score.stderr} if len(values) > 1 else {}
        )
    results = {
        "task": task,
        "objective": objective,
        "horizon": horizon,
        "seed": seed,
        "metrics": metrics,
        "curves": {},
        "decoding": {},
    }
    _dump(directory / "results.json", [{**results, **entry}])
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(10, recipe["steps"] + 1, 10):
        loss = 1 + 3 * np.exp(-step / 60) + 0.02 * rng.normal() - 0.02 * bool(horizon)
        parts = {
            name: height * np.exp(-step / 80) + 0.1
            for name, height in PARTS.get(objective, {}).items()
        }
        lines.append(
            {
                "step": step,
                "loss": loss,
                "next_token": loss,
                **parts,
                "learning_rate": 1e-3,
                "tokens": 2048 * step,
            }
        )
        if step % 100 == 0:
            lines.append({"step": step, "eval_loss": loss, "eval_next_token": loss + 0.02})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def write_city_run(directory: Path, objective: str, seed: int) -> Path:
    """One run with every metric of the street task, decoding and a map; NextLat is ahead as in
    `CITY`, plus chance."""
    nextlat = objective == "nextlat"
    luck, hard = (
        np.random.default_rng((seed, nextlat)),
        np.random.default_rng(7).random((len(CITY), ITEMS)),
    )
    items = {}
    for (name, values), difficulty in zip(CITY.items(), hard, strict=True):
        value = values[nextlat]
        if name in ("next_token_loss", "effective_latent_rank"):
            items[name] = value * (
                1
                + 0.02 * luck.normal()
                + 0.05 * (difficulty - 0.5)
                + 0.02 * luck.normal(size=ITEMS)
            )
        else:
            items[name] = (
                difficulty + 0.1 * luck.normal(size=ITEMS) < value + 0.03 * luck.normal()
            ).astype(float)
    decoding: dict[str, Any] = {}
    if nextlat:
        decoding = {
            "draft_length": 8,
            "identical": True,
            "mean_acceptance_length": 3.1 + 0.2 * luck.normal(),
            "decoding_speedup": 1.7 + 0.1 * luck.normal(),
            "acceptance_by_position": [
                round(0.9**place + 0.02 * float(luck.normal()), 4) for place in range(1, 9)
            ],
        }
    numbers = {
        name: decoding[name]
        for name in ("mean_acceptance_length", "decoding_speedup")
        if name in decoding
    }
    if nextlat:
        numbers["accepted_tokens_per_cycle"] = numbers["mean_acceptance_length"] - 1
    path = write_run(directory, objective, seed, items=items, numbers=numbers, decoding=decoding)
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
    places = np.arange(1, 25)
    transformer = np.where(places <= 8, 0.98, 0.2 + 0.78 * np.exp(-(places - 8) / 2)) - 0.005 * seed
    curves = {"transformer_accuracy_by_position": transformer.tolist()}
    items = {
        f"transformer_accuracy_{n}": np.arange(ITEMS) < round(ITEMS * transformer[n - 1])
        for n in (8, 16, 24)
    }
    if objective == "nextlat":
        alone = 0.99 - 0.008 * places - 0.01 * seed
        curves["dynamics_accuracy_by_position"] = alone.tolist()
        items |= {
            f"dynamics_accuracy_{n}": np.arange(ITEMS) < round(ITEMS * alone[n - 1])
            for n in (8, 16, 24)
        }
    return write_run(directory, objective, seed, task="word-problem", items=items, curves=curves)


def write_path_star_run(
    directory: Path, objective: str, seed: int, losses: dict[int, float], exact: float
) -> Path:
    """One run of G(2, 3) with these held-out losses at these steps and this share of exact paths;
    the branch is as good as the path."""
    shares = {1: 1.0, 2: exact, 3: 1.0}
    items = {
        f"accuracy_position_{place}": np.arange(ITEMS) < round(ITEMS * share)
        for place, share in shares.items()
    }
    items |= {
        name: items["accuracy_position_2"]
        for name in ("exact_path_accuracy", "exact_path_accuracy_sampled")
    }
    items["next_token_loss"] = np.full(ITEMS, 0.2)
    path = write_run(
        directory,
        objective,
        seed,
        task="path-star",
        items=items,
        curves={"accuracy_by_position": list(shares.values())},
    )
    log = [
        line
        for line in (path / "metrics.jsonl").read_text().splitlines()
        if "eval_loss" not in line
    ]
    log += [
        json.dumps({"step": step, "eval_loss": loss, "eval_next_token": loss})
        for step, loss in losses.items()
    ]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in log))
    return path


def write_countdown_run(directory: Path, objective: str, seed: int, solved: float) -> Path:
    """One run with two equations; held-out targets are solved half as often as those seen in
    training."""
    shares = {"solved_seen": solved, "solved_held_out": solved / 2}
    for place, easier in ((1, 0.9), (2, 0.3)):
        shares |= {
            f"true_equation_{place}_seen": easier + (1 - easier) * solved,
            f"true_equation_{place}_held_out": easier,
        }
    items = {name: np.arange(ITEMS) < round(ITEMS * share) for name, share in shares.items()}
    return write_run(directory, objective, seed, task="countdown", items=items)


def write_hmm_run(directory: Path, objective: str, seed: int, r2: float, states: int = 3) -> Path:
    """One run of the hidden Markov model whose state tells this much of the belief; the first
    places are the corners of the simplex."""
    luck = np.random.default_rng(seed)
    items = {
        "belief_r2": r2 + 0.02 * luck.normal(size=ITEMS),
        "next_token_kl": 0.01 * luck.random(ITEMS),
    }
    items |= {"entropy_floor": np.linspace(0.9, 1.1, ITEMS)}
    items |= (
        {"transition_consistency_error": 0.1 + 0.01 * luck.random(ITEMS)}
        if objective == "nextlat"
        else {}
    )
    path = write_run(directory, objective, seed, task="hmm", items=items)
    true = np.concatenate([np.eye(states), np.random.default_rng(0).dirichlet(np.ones(states), 40)])
    decoded = true + (1 - r2) * (luck.dirichlet(np.ones(states), len(true)) - 1 / states)
    _dump(
        path / "beliefs.json",
        {"r2": r2, "true": true.round(5).tolist(), "decoded": decoded.round(5).tolist()},
    )
    return path


def write_text_run(directory: Path, objective: str, seed: int, ahead: float) -> Path:
    """One run of the text task whose probes are so many nats better at 20 tokens ahead, and not at
    all at one."""
    offsets = np.arange(20)
    curve = 3 + 2 * (1 - np.exp(-offsets / 4)) + 0.05 * seed - ahead * offsets / 19
    items = {
        "perplexity": np.full(ITEMS, 12.0 + seed),
        "effective_latent_rank": np.full(ITEMS, 40.0),
    }
    return write_run(
        directory,
        objective,
        seed,
        task="text",
        items=items,
        curves={"probe_cross_entropy": curve.tolist()},
    )


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2))
