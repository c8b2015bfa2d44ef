"""Predicted operations against those that torch counts while a tiny model really makes them."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import nextlat
from conftest import tiny_lm
from nextlat.flops import Shape, step_flops, training_flops

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
]


def counted(model: nextlat.ObjectiveModel) -> float:
    """Per token, forward and backward."""
    ids = torch.randint(VOCAB, (ROWS, T))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).loss.backward()
    return counter.get_total_flops() / ids.numel()


def recomputed(config: object, head: int) -> float:
    """Per token: logits made a second time in the backward pass, which the method itself does not ask for."""
    products = T - 1
    if isinstance(config, nextlat.NextLatConfig) and config.lambda_kl:
        plain_kl = config.kl_loss == "kl" and config.stop_gradient_teacher and config.stop_gradient_head
        again = 0 if plain_kl else 1 if config.kl_loss == "cross_entropy" else 2
        products += again * sum(T - i - 1 for i in range(1, config.horizon + 1))
    return 2 * head * products / T


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_prediction_is_what_is_counted(family: str, config: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "linear_cross_entropy", None, raising=False)  # the counter cannot see into it
    model = nextlat.attach(tiny_lm(family, VOCAB, tie_word_embeddings=False), config)
    shape = Shape.of(model)
    predicted = training_flops(shape, config, T)
    assert predicted is not None
    assert sum(predicted.values()) + recomputed(config, shape.head) == pytest.approx(counted(model), rel=1e-6)


def test_packed_and_padded_rows_are_predicted_from_their_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "linear_cross_entropy", None, raising=False)
    config = nextlat.NextLatConfig(horizon=3)
    model = nextlat.attach(tiny_lm("llama", VOCAB, tie_word_embeddings=False), config)
    ids = torch.randint(VOCAB, (2, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0]])
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    labels = torch.where(torch.arange(12) < 2, -100, ids)
    inputs = {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}
    shape, counts = Shape.of(model), model.counts(**inputs).tolist()
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    predicted = step_flops(shape, config, 2, 12, counts)
    assert predicted is not None
    assert sum(predicted.values()) + 2 * shape.head * counts[0] == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_parts_are_named_and_add_up_by_hand() -> None:
    """Eleven tokens, horizon 2: 10 have a loss; 10 and 9 states are reached, of which 9 and 8 have a loss of their own."""
    parts = training_flops(Shape(layers=100, attention=8, head=70, dynamics=30), nextlat.NextLatConfig(horizon=2), 11)
    assert parts == pytest.approx(
        {"backbone": 600 + 12 * 11 * 8, "head": 6 * 70 * 10 / 11, "dynamics": 6 * 30 * 19 / 11, "kl": 6 * 70 * 17 / 11}
    )


def test_objective_without_a_formula_is_not_guessed() -> None:
    assert training_flops(Shape(1, 1, 1), object(), 8) is None
