"""Objective models in `transformers.Trainer`, and in our own with the same arguments."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import nextlat
from conftest import tiny_lm
from nextlat import NextLatTrainer
from nextlat.errors import NextLatError
from nextlat.training.recipe import load_recipe

pytestmark = pytest.mark.slow

TRAINERS = (Trainer, NextLatTrainer)
Rows = list[dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def no_warnings_of_the_library(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


@pytest.fixture(scope="module")
def rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (8, 12), generator=generator)
    return [{"input_ids": x, "labels": x} for x in ids]


@pytest.fixture(scope="module")
def uneven_rows(rows: Rows) -> Rows:
    """As after a prompt: only the last few tokens of some rows have a label."""
    uneven = [{**row, "labels": row["labels"].clone()} for row in rows]
    for i, row in enumerate(uneven):
        row["labels"][: (0, 9, 5, 10)[i % 4]] = -100
    return uneven


def model(config: Any = None, *, family: str = "llama", seed: int = 0) -> nextlat.ObjectiveModel:
    llama = family == "llama"
    lm = nextlat.llama(50, layers=1, width=32, seed=seed) if llama else tiny_lm(family, seed=seed)
    torch.manual_seed(seed)
    return nextlat.attach(lm, config or nextlat.NextLatConfig(horizon=2))


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "data_seed": 0,
    }
    return TrainingArguments(str(out), **(settings | changes))


def weights(trained: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.parameters()])


def train(trainer: Any, out: Path, rows: Rows, *, resume: str | None = None, **changes: Any) -> Any:
    lm = changes.pop("model", None) or model()
    made = trainer(lm, arguments(out, **changes), train_dataset=rows, eval_dataset=rows[:5])
    made.train(resume_from_checkpoint=resume)
    return made


# ---- any Trainer ----


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_model_with_tied_embeddings_trains_saves_and_resumes_exactly(
    trainer: Any, tmp_path: Path, rows: Rows
) -> None:
    whole = train(trainer, tmp_path, rows, model=model(family="gpt2"))
    assert whole.model.lm.lm_head.weight is whole.model.lm.transformer.wte.weight
    resumed = train(
        trainer,
        tmp_path / "resumed",
        rows,
        model=model(family="gpt2", seed=1),
        resume=str(tmp_path / "checkpoint-2"),
    )
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert not torch.equal(weights(whole.model), weights(model(family="gpt2")))


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    "config", [nextlat.NextTokenConfig(), nextlat.NextLatConfig(horizon=3), nextlat.BSTConfig()]
)
def test_accumulation_over_uneven_batches_is_the_undivided_batch(
    trainer: Any, config: Any, tmp_path: Path, uneven_rows: Rows
) -> None:
    sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "save_strategy": "no"}
    sgd |= {"max_steps": 1, "train_sampling_strategy": "sequential"}
    start, steps = weights(model(config)), []
    for size, parts in ((4, 1), (1, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        done = train(trainer, tmp_path, uneven_rows, model=model(config), **sgd, **sizes)
        steps.append(weights(done.model) - start)
    assert (steps[0] - steps[1]).norm() < 1e-5 * steps[0].norm()


def test_our_trainer_divides_every_part_by_its_own_count(tmp_path: Path, uneven_rows: Rows) -> None:
    done = train(
        NextLatTrainer,
        tmp_path,
        uneven_rows,
        max_steps=1,
        gradient_accumulation_steps=4,
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    batch = {k: torch.stack([row[k] for row in uneven_rows]) for k in uneven_rows[0]}
    expected = model()(**batch)
    logged = done.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    for name, value in expected.losses.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"bf16": True}, 1e-2),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"},
            1e-6,
            marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")],
        ),
    ],
)
def test_computed_otherwise_it_trains_the_same(
    trainer: Any, setting: dict[str, Any], tolerance: float, tmp_path: Path, rows: Rows
) -> None:
    plain, other = (
        train(trainer, tmp_path, rows, save_strategy="no", **changes) for changes in ({}, setting)
    )
    assert (weights(plain.model) - weights(other.model)).abs().max() < tolerance
    if "gradient_checkpointing" in setting:
        assert other.model.lm.is_gradient_checkpointing
    if "bf16" in setting:
        assert not torch.equal(weights(plain.model), weights(other.model))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_held_out_rows_are_evaluated(trainer: Any, tmp_path: Path, rows: Rows) -> None:
    done = train(trainer, tmp_path, rows, save_strategy="no")
    batch = {k: torch.stack([row[k] for row in rows[:5]]) for k in rows[0]}
    labelled = 5 * 11 if trainer is Trainer else None
    with torch.no_grad():
        expected = done.model.eval()(**batch, num_items_in_batch=labelled)
    found = done.evaluate()
    assert found["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    if trainer is NextLatTrainer:
        assert found["eval_kl"] == pytest.approx(expected.losses["kl"].item(), rel=1e-5)


# ---- ours ----


def test_what_it_saves_opens_without_this_package_and_with_it(tmp_path: Path, rows: Rows) -> None:
    tokenizer = load_recipe("city-tiny").task.build().tokenizer
    trainer = NextLatTrainer(
        model(), arguments(tmp_path), train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "mine"))
    ids = rows[0]["input_ids"][None]
    with torch.no_grad():
        logits = trainer.model(ids).logits
        for path in (tmp_path / "mine", tmp_path / "checkpoint-4"):
            assert torch.equal(nextlat.load(path)(ids).logits, logits)
            assert torch.equal(AutoModelForCausalLM.from_pretrained(path)(ids).logits, logits)
            assert len(AutoTokenizer.from_pretrained(path)) == len(tokenizer)


def test_the_best_checkpoint_is_loaded_and_kept(tmp_path: Path, rows: Rows) -> None:
    losses = iter([3.0, 1.0, 2.0, 4.0])

    class Scored(NextLatTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {"eval_loss": next(losses, 5.0)}

    done = train(
        Scored,
        tmp_path,
        rows,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    best = nextlat.load(tmp_path / "checkpoint-2")
    assert torch.equal(weights(done.model), weights(best))


def test_several_held_out_sets_have_names(tmp_path: Path, rows: Rows) -> None:
    sets = {"a": rows[:2], "b": rows[2:]}
    trainer = NextLatTrainer(model(), arguments(tmp_path), train_dataset=rows, eval_dataset=sets)
    found = trainer.evaluate()
    assert {"eval_a_loss", "eval_a_kl", "eval_b_loss"} <= found.keys()
    assert found["eval_a_loss"] == trainer.evaluate(rows[:2], metric_key_prefix="test")["test_loss"]


def test_a_save_that_fails_leaves_the_checkpoint_before_it(
    tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, folder: str) -> None:
        if "checkpoint-4" in folder:
            raise KeyboardInterrupt

    monkeypatch.setattr(NextLatTrainer, "_save_scaler", fail)
    with pytest.raises(KeyboardInterrupt):
        train(NextLatTrainer, tmp_path, rows)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


class Counting(Trainer):
    """Somebody else's Trainer."""

    steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.steps += 1
        return super().training_step(*args, **kwargs)


def test_it_is_a_mixin_for_other_trainers(tmp_path: Path, rows: Rows) -> None:
    class Mine(NextLatTrainer, Counting):
        pass

    done = train(Mine, tmp_path, rows)
    assert done.steps == 4
    assert torch.equal(
        weights(done.model), weights(train(NextLatTrainer, tmp_path / "ours", rows).model)
    )
    assert torch.equal(weights(nextlat.load(tmp_path / "checkpoint-4")), weights(done.model))


def test_what_it_cannot_do_is_refused(tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(NextLatError, match=r"trains what nextlat.attach gives, not a Llama"):
        NextLatTrainer(tiny_lm("llama"), arguments(tmp_path), train_dataset=rows)
    trainer = NextLatTrainer(
        model(), arguments(tmp_path), train_dataset=rows, eval_dataset=rows, compute_metrics=len
    )
    with pytest.raises(NextLatError, match="compute_metrics needs logits"):
        trainer.evaluate()
    with pytest.raises(NextLatError, match="label_smoothing_factor is not for"):
        train(NextLatTrainer, tmp_path, rows, label_smoothing_factor=0.1)
    trainer = NextLatTrainer(
        model(), arguments(tmp_path), train_dataset=rows, compute_loss_func=len
    )
    with pytest.raises(NextLatError, match="leave compute_loss_func out"):
        trainer.train()


class Spoil(TrainerCallback):
    """Makes a weight infinite after the second step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            with torch.no_grad():
                next(kwargs["model"].objective.parameters()).view(-1)[0] = float("inf")


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path, rows: Rows) -> None:
    trainer = NextLatTrainer(model(), arguments(tmp_path), train_dataset=rows, callbacks=[Spoil()])
    with pytest.raises(NextLatError, match=r"is not finite at step 2, .* last sound at step 1"):
        trainer.train()
    with pytest.raises(NextLatError, match="is not finite"):
        trainer.save_model(str(tmp_path / "mine"))
    assert list(tmp_path.iterdir()) == []


# ---- resuming compares what it reads ----


def _change(path: Path, change: Any) -> None:
    with torch.serialization.safe_globals([]):
        state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("never",)


STRANGE = {
    "another shape": ("optimizer.pt", lambda s: s["state"][0].update(exp_avg=torch.zeros(3))),
    "no state": ("optimizer.pt", lambda s: s["state"].clear()),
    "half a state": ("optimizer.pt", lambda s: s["state"][1].pop("exp_avg_sq")),
    "a step of many": ("optimizer.pt", lambda s: s["state"][1].update(step=torch.zeros(7))),
    "fewer parameters": ("optimizer.pt", lambda s: s["param_groups"][0]["params"].pop()),
    "more groups": ("optimizer.pt", lambda s: s["param_groups"].append({"params": []})),
    "no groups": ("optimizer.pt", lambda s: s.pop("param_groups")),
    "a rate in words": ("optimizer.pt", lambda s: s["param_groups"][0].update(lr="fast")),
    "code": ("optimizer.pt", lambda s: s.update(more=Malicious())),
    "another schedule": ("scheduler.pt", lambda s: s.update(step="3")),
    "a step in words": ("scheduler.pt", lambda s: s.update(last_epoch="3")),
    "no random state": ("rng_state.pth", lambda s: s.pop("cpu")),
    "a short random state": ("rng_state.pth", lambda s: s.update(cpu=s["cpu"][:7])),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_state_that_is_not_of_this_run_is_named(strange: str, tmp_path: Path, rows: Rows) -> None:
    train(NextLatTrainer, tmp_path, rows, max_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    name, change = STRANGE[strange]
    _change(checkpoint / name, change)
    with pytest.raises(NextLatError, match=rf"{name} is not of this run \(.*remove .*checkpoint-2"):
        train(NextLatTrainer, tmp_path, rows, resume=str(checkpoint))
