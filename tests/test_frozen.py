"""Dynamics beside a frozen model: nothing is computed or written twice, and nothing changes by
that."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import nextlat
from conftest import tiny_lm
from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.training.cached_states import CachedStates, NumberedRows
from nextlat.training.recipe import Recipe, load_recipe
from nextlat.training.run_directory import read_metrics
from nextlat.training.train import train
from nextlat.training.trainer import NextLatTrainer

TINY = [
    "steps=7", "batch_size=4", "task.row_length=32", "task.tests=5", "run.save_every=2",
    "run.log_every=1", "run.eval_every=3", "run.keep_checkpoints=9", "schedule.warmup_steps=2",
    "schedule.decay_steps=2", "backbone.frozen=true", "objectives.nextlat.horizon=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "lm"
    tiny_lm("gpt2", 60, resid_pdrop=0.1, bos_token_id=1, eos_token_id=1).save_pretrained(path)
    return path


def recipe(lm: Path, *overrides: str) -> Recipe:
    sizes = [f"backbone.{name}=" for name in ("layers", "width", "heads")]
    return load_recipe("city-tiny", [*sizes, *TINY, f"backbone.pretrained={lm}", *overrides])


def learned(run: Path) -> dict[str, Tensor]:
    return load_file(run / "nextlat/objective.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run)]


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every pass of the transformer without a cache from now on."""
    read: list[int] = []
    original = Backbone.states

    def states(self: Backbone, input_ids: Tensor, *rest: Any, **arguments: Any) -> Tensor:
        read.append(len(input_ids))
        return original(self, input_ids, *rest, **arguments)

    monkeypatch.setattr(Backbone, "states", states)
    return read


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, act: Callable[[], object]) -> None:
    original, done = NextLatTrainer.training_step, 0

    def step(self: NextLatTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(NextLatTrainer, "training_step", step)


@pytest.mark.slow
def test_cached_states_change_no_bit_and_are_computed_once(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(recipe(pretrained), tmp_path / "plain")
    read, shared = passes(monkeypatch), f"run.states={tmp_path / 'states'}"
    cached = train(recipe(pretrained, "backbone.cached_rows=500", shared), tmp_path / "cached")
    assert same(learned(plain), learned(cached)) and logged(plain) == logged(cached)
    rows = sum(n for n in read if n != 2)  # without those that try the model out
    held_out = len(recipe(pretrained).task.build().eval_dataset())
    assert rows == 7 * 4 + held_out  # once, though evaluated three times
    read.clear()
    again = train(recipe(pretrained, "backbone.cached_rows=500", shared), tmp_path / "again")
    assert same(learned(again), learned(cached))
    # The first batch of each kind tells what a row of states is.
    assert sum(n for n in read if n != 2) == 4 + min(held_out, 4)
    assert not (cached / "states").exists()


@pytest.mark.slow
def test_epochs_of_cached_rows_go_on_exactly_after_an_interruption(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(pretrained, "backbone.cached_rows=12", "task.tests=5")
    whole = train(settings, tmp_path / "whole")
    run = tmp_path / "run"

    def die() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stop_after(patch, 6, die)
        with pytest.raises(KeyboardInterrupt):
            train(settings, run)
    (data,) = (run / "states/train").glob("*.states")
    content = bytearray(data.read_bytes())
    third = len(content) // 3
    content[:third] = bytes(third)  # rows that did not reach the disk
    data.write_bytes(content)
    train(settings, run)
    assert same(learned(run), learned(whole)) and logged(run) == logged(whole)
    assert not (run / "states").exists()  # of use to no one any more


def test_states_of_another_model_or_other_data_are_never_used(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(12).view(2, 6)
    models = []
    for seed in (0, 0, 1):
        models.append(nextlat.attach(tiny_lm("llama", seed=seed), nextlat.NextLatConfig()))
    read = passes(monkeypatch)

    def states(model: nextlat.ObjectiveModel, data: str) -> Tensor:
        cache = CachedStates(tmp_path, 9, data)
        item = {"input_ids": ids, "labels": ids}
        found = cache.states(model, item, torch.tensor([3, 8]), torch.enable_grad())
        cache.close()
        return found

    first = states(models[0], "a")
    for model, data in ((models[0], "a"), (models[1], "a"), (models[2], "a"), (models[0], "b")):
        expected = model.backbone.states(ids)
        read.clear()
        assert torch.equal(states(model, data), expected)
    assert torch.equal(first, states(models[1], "a")) and len([*tmp_path.glob("*.states")]) == 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(NextLatError, match=r"states of 9 rows take .* lower backbone.cached_rows"):
        states(models[0], "c")


def test_numbered_rows_come_in_another_order_in_every_epoch() -> None:
    rows = NumberedRows([{"input_ids": torch.tensor([i])} for i in range(9)], 5, 15, seed=3)
    taken = [rows[i] for i in [*range(15), 2]]
    numbers = [int(item["row"]) for item in taken]
    assert numbers[:5] == [0, 1, 2, 3, 4] and numbers[15] == 2
    assert sorted(numbers[5:10]) == sorted(numbers[10:15]) == numbers[:5]
    assert numbers[5:10] != numbers[10:15] != numbers[:5]
    assert all(item["input_ids"] == item["row"] for item in taken) and len(rows) == 15


def test_the_frozen_half_keeps_its_dtype_and_is_written_once(
    pretrained: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    lm = AutoModelForCausalLM.from_pretrained(pretrained, dtype=torch.bfloat16)
    lm.save_pretrained(half)
    run = train(recipe(half, "run.keep_checkpoints=3"), tmp_path / "run")
    files = [path / "model.safetensors" for path in (run, *run.glob("checkpoint-*"))]
    assert len({path.stat().st_ino for path in files}) == 1 and len(files) == 4
    assert same(load_file(half / "model.safetensors"), load_file(files[0]))
    assert {x.dtype for x in learned(run).values()} == {torch.float32}
    for directory in (run, files[1].parent):
        model = nextlat.load(directory)
        assert (model.dtype, next(model.objective.parameters()).dtype) == (
            torch.bfloat16,
            torch.float32,
        )
        prompt = torch.arange(4)[None]
        plain = model.lm.generate(prompt, max_new_tokens=6, do_sample=False)
        drafted = model.generate(prompt, max_new_tokens=6, do_sample=False, draft_length=2)
        assert drafted.shape == plain.shape


def test_a_frozen_models_own_loss_is_not_computed_and_acceptance_is_logged(
    pretrained: Path, tmp_path: Path
) -> None:
    lines = read_metrics(train(recipe(pretrained), tmp_path / "run"))
    training = next(line for line in lines if "loss" in line)
    held_out = next(line for line in lines if "eval_loss" in line)
    assert "next_token" not in training and "eval_next_token" not in held_out
    for i in (1, 2):
        assert 0 <= training[f"acceptance_{i}"] <= 1 and 0 <= held_out[f"eval_acceptance_{i}"] <= 1
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig())
    ids = torch.arange(12).view(2, 6)
    assert "next_token" in model(ids, ids).losses  # where it teaches something
    assert model.objective.acceptance(Batch.from_inputs(ids, ids)) is None
    model.requires_grad_(False)
    assert "next_token" in model(ids, ids).losses  # where nothing learns, all is measured


@pytest.mark.parametrize("vocabulary", [None, 20])
def test_acceptance_is_agreement_of_choices_along_the_text(vocabulary: int | None) -> None:
    config = nextlat.NextLatConfig(horizon=3, draft_vocabulary=vocabulary)
    model = nextlat.attach(tiny_lm("llama"), config)
    model.lm.requires_grad_(False)
    ids = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    expected, backbone = torch.zeros(2, 3), model.backbone
    with torch.no_grad():
        h = backbone.states(ids)
        for row in range(3):
            for t in range(12):
                state = h[row, t]
                for i in range(1, 4):
                    s = t + i
                    if s + 1 >= 12:
                        break
                    state = model.objective.dynamics(state, backbone.embed(ids[row, s]))
                    if labels[row, s + 1] == -100:
                        continue
                    drafted = backbone.head(state)[:vocabulary].argmax()
                    expected[:, i - 1] += torch.tensor(
                        [float(drafted == backbone.head(h[row, s]).argmax()), 1.0]
                    )
    found = model.objective.acceptance(Batch.from_inputs(ids, labels))
    assert found.tolist() == expected.tolist()


def test_cached_rows_need_a_frozen_model() -> None:
    with pytest.raises(NextLatError, match="cached_rows is for a frozen transformer"):
        load_recipe("city-tiny", ["backbone.cached_rows=10"])
