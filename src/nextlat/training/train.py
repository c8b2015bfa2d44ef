"""A recipe becomes a trained model: task, backbone and objective are built, trained, checkpointed,
and exported.

The same call on the same directory goes on where the last one stopped, however it stopped, and ends
with the same weights bit for bit (on the CPU with the same number of threads; on other devices as
far as their kernels are deterministic).
"""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments

from nextlat.backbone import llama
from nextlat.errors import NextLatError, first_line
from nextlat.files import TEMPORARY, move_into, remove, remove_unfinished, write_errors, write_json
from nextlat.hub import hub_or_cache
from nextlat.model import ObjectiveModel, attach
from nextlat.tasks import Task
from nextlat.training.recipe import Recipe, differences
from nextlat.training.run_directory import (
    RECORD,
    MetricsLog,
    checkpoint_step,
    last_complete_checkpoint,
    model_fault,
    provenance,
    read_record,
    refuse_foreign_directory,
    rotate_checkpoints,
    sole_writer,
)
from nextlat.training.trainer import FirstRows, NextLatTrainer, StopSignal, no_library_bars

logger = logging.getLogger(__name__)

SCHEDULERS = {"wsd": "warmup_stable_decay", "cosine": "cosine", "linear": "linear"}


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop (Ctrl-C, SIGTERM) and did so after a step, with a checkpoint.

    Attributes:
        signal: its number. step: optimiser steps done. directory: of the run.
    """

    def __init__(self, directory: Path, step: int, number: int) -> None:
        super().__init__(
            f"stopped after step {step}, saved in {directory}: the same command goes on from there."
        )
        self.directory, self.step, self.signal = directory, step, number


def build_model(recipe: Recipe, task: Task) -> ObjectiveModel:
    """The untrained model of a recipe. The backbone's initial weights depend on the seed alone, not
    on the objective.

    Raises:
        NextLatError: a horizon beyond the task's sequences; sizes that do not fit together; a
            pretrained model that cannot be loaded, or with too small a vocabulary.
    """
    _check_horizon(recipe, task)
    backbone, tokenizer = recipe.backbone, task.tokenizer
    lm: Any
    vocab_size = len(tokenizer)
    if backbone.pretrained is not None:
        try:
            with hub_or_cache(backbone.pretrained), no_library_bars():
                lm = AutoModelForCausalLM.from_pretrained(backbone.pretrained, dtype=torch.float32)
        except (OSError, ValueError, SafetensorError) as error:
            raise NextLatError(
                f"backbone.pretrained = '{backbone.pretrained}' cannot be loaded ({first_line(error)}): give the directory of a "
                "saved causal LM, or a hub id that can be reached."
            ) from error
        known = lm.get_input_embeddings().num_embeddings
        if known < vocab_size:
            raise NextLatError(
                f"backbone.pretrained = '{backbone.pretrained}' knows {known} tokens, the task {recipe.task_name} needs "
                f"{vocab_size}: train from scratch or choose another model."
            )
        lm.requires_grad_(not backbone.frozen)
    else:
        lm = llama(
            vocab_size,
            layers=backbone.layers or 0,  # None has been refused with the recipe
            width=backbone.width or 0,
            heads=backbone.heads or 0,
            intermediate_size=backbone.intermediate_size,
            initializer_range=backbone.initializer_range,
            max_length=backbone.max_length or task.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seed=recipe.seed,
        )
    positions = getattr(lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and positions < task.max_length:
        key = "max_length" if backbone.pretrained is None else "pretrained"
        raise NextLatError(
            f"backbone.{key} = {getattr(backbone, key)!r} gives {positions} positions, the task {recipe.task_name} needs "
            f"{task.max_length}: leave it out, or give one with as many."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return attach(lm, recipe.objective_config)


def training_arguments(recipe: Recipe, directory: Path) -> TrainingArguments:
    """The Trainer's arguments of a recipe.

    Raises:
        NextLatError: a batch that cannot be split over processes and micro-batches; a reporting
            tool that is not installed.
    """
    schedule, run, optimizer = recipe.schedule, recipe.run, recipe.optimizer
    scheduler = SCHEDULERS.get(
        schedule.name, "constant_with_warmup" if schedule.warmup_steps else "constant"
    )
    decay = {"num_decay_steps": schedule.decay_steps, "decay_type": "linear"}
    on_cpu = not torch.cuda.is_available()
    for tool in run.report_to:
        if find_spec(tool) is None:
            raise NextLatError(
                f"run.report_to asks for {tool}, which is not installed: pip install {tool}, or leave it out."
            )
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=recipe.steps,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        optim="adamw_torch_fused",
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon,
        max_grad_norm=optimizer.gradient_clip,
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=decay if schedule.name == "wsd" else None,
        warmup_steps=schedule.warmup_steps,
        logging_strategy="steps",
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,  # it would wait for the device at every step; the log refuses a loss gone wrong
        eval_strategy="steps",
        eval_steps=run.eval_every or recipe.steps,
        save_strategy="steps",
        save_steps=run.save_every or recipe.steps,
        save_total_limit=None,  # NextLatTrainer deletes old checkpoints itself, after the new one is safe
        report_to=list(run.report_to) or "none",
        run_name=recipe.run_name,
        disable_tqdm=True,  # NextLatTrainer has a bar of its own
        bf16=run.precision == "bf16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=run.workers,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,  # strict: what a task gives, the model must take
        seed=recipe.seed,
        data_seed=recipe.seed,
        ddp_find_unused_parameters=False,
    )
    if args.world_size == 1:
        args._n_gpu = min(
            args.n_gpu, 1
        )  # without torchrun one GPU is used; nn.DataParallel would break the counts
    parts = recipe.gradient_accumulation * args.world_size
    if recipe.batch_size % parts:
        raise NextLatError(
            f"batch_size {recipe.batch_size} cannot be split over {args.world_size} processes with gradient_accumulation "
            f"{recipe.gradient_accumulation}: choose a multiple of {parts}."
        )
    args.per_device_train_batch_size = args.per_device_eval_batch_size = recipe.batch_size // parts
    return args


def train(recipe: Recipe, out: str | Path, *, progress: bool = True) -> Path:
    """Train a recipe in a run directory, or go on with it there.

    A run that was stopped anywhere, `kill -9` during a save or the final export included, goes on
    from its last whole checkpoint. A finished run is left as it is and the call returns at once
    (`run_directory.is_finished` tells). On Ctrl-C the current step is finished and saved first.
    With `torchrun` the batch is divided among the processes.

    Args:
        recipe: see `recipe.load_recipe`. out: the run directory, made if need be. progress: show a
            progress bar on stderr.

    Returns:
        The run directory, now a plain Hugging Face model directory besides.

    Raises:
        NextLatError: the directory holds something else, a run of another recipe, or only damaged
            checkpoints; it cannot be written or the disk is full (the last checkpoint is then
            intact); another process is training there; the loss is not finite; or whatever is wrong
            with the recipe's task or model.
        Interrupted: by Ctrl-C or SIGTERM, after a checkpoint.
    """
    out = Path(out)
    with write_errors(out, "choose another place"):
        out.mkdir(parents=True, exist_ok=True)
    args = training_arguments(recipe, out)
    first = args.process_index == 0
    with sole_writer(out) if first else nullcontext(), threads(recipe.run.threads):
        with args.main_process_first():  # the first process tidies up before the others look
            record = read_record(out)
            check_same_run(record, recipe, out)
            if first:
                remove_unfinished(out)
        if record is None or record["status"] != "finished":
            _train(recipe, out, args, record, first=first, progress=progress)
        elif fault := model_fault(out):
            raise NextLatError(
                f"the finished run {out} is damaged ({fault}): restore it or train in another directory."
            )
        else:
            logger.info("%s is finished: nothing to train.", out)
        return out


def check_same_run(record: dict[str, Any] | None, recipe: Recipe, out: Path) -> None:
    """Whether a run directory with this run.json (None = without one) may be that of a recipe.

    Raises:
        NextLatError: it holds something else.
    """
    if record is None:
        refuse_foreign_directory(out)
        return
    # Read back first, so that a setting which came with a later version has its default and is no
    # difference.
    keys = differences(Recipe.from_dict(record["recipe"]).to_dict(), recipe.to_dict())
    if "objective" in keys:
        raise NextLatError(
            f"{out} is the run directory of another objective, {record['recipe']['objective']}, not {recipe.objective}: "
            "choose another directory."
        )
    if keys:
        raise NextLatError(
            f"{out} holds a run of a recipe that differs in {', '.join(keys)}: choose another one."
        )


def _train(
    recipe: Recipe,
    out: Path,
    args: TrainingArguments,
    record: dict[str, Any] | None,
    *,
    first: bool,
    progress: bool,
) -> None:
    checkpoint, faults = last_complete_checkpoint(out)
    if checkpoint is None and faults:
        raise NextLatError(
            f"no checkpoint in {out} can be used: {'; '.join(faults)}; restore one or choose another directory."
        )
    for fault in faults:
        logger.warning(
            "%s in %s: going on from %s.",
            fault,
            out,
            checkpoint.name if checkpoint else "the start",
        )
    step = checkpoint_step(checkpoint) if checkpoint else 0
    task = recipe.task.build()
    fingerprint = task.fingerprint()
    if record is not None and record["task"]["fingerprint"] != fingerprint:
        raise NextLatError(
            f"the data of task {recipe.task_name} is not what {out} was trained on: restore it, or start anew."
        )
    model = build_model(recipe, task)
    if record is None:
        record = _new_record(recipe, fingerprint, model, args)
    else:
        logger.info("going on from step %d of %d in %s.", step, recipe.steps, out)
        record = {**record, "resumed_at": [*record["resumed_at"], step]}
    if first:
        write_json(out / RECORD, record)
    if recipe.run.compile:
        model.lm.base_model.compile()  # the layers: fixed shapes and one graph, which the losses' masked positions have not
    rows = task.train_dataset(recipe.seed)
    stop = StopSignal()
    trainer = NextLatTrainer(
        model,
        args,
        FirstRows(rows, recipe.steps * recipe.batch_size),
        task.eval_dataset(),
        tokenizer=task.tokenizer,
        metrics=MetricsLog(out, step, first=first),
        keep_checkpoints=recipe.run.keep_checkpoints,
        stop=stop,
        progress=progress,
    )
    if step < recipe.steps:
        with stop.installed():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if (
            trainer.state.global_step < recipe.steps
        ):  # on all processes, whichever of them got the signal
            raise Interrupted(out, trainer.state.global_step, stop.received or signal.SIGINT)
        record = {
            **record,
            "tokens": trainer.state.num_input_tokens_seen,
            "seconds": round(trainer.seconds, 3),
        }
    else:
        assert checkpoint is not None
        trainer._load_from_checkpoint(
            str(checkpoint)
        )  # killed during the export: only that is left to do
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        record = {
            **record,
            "tokens": trainer.state.num_input_tokens_seen,
            "seconds": trainer.seconds_before,
        }
    if first:
        _export(trainer, out)
        write_json(
            out / RECORD,
            {**record, "status": "finished", "steps": recipe.steps, "finished": _now()},
        )
        rotate_checkpoints(out, recipe.steps, recipe.run.keep_checkpoints)
    trainer.accelerator.wait_for_everyone()


def check_trains(recipe: Recipe, task: Task) -> None:
    """Whether `train` would get to its first step with a recipe whose task is built, found out on
    one layer of its transformer.

    Raises:
        NextLatError: the objective does not fit the model, or its horizon the task.
    """
    backbone = (
        recipe.backbone
        if recipe.backbone.pretrained is not None
        else replace(recipe.backbone, layers=1)
    )
    build_model(replace(recipe, backbone=backbone), task)


def _check_horizon(recipe: Recipe, task: Task) -> None:
    """The last of d steps beyond the next token must have a target somewhere. (Before the model is
    built: MTP's grows with d.)"""
    d = getattr(recipe.objective_config, "horizon", 0)
    if not d:  # rows are not made for nothing
        return
    longest = min(task.max_length, len(task.train_dataset(recipe.seed)[0]["input_ids"]))
    if d + 2 > longest:
        raise NextLatError(
            f"the horizon {d} is too long for sequences of at most {longest} tokens: choose one of at most {max(longest - 2, 0)}."
        )


def _export(trainer: NextLatTrainer, out: Path) -> None:
    """The trained model into the run directory, config.json last: a directory without it opens
    nowhere."""
    staging = out / f"{TEMPORARY}export"
    with write_errors(out):
        try:
            trainer.save_model(str(staging), _internal_call=True)
            move_into(staging, out, last="config.json")
        finally:
            remove(staging)


def _new_record(
    recipe: Recipe, fingerprint: str, model: ObjectiveModel, args: TrainingArguments
) -> dict[str, Any]:
    return {
        "status": "running",
        "recipe_name": recipe.name,
        "recipe": recipe.to_dict(),
        "seed": recipe.seed,
        "task": {"name": recipe.task_name, "fingerprint": fingerprint},
        **provenance(args.device),
        "processes": args.world_size,
        "parameters": {
            "lm": sum(p.numel() for p in model.lm.parameters()),
            "objective": sum(p.numel() for p in model.objective.parameters()),
        },
        "started": _now(),
        "resumed_at": [],
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextmanager
def threads(number: int) -> Iterator[None]:
    """torch on so many CPU threads; 0 leaves it as it is."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
