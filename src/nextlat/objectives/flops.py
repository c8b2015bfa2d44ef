"""How many floating-point operations a training step asks for, predicted from shapes alone.

Counted as everywhere: a product of (M, K) and (K, N) matrices is 2 M K N operations, only matrix
products count, the half of the attention that the causal mask hides counts too, and what is
recomputed to save memory does not (it is no part of the method). The backward pass costs twice the
forward pass: once for the inputs, once for the weights (in attention, for both factors). A frozen
transformer has none; the cost of what drafts from it is then counted for NextLat alone.

What an objective adds to the transformer is its own to say: `Objective.flops`. These are the parts
to say it with.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

import torch
from torch import nn

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.head import is_frozen
from nextlat.objectives.objective import Objective

FORWARD = 2.0  # operations of a product per weight and vector
TRAINING = 6.0  # with the backward pass


def per_weight(backbone: Backbone) -> float:
    """Operations of a product per weight of the transformer and vector."""
    return FORWARD if is_frozen(backbone.lm) else TRAINING


def weights(module: nn.Module) -> int:
    """Weights in the matrix products of a module: of all experts where there are several, without
    tables of embeddings."""
    tables = {id(one.weight) for one in module.modules() if isinstance(one, nn.Embedding)}
    return sum(p.numel() for p in module.parameters() if p.ndim > 1 and id(p) not in tables)


def head_weights(backbone: Backbone) -> int:
    """Weights of the output head, D * V."""
    return backbone.width * backbone.vocab_size


def attention_flops(backbone: Backbone, layers: int, batch: Batch) -> float:
    """Of so many layers on a whole batch, padding included, without their projections: q k^T and
    its product with v."""
    (B, T), config = batch.input_ids.shape, backbone.lm.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return per_weight(backbone) * 2 * B * T * T * layers * config.num_attention_heads * size


def transformer_flops(backbone: Backbone, batch: Batch) -> float:
    """All layers of the LM, without its head."""
    layers = backbone.lm.config.num_hidden_layers
    products = per_weight(backbone) * weights(backbone.transformer) * batch.input_ids.numel()
    return products + attention_flops(backbone, layers, batch)


def step_flops(objective: Objective, batch: Batch) -> dict[str, float] | None:
    """Operations of the forward and backward pass of one batch, {"backbone": ..., ...} by part;
    None for an objective that has no formula."""
    own = objective.flops(batch)
    return own and {"backbone": transformer_flops(objective.backbone, batch), **own}


def training_flops(objective: Objective, length: int) -> dict[str, float] | None:
    """`step_flops` per token, where every row is one document of `length` labelled tokens."""
    row = torch.zeros(1, length, dtype=torch.long)
    parts = step_flops(objective, Batch.from_inputs(row, row))
    return parts and {name: value / length for name, value in parts.items()}
