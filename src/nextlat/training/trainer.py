"""`transformers.Trainer` for objective models: right loss normalisation, named losses, atomic
checkpoints, exact resume.

As thin as can be: every method here replaces or refines one of the Trainer's own of the same name;
the loop, optimiser, schedules, mixed precision, distribution and reporting are the library's.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as library_logging

from nextlat.backbone import evaluation_mode
from nextlat.errors import NextLatError
from nextlat.files import atomic_directory, staging_directory
from nextlat.losses import add_counts
from nextlat.model import ObjectiveModel
from nextlat.training.run_directory import MetricsLog, rotate_checkpoints

Item = dict[str, Tensor]


def collate(items: list[Item]) -> Item:
    """Rows of equal length to a batch; nothing is guessed or converted."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class FirstRows(Dataset[Item]):
    """The first `count` rows of a dataset, begun again where it ends: exactly the rows of one run,
    in order.

    Rows are independent draws (see `tasks`), so there is nothing to shuffle, and a resumed run
    finds its place by counting.
    """

    def __init__(self, dataset: Dataset[Item], count: int) -> None:
        self._dataset, self._count = dataset, count
        self._size: int = len(dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        return self._dataset[index % self._size]


def evaluation_loss(
    model: ObjectiveModel, dataset: Dataset[Item], batch_size: int
) -> dict[str, float]:
    """Means of the objective and its named parts over a whole dataset, each over its own count
    (next_token: nats per token).

    The counts are taken over the dataset in a first pass, so that uneven batches weigh no more than
    their tokens.
    """
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    counts = add_counts([model.counts(**batch) for batch in loader])
    counts = {name: count.to(model.device) for name, count in counts.items()}
    sums: dict[str, Tensor] = {}
    with evaluation_mode(model):
        for batch in loader:
            out = model(
                **{key: value.to(model.device) for key, value in batch.items()}, counts=counts
            )
            for name, value in {"loss": out.loss, **out.losses}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
    return {name: value.item() for name, value in sums.items()}


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


class StopSignal:
    """Ctrl-C (and SIGTERM) asks the run to stop after its current step; a second one takes effect
    at once.

    Attributes:
        received: number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Only the main thread can install signal handlers; elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {
            number: signal.getsignal(number) or signal.SIG_DFL
            for number in (signal.SIGINT, signal.SIGTERM)
        }

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.received = number
            for each, handler in previous.items():
                signal.signal(each, handler)

        for number in previous:
            signal.signal(number, on_signal)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class RunControl(TrainerCallback):
    """Stops at a signal with a checkpoint, and logs before every save so that no half-averaged
    losses need saving."""

    def __init__(self, stop: StopSignal) -> None:
        self.stop = stop

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stops(args, control):
            control.should_training_stop = control.should_save = True
        if control.should_save:
            control.should_log = True

    def _stops(self, args: TrainingArguments, control: Any) -> bool:
        if args.world_size == 1:
            return self.stop.received is not None
        if not (
            control.should_log or control.should_save
        ):  # processes agree where they wait for each other anyway
            return False
        received = torch.tensor(float(self.stop.received is not None), device=args.device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return bool(received.item())


class ProgressBar(ProgressCallback):
    """Rate, remaining time and the latest loss parts on one line; nothing else is printed."""

    training_bar: Any

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.training_bar is not None and logs:
            hidden = (
                "loss",
                "eval_loss",
                "learning_rate",
                "grad_norm",
                "epoch",
                "tokens",
                "seconds",
            )
            shown = {
                key: f"{value:.3f}"
                for key, value in logs.items()
                if key not in hidden and isinstance(value, float)
            }
            self.training_bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class NextLatTrainer(Trainer):
    """Trains an `ObjectiveModel`.

    Args:
        model: what is trained. args: of the Trainer, see `training.training_arguments`.
        train_dataset: as long as the run, see `FirstRows`. eval_dataset: held-out rows, read at
            every evaluation.
        tokenizer: saved with every checkpoint.
        metrics: where every logged line goes, whatever else is asked to report.
        keep_checkpoints: how many stay; at least one while training.
        stop: asks for an early end.
        progress: show a bar.
    """

    def __init__(
        self,
        model: ObjectiveModel,
        args: TrainingArguments,
        train_dataset: Dataset[Item],
        eval_dataset: Dataset[Item],
        *,
        tokenizer: PreTrainedTokenizerBase,
        metrics: MetricsLog,
        keep_checkpoints: int,
        stop: StopSignal,
        progress: bool,
    ) -> None:
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[RunControl(stop)],
        )
        if use_cache is not None:
            model.config.use_cache = use_cache  # the Trainer switched it off, and would save that; our forward does so itself
        self.model_accepts_loss_kwargs = (
            True  # the loss is a share of the whole step's: the Trainer must not divide it again
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self._bar = ProgressBar() if progress else None
        if self._bar is not None:
            self.add_callback(self._bar)
        self._model, self._held_out, self._run = model, eval_dataset, Path(str(args.output_dir))
        self._tokenizer, self._metrics, self._keep = tokenizer, metrics, keep_checkpoints
        self._sums: dict[str, Tensor] = {}  # of the steps since the last log, as are the next two
        self._steps = 0
        self._tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self.seconds_before, self._started = metrics.seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training up to now, those before a resumed checkpoint included."""
        return self.seconds_before + time.monotonic() - self._started

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._started = time.monotonic()
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._bar is not None:
                self._bar.close()

    # ---- loss: every part divided by its own count over the whole optimiser step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Item], num_batches: int, device: torch.device
    ) -> tuple[list[Item], Any]:
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return [], None
        self._steps += 1
        for batch in batches:
            mask = batch.get("attention_mask")
            self._tokens += batch["input_ids"].numel() if mask is None else mask.sum()
        if len(batches) == 1 and self.args.world_size == 1:
            return (
                batches,
                None,
            )  # the batch is the whole step, whose own counts the loss takes anyway
        counts = add_counts([self._model.counts(**batch) for batch in batches])
        counts = {name: count.to(device) for name, count in counts.items()}
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return batches, counts

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Item,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        self._model.objective.step = (
            self.state.global_step + 1
        )  # restored on resume, so that the loss there is the same
        outputs = model(**inputs, counts=num_items_in_batch)
        for name, value in outputs.losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        # Processes average their gradients, and each loss is already its share of the global mean.
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(
        self, model: torch.nn.Module, grad_norm: Tensor | float | None = None
    ) -> Any:
        """Without clipping the norm is only for the log: not worth a pass over the gradients at
        other steps."""
        step = self.state.global_step + 1
        logged = any(
            step % every == 0
            for every in (self.state.logging_steps, self.state.save_steps, self.state.max_steps)
        )
        if grad_norm is None and not logged:
            return None
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    # ---- log ----

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if (
            "train_runtime" in logs
        ):  # the Trainer's own summary; run.json has what is true over all resumes
            return
        if "loss" in logs:
            sums = {
                name: self.accelerator.reduce(value.float(), "sum").item()
                for name, value in self._sums.items()
            }
            steps, self._sums, self._steps = self._steps, {}, 0
            self.state.num_input_tokens_seen += int(
                self.accelerator.reduce(self._tokens, "sum").item()
            )
            self._tokens.zero_()
            logs = {
                "loss": logs.pop("loss"),
                **{name: value / steps for name, value in sums.items()},
                **logs,
                "tokens": self.state.num_input_tokens_seen,
                "seconds": round(self.seconds, 3),
            }
            if not math.isfinite(logs["loss"]):
                raise NextLatError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: "
                    "train in a new directory with a lower optimizer.learning_rate or with optimizer.gradient_clip."
                )
        super().log(logs, start_time)
        self.state.log_history.clear()  # metrics.jsonl has it; the Trainer would write it all into every checkpoint again
        if self.is_world_process_zero():
            line = {key: value for key, value in logs.items() if key != "epoch"}
            finite = {
                k: v if not isinstance(v, float) or math.isfinite(v) else None
                for k, v in line.items()
            }
            self._metrics.append({"step": self.state.global_step, **finite})

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        means = evaluation_loss(self._model, self._held_out, self.args.per_device_eval_batch_size)
        logs = {f"eval_{name}": value for name, value in means.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    # ---- checkpoints: staged, flushed, renamed, and only then are older ones deleted ----

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        target = self._run / f"checkpoint-{self.state.global_step}"
        with self._staged(target) as staging:
            folder = str(staging)
            self.save_model(folder, _internal_call=True)
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler(folder)
            self._save_rng_state(folder)
            if self.args.should_save:
                self.state.save_to_json(str(staging / "trainer_state.json"))
                self._metrics.sync()
        if self.args.should_save:
            rotate_checkpoints(self._run, self.state.global_step, max(self._keep, 1))

    @contextmanager
    def _staged(self, target: Path) -> Iterator[Path]:
        """Every process writes its files into one staging directory, which the first process makes
        and publishes."""
        if self.args.should_save:
            with atomic_directory(target) as staging:
                self.accelerator.wait_for_everyone()
                yield staging
                self.accelerator.wait_for_everyone()
        else:
            self.accelerator.wait_for_everyone()
            yield staging_directory(target)
            self.accelerator.wait_for_everyone()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if self.args.should_save:
            directory = Path(output_dir or self._run)
            with no_library_bars():
                self._model.save_pretrained(directory)
            self._tokenizer.save_pretrained(directory)
            for weights in directory.rglob(
                "*.safetensors"
            ):  # safetensors makes files that only their owner can read
                weights.chmod((directory / "config.json").stat().st_mode)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        with no_library_bars():
            self._model.load_weights(resume_from_checkpoint)
