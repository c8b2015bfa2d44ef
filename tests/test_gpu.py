"""On an accelerator: losses, gradients, tokens as on a CPU; bf16, compiled decoding, resuming."""

from pathlib import Path

import pytest
import torch

import nextlat
from conftest import FAMILIES, tiny_lm
from nextlat.objectives import OBJECTIVES
from nextlat.training.recipe import load_recipe
from nextlat.training.run_directory import read_metrics
from nextlat.training.train import Interrupted, train
from reference import VOCAB, documents, pack

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason="needs an accelerator, and torch finds none"),
]
PROMPTS = torch.arange(3 * 6).view(3, 6) % VOCAB
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def model_of(name: str, family: str = "llama") -> nextlat.ObjectiveModel:
    torch.manual_seed(1)
    config, _ = OBJECTIVES[name]
    lm = tiny_lm(family, VOCAB)
    return nextlat.attach(lm, config(**({} if name in ("next-token", "bst") else {"horizon": 2})))


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"bst"}))  # which draws pairs anew
def test_losses_and_gradients_are_those_of_a_cpu(name: str) -> None:
    docs = documents(0, [9, 6, 11, 3], prompt=1)
    batch = pack([docs[:2], docs[2:]], length=20)
    found = []
    for device in ("cpu", DEVICE):
        model = model_of(name).to(device)
        torch.manual_seed(0)  # of the pairs that belief-state training draws
        output = model(**{key: x.to(device) for key, x in batch.items()})
        output.loss.backward()
        found.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
        found[-1]["loss"] = output.loss.detach().cpu()
    assert found[0].keys() == found[1].keys()
    for key, x in found[0].items():
        torch.testing.assert_close(x, found[1][key], rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft_length", [0, 1, 4, "auto"])
def test_greedy_decoding_is_that_of_transformers(family: str, draft_length: int | str) -> None:
    model, ids = model_of("nextlat", family).to(DEVICE), PROMPTS.to(DEVICE)
    expected = model.backbone.lm.generate(ids, max_new_tokens=24, do_sample=False)
    drafted = model.generate(ids, max_new_tokens=24, draft_length=draft_length)
    assert torch.equal(drafted, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_decoding_gives_the_same_tokens(rows: int) -> None:
    model, ids = model_of("nextlat").to(DEVICE), PROMPTS[:rows].to(DEVICE)
    expected = model.generate(ids, max_new_tokens=24, draft_length=3)
    for _ in range(2):  # the second call replays the graph of the first
        assert torch.equal(
            model.generate(ids, max_new_tokens=24, draft_length=3, compile=True), expected
        )


def test_sampling_repeats_under_a_seed() -> None:
    model, ids = model_of("nextlat").to(DEVICE), PROMPTS.to(DEVICE)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(model.generate(ids, max_new_tokens=24, draft_length=3, do_sample=True))
    assert torch.equal(*outputs)


@pytest.mark.slow
@every_objective
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_stopped_and_resumed_to_the_same_losses(
    name: str, precision: str, tmp_path: Path
) -> None:
    recipe = load_recipe(
        "city-tiny",
        [
            "steps=6",
            "batch_size=4",
            "run.save_every=2",
            "run.log_every=1",
            "schedule.warmup_steps=1",
            "schedule.decay_steps=2",
            f"run.precision={precision}",
        ],
        objective=name,
    )
    train(recipe, tmp_path / "whole")

    def stop(shown: str, step: int, steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises((Interrupted, KeyboardInterrupt)):
        train(recipe, tmp_path / "run", progress=stop)
    train(recipe, tmp_path / "run")
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / run) if "loss" in row]
        for run in ("whole", "run")
    ]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
