"""How many floating-point operations a training step asks for, predicted from shapes alone.

Counted as everywhere: a product of (M, K) and (K, N) matrices is 2 M K N operations, only matrix products count, the half of the
attention that the causal mask hides counts too, and what is recomputed to save memory does not (it is no part of the method).

Shapes: T tokens of one document that fills a row, D width, E embedding width, V vocabulary, d horizon.
"""

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


def training_flops(shape: Shape, objective: NextTokenConfig | NextLatConfig | object, length: int) -> dict[str, float] | None:
    """Operations per token of forward and backward pass: {"backbone", "head"} and for NextLat {"dynamics", "kl"}.

    Args:
        shape: of the model. objective: its configuration. length: T, of every document; all its tokens are labelled.

    Returns:
        None for an objective of which this has no formula.
    """
    T = length
    # Backward costs twice what forward does: once for the inputs, once for the weights (in attention, for both factors).
    parts = {"backbone": 3.0 * (2 * shape.layers * T + 2 * 2 * T * T * shape.attention), "head": 3.0 * 2 * shape.head * (T - 1)}
    if isinstance(objective, NextLatConfig):
        steps = range(1, objective.horizon + 1)
        reached = sum(max(T - i, 0) for i in steps)
        scored = sum(max(T - i - 1, 0) for i in steps) if objective.lambda_kl > 0 else 0
        parts["dynamics"] = 3.0 * 2 * shape.dynamics * reached
        parts["kl"] = float(head_passes(objective) * 2 * shape.head * scored)
    elif not isinstance(objective, NextTokenConfig):
        return None
    return {name: value / T for name, value in parts.items()}


def head_passes(objective: NextLatConfig) -> int:
    """Products with W that the token-level loss of one predicted state needs: 3 in the paper's form."""
    student = 2 if objective.stop_gradient_head else 3  # forward, gradient to h_hat, and to W where W moves
    teacher = 0 if objective.kl_loss == "cross_entropy" else 1 if objective.stop_gradient_teacher else 3
    return student + teacher
