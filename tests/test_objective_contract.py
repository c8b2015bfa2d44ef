"""What every objective owes every backbone: it trains what is trainable, counts right, saves,
loads, packs, and survives bf16."""

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import nextlat
from conftest import every_family, tiny_lm
from nextlat.batch import Batch
from nextlat.evaluation import evaluate as evaluate_run
from nextlat.evaluation import open_run
from nextlat.losses import add_counts
from nextlat.objectives import OBJECTIVES
from nextlat.results import read_results
from nextlat.training.held_out import evaluation_loss
from nextlat.training.recipe import load_recipe
from nextlat.training.run_directory import read_metrics
from nextlat.training.train import Interrupted, train
from nextlat.training.trainer import NextLatTrainer
from reference import VOCAB, assert_same_gradients, documents, gradients, listed, pack

CONFIGS = {
    "next-token": nextlat.NextTokenConfig(),
    "nextlat": nextlat.NextLatConfig(horizon=2, hidden_size=24),
    "gru": nextlat.NextLatConfig(dynamics="gru", next_h_loss="mse", kl_loss="cross_entropy"),
    "separate norms": nextlat.NextLatConfig(separate_norms=True, stop_gradient_teacher=False),
    "mtp": nextlat.MTPConfig(horizon=2),
    "jtp": nextlat.JTPConfig(horizon=2),
    "bst": nextlat.BSTConfig(pair_share=0.8),
}
NEEDED_AT_INFERENCE = {"jtp", "bst"}  # of all others the LM alone is the model

every_config = pytest.mark.parametrize("name", CONFIGS)
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def model_of(name: str, family: str, **settings: object) -> nextlat.ObjectiveModel:
    torch.manual_seed(1)
    lm = tiny_lm(family, VOCAB, tie_word_embeddings=False, **settings)
    return nextlat.attach(lm, CONFIGS[name])


def batch_of(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Two rows of packed documents with prompts, padded."""
    docs = documents(seed, list(lengths or (9, 6, 11, 3)), prompt=1)
    return pack([docs[: len(docs) // 2], docs[len(docs) // 2 :]], length=20)


def test_the_matrix_has_every_objective_and_each_says_what_it_is() -> None:
    assert OBJECTIVES.keys() <= CONFIGS.keys()
    for name, (config, objective) in OBJECTIVES.items():
        assert type(CONFIGS[name]) is config and objective.name == name
        assert objective.needed_at_inference == (name in NEEDED_AT_INFERENCE)
    titles = {name: (o.title, o.published_as) for name, (_, o) in OBJECTIVES.items()}
    assert titles == {
        "next-token": ("next-token", "GPT"),
        "nextlat": ("NextLat", "NextLat"),
        "mtp": ("MTP", "MTP"),
        "jtp": ("JTP", "JTP"),
        "bst": ("BST", "BST"),
    }


@every_config
@every_family
def test_it_trains_what_is_trainable_and_nothing_else(name: str, family: str) -> None:
    model = model_of(name, family).train()
    frozen = next(model.lm.parameters()).requires_grad_(False)  # the embeddings
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        out = model(**batch_of())
        out.loss.backward()
        assert all(
            (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad
            for p in model.parameters()
        )
        optimizer.step()
        losses.append(out.loss.item())
    assert all(b < a for a, b in pairwise(losses)), losses
    assert {key for key, p in model.named_parameters() if torch.equal(before[key], p)} == {
        key for key, p in model.named_parameters() if p is frozen
    }
    assert out.losses.keys() <= {"next_token", *model.objective.parts}  # each part has a title


@every_config
@every_family
def test_a_frozen_model_stays_frozen_while_its_objective_trains(name: str, family: str) -> None:
    model = model_of(name, family)
    model.lm.requires_grad_(False)
    if not list(model.objective.parameters()):
        return
    loss = model(**batch_of()).loss
    loss.backward()
    assert all(p.grad is None for p in model.lm.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.objective.parameters())


@every_config
@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_give_the_same_model(
    name: str, family: str, tied: bool, tmp_path: Path
) -> None:
    model = nextlat.attach(tiny_lm(family, VOCAB, tie_word_embeddings=tied), CONFIGS[name])
    with torch.no_grad():
        for p in model.objective.parameters():
            p += 0.1 * torch.randn_like(p)  # no longer what `attach` would make of the LM again
    model.save_pretrained(tmp_path)
    # Gemma 2 has no other kernel that caps its attention logits.
    again = nextlat.load(tmp_path, attn_implementation="eager")
    assert again.objective.name == model.objective.name
    assert again.objective.config == CONFIGS[name]
    batch, ids = batch_of(), batch_of()["input_ids"]
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    # Serving engines read every file of this kind at the top.
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    same = torch.allclose(base(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert same == (name not in NEEDED_AT_INFERENCE)
    note = "nextlat.load" in (tmp_path / "nextlat" / "objective.json").read_text()
    assert note == (name in NEEDED_AT_INFERENCE)

    other = nextlat.attach(tiny_lm(family, VOCAB, seed=1, tie_word_embeddings=tied), CONFIGS[name])
    parameters = list(other.parameters())
    other.load_weights(tmp_path)  # resume
    torch.testing.assert_close(other(**batch).loss, model(**batch).loss, rtol=0, atol=0)
    # An optimiser that holds them stays valid.
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))


@every_config
@every_family
def test_packed_documents_equal_separate_ones(name: str, family: str) -> None:
    model = model_of(name, family).eval()
    docs = documents(2, [7, 12, 4], prompt=1)
    packed = pack([docs], length=25)
    separate = [pack([[doc]], length=len(doc[0])) for doc in docs]
    counts = model.counts(**packed)
    assert listed(counts) == listed(add_counts([model.counts(**doc) for doc in separate]))

    def in_parts() -> Tensor:
        return sum(model(**doc, counts=counts).loss for doc in separate)

    torch.testing.assert_close(in_parts(), model(**packed).loss, rtol=1e-4, atol=1e-5)
    ours, theirs = gradients(model, model(**packed).loss), gradients(model, in_parts())
    assert_same_gradients(ours, theirs, rtol=1e-3, atol=2e-5)


@every_objective
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_micro_batches_with_common_counts_equal_the_undivided_batch(name: str, family: str) -> None:
    model = model_of(name, family).eval()
    rows = [pack([documents(seed, [2 + 2 * seed, 3], prompt=1)], length=20) for seed in range(8)]
    whole = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    counts = add_counts([model.counts(**row) for row in rows])
    assert listed(counts) == listed(model.counts(**whole))
    expected = gradients(model, model(**whole).loss)
    ours = gradients(model, sum(model(**row, counts=counts).loss for row in rows))
    assert_same_gradients(ours, expected, rtol=1e-3, atol=2e-5)


@every_objective
@every_family
def test_bf16_autocast_is_finite_and_near(name: str, family: str) -> None:
    model = model_of(name, family, initializer_range=0.02)
    exact = model(**batch_of()).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch_of())
        logits = model(batch_of()["input_ids"]).logits
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact, rtol=0.05, atol=0.05)
    out.loss.backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_config
def test_a_model_loaded_in_bf16_gives_finite_losses_and_logits(name: str, tmp_path: Path) -> None:
    model_of(name, "llama", initializer_range=0.02).save_pretrained(tmp_path)
    model = nextlat.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model(**batch_of())
    out.loss.backward()
    assert out.loss.isfinite() and model(batch_of()["input_ids"]).logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_objective
def test_a_copy_of_the_model_is_independent_of_it(name: str) -> None:
    model = model_of(name, "llama").eval()
    model(**batch_of()).loss.backward()
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(**batch_of()).loss, model(**batch_of()).loss, rtol=0, atol=0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    other.zero_grad()
    other(**batch_of(seed=1)).loss.backward()
    assert sum(p.grad.abs().sum() > 0 for p in other.parameters()) == len(list(other.parameters()))


@every_objective
def test_next_token_loss_is_that_of_the_logits(name: str) -> None:
    """What every objective reports as `next_token`, and what is measured row by row, is the
    cross-entropy of the logits that the model gives."""
    model = model_of(name, "llama").train()
    inputs = batch_of()
    batch = Batch.from_inputs(**inputs)
    del (without := dict(inputs))["labels"]
    logits = model(**without).logits.flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    each = (each * batch.scored).view(2, -1)
    torch.testing.assert_close(
        model(**inputs).losses["next_token"], each.sum() / batch.scored.sum()
    )
    sums, counts = model.next_token_loss(batch)
    torch.testing.assert_close(sums, each.sum(1))
    assert counts.tolist() == batch.scored.view(2, -1).sum(1).tolist()
    assert model.training and not sums.requires_grad


# ---- as a run ----


TINY = [
    "steps=4",
    "batch_size=4",
    "task.row_length=32",
    "task.tests=5",
    "run.save_every=2",
    "run.log_every=1",
    "schedule.warmup_steps=1",
    "schedule.decay_steps=1",
    "backbone.layers=1",
    "backbone.width=16",
]


def tiny(*overrides: str, **arguments: Any) -> Any:
    return load_recipe("city-tiny", [*TINY, *overrides], **arguments)


def weights(run: Path) -> Tensor:
    files = (run / "model.safetensors", run / "nextlat/objective.safetensors")
    return torch.cat([x.flatten() for file in files for x in load_file(file).values()])


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C when the `number`-th forward and backward pass begins."""
    steps: list[int] = []
    original: Callable[..., Any] = NextLatTrainer.training_step

    def step(self: NextLatTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == number:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(NextLatTrainer, "training_step", step)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mtp", "jtp", "bst"])
def test_a_run_resumes_exactly_accumulates_and_is_evaluated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"bst": "pair_share=0.5"}.get(name, "horizon=2")
    setting = f"objectives.{name}.{own}"
    recipe = tiny(setting, objective=name)
    whole = train(recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            train(recipe, tmp_path / "again", progress=False)
    again = train(recipe, tmp_path / "again", progress=False)
    assert torch.equal(weights(whole), weights(again))
    logs = [[{**line, "seconds": 0} for line in read_metrics(run)] for run in (whole, again)]
    assert logs[0] == logs[1]

    recipe = tiny(setting, "gradient_accumulation=4", objective=name)
    split = train(recipe, tmp_path / "split", progress=False)
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=1e-5)

    evaluate_run(whole)
    (entry,) = read_results(whole)
    _, task, model = open_run(whole)
    expected = evaluation_loss(model, task.eval_dataset(), 4)["next_token"]
    values = {metric.name: metric.value for metric in entry.metrics}
    assert values["next_token_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["nextlat", "mtp", "jtp"])
def test_a_horizon_beyond_the_sequences_is_one_sentence(name: str, tmp_path: Path) -> None:
    recipe = tiny("task.max_moves=6", f"objectives.{name}.horizon=8", objective=name)
    with pytest.raises(
        nextlat.NextLatError,
        match=r"horizon 8 is too long for sequences of at most 9 tokens: .* at most 7\.",
    ):
        train(recipe, tmp_path / "run", progress=False)
    assert list((tmp_path / "run").iterdir()) == []  # a shorter one can be trained there
