"""`transformers.Trainer` for objective models.

As thin as can be: every method here replaces or refines one of the Trainer's own of the same name;
the loop, optimiser, schedules, mixed precision, distribution and reporting are the library's.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging as library_logging

from nextlat.errors import NextLatError
from nextlat.files import atomic_directory, staging_directory
from nextlat.head import is_frozen
from nextlat.losses import add_counts
from nextlat.model import ObjectiveModel
from nextlat.saving import link_lm
from nextlat.sidecar import DESCRIPTION
from nextlat.training import ranks
from nextlat.training.cached_states import ROW, CachedStates
from nextlat.training.cached_states import Item as Item
from nextlat.training.checkpoints import (
    check_optimizer_state,
    load_state,
    load_trainer_state,
    of_this_run,
    rotate_checkpoints,
)
from nextlat.training.held_out import by_position, evaluation_loss, model_inputs
from nextlat.training.sharding import (
    Shards,
    load_optimizer,
    names_of,
    plugin_of,
    save_optimizer,
    take_shards,
)
from nextlat.weights import SIDECAR, not_finite, read_sums, write_sums

logger = logging.getLogger(__name__)


@contextmanager
def no_library_bars() -> Iterator[None]:
    """transformers draws a bar for every load and save, across the one of the run."""
    shown = library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library_logging.enable_progress_bar()


class NextLatTrainer(Trainer):
    """`transformers.Trainer` for what `nextlat.attach` gives, with the same arguments.

    Every loss part is divided by its own count over the whole optimiser step (micro-batches and
    processes) and logged. What is saved is a plain Hugging Face directory with the sidecar
    `nextlat/`. A checkpoint gets its name only when all of it is on the disk, and what is read from
    it on resume is compared with the model. A loss or weight that is not finite ends the training.

    It is a mixin, too: `class MyTrainer(NextLatTrainer, SomeTrainer)` does the same for any other
    subclass of the Trainer.

    Example:
        trainer = nextlat.NextLatTrainer(model, args, train_dataset=rows)
        trainer.train()
        trainer.save_model("my-model")  # opens with nextlat.load and AutoModelForCausalLM

    Raises:
        NextLatError: a model that is none of ours, a setting that asks for what an objective model
            cannot do, or a checkpoint of something else.
    """

    args: TrainingArguments
    train_states: CachedStates | None = None  # of rows with numbers
    eval_states: CachedStates | None = None
    _shards: Shards | None = None  # with FSDP, once training has begun
    _names: list[str] = []  # of the optimiser's parameters
    _written: Path | None = None  # a checkpoint that holds the LM as it is, where that is frozen

    def create_accelerator_and_postprocess(self) -> None:
        if not isinstance(self.model, ObjectiveModel):
            kind = type(self.model).__name__
            raise NextLatError(f"NextLatTrainer trains what nextlat.attach gives, not a {kind}.")
        args = self.args
        ranks.check_environment(
            accumulation=args.gradient_accumulation_steps,
            precision="fp16" if args.fp16 else "bf16" if args.bf16 else None,
        )
        if args.deepspeed or getattr(args, "parallelism_config", None):
            raise NextLatError(
                "objective models train with plain data parallelism or FSDP2: leave deepspeed and "
                "parallelism_config out."
            )
        plugin, sharded = plugin_of(args), os.environ.get("ACCELERATE_USE_FSDP")
        if self.args.label_smoothing_factor:
            raise NextLatError("label_smoothing_factor is not for objective models: leave it out.")
        if self.args.n_gpu > 1:
            logger.warning("one GPU of %d is used: torchrun uses all.", self.args.n_gpu)
            self.args._n_gpu = 1
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False
        # Of the steps since the last log:
        self._sums: dict[str, Tensor] = {}
        self._steps: set[int] = set()
        self._tokens: Tensor | int = 0
        self._accepted: Tensor | int = 0
        self._sound_step = 0
        super().create_accelerator_and_postprocess()
        if ranks.several():
            ranks.share_weights(self.model, args.device)
            ranks.settle_at_exit()
        if plugin is not None:
            # accelerate has FSDP on no CPU, and tells of it whoever comes later in this process.
            state = self.accelerator.state
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            self.is_fsdp_enabled = True
            if sharded is None:
                os.environ.pop("ACCELERATE_USE_FSDP", None)

    @property
    def objective_model(self) -> ObjectiveModel:
        """The model itself, however it is wrapped."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    # ---- weights in shards ----

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        if self.is_fsdp_enabled and self._shards is None:
            optimizer, model = self.create_optimizer(), self.objective_model
            self._names = names_of(model, optimizer)
            plugin, bf16 = self.accelerator.state.fsdp_plugin, self.args.mixed_precision == "bf16"
            self._shards = Shards(model, plugin, self.args.device, bf16=bf16)
            take_shards(model, optimizer, self._names)
        prepared = super()._prepare_for_training(*arguments, **options)
        if self._shards is not None:
            take_shards(self.objective_model, self.optimizer, self._names)
        return prepared

    def _whole(self, *, changed: bool = False) -> Any:
        return nullcontext() if self._shards is None else self._shards.whole(changed=changed)

    # ---- loss: every part divided by its own count over the whole optimiser step ----

    def _get_num_items_in_batch(self, batch_samples: list[Item], device: torch.device) -> Any:
        several = len(batch_samples) > 1 or self.args.world_size > 1
        if not batch_samples or not several:
            return None  # the batch is the whole step, whose own counts the loss takes anyway
        counts = [self.objective_model.counts(**model_inputs(x)) for x in batch_samples]
        total = {name: count.to(device) for name, count in add_counts(counts).items()}
        return self.accelerator.reduce(total, "sum") if self.args.world_size > 1 else total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Item,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self.compute_loss_func is not None:
            raise NextLatError("an objective model has its own loss: leave compute_loss_func out.")
        step = self.state.global_step + 1
        # Restored on resume, so that a loss that changes over the steps is the same there.
        self.objective_model.objective.step = step
        inputs = self._with_states(model_inputs(inputs, numbered=True), self.train_states)
        outputs = model(**inputs, counts=num_items_in_batch)
        if model.training:
            self._steps.add(step)
            if step % self.state.logging_steps == 0 and self.args.logging_strategy == "steps":
                accepted = self.objective_model.acceptance(**inputs)
                self._accepted = self._accepted if accepted is None else self._accepted + accepted
            for name, value in outputs.losses.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        # Processes average their gradients, and each loss is already its share of the global mean.
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _with_states(self, batch: Item, cached: CachedStates | None) -> Item:
        row_B = batch.get(ROW)
        if cached is None or row_B is None:
            return model_inputs(batch)
        batch, context = model_inputs(batch), self.accelerator.autocast()
        return {**batch, "states": cached.states(self.objective_model, batch, row_B, context)}

    # ---- log ----

    def _track_num_input_tokens(self, inputs: Item) -> None:
        """Without waiting for the device at every step, as the Trainer does."""
        if self.args.include_num_input_tokens_seen != "no":
            return super()._track_num_input_tokens(inputs)
        mask = inputs.get("attention_mask")
        self._tokens = self._tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Without clipping the norm is only for the log: not worth a pass over the gradients at
        other steps."""
        step, state = self.state.global_step + 1, self.state
        every = (state.logging_steps, state.save_steps, state.max_steps)
        by_steps = grad_norm is None and self.args.logging_strategy == "steps"
        if by_steps and all(step % (n or step + 1) for n in every):
            return None
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            reduce = self.accelerator.reduce
            parts = {name: reduce(x.float(), "sum").item() for name, x in self._sums.items()}
            tokens = torch.as_tensor(self._tokens, dtype=torch.int64, device=self.args.device)
            self.state.num_input_tokens_seen += int(reduce(tokens, "sum").item())
            means = {name: total / len(self._steps) for name, total in parts.items()}
            accepted = self._accepted
            accepted = accepted if isinstance(accepted, int) else reduce(accepted, "sum")
            logs = {"loss": logs["loss"], **means, **by_position(accepted), **logs}
            self._sums, self._steps, self._tokens, self._accepted = {}, set(), 0, 0
        for name, value in logs.items():
            if name.endswith("loss") and not math.isfinite(value):
                held_out = "" if name == "loss" else "held-out "
                raise self._not_sound(f"the {held_out}loss is {value}")
        with nullcontext() if self._shards is None else ranks.together():
            self._check_weights()
        self._sound_step = self.state.global_step
        super().log(logs, start_time)

    def _check_weights(self) -> None:
        parameters = self.objective_model.named_parameters()
        if names := not_finite(
            (n, p.to_local() if isinstance(p, DTensor) else p) for n, p in parameters
        ):
            raise self._not_sound(f"{names[0]} is not finite")

    def _not_sound(self, told: str) -> NextLatError:
        return NextLatError(
            f"{told} at step {self.state.global_step}, the model was last sound at step "
            f"{self._sound_step}: train in a new directory with a lower learning rate or with "
            "clipped gradients (optimizer.learning_rate, optimizer.gradient_clip)."
        )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        if self.compute_metrics is not None:
            raise NextLatError(
                "compute_metrics needs logits, which an objective model gives only without labels: "
                "leave it out, and measure the trained model."
            )
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        logs: dict[str, float] = {}
        named = dataset if isinstance(dataset, dict) else {"": dataset}
        for name, rows in named.items():
            prefix = "_".join(filter(None, (metric_key_prefix, name)))
            ours = self.get_eval_dataloader(rows)
            # Not by the library, which counts rows twice to make it even.
            means = evaluation_loss(
                self.objective_model,
                ours.dataset,
                self.args.per_device_eval_batch_size,
                ours.collate_fn,
                partial(self._with_states, cached=self.eval_states),
            )
            logs |= {f"{prefix}_{part}": value for part, value in means.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    # ---- files ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        with ranks.together(), self._whole():
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self._check_weights()
            directory = Path(output_dir or str(self.args.output_dir))
            with no_library_bars():
                # A frozen LM is written once, and has more names from then on.
                known = link_lm(self._written, directory) if self._written else {}
                self.objective_model.save_pretrained(directory, known=known)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
            # safetensors makes files that only their owner can read
            for weights in directory.rglob("*.safetensors"):
                weights.chmod((directory / SIDECAR / DESCRIPTION).stat().st_mode)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Every save has written ours."""

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        with no_library_bars(), self._whole(changed=True):
            self.objective_model.load_weights(resume_from_checkpoint)
        checkpoint = Path(resume_from_checkpoint)
        self._written = checkpoint if is_frozen(self.objective_model.lm) else None
        with of_this_run(checkpoint / "trainer_state.json"):
            self._sound_step = load_trainer_state(checkpoint).global_step

    def _load_best_model(self) -> None:
        best = Path(self.args.output_dir or "") / f"checkpoint-{self.state.best_global_step}"
        with no_library_bars(), self._whole(changed=True):
            self.objective_model.load_weights(best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        directory, model = Path(checkpoint), self.objective_model
        with of_this_run(directory / "optimizer.pt"):
            optimizer = cast(torch.optim.Optimizer, self.optimizer)
            if self._shards is not None:
                take_shards(model, optimizer, self._names)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = load_optimizer(directory, parameters, names_of(model, optimizer))
            check_optimizer_state(optimizer, state)
            optimizer.load_state_dict(state)
        with of_this_run(directory / "scheduler.pt"):
            scheduler: Any = self.lr_scheduler
            state, own = load_state(directory / "scheduler.pt"), scheduler.state_dict()
            own |= {"last_epoch": load_trainer_state(directory).global_step}
            if any(state[key] != own[key] for key in ("base_lrs", "last_epoch")) or any(
                type(value) is not type(own[key]) for key, value in state.items()
            ):
                raise ValueError("it is of another schedule")
            scheduler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with of_this_run(Path(checkpoint or "") / "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._shards is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer(Path(output_dir), self.optimizer, self._names)
        if self.args.should_save:
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        state: Any = self.state
        args = self.args
        target = Path(self._get_output_dir(trial)) / f"checkpoint-{state.global_step}"
        best = target.with_name(f"checkpoint-{state.best_global_step}")
        if state.best_global_step and (best == target or best.is_dir()):
            state.best_model_checkpoint = str(best)
        with self._staged(target) as staging:
            with ranks.together():
                self.save_model(str(staging), _internal_call=True)
                if not args.save_only_model:
                    self._save_scaler(str(staging))
                    self._save_rng_state(str(staging))
            if not args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
            if args.should_save:
                for callback in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(callback, ExportableState):
                        state.stateful_callbacks[type(callback).__name__] = callback.state()
                state.save_to_json(str(staging / "trainer_state.json"))
        self._written = target if is_frozen(self.objective_model.lm) else None
        if args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if args.should_save and args.save_total_limit:
            spared = Path(state.best_model_checkpoint or target)
            rotate_checkpoints(target.parent, state.global_step, args.save_total_limit, spared)

    @contextmanager
    def _staged(self, target: Path) -> Iterator[Path]:
        """Every process writes its files into one staging directory, which the first process makes
        and publishes."""
        with ranks.together(), ExitStack() as published:
            with ranks.together():
                staging = staging_directory(target)
                if self.args.should_save:
                    staging = published.enter_context(atomic_directory(target))
            with ranks.together():
                yield staging
            if self.args.should_save:
                write_sums(staging, read_sums(staging))
