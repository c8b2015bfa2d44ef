"""The LoRA stage of `own_model.py`: an adapter and the dynamics, trained together."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

import nextlat
from nextlat.training.build import frequent_tokens
from own_model_text import OwnText, OwnTextConfig

ROWS, RATE, RANK = 4, 5e-4, 16
SAVE_EVERY = 20
METRICS = "lora-log.json"


class Watch(TrainerCallback):
    """What is called with every line of the log."""

    def __init__(self, progress: Callable[[dict[str, Any]], None]) -> None:
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.progress({**logs, "step": state.global_step})


def train_lora(
    base: str, out: Path, run: Path, settings: dict[str, int], *, steps: int, vocabulary: int,
    progress: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Goes on at the last checkpoint, and saves the model with the adapter merged into `run`.

    Args:
        base: directory of the model.
        out: where the corpus lies.
        run: where checkpoints and the model go.
        settings: of NextLatConfig.
        steps: of ROWS x 256 tokens.
        vocabulary: tokens that drafts are drawn from.
        progress: called with every line of the log; may raise to stop.
    """
    if (run / "nextlat").is_dir():
        return
    task = OwnText(OwnTextConfig(directory=str(out), tokenizer=base))
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_pretrained(base)
    lm = get_peft_model(lm, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    tokens = frequent_tokens(task, 0, vocabulary)
    model = nextlat.attach(lm, nextlat.NextLatConfig(draft_vocabulary=tokens, **settings))
    arguments = TrainingArguments(
        str(run),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=ROWS,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.01,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=max(steps // 6, 1),
        save_steps=SAVE_EVERY,
        save_total_limit=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = nextlat.NextLatTrainer(
        model,
        arguments,
        train_dataset=Subset(task.train_dataset(0), range(steps * ROWS)),  # it has no end
        eval_dataset=task.eval_dataset(),
        callbacks=[Watch(progress)],
    )
    trainer.train(resume_from_checkpoint=any(run.glob("checkpoint-*")))
    (run / METRICS).write_text(json.dumps(trainer.state.log_history))
    model.save_pretrained(run, merge=True)


def curve(run: Path, steps: int, settings: dict[str, int]) -> dict[str, Any]:
    """The log of a finished run: the last line of training, and what was held out."""
    lines = json.loads((run / METRICS).read_text())
    training = next(line for line in reversed(lines) if "loss" in line)
    held_out = [line for line in lines if "eval_loss" in line]
    about = {"steps": steps, "rows": ROWS, "rate": RATE, "rank": RANK, **settings}
    return {**about, "training": training, "held_out": held_out}
