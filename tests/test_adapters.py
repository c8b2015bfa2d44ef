"""LoRA adapters under an objective: trained, saved apart, opened to the same bits, merged."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import nextlat
from conftest import tiny_lm
from nextlat.errors import NextLatError
from nextlat.model import ObjectiveModel

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'nextlat[peft]'")

IDS = torch.arange(24).view(2, 12) % 50
MODULES = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


@pytest.fixture(autouse=True)
def warnings_of_others() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft|transformers")
        yield


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_lm(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def lora(lm: Any, **settings: Any) -> Any:
    return peft.LoraConfig(
        r=4, **({"target_modules": MODULES[lm.config.model_type], "lora_dropout": 0.1} | settings)
    )


def add_adapter(lm: Any, config: Any) -> None:
    """As transformers does it, where it takes the PEFT that is here."""
    try:
        lm.add_adapter(config)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} says: {error}")


def adapted(base: Path, *, integrated: bool = False, dtype: Any = "auto", **settings: Any) -> Any:
    """A model with an adapter that says something: by PEFT, or by transformers' add_adapter."""
    lm: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    torch.manual_seed(0)
    if integrated:
        add_adapter(lm, lora(lm, **settings))
    else:
        lm = peft.get_peft_model(lm, lora(lm, **settings))
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return lm


def attached(base: Path, **settings: Any) -> ObjectiveModel:
    return nextlat.attach(adapted(base, **settings), nextlat.NextLatConfig(horizon=2)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("integrated", [False, True])
def test_what_is_saved_opens_to_the_same_bits(
    base: Path, integrated: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = attached(base, integrated=integrated, dtype=dtype)  # the base is stored in fp32
    model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    again = nextlat.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(again), logits(again.lm))
    plain = model.objective.state_dict()
    assert all(torch.equal(x, plain[name]) for name, x in again.objective.state_dict().items())
    trainable = [name for name, p in again.lm.named_parameters() if p.requires_grad]
    assert trainable and all("lora" in name for name in trainable) and not again.training

    # add_adapter gives adapters the dtype of the base, get_peft_model fp32.
    lm, fp32 = AutoModelForCausalLM.from_pretrained(base, dtype=dtype), not integrated
    theirs = peft.PeftModel.from_pretrained(lm, tmp_path / "out", autocast_adapter_dtype=fp32)
    assert torch.equal(logits(theirs), logits(model))
    if dtype is torch.float32:
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(theirs), logits(model))


@pytest.mark.parametrize("integrated", [False, True])
def test_merged_it_is_a_plain_model(base: Path, integrated: bool, tmp_path: Path) -> None:
    model = attached(base, integrated=integrated)
    before = logits(model)
    model.save_pretrained(tmp_path / "out", merge=True)
    assert torch.equal(logits(model), before)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("lora" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(logits(plain), before)
    assert torch.equal(logits(nextlat.load(tmp_path / "out")), logits(plain))


@pytest.mark.parametrize("integrated", [False, True])
def test_adapter_and_dynamics_train_and_the_base_does_not(base: Path, integrated: bool) -> None:
    model = attached(base, integrated=integrated).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        trained = "lora" in name or name.startswith("objective.")
        assert parameter.requires_grad == trained
        assert not trained or bool(parameter.grad.abs().sum() > 0), name


def test_drafting_leaves_the_output_of_the_adapted_model(base: Path) -> None:
    model = attached(base)
    expected = model.lm.generate(IDS, max_new_tokens=8, do_sample=False)
    found = model.generate(IDS, max_new_tokens=8, do_sample=False, draft_length=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("after", [False, True])
def test_an_adapter_on_the_head_counts_from_when_it_is_there(after: bool) -> None:
    lm: Any = tiny_lm("llama")
    config = lora(lm, target_modules=["lm_head"])
    model = nextlat.attach(lm, nextlat.NextLatConfig()) if after else None
    add_adapter(lm, config)
    model = model or nextlat.attach(lm, nextlat.NextLatConfig())
    torch.nn.init.normal_(lm.lm_head.lora_B["default"].weight)
    torch.testing.assert_close(logits(model), logits(lm))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert lm.lm_head.lora_B["default"].weight.grad.abs().sum() > 0


def test_modules_to_save_are_saved(tmp_path: Path) -> None:
    tiny_lm("llama").save_pretrained(tmp_path / "base")
    model = attached(tmp_path / "base", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(nextlat.load(tmp_path / "out")), logits(model))
    model.save_pretrained(tmp_path / "merged", merge=True)
    torch.testing.assert_close(logits(nextlat.load(tmp_path / "merged")), logits(model))


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "data_seed": 0}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
    return TrainingArguments(str(out), **(settings | quiet | changes))


@pytest.mark.parametrize("trainer", [Trainer, nextlat.NextLatTrainer])
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_trains_checkpoints_and_resumes_exactly(
    trainer: Any, checkpointing: bool, tmp_path: Path
) -> None:
    tiny_lm("llama").save_pretrained(tmp_path / "base")
    rows = [{"input_ids": x, "labels": x} for x in (IDS.repeat(4, 1) + torch.arange(8)[:, None])]
    rows = [{name: x % 50 for name, x in row.items()} for row in rows]
    trained = []
    for out, resume in ((tmp_path / "a", None), (tmp_path / "b", str(tmp_path / "a/checkpoint-2"))):
        args = arguments(out, gradient_checkpointing=checkpointing)
        made = trainer(attached(tmp_path / "base"), args, train_dataset=rows)
        made.train(resume_from_checkpoint=resume)
        trained.append(made.model)
    assert torch.equal(logits(trained[0]), logits(trained[1]))
    assert not torch.equal(logits(trained[0]), logits(attached(tmp_path / "base")))
    if trainer is nextlat.NextLatTrainer:
        checkpoint = tmp_path / "a/checkpoint-4"
        assert torch.equal(logits(nextlat.load(checkpoint)), logits(trained[0]))
        assert (checkpoint / "adapter_model.safetensors").stat().st_size < 20_000
        assert not (checkpoint / "model.safetensors").exists()


# ---- what is refused ----


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_an_adapter_around_the_objective(task_type: str | None) -> None:
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig())
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert any("dynamics" in name for name in linear)
    config = peft.LoraConfig(target_modules=linear, task_type=task_type)
    with pytest.raises(NextLatError, match=r"go into the language model.*attach\(get_peft_model"):
        peft.get_peft_model(model, config)


def test_prompt_learning() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(NextLatError, match="PROMPT_TUNING puts tokens of its own before the text"):
        nextlat.attach(peft.get_peft_model(tiny_lm("llama"), config), nextlat.NextLatConfig())


def unfrozen(model: Any) -> None:
    model.lm.get_input_embeddings().weight.requires_grad_(True)


def second(model: Any) -> None:
    peft.inject_adapter_in_model(lora(model.lm), model.lm, adapter_name="more")


def merged(model: Any) -> None:
    next(m for m in model.lm.modules() if hasattr(m, "merge")).merge()


def nameless(model: Any) -> None:
    model.lm.name_or_path = model.lm.peft_config["default"].base_model_name_or_path = ""


UNSAVABLE = {
    unfrozen: r"is trained besides the adapter, .*merge=True",
    second: r"has the adapters default, more, a directory holds one",
    merged: r"the adapter at .* is merged: undo that",
    nameless: r"made in memory, and an adapter only names its base",
}


@pytest.mark.parametrize("change", UNSAVABLE, ids=lambda change: change.__name__)
def test_what_could_not_be_opened_again_is_not_saved(
    change: Any, base: Path, tmp_path: Path
) -> None:
    model = attached(base)
    change(model)
    with pytest.raises(NextLatError, match=UNSAVABLE[change]):
        model.save_pretrained(tmp_path / "out")


def test_an_adapter_is_not_mixed_with_a_plain_model(base: Path, tmp_path: Path) -> None:
    model = attached(base)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NextLatError, match="adapter holds an adapter: choose another directory"):
        model.save_pretrained(tmp_path / "adapter", merge=True)
    with pytest.raises(NextLatError, match="base holds a plain model: choose another directory"):
        model.save_pretrained(base)


def test_merging_into_a_shared_weight_is_refused(tmp_path: Path) -> None:
    tiny_lm("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = attached(tmp_path / "base", target_modules=["lm_head"])
    with pytest.raises(NextLatError, match="another layer shares"):
        model.save_pretrained(tmp_path / "out", merge=True)


def test_another_base_and_other_weights_are_named(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    attached(base).save_pretrained(out)
    weights = out / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(NextLatError, match=r"adapter_model.safetensors is not the file"):
        nextlat.load(out)
    weights.write_bytes(whole)
    family = AutoModelForCausalLM.from_pretrained(base).config.model_type
    tiny_lm(family, seed=1).save_pretrained(base)
    with pytest.raises(NextLatError, match="base is not the model that the adapter in"):
        nextlat.load(out)
    (base / "config.json").unlink()
    with pytest.raises(NextLatError, match=r"cannot open .*base"):
        nextlat.load(out)
