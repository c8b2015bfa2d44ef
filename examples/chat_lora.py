"""Fine-tune a chat model with TRL, a LoRA adapter and next-latent prediction.

    python examples/chat_lora.py MODEL CHATS.jsonl my-adapter

MODEL is a directory or a name on the hub; every line of CHATS.jsonl has "messages". The three lines
marked below are all that next-latent prediction adds. Needs nextlat[trl,peft].
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import nextlat  # 1


class Trainer(nextlat.NextLatTrainer, SFTTrainer): ...  # 2


name, chats, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name)
model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
model = nextlat.attach(model, nextlat.NextLatConfig(horizon=4))  # 3

arguments = SFTConfig(
    out, max_steps=20, packing=True, assistant_only_loss=True, report_to="none", bf16=False
)
trainer = Trainer(
    model,
    args=arguments,
    train_dataset=load_dataset("json", data_files=chats, split="train"),
    processing_class=AutoTokenizer.from_pretrained(name),
)
trainer.train()
trainer.save_model(out)
