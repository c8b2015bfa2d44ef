"""What every objective owes every backbone: it trains what is trainable, counts right, saves,
loads, packs, and survives bf16."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import nextlat
from conftest import tiny_lm
from nextlat.batch import Batch
from nextlat.evaluation import evaluate as evaluate_run
from nextlat.evaluation import open_run, read_results
from nextlat.objectives import OBJECTIVES
from nextlat.training.train import Interrupted, train
from nextlat.training.trainer import evaluation_loss
from test_objectives import VOCAB, documents, gradients, pack
from test_training import before_step, largest_difference, metrics, tiny

CONFIGS = {
    "next-token": nextlat.NextTokenConfig(),
    "nextlat": nextlat.NextLatConfig(horizon=2, hidden_size=24),
    "mtp": nextlat.MTPConfig(horizon=2),
    "jtp": nextlat.JTPConfig(horizon=2),
    "bst": nextlat.BSTConfig(pair_share=0.8),
}
PLAIN = {"next-token", "nextlat", "mtp"}  # the LM alone is the model
BASELINES = ["mtp", "jtp", "bst"]

every_objective = pytest.mark.parametrize("name", CONFIGS)
every_family = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])


def model_of(name: str, family: str, **settings: object) -> nextlat.ObjectiveModel:
    torch.manual_seed(1)
    return nextlat.attach(
        tiny_lm(family, VOCAB, tie_word_embeddings=False, **settings), CONFIGS[name]
    )


def batch_of(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Two rows of packed documents with prompts, padded."""
    docs = documents(seed, list(lengths or (9, 6, 11, 3)), prompt=1)
    return pack([docs[: len(docs) // 2], docs[len(docs) // 2 :]], length=20)


def test_the_matrix_has_every_objective() -> None:
    assert CONFIGS.keys() == OBJECTIVES.keys()
    assert {
        name for name, (_, objective) in OBJECTIVES.items() if not objective.needed_at_inference
    } == PLAIN


@every_objective
@every_family
def test_it_trains_what_is_trainable_and_nothing_else(name: str, family: str) -> None:
    model = model_of(name, family).train()
    frozen = next(model.lm.parameters()).requires_grad_(False)  # the embeddings
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch_of()).loss
        loss.backward()
        assert all(
            (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad
            for p in model.parameters()
        )
        optimizer.step()
        losses.append(loss.item())
    assert all(b < a for a, b in pairwise(losses)), losses
    assert {key for key, p in model.named_parameters() if torch.equal(before[key], p)} == {
        key for key, p in model.named_parameters() if p is frozen
    }


@every_objective
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


@every_objective
@every_family
def test_save_and_load_give_the_same_model(name: str, family: str, tmp_path: Path) -> None:
    model = model_of(name, family)
    with torch.no_grad():
        for p in model.objective.parameters():
            p += 0.1 * torch.randn_like(p)  # no longer what `attach` would make of the LM again
    model.save_pretrained(tmp_path)
    again = nextlat.load(tmp_path, attn_implementation="eager")
    assert again.objective.name == name and again.objective.config == CONFIGS[name]
    batch = batch_of()
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss, rtol=0, atol=1e-6)
    ids = batch["input_ids"]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    same = torch.allclose(base(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert same == (name in PLAIN)
    assert ("nextlat.load" in (tmp_path / "nextlat" / "objective.json").read_text()) == (
        name not in PLAIN
    )


@every_objective
@every_family
def test_packed_documents_equal_separate_ones(name: str, family: str) -> None:
    model = model_of(name, family).eval()
    docs = documents(2, [7, 12, 4], prompt=1)
    packed = pack([docs], length=25)
    separate = [pack([[doc]], length=len(doc[0])) for doc in docs]
    counts = model.counts(**packed)
    assert torch.equal(counts, sum(model.counts(**doc) for doc in separate))
    whole = model(**packed).loss
    parts = sum(model(**doc, counts=counts).loss for doc in separate)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    ours, theirs = (
        gradients(model, whole),
        gradients(model, sum(model(**doc, counts=counts).loss for doc in separate)),
    )
    for key, gradient in ours.items():
        torch.testing.assert_close(
            theirs[key], gradient, rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@every_objective
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_micro_batches_with_common_counts_equal_the_undivided_batch(name: str, family: str) -> None:
    model = model_of(name, family).eval()
    rows = [pack([documents(seed, [2 + 2 * seed, 3], prompt=1)], length=20) for seed in range(8)]
    whole = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    counts = sum(model.counts(**row) for row in rows)
    assert torch.equal(counts, model.counts(**whole))
    expected = gradients(model, model(**whole).loss)
    model.zero_grad()
    for row in rows:
        model(**row, counts=counts).loss.backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, expected[key], rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


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


@every_objective
def test_a_model_loaded_in_bf16_gives_finite_losses_and_logits(name: str, tmp_path: Path) -> None:
    model_of(name, "llama", initializer_range=0.02).save_pretrained(tmp_path)
    model = nextlat.load(tmp_path, dtype=torch.bfloat16)
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
    """What every objective reports as `next_token` is the cross-entropy of the logits that the
    model gives."""
    model = model_of(name, "llama").eval()
    batch = batch_of()
    scored = Batch.from_inputs(**batch).scored()
    logits = model(
        **{key: value for key, value in batch.items() if key != "labels"}
    ).logits.flatten(0, 1)[scored]
    targets = Batch.from_inputs(**batch).targets()[scored]
    torch.testing.assert_close(
        model(**batch).losses["next_token"], torch.nn.functional.cross_entropy(logits, targets)
    )


# ---- as a run ----


@pytest.mark.parametrize("name", BASELINES)
def test_a_run_resumes_exactly_accumulates_and_is_evaluated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["steps=4", "schedule.warmup_steps=1", "schedule.decay_steps=1"]
    settings += {"bst": ["objectives.bst.pair_share=0.5"]}.get(
        name, [f"objectives.{name}.horizon=2"]
    )
    recipe = tiny(*settings, objective=name)
    whole = train(recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            train(recipe, tmp_path / "again", progress=False)
    again = train(recipe, tmp_path / "again", progress=False)
    assert largest_difference(whole, again) == 0 and metrics(whole) == metrics(again)

    split = train(
        tiny(*settings, "gradient_accumulation=4", objective=name),
        tmp_path / "split",
        progress=False,
    )
    assert largest_difference(whole, split) < 1e-5

    evaluate_run(whole)
    (entry,) = read_results(whole)
    _, task, model = open_run(whole)
    expected = evaluation_loss(model, task.eval_dataset(), 4)["next_token"]
    assert entry["metrics"]["next_token_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["nextlat", "mtp", "jtp"])
def test_a_horizon_beyond_the_sequences_is_one_sentence(name: str, tmp_path: Path) -> None:
    recipe = tiny("task.max_moves=6", f"objectives.{name}.horizon=8", objective=name)
    with pytest.raises(
        nextlat.NextLatError,
        match=r"horizon 8 is too long for sequences of at most 9 tokens: .* at most 7\.",
    ):
        train(recipe, tmp_path / "run", progress=False)
    assert list((tmp_path / "run").iterdir()) == []  # a shorter one can be trained there
