"""The untrained model of a recipe."""

import os
from typing import Any, cast

import torch

from nextlat.batch import IGNORE
from nextlat.errors import NextLatError
from nextlat.hub import hub_or_cache
from nextlat.model import ObjectiveModel, attach
from nextlat.objectives import NextLat
from nextlat.paper_lm import llama
from nextlat.tasks import Task
from nextlat.tasks.task import vocabulary_size
from nextlat.training.recipe import Recipe
from nextlat.training.trainer import no_library_bars
from nextlat.weights import load_lm

VOCABULARY = "draft_vocabulary"  # a setting of NextLat
COUNTED_ROWS = 4000  # in which tokens are counted for it


def build_model(recipe: Recipe, task: Task) -> ObjectiveModel:
    """The untrained model of a recipe. The backbone's initial weights depend on the seed alone, not
    on the objective.

    Raises:
        NextLatError: a horizon beyond the task's sequences; sizes that do not fit together, or into
            memory; a pretrained model that cannot be loaded, or with too small a vocabulary.
    """
    _check_horizon(recipe, task)
    backbone, tokenizer = recipe.backbone, task.tokenizer
    lm: Any
    if backbone.pretrained is not None:
        given = f"backbone.pretrained = '{backbone.pretrained}'"
        try:
            with hub_or_cache(backbone.pretrained), no_library_bars():
                how = {} if backbone.frozen else {"dtype": torch.float32}
                lm = load_lm(backbone.pretrained, **how)
        except NextLatError as error:
            raise NextLatError(f"{given}: {error}") from error
        known, needed = lm.get_input_embeddings().num_embeddings, vocabulary_size(tokenizer)
        if known < needed:
            raise NextLatError(
                f"{given} knows {known} tokens, the task {recipe.task_name} needs {needed}: train "
                "from scratch or choose another model."
            )
        lm.requires_grad_(not backbone.frozen)
    else:
        layers, width, heads = backbone.layers, backbone.width, backbone.heads
        assert layers and width and heads  # or the recipe would have been refused
        _check_memory(layers * width * (backbone.intermediate_size or width) * 4)
        # transformers keeps the embedding of the padding token at zero.
        pad = tokenizer.pad_token_id
        spoken = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        lm = llama(
            vocabulary_size(tokenizer),
            layers=layers,
            width=width,
            heads=heads,
            intermediate_size=backbone.intermediate_size,
            initializer_range=backbone.initializer_range,
            max_length=backbone.max_length or task.max_length,
            positions=backbone.positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None if pad in spoken else pad,
            seed=recipe.seed,
        )
    positions = getattr(lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and positions < task.max_length:
        key = "max_length" if backbone.pretrained is None else "pretrained"
        raise NextLatError(
            f"backbone.{key} = {getattr(backbone, key)!r} gives {positions} positions, the task "
            f"{recipe.task_name} needs {task.max_length}: leave it out, or give one with as many."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        try:
            model = attach(lm, recipe.objective_config)
            if backbone.frozen:
                model.objective.float()  # what is trained, beside an LM that keeps its dtype
            if isinstance(number := getattr(recipe.objective_config, VOCABULARY, None), int):
                tokens = frequent_tokens(task, recipe.seed, number)
                cast(NextLat, model.objective).set_draft_vocabulary(tokens)
            return model
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            raise NextLatError(
                f"the objective {recipe.objective} with these settings does not fit into this "
                "machine's memory: make it smaller."
            ) from error


def frequent_tokens(task: Task, seed: int, number: int) -> list[int]:
    """The tokens with most labels in the first training rows, all others after them by their id."""
    dataset: Any = task.train_dataset(seed)
    rows = min(COUNTED_ROWS, getattr(dataset, "rows", COUNTED_ROWS))
    labels = torch.cat([dataset[row]["labels"] for row in range(rows)])
    counts = torch.bincount(labels[labels != IGNORE], minlength=number)
    return counts.argsort(descending=True, stable=True)[:number].tolist()


def _check_memory(parameters: int) -> None:
    """Refuse a transformer that has more weights than this machine's memory could hold."""
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    if 4 * parameters > memory > 0:
        raise NextLatError(
            f"the transformer would take {4 * parameters / 1e9:,.0f} GB, and this machine has "
            f"{memory / 1e9:,.0f}: lower backbone.layers or backbone.width."
        )


def check_trains(recipe: Recipe, task: Task) -> None:
    """Whether `train` would get to its first step with a recipe whose task is built, found out on
    one layer of its transformer.

    Raises:
        NextLatError: the objective does not fit the model, or its horizon the task.
    """
    backbone = recipe.backbone
    if backbone.pretrained is None:
        backbone = backbone.model_copy(update={"layers": 1})
    build_model(recipe.model_copy(update={"backbone": backbone}), task)


def _check_horizon(recipe: Recipe, task: Task) -> None:
    """The last of d steps beyond the next token must have a target somewhere. (Before the model is
    built: MTP's grows with d.)"""
    d = getattr(recipe.objective_config, "horizon", 0)
    if not d:  # rows are not made for nothing
        return
    longest = min(task.max_length, len(task.train_dataset(recipe.seed)[0]["input_ids"]))
    if d + 2 > longest:
        raise NextLatError(
            f"the horizon {d} is too long for sequences of at most {longest} tokens: choose one of "
            f"at most {max(longest - 2, 0)}."
        )
