"""Predicted operations against those that torch counts while a tiny model really makes them."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import nextlat
from conftest import tiny_lm
from nextlat.batch import Batch
from nextlat.objectives import OBJECTIVES, Objective
from nextlat.objectives.flops import FORWARD, head_weights, step_flops, training_flops, weights
from reference import listed

VOCAB, ROWS, T = 50, 2, 24
CONFIGS = [
    nextlat.NextTokenConfig(),
    nextlat.NextLatConfig(horizon=1),
    nextlat.NextLatConfig(horizon=5, hidden_size=20, num_layers=2),
    nextlat.NextLatConfig(horizon=2, lambda_kl=0),
    nextlat.NextLatConfig(horizon=2, dynamics="gru"),
    nextlat.NextLatConfig(horizon=2, kl_loss="cross_entropy"),
    nextlat.NextLatConfig(horizon=2, stop_gradient_head=False),
    nextlat.NextLatConfig(horizon=2, stop_gradient_teacher=False, stop_gradient_head=False),
    nextlat.MTPConfig(horizon=1),
    nextlat.MTPConfig(horizon=4),
    nextlat.JTPConfig(horizon=1),
    nextlat.JTPConfig(horizon=4),
    nextlat.BSTConfig(),
    nextlat.BSTConfig(pair_share=0.3),
]


def batch(*, packed: bool) -> dict[str, Tensor]:
    """Two rows of one document each; or of several, with a prompt and padding."""
    ids = torch.randint(VOCAB, (ROWS, T), generator=torch.Generator().manual_seed(3))
    if not packed:
        return {"input_ids": ids, "labels": ids}
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in sizes]) for sizes in [(5, 2, 17), (9, 11, 4)]]
    )
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    labels = torch.where(torch.arange(T) < 2, -100, ids)
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}


def predict(model: nextlat.ObjectiveModel, inputs: dict[str, Tensor]) -> dict[str, float]:
    predicted = step_flops(model.objective, Batch.from_inputs(**inputs))
    assert predicted is not None
    return predicted


def counted(model: nextlat.ObjectiveModel, inputs: dict[str, Tensor]) -> int:
    """Forward and backward."""
    counter = FlopCounterMode(display=False)
    # Its hooks on modules, which say where an operation belongs, cannot follow a backward pass
    # within the loss (MTP, BST).
    counter.mod_tracker = nullcontext()
    counter.mod_tracker.parents = {"Global"}
    with counter:
        model(**inputs).loss.backward()
    return counter.get_total_flops()


def recomputed(model: nextlat.ObjectiveModel, inputs: dict[str, Tensor]) -> float:
    """What the method itself does not ask for: logits made a second time in the backward pass, and
    what is only logged."""
    config, counts = model.objective.config, listed(model.counts(**inputs))
    head, products = head_weights(model.backbone), sum(map(sum, counts.values()))
    if isinstance(config, nextlat.BSTConfig):  # whose next-token loss is for the log
        logged = sum(counts["next_token"])
        return FORWARD * (head * products + weights(model.objective.text_head) * logged)
    if isinstance(config, nextlat.NextLatConfig):
        plain_kl = (
            config.kl_loss == "kl" and config.stop_gradient_teacher and config.stop_gradient_head
        )
        again = (
            0 if plain_kl or not config.lambda_kl else 1 if config.kl_loss == "cross_entropy" else 2
        )
        products = sum(counts["next_token"]) + again * sum(counts[config.kl_loss])
    return FORWARD * head * products


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_prediction_is_what_is_counted(
    family: str, config: object, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        F, "linear_cross_entropy", None, raising=False
    )  # the counter cannot see into it
    model = nextlat.attach(tiny_lm(family, VOCAB, tie_word_embeddings=False), config)
    inputs = batch(packed=packed)
    predicted = predict(model, inputs)
    assert sum(predicted.values()) + recomputed(model, inputs) == pytest.approx(
        counted(model, inputs), rel=1e-6
    )


def test_heads_whose_token_lies_beyond_every_document_are_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(F, "linear_cross_entropy", None, raising=False)
    model = nextlat.attach(
        tiny_lm("llama", VOCAB, tie_word_embeddings=False), nextlat.MTPConfig(horizon=4)
    )
    inputs = {name: value[:, :4] for name, value in batch(packed=False).items()}
    assert [n > 0 for n in listed(model.counts(**inputs))["multi_token"]] == [True] * 2 + [
        False
    ] * 2
    predicted = predict(model, inputs)
    assert sum(predicted.values()) + recomputed(model, inputs) == pytest.approx(
        counted(model, inputs), rel=1e-6
    )


def test_no_formula_goes_unchecked() -> None:
    """One inherited from another objective by accident would be believed, too."""
    with_formula = {
        config
        for config, objective in OBJECTIVES.values()
        if objective.flops is not Objective.flops
    }
    assert with_formula == {type(config) for config in CONFIGS}


def test_parts_are_named_and_add_up_by_hand() -> None:
    """Eleven tokens, horizon 2: 10 have a loss; 10 and 9 states are reached, of which 9 and 8 have
    a loss of their own."""
    lm = nextlat.llama(7, layers=2, width=8, heads=2)
    model = nextlat.attach(lm, nextlat.NextLatConfig(horizon=2, hidden_size=10))
    layer = 4 * 8 * 8 + 3 * 8 * 32
    assert training_flops(model.objective, 11) == pytest.approx(
        {
            "backbone": 6 * 2 * layer + 12 * 11 * 2 * 8,
            "head": 6 * 56 * 10 / 11,
            "dynamics": 6 * (16 * 10 + 10 * 10 + 10 * 8) * 19 / 11,
            "kl": 2 * 56 * (2 * 17 + 9) / 11,  # the teacher once for both steps
        }
    )


def test_objective_without_a_formula_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nextlat.attach(nextlat.llama(7, layers=1, width=8, heads=2), nextlat.NextTokenConfig())
    monkeypatch.setattr(type(model.objective), "flops", Objective.flops)
    assert training_flops(model.objective, 8) is None


def test_a_frozen_transformer_has_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "linear_cross_entropy", None, raising=False)
    model = nextlat.attach(
        tiny_lm("llama", VOCAB, tie_word_embeddings=False), nextlat.NextLatConfig(horizon=2)
    )
    trained = predict(model, batch(packed=True))
    model.lm.requires_grad_(False)
    predicted = predict(model, batch(packed=True))
    assert sum(predicted.values()) == pytest.approx(counted(model, batch(packed=True)), rel=1e-6)
    assert (
        predicted["dynamics"] == trained["dynamics"]
        and 3 * predicted["backbone"] == trained["backbone"]
    )
