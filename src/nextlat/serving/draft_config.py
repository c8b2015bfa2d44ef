"""What a server reads beside the weights: `nextlat/config.json`, which makes the sidecar a draft
model of vLLM.

It is written with every save, whatever the objective, so that a sidecar that cannot draft there is
refused by name and not by an accident of loading. Nothing here imports vLLM.
"""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nextlat.backbone import TOLERANCE, Backbone, evaluation_mode, probe_ids
from nextlat.errors import NextLatError
from nextlat.objectives import NextLat, NextLatConfig, Objective
from nextlat.serving import ARCHITECTURE

DRAFT_CONFIG = "config.json"
FORMAT = 1
# Settings of an objective that the drafter below follows, or that have done their work in training.
SERVED = frozenset(
    {
        *("dynamics", "hidden_size", "num_layers", "separate_norms", "zero_init"),
        *("horizon", "lambda_next_h", "lambda_kl", "next_h_loss", "kl_loss", "warmup_steps"),
        *("stop_gradient_target", "stop_gradient_teacher", "stop_gradient_head"),
    }
)


def write_draft_config(sidecar: Path, objective: Objective) -> None:
    """Write `config.json` into the sidecar directory of a saved model.

    Args:
        sidecar: the directory that holds `objective.safetensors`.
        objective: the one saved there, of any kind, with its backbone.
    """
    text = json.dumps(draft_config(objective), indent=2, sort_keys=True)
    (sidecar / DRAFT_CONFIG).write_text(text + "\n")


def draft_config(objective: Objective) -> dict[str, Any]:
    """The configuration of the draft model, in the words of a small Llama, which every reader of
    configurations knows; what the drafter really is stands in the block "nextlat"."""
    backbone = objective.backbone
    text_config = backbone.lm.config.get_text_config(decoder=True)
    # No attention of the drafter is ever run: all that its heads must do is divide the width, and
    # be divided by the same numbers of tensor-parallel ranks as the target's.
    heads = math.gcd(getattr(text_config, "num_attention_heads", None) or 1, backbone.width)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "dtype": str(backbone.lm.dtype).removeprefix("torch."),
        "hidden_size": backbone.width,
        "vocab_size": backbone.vocab_size,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": getattr(text_config, "max_position_embeddings", None) or 2048,
        "nextlat": {
            "format": FORMAT,
            "objective": objective.name,
            "needed_at_inference": objective.needed_at_inference,
            "config": objective.config.model_dump(mode="json"),
            # The other objectives do not draft in vLLM: there is nothing to find out for them.
            **(_surroundings(backbone) if isinstance(objective, NextLat) else {}),
        },
    }


def _surroundings(backbone: Backbone) -> dict[str, Any]:
    """How the target embeds a token and reads a state, in the terms that vLLM's layers take: a
    factor on a row of the embedding; a factor on the logits and a soft cap. None where a map is
    neither."""
    lm = backbone.lm
    embedding = lm.get_input_embeddings()
    names = [name for name, module in lm.named_modules() if module is embedding]
    with evaluation_mode(lm), torch.no_grad():
        scale, soft_cap = _head_form(backbone)
        return {
            "embedding": {
                "module": names[0],
                "width": backbone.embedding_width,
                "scale": _embedding_scale(backbone),
            },
            "head": {"scale": scale, "soft_cap": soft_cap},
        }


def _embedding_scale(backbone: Backbone) -> float | None:
    """c of E(x) = c * weight[x], or None."""
    table: Any = backbone.lm.get_input_embeddings()
    ids = probe_ids(backbone.lm)
    rows, embedded = table.weight[ids], backbone.embed(ids)
    if embedded.shape != rows.shape:
        return None
    if torch.equal(embedded, rows):
        return 1.0
    # A constant of the model's own dtype, which the rounded products blur.
    scale = float(torch.tensor(_ratio(embedded, rows)).to(rows.dtype))
    return scale if Backbone.close(rows * scale, embedded) else None


def _head_form(backbone: Backbone) -> tuple[float | None, float | None]:
    """(s, c) of head(h) = s * c * tanh(z / c), z = W h + b; c is None without a soft cap, s with any
    other form."""
    head = backbone.head
    if head.weight is not None:
        return 1.0, None
    table: Any = backbone.lm.get_output_embeddings()

    def plain(h: Tensor) -> Tensor:
        return F.linear(h.to(table.weight.dtype), table.weight, getattr(table, "bias", None))

    h = backbone.states(probe_ids(backbone.lm))
    # Where the logits are small a cap is invisible, where they are huge nothing else is.
    small, huge = (h * (size / plain(h).abs().max().clamp(min=1e-6)) for size in (1e-3, 1e6))
    scale = _ratio(head(small), plain(small))
    if abs(scale - 1) < TOLERANCE.get(backbone.lm.dtype, 1e-4):
        scale = 1.0
    limit = float(head(huge).abs().max())
    soft_cap = limit / scale if limit < 0.5 * scale * float(plain(huge).abs().max()) else None

    for size in (1.0, 30.0, 1000.0):
        z = plain(h * size)
        form = scale * (z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap))
        if not Backbone.close(form, head(h * size)):
            return None, None
    return scale, soft_cap


def _ratio(a: Tensor, b: Tensor) -> float:
    """The constant c of a = c * b, each entry of which is rounded."""
    a, b = a.double().flatten(), b.double().flatten()
    return float((a / b)[b != 0].median()) if bool((b != 0).any()) else 0.0


def served_settings(block: Any) -> NextLatConfig:
    """The settings of a sidecar that can be served as it is described.

    Args:
        block: "nextlat" of the draft model's config.json.

    Raises:
        NextLatError: it cannot, and why.
    """
    again = "save the model again with this version of nextlat (nextlat.load, then save_pretrained)"
    if not isinstance(block, dict) or block.get("format") != FORMAT:
        raise NextLatError(
            f"the draft model is no sidecar of nextlat in format {FORMAT}: name RUN/nextlat of a saved run, or {again}."
        )
    if block["objective"] != "nextlat":
        raise NextLatError(
            f"the model was trained with the objective '{block['objective']}', which cannot draft in vLLM: "
            "serve it without a speculative config."
        )
    defaults = {field.name: field.default for field in fields(NextLatConfig)}
    for name, value in block["config"].items():
        known = name in SERVED or (name in defaults and value == defaults[name])
        if not known:
            raise NextLatError(
                f"the sidecar was trained with {name} = {value!r}, which this version cannot serve in vLLM: "
                "upgrade nextlat, or serve without a speculative config."
            )
    if block["embedding"]["module"] != "model.embed_tokens":
        raise NextLatError(
            f"vLLM gives a drafter the target's embeddings only where they are 'model.embed_tokens', and here they are "
            f"'{block['embedding']['module']}': serve it without a speculative config."
        )
    for part in ("embedding", "head"):
        if block[part]["scale"] is None:
            raise NextLatError(
                f"the {part} of this model does more than scale and cap, which vLLM's layers cannot be told: "
                "serve it without a speculative config."
            )
    return NextLatConfig(**block["config"])
