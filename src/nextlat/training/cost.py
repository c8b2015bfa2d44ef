"""What a training run would cost, found out before it starts: parameters, tokens, operations, and
time on this machine.

Nothing is trained that stays, and nothing is written but the beginning of a text's tokens, in the
cache where the run finds it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nextlat.batch import Batch
from nextlat.model import ObjectiveModel
from nextlat.objectives.flops import step_flops
from nextlat.tasks import Task
from nextlat.tasks.task import DataSize
from nextlat.training.build import build_model
from nextlat.training.cached_states import Item
from nextlat.training.held_out import collate
from nextlat.training.recipe import Recipe
from nextlat.training.train import FirstRows, threads

BUDGET = 4.0  # seconds of matrix products that timing may take; longer steps are not tried
TIMED_STEPS = 3  # after one that is not timed


@dataclass(frozen=True)
class Cost:
    """The cost of one run."""

    lm_parameters: int  # of the transformer
    objective_parameters: int  # of what the objective adds
    steps: int
    rows: int  # of each step
    tokens: int  # of the whole run, padding left out; estimated from one batch
    flops: dict[str, float] | None  # of the whole run by part; None = there is no formula
    step_seconds: float
    timed: bool  # or a step takes at least as long as its matrix products, or its single rows
    flops_per_second: float  # of matrix products of the model's size here
    device: str
    threads: int
    data: DataSize | None  # of the training data, where they are kept

    @property
    def seconds(self) -> float:
        """Of the training; checkpoints and evaluations come on top."""
        return self.steps * self.step_seconds


def dry_run(recipe: Recipe, device: str | None = None) -> Cost:
    """Find out what `training.train` of a recipe would cost in one process.

    Args:
        recipe: see `recipe.load_recipe`.
        device: None = where it would be trained.

    Raises:
        NextLatError: whatever is wrong with the recipe's task or model.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with threads(recipe.run.threads), torch.random.fork_rng():
        task = recipe.task.preview().build()
        model = build_model(recipe, task).to(place).train()
        batch, steps = _first_batch(recipe, task), recipe.steps
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        flops = step_flops(model.objective, Batch.from_inputs(**batch))
        throughput = _matmul_flops_per_second(recipe, model)
        if flops:
            expected = sum(flops.values()) / throughput
        else:  # more than a step that computes the rows together
            row = {name: value[:1] for name, value in batch.items()}
            single = min(_seconds(lambda: _loss(recipe, model, row), place) for _ in range(2))
            expected = single * recipe.batch_size
        timed = expected * (TIMED_STEPS + 1) < BUDGET
        return Cost(
            lm_parameters=sum(p.numel() for p in model.lm.parameters()),
            objective_parameters=sum(p.numel() for p in model.objective.parameters()),
            steps=steps,
            rows=recipe.batch_size,
            tokens=tokens * steps,
            flops={name: value * steps for name, value in flops.items()} if flops else None,
            step_seconds=_seconds_per_step(recipe, task, model) if timed else expected,
            timed=timed,
            flops_per_second=throughput,
            device=torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
            threads=torch.get_num_threads(),
            data=task.data_size(),
        )


def _first_batch(recipe: Recipe, task: Task) -> Item:
    rows = FirstRows(task.train_dataset(recipe.seed), recipe.batch_size)
    return collate([rows[i] for i in range(len(rows))])


def _autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.run.precision == "bf16")


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _matmul_flops_per_second(recipe: Recipe, model: ObjectiveModel) -> float:
    """Of a product like those of the layers: (rows, D) by (D, 4 D), rows as many as a batch has."""
    rows, D, device = 2048, model.backbone.width, model.device
    x, weight = torch.randn(rows, D, device=device), torch.randn(D, 4 * D, device=device)
    with torch.no_grad(), _autocast(recipe, device):
        seconds = [_seconds(lambda: x @ weight, device) for _ in range(6)]
    return 2 * rows * D * 4 * D / statistics.median(seconds[1:])


def _loss(recipe: Recipe, model: ObjectiveModel, batch: Item) -> None:
    """Forward and backward pass of a batch."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    with _autocast(recipe, model.device):
        loss = model(**inputs).loss
    loss.backward()


def _seconds_per_step(recipe: Recipe, task: Task, model: ObjectiveModel) -> float:
    """Median of a few optimiser steps on real rows, made while it waits unless `run.workers` would
    make them."""
    device, parts = model.device, recipe.gradient_accumulation
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=device.type in ("cpu", "cuda"))
    ready = _first_batch(recipe, task) if recipe.run.workers else None

    def step() -> None:
        batch = ready or _first_batch(recipe, task)
        for part in range(parts):
            _loss(recipe, model, {name: value[part::parts] for name, value in batch.items()})
        optimizer.step()
        optimizer.zero_grad()

    return statistics.median([_seconds(step, device) for _ in range(1 + TIMED_STEPS)][1:])
