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
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from nextlat.errors import NextLatError
from nextlat.files import (
    TEMPORARY,
    move_into,
    named_directory,
    remove,
    remove_unfinished,
    write_errors,
    write_json,
)
from nextlat.model import ObjectiveModel, load
from nextlat.signals import StopSignal
from nextlat.training import ranks
from nextlat.training.build import build_model
from nextlat.training.cached_states import CachedStates, Item, NumberedRows
from nextlat.training.checkpoints import (
    checkpoint_step,
    last_complete_checkpoint,
    load_trainer_state,
    rotate_checkpoints,
)
from nextlat.training.held_out import collate
from nextlat.training.recipe import Recipe
from nextlat.training.run_directory import (
    FORMAT,
    RECORD,
    differences,
    provenance,
    read_record,
    refuse_foreign_directory,
    sole_writer,
)
from nextlat.training.run_log import Progress, RunLog
from nextlat.training.sharding import plugin_of
from nextlat.training.trainer import NextLatTrainer

logger = logging.getLogger(__name__)

SCHEDULERS = {"wsd": "warmup_stable_decay", "cosine": "cosine", "linear": "linear"}
STATES = "states"
FIXED = ("run.precision", "run.compile", "run.keep")  # of a run, they change its result


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


def training_arguments(recipe: Recipe, directory: Path) -> TrainingArguments:
    """The Trainer's arguments of a recipe.

    Raises:
        NextLatError: a batch that cannot be split over processes and micro-batches; a reporting
            tool that is not installed; an environment that asks for something else.
    """
    schedule, run, optimizer = recipe.schedule, recipe.run, recipe.optimizer
    ranks.check_environment(
        accumulation=recipe.gradient_accumulation,
        precision=run.precision.replace("fp32", "no"),
        compiled=run.compile,
    )
    ranks.join()
    configured = ranks.asked("ACCELERATE_USE_FSDP")
    if configured and run.parallel == "ddp":
        raise NextLatError(
            'accelerate is configured for FSDP, and the recipe for run.parallel = "ddp": set '
            "run.parallel=fsdp, or leave out accelerate's."
        )
    decay = {"num_decay_steps": schedule.decay_steps, "decay_type": "linear"}
    scheduler = SCHEDULERS.get(
        schedule.name, "constant_with_warmup" if schedule.warmup_steps else "constant"
    )
    on_cpu, best = not torch.cuda.is_available(), run.keep == "best"
    criterion = "loss" if recipe.backbone.frozen else "next_token"
    for tool in run.report_to:
        if find_spec(tool) is None:
            raise NextLatError(
                f"run.report_to asks for {tool}, which is not installed: pip install {tool}, or "
                "leave it out."
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
        # The filter would wait for the device at every step; the log refuses a loss gone wrong.
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=run.eval_every or recipe.steps,
        save_strategy="steps",
        save_steps=(run.eval_every if best else run.save_every) or recipe.steps,
        load_best_model_at_end=best,
        metric_for_best_model=criterion if best else None,
        greater_is_better=False,
        save_total_limit=max(run.keep_checkpoints, 1),
        report_to=list(run.report_to) or "none",
        run_name=recipe.run_name,
        disable_tqdm=True,  # `train` reports its progress itself
        bf16=run.precision == "bf16",
        # What accelerate is configured for beyond that holds.
        fsdp=cast(Any, run.parallel == "fsdp" and not configured),
        log_level_replica="error",
        ddp_timeout=int(ranks.NO_TIME_OUT.total_seconds()),
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=run.workers,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,  # strict: what a task gives, the model must take
        seed=recipe.seed,
        data_seed=recipe.seed,
    )
    parts = recipe.gradient_accumulation * args.world_size
    if recipe.batch_size % parts:
        raise NextLatError(
            f"batch_size {recipe.batch_size} cannot be split over {args.world_size} processes with "
            f"gradient_accumulation {recipe.gradient_accumulation}: choose a multiple of {parts}."
        )
    plugin_of(args)  # refuses what cannot be
    args.per_device_train_batch_size = args.per_device_eval_batch_size = recipe.batch_size // parts
    return args


class FirstRows(Dataset[Item]):
    """The first `count` rows of a dataset, begun again where it ends: those of one run, in order.

    Rows are independent draws (see `tasks`), so there is nothing to shuffle, and a resumed run
    finds its position by counting.
    """

    def __init__(self, dataset: Dataset[Item], count: int) -> None:
        self._dataset, self._count = dataset, count
        self._size: int = len(dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        return self._dataset[index % self._size]


def train(recipe: Recipe, out: str | Path, *, progress: Progress | None = None) -> Path:
    """Train a recipe in a run directory, or go on with it there.

    A run that was stopped anywhere, `kill -9` during a save or the final export included, goes on
    from its last whole checkpoint. A finished run is left as it is and the call returns at once
    (`run_directory.is_finished` tells). On Ctrl-C or SIGTERM the current step is finished and saved
    first. With `torchrun` the batch is divided among the processes.

    Args:
        recipe: see `recipe.load_recipe`.
        out: the run directory, made if need be.
        progress: called after every step.

    Returns:
        The run directory, now a plain Hugging Face model directory besides.

    Raises:
        NextLatError: the directory holds something else, a run of another recipe, or only damaged
            checkpoints; it cannot be written or the disk is full (the last checkpoint is then
            intact); another process is training there; the loss or a weight is not finite; or
            whatever is wrong with the recipe's task or model.
        Interrupted: by Ctrl-C or SIGTERM, after a checkpoint.
        KeyboardInterrupt: by one of them, before the first step or after the last.
    """
    out = named_directory(out)
    with write_errors(out, "choose another place"):
        out.mkdir(parents=True, exist_ok=True)
    args = training_arguments(recipe, out)
    first = args.process_index == 0
    with StopSignal() as stop, threads(recipe.run.threads), ExitStack() as lock:
        with ranks.together():  # the first process tidies up before the others look
            if first:
                lock.enter_context(sole_writer(out))
                check_same_run(read_record(out), recipe, out)
                remove_unfinished(out)
        record = read_record(out)
        if record is None or record["status"] != "finished":
            _train(recipe, out, args, record, stop, progress if first else None)
            return out
        with ranks.together():
            if first:
                try:
                    load(out)
                except NextLatError as error:
                    raise NextLatError(f"the finished run {out} is damaged: {error}") from error
                logger.info("%s is finished: nothing to train.", out)
    return out


def check_same_run(record: dict[str, Any] | None, recipe: Recipe, out: Path) -> None:
    """Whether a run directory with this run.json (None = without one) may be that of a recipe.

    Settings that its result does not depend on may differ: all of `run` but precision and compile.

    Raises:
        NextLatError: it holds something else.
    """
    if record is None:
        refuse_foreign_directory(out)
        return
    # Read back first, so that a setting which came with a later version has its default and is no
    # difference.
    before = Recipe.from_dict(record["recipe"], record["recipe_name"])
    keys = differences(before.to_dict(), recipe.to_dict())
    if "objective" in keys:
        raise NextLatError(
            f"{out} is the run directory of another objective, {before.objective}, not "
            f"{recipe.objective}: choose another directory."
        )
    if keys := [key for key in keys if not key.startswith("run.") or key in FIXED]:
        raise NextLatError(
            f"{out} holds a run of a recipe that differs in {', '.join(keys)}: choose another one."
        )


def _train(
    recipe: Recipe,
    out: Path,
    args: TrainingArguments,
    record: dict[str, Any] | None,
    stop: StopSignal,
    progress: Progress | None,
) -> None:
    checkpoint, faults = last_complete_checkpoint(out)
    if checkpoint is None and faults:
        raise NextLatError(
            f"no checkpoint in {out} can be used: {'; '.join(faults)}; restore one or choose "
            "another directory."
        )
    start = checkpoint.name if checkpoint else "the start"
    first = args.process_index == 0
    for fault in faults if first else ():
        logger.warning("%s in %s: going on from %s.", fault, out, start)
    step = checkpoint_step(checkpoint) if checkpoint else 0
    task = recipe.task.build()
    fingerprint = task.fingerprint()
    if record is not None and record["task"]["fingerprint"] != fingerprint:
        raise NextLatError(
            f"the data of task {recipe.task_name} is not what {out} was trained on: restore it, or "
            "start anew."
        )
    model = build_model(recipe, task)
    if record is None:
        record = _new_record(recipe, fingerprint, model, args)
    else:
        logger.info("going on from step %d of %d in %s.", step, recipe.steps, out)
        resumed = [*record["resumed_at"], step]
        record = {**record, "recipe": recipe.to_dict(), "resumed_at": resumed}
    if first:
        write_json(out / RECORD, record)
    if recipe.run.compile:
        # The layers: fixed shapes and one graph, which the losses' masked positions have not.
        model.backbone.transformer.compile()
    log = RunLog(out, step, stop, progress, first=first)
    train_rows, eval_rows = task.train_dataset(recipe.seed), task.eval_dataset()
    count, kept = recipe.steps * recipe.batch_size, recipe.backbone.cached_rows
    if kept:
        kept = min(kept, getattr(train_rows, "rows", kept))
        eval_rows = NumberedRows(eval_rows, len(eval_rows))
    trainer = NextLatTrainer(
        model,
        args,
        collate,
        NumberedRows(train_rows, kept, count, recipe.seed)
        if kept
        else FirstRows(train_rows, count),
        eval_rows,
        task.tokenizer,
        callbacks=[log],
    )
    if kept:
        directory, sole = Path(recipe.run.states or out / STATES), not recipe.run.states
        trainer.train_states, trainer.eval_states = (
            CachedStates(
                directory / name,
                rows,
                [name, fingerprint, recipe.seed, recipe.run.precision],
                sole=sole,
            )
            for name, rows in (("train", kept), ("eval", eval_rows.rows))
        )
    trainer.remove_callback(PrinterCallback)
    if step < recipe.steps:
        with stop.deferred():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        done = trainer.state.global_step
        if done < recipe.steps:  # on all processes, whichever of them got the signal
            raise Interrupted(out, done, stop.received or signal.SIGINT)
    else:  # killed during the export: only that is left to do
        assert checkpoint is not None
        trainer.state = load_trainer_state(checkpoint)
        kept = trainer.state.best_global_step or step
        trainer._load_from_checkpoint(str(checkpoint.with_name(f"checkpoint-{kept}")))
    with ranks.together():
        _export(trainer, out, first=first)
        if first:
            finished = {
                "status": "finished",
                "steps": recipe.steps,
                "kept": trainer.state.best_global_step or recipe.steps,
                "tokens": trainer.state.num_input_tokens_seen,
                "seconds": log.seconds,
                "finished": _now(),
            }
            write_json(out / RECORD, {**record, **finished})
            rotate_checkpoints(out, recipe.steps, recipe.run.keep_checkpoints)
            remove(out / STATES)


def _export(trainer: NextLatTrainer, out: Path, *, first: bool) -> None:
    """The trained model into the run directory, config.json last: a directory without it opens
    nowhere."""
    staging = out / f"{TEMPORARY}export"
    with write_errors(out):
        try:
            trainer.save_model(str(staging), _internal_call=True)
            if first:
                move_into(staging, out, last="config.json")
        finally:
            if first:
                remove(staging)


def _new_record(
    recipe: Recipe, fingerprint: str, model: ObjectiveModel, args: TrainingArguments
) -> dict[str, Any]:
    return {
        "format": FORMAT,
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
