"""metrics.jsonl, one JSON object per line, written as training goes; and what a run adds to the
Trainer's loop besides."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from nextlat.files import sync, write_errors, write_text
from nextlat.signals import StopSignal
from nextlat.training import ranks
from nextlat.training.run_directory import METRICS, read_metrics

NOT_SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch")
Progress = Callable[[str, int, int], None]  # what to show now, how much is done, of how much


class RunLog(TrainerCallback):
    """Logs to metrics.jsonl, asks for a checkpoint and an end after a signal, tells the progress.

    Args:
        directory: of the run.
        step: from which this process takes up the run; lines of later steps, which it will write
            again, and a last line cut off by a kill are removed.
        stop: asks for an early end.
        progress: called after every step.
        first: whether this is the process that writes.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        stop: StopSignal,
        progress: Progress | None,
        *,
        first: bool = True,
    ) -> None:
        self._path, self._stop, self._progress = directory / METRICS, stop, progress
        lines = [line for line in read_metrics(directory) if line["step"] <= step]
        self._before = max((line.get("seconds") or 0.0 for line in lines), default=0.0)
        self._started: float | None = None
        self._shown = ""
        self._agreement = ranks.Agreement() if ranks.several() else None
        if first and (self._path.exists() or self._path.is_symlink()):
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))

    @property
    def seconds(self) -> float:
        """Of training up to now, those before a resumed checkpoint included."""
        now = time.monotonic()
        return round(self._before + now - (self._started or now), 3)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        state.compute_steps(args, state.max_steps)  # a resumed run may log and save at other steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stops = self._stop.received is not None
        if self._agreement.reached(stops) if self._agreement else stops:
            control.should_training_stop = control.should_save = True
        if control.should_save:
            control.should_log = True  # so that no half-averaged losses need saving
        if self._progress:
            self._progress(self._shown, state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        state.log_history.clear()  # the Trainer would write it into every checkpoint again
        if "train_runtime" in logs:  # its own summary; run.json has what is true over all resumes
            return
        parts = {key: value for key, value in logs.items() if key not in NOT_SHOWN}
        self._shown = "  ".join(f"{key} {value:.3f}" for key, value in parts.items())
        line = {key: value for key, value in logs.items() if key != "epoch"}
        if "loss" in line:
            line |= {"tokens": state.num_input_tokens_seen, "seconds": self.seconds}
        if state.is_world_process_zero:
            finite = {k: v if math.isfinite(v) else None for k, v in line.items()}
            text = json.dumps({"step": state.global_step, **finite}, allow_nan=False)
            with write_errors(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")
            if control.should_save:  # the checkpoint will rely on these lines
                sync(self._path)
