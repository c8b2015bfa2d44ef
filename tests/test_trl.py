"""`trl.SFTTrainer` with next-latent prediction: chats, packed, with a loss on what the assistant
says."""

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import nextlat
from conftest import chat_tokenizer, conversation, tiny_lm

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed: pip install 'nextlat[trl]'", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}")
        for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")
    ),
]

ANSWERS = ["yes", "no, never", "perhaps", "why not?", "ask me later", "certainly so"]
CHATS = [{"messages": conversation(f"q{i}", a, a * (i % 3))} for i, a in enumerate(ANSWERS)]


class Trainer(nextlat.NextLatTrainer, SFTTrainer):
    """What TRL's users write."""


@pytest.fixture(autouse=True)
def advice_of_trl_is_not_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "trl")


def trainer(out: Path, kind: Any = Trainer, lm: Any = None, **settings: Any) -> Any:
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    sgd = {
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
    }
    step = {
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "logging_steps": 1,
        "max_length": 512,
        "assistant_only_loss": True,
    }
    torch.manual_seed(0)
    lm = lm or tiny_lm("llama", 259, max_position_embeddings=512)
    model = nextlat.attach(lm, nextlat.NextLatConfig(horizon=3))
    return kind(
        model,
        args=SFTConfig(str(out), **(quiet | sgd | step | settings)),
        train_dataset=Dataset.from_list(CHATS),
        eval_dataset=Dataset.from_list(CHATS[:2]),
        processing_class=chat_tokenizer(),
    )


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_loss_is_on_what_the_assistant_says(tmp_path: Path) -> None:
    made = trainer(tmp_path, packing=True)
    batch = next(iter(made.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() > 1
    labels = batch["labels"][batch["labels"] != -100]
    said = [m["content"] for c in CHATS for m in c["messages"] if m["role"] == "assistant"]
    found = made.processing_class.decode(labels).split("<|im_end|>")
    assert sorted(found) == sorted([*said, ""])


def test_packed_is_the_same_step_as_padded(tmp_path: Path) -> None:
    start = weights(trainer(tmp_path).model)
    steps, logs = [], []
    for settings in (
        {"per_device_train_batch_size": 6},
        {"per_device_train_batch_size": 1, "packing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 6, "padding_free": True, "max_length": None},
    ):
        made = trainer(tmp_path, save_strategy="no", **settings)
        made.train()
        steps.append(weights(made.model) - start)
        logs.append(made.state.log_history[0])
    for step, log in zip(steps[1:], logs[1:], strict=True):
        assert (step - steps[0]).norm() < 1e-4 * steps[0].norm()
        for part in ("loss", "next_token", "next_h", "kl"):
            assert log[part] == pytest.approx(logs[0][part], rel=1e-4)


def test_it_checkpoints_resumes_and_evaluates(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_steps": 2, "packing": True, "learning_rate": 0.1}
    made = trainer(tmp_path, **settings)
    made.train()
    again = trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(made.model), weights(again.model))
    assert torch.equal(weights(nextlat.load(tmp_path / "checkpoint-4")), weights(made.model))
    assert {"eval_loss", "eval_next_token", "eval_kl"} <= made.evaluate().keys()


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'nextlat[peft]'")
    tiny_lm("llama", 259, max_position_embeddings=512).save_pretrained(tmp_path / "base")
    lm = type(tiny_lm("llama")).from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    made = trainer(tmp_path / "run", lm=peft.get_peft_model(lm, config), packing=True)
    made.train()
    made.save_model(str(tmp_path / "run"))
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
    assert torch.equal(weights(nextlat.load(tmp_path / "run")), weights(made.model))
    with pytest.raises(nextlat.NextLatError, match="adapters go into the language model"):
        SFTTrainer(
            nextlat.attach(tiny_lm("llama", 259)),
            args=made.args,
            train_dataset=Dataset.from_list(CHATS),
            processing_class=chat_tokenizer(),
            peft_config=peft.LoraConfig(target_modules=["q_proj"]),
        )


def test_without_ours_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"class Trainer\(nextlat.NextLatTrainer, SFTTrainer"):
        trainer(tmp_path, kind=SFTTrainer).train()
