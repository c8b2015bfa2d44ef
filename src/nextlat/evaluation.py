"""A finished run and its task become results.json: every metric with its error, and what decoding
gains.

Next to it, scores.safetensors keeps what each item (pair, walk, sequence) contributed, so that two
models can be compared item by item without running them again; tables and plots read only these
files.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.utils.data import DataLoader

from nextlat.batch import Batch
from nextlat.decoding.speed import TRANSFORMERS, compare_decoding
from nextlat.errors import NextLatError
from nextlat.files import TEMPORARY, write_errors, write_json
from nextlat.model import ObjectiveModel, load
from nextlat.scores import Score, ratio_score, share_interval
from nextlat.tasks import Task
from nextlat.training.recipe import Recipe
from nextlat.training.run_directory import read_record
from nextlat.training.train import threads

RESULTS, SCORES = "results.json", "scores.safetensors"
DRAFT_LENGTH = 4  # of the decoding measurement: small models gain little from drafts that are longer than what is accepted
DECODED_PROMPTS = 12

# Metrics that every task has, beside those it names itself.
HIGHER_IS_BETTER = {
    "next_token_loss": False,
    "mean_acceptance_length": True,
    "accepted_tokens_per_cycle": True,
    "decoding_speedup": True,
    "decoding_speedup_transformers": True,
}

Progress = Callable[[str, int, int], None]  # what is measured now, how many are done, of how many


def open_run(directory: str | Path) -> tuple[Recipe, Task, ObjectiveModel]:
    """Recipe, task and trained model of a run directory.

    Raises:
        NextLatError: not a run, not finished, damaged, or its world is no longer the one it was
            trained in.
    """
    directory = Path(directory)
    record = read_record(directory)
    if record is None:
        raise NextLatError(
            f"{directory} is not a run directory (no run.json): train one with 'nextlat train RECIPE --out {directory}'."
        )
    if record["status"] != "finished":
        raise NextLatError(
            f"the run {directory} is not finished: give the command that started it again, and it goes on."
        )
    recipe = Recipe.from_dict(record["recipe"], record.get("recipe_name", directory.name))
    task = recipe.task.build()
    if task.fingerprint() != record["task"]["fingerprint"]:
        raise NextLatError(
            f"the data of task {recipe.task_name} are not those that {directory} was trained on: restore them to evaluate it."
        )
    return recipe, task, load(directory)


def evaluate(directory: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a finished run, write results.json and scores.safetensors into it, and return the
    entry of results.json.

    Args:
        directory: of the run. progress: called before every measurement.

    Raises:
        NextLatError: see `open_run`; or the results cannot be written.
    """
    directory = Path(directory)
    recipe, task, model = open_run(directory)
    with threads(recipe.run.threads):
        return _evaluate(directory, recipe, task, model, progress)


def _evaluate(
    directory: Path, recipe: Recipe, task: Task, model: ObjectiveModel, progress: Progress | None
) -> dict[str, Any]:
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    scores: dict[str, Score] = {}
    curves: dict[str, list[float]] = {}
    decodes = bool(task.prompts(1)) and model.objective.max_draft_length != 0
    stages = {
        "next-token loss": lambda m: {"next_token_loss": next_token_loss(m, task)},
        **task.metrics(),
    }
    total = len(stages) + 1 + decodes
    for done, (name, measure) in enumerate(stages.items()):
        if progress:
            progress(name, done, total)
        for key, value in measure(model).items():
            if isinstance(value, Score):
                scores[key] = value
            else:
                curves[key] = value
    metrics: dict[str, float] = {}
    for name, score in scores.items():
        metrics[name] = score.value
        if np.isfinite(score.stderr):
            metrics[f"{name}_stderr"] = score.stderr
    decoding: dict[str, Any] = {}
    if decodes:
        if progress:
            progress("decoding", len(stages), total)
        decoding = measure_decoding(model, task)
        metrics |= {name: decoding[name] for name in HIGHER_IS_BETTER if name in decoding}
    if progress:
        progress("pictures", total - 1, total)
    artifacts = task.artifacts(model)
    entry = {
        "task": recipe.task_name,
        "objective": recipe.objective,
        "horizon": model.objective.horizon,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "metrics": metrics,
        "intervals": {
            name: interval for name, score in scores.items() if (interval := share_interval(score))
        },
        "curves": curves,
        "decoding": decoding,
    }
    with write_errors(directory):
        temporary = directory / f"{TEMPORARY}{SCORES}"
        save_file(
            {name: score.per_item.astype(np.float64) for name, score in scores.items()}, temporary
        )
        temporary.replace(directory / SCORES)
        for name, content in artifacts.items():
            write_json(directory / name, content)
        write_json(directory / RESULTS, [entry])
    return entry


def next_token_loss(model: ObjectiveModel, task: Task) -> Score:
    """Cross-entropy of held-out rows in nats per scored token; the items are the rows."""
    sums, counts = [], []
    for row in DataLoader(task.eval_dataset(), batch_size=1):
        batch = Batch.from_inputs(**{name: x.to(model.device) for name, x in row.items()})
        row_sums, row_counts = model.next_token_loss(batch)
        sums += row_sums.tolist()
        counts += row_counts.tolist()
    return ratio_score(sums, counts)


def measure_decoding(model: ObjectiveModel, task: Task) -> dict[str, Any]:
    """Greedy self-speculation on held-out prompts, interleaved with plain decoding by us and by
    transformers."""
    room = task.max_length - max(len(prompt) for prompt in task.prompts(DECODED_PROMPTS))
    most = model.objective.max_draft_length
    length = DRAFT_LENGTH if most is None else min(DRAFT_LENGTH, most)
    timings = compare_decoding(
        model, task.prompts(DECODED_PROMPTS), draft_lengths=[0, length], max_new_tokens=room
    )
    drafted, plain, theirs = timings[length], timings[0], timings[TRANSFORMERS]
    # transformers decodes the LM alone, which with some objectives is not the model.
    same = drafted.outputs == plain.outputs and (
        model.objective.needed_at_inference or plain.outputs == theirs.outputs
    )
    return {
        "draft_length": length,
        "prompts": DECODED_PROMPTS,
        "identical": same,
        "mean_acceptance_length": drafted.total.mean_acceptance_length,
        "accepted_tokens_per_cycle": drafted.total.accepted_per_cycle,
        "acceptance_rate": drafted.total.acceptance_rate,
        "acceptance_by_position": drafted.total.acceptance_by_position,
        "decoding_speedup": drafted.tokens_per_second / plain.tokens_per_second,
        "decoding_speedup_transformers": drafted.tokens_per_second / theirs.tokens_per_second,
        "tokens_per_second": {
            str(way): timing.tokens_per_second for way, timing in timings.items()
        },
    }


def read_results(directory: str | Path) -> list[dict[str, Any]]:
    """results.json of a run.

    Raises:
        NextLatError: there is none, or it is corrupt.
    """
    path = Path(directory) / RESULTS
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise NextLatError(
            f"{directory} has no {RESULTS}: run 'nextlat evaluate {directory}' first."
        ) from error
    except (OSError, ValueError) as error:
        raise NextLatError(
            f"{path} is corrupt ({error}): run 'nextlat evaluate {directory}' again."
        ) from error
