"""Train a pretrained model with next-latent prediction on a text file, with transformers' Trainer.

    python examples/pretrained.py MODEL TEXT my-model

MODEL is a directory or the name of a model on the Hugging Face hub, e.g. openai-community/gpt2.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import nextlat

name, text, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
ids = tokenizer(Path(text).read_text(), return_tensors="pt").input_ids[0]
data = [{"input_ids": row, "labels": row} for row in ids.split(64) if len(row) == 64]

model = nextlat.attach(
    AutoModelForCausalLM.from_pretrained(name),
    nextlat.NextLatConfig(horizon=2, warmup_steps=10),
)
arguments = TrainingArguments(
    out,
    max_steps=20,
    per_device_train_batch_size=4,
    learning_rate=5e-5,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
Trainer(model, arguments, train_dataset=data).train()

model.save_pretrained(out)
tokenizer.save_pretrained(out)
