"""How many floating-point operations a training step asks for, predicted from shapes alone.

Counted as everywhere: a product of (M, K) and (K, N) matrices is 2 M K N operations, only matrix products count, the half of the
attention that the causal mask hides counts too, and what is recomputed to save memory does not (it is no part of the method).

Shapes: B rows of T tokens, D width, E embedding width, V vocabulary, d horizon.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from nextlat.model import ObjectiveModel
from nextlat.objectives import NextLatConfig, NextTokenConfig


@dataclass(frozen=True)
class Shape:
    """What the counts depend on.

    Attributes:
        layers: weights in the matrix products of the backbone, embeddings and head left out (all experts, where there are several).
        attention: heads x head size, summed over the layers.
        head: D * V. dynamics: weights in the matrix products of the latent dynamics model, 0 without one.
    """

    layers: int
    attention: int
    head: int
    dynamics: int = 0

    @classmethod
    def of(cls, model: ObjectiveModel) -> "Shape":
        """The shape of a model of any family; nothing is computed."""
        config, base = model.config, model.lm.base_model
        tables = {id(module.weight) for module in base.modules() if isinstance(module, nn.Embedding)}
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dynamics = getattr(model.objective, "dynamics", None)
        return cls(
            layers=sum(p.numel() for p in base.parameters() if p.ndim > 1 and id(p) not in tables),
            attention=config.num_hidden_layers * config.num_attention_heads * head_size,
            head=model.backbone.width * model.backbone.vocab_size,
            dynamics=sum(p.numel() for p in dynamics.parameters() if p.ndim > 1) if dynamics is not None else 0,
        )


def step_flops(shape: Shape, objective: object, rows: int, length: int, counts: Sequence[float]) -> dict[str, float] | None:
    """Operations of the forward and backward pass of one batch: {"backbone", "head"}, and for NextLat {"dynamics", "kl"}.

    Args:
        shape: of the model. objective: its configuration. rows, length: B, T of the batch, padding included.
        counts: of the objective on that batch, see `Objective.counts`.

    Returns:
        None for an objective of which this has no formula.
    """
    if not isinstance(objective, NextTokenConfig | NextLatConfig):
        return None
    # Backward costs twice what forward does: once for the inputs, once for the weights (in attention, for both factors).
    positions = rows * length
    parts = {
        "backbone": 3.0 * positions * (2 * shape.layers + 4 * length * shape.attention),
        "head": 6.0 * shape.head * counts[0],
    }
    if isinstance(objective, NextLatConfig):
        d = objective.horizon
        parts["dynamics"] = 6.0 * shape.dynamics * sum(counts[1 : 1 + d])
        parts["kl"] = 2.0 * head_passes(objective) * shape.head * sum(counts[1 + d :])
    return parts


def training_flops(shape: Shape, objective: object, length: int) -> dict[str, float] | None:
    """Operations per token of `step_flops`, where every row is one document of `length` labelled tokens."""
    steps = range(1, getattr(objective, "horizon", 0) + 1)
    counts = [length - 1, *(max(length - i, 0) for i in steps), *(max(length - i - 1, 0) for i in steps)]
    parts = step_flops(shape, objective, 1, length, counts)
    return parts and {name: value / length for name, value in parts.items()}


def head_passes(objective: NextLatConfig) -> int:
    """Products with W that the token-level loss of one predicted state needs: 3 in the paper's form."""
    if not objective.lambda_kl:
        return 0
    student = 2 if objective.stop_gradient_head else 3  # forward, gradient to h_hat, and to W where W moves
    teacher = 0 if objective.kl_loss == "cross_entropy" else 1 if objective.stop_gradient_teacher else 3
    return student + teacher
