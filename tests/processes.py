"""Trainings with `NextLatTrainer` in one process or several: a script for test_ranks.py, which
torchrun and accelerate start; what it is to train is JSON.

A training: {"out": directory, "family": ..., "objective": ..., "rows": ..., "arguments": of
TrainingArguments, "resume": checkpoint, ...}. The trained model is saved in out/final.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

import nextlat
from conftest import tiny_lm
from nextlat.errors import NextLatError
from nextlat.objectives import OBJECTIVES

BATCH = 4  # rows of a step, on however many processes
CONFIGS = {"nextlat": {"horizon": 2}, "mtp": {"horizon": 2}, "jtp": {"horizon": 2}}


def rows(kind: str) -> list[dict[str, torch.Tensor]]:
    """Eight rows: `even`, or `uneven`, where some have few labels and the second and third (of one
    process, in the first step) none at all."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (8, 12), generator=generator)
    made = [{"input_ids": x, "labels": x.clone()} for x in ids]
    for i, row in enumerate(made if kind == "uneven" else ()):
        row["labels"][: (0, 5, 12, 12, 9, 0, 12, 3)[i]] = -100
    return made


def model(training: dict[str, Any]) -> nextlat.ObjectiveModel:
    family, objective = training.get("family", "llama"), training.get("objective", "nextlat")
    llama = family == "llama"
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # the first process's weights must hold
    lm: Any = nextlat.llama(50, layers=2, width=32) if llama else tiny_lm(family)
    lm.requires_grad_(not training.get("frozen"))
    if "base" in training:
        from peft import LoraConfig, get_peft_model

        lm = AutoModelForCausalLM.from_pretrained(training["base"])
        lm = get_peft_model(lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    config = OBJECTIVES[objective][0](**CONFIGS.get(objective, {}))
    return nextlat.attach(lm, config)


class Stop(TrainerCallback):
    """A signal to one process after a step (0: SIGKILL, while it saves what there is to save)."""

    def __init__(self, step: int, rank: int, number: int) -> None:
        self.at, self.number = (step, rank), number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step, args.process_index) == self.at:
            if self.number:
                os.kill(os.getpid(), self.number)
            else:
                torch.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def train(training: dict[str, Any]) -> Any:
    out = Path(training["out"])
    processes = int(os.environ.get("WORLD_SIZE", 1))
    settings: dict[str, Any] = {
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "data_seed": 0,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "train_sampling_strategy": "sequential",
        **training.get("arguments", {}),
    }
    parts = processes * settings.get("gradient_accumulation_steps", 1)
    args = TrainingArguments(str(out), per_device_train_batch_size=BATCH // parts, **settings)
    data = rows(training.get("rows", "even"))
    trainer = nextlat.NextLatTrainer(
        model(training),
        args,
        train_dataset=data,
        eval_dataset=data[:5],
        callbacks=[Stop(*training["stop"])] if "stop" in training else [],
    )
    before = trainer.evaluate()  # which is of one model, too
    trainer.train(resume_from_checkpoint=training.get("resume"))
    trainer.save_model(str(out / "final"))
    if trainer.args.process_index == 0:
        (out / "log.json").write_text(json.dumps([before, *trainer.state.log_history]))
    return trainer


def main() -> None:
    torch.set_num_threads(1)
    for training in json.loads(Path(sys.argv[1]).read_text()):
        if "error" not in training:
            train(training)
            continue
        try:
            train(training)
        except NextLatError as error:
            Path(training["out"] + f".{os.environ['RANK']}.error").write_text(str(error))


if __name__ == "__main__":
    main()
