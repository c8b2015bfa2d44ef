"""What a server reads beside the weights: `nextlat/config.json`, which makes the sidecar a draft
model of vLLM.

It is written with every save, whatever the objective, so that a sidecar that cannot draft there is
refused by name and not by an accident of loading. Nothing here imports vLLM.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nextlat.backbone import TOLERANCE, Backbone, evaluation_mode, probe_ids
from nextlat.errors import NextLatError
from nextlat.files import write_json
from nextlat.objectives import NextLat, NextLatConfig, Objective
from nextlat.serving import ARCHITECTURE
from nextlat.validation import Settings, check_format

DRAFT_CONFIG, BLOCK, FORMAT = "config.json", "nextlat", 1
# Settings that the drafter in `vllm` follows, or that have done their work in training. Any other
# must have its default there.
SERVED = {
    *("dynamics", "hidden_size", "num_layers", "separate_norms", "zero_init"),
    *("horizon", "lambda_next_h", "lambda_kl", "next_h_loss", "kl_loss", "warmup_steps"),
    "draft_vocabulary",
    *("stop_gradient_target", "stop_gradient_teacher", "stop_gradient_head"),
}
EMBEDDINGS = "model.embed_tokens"  # where vLLM looks for what it gives to a drafter
PLAIN = "serve it without a speculative config"


class Embedding(Settings):
    """How the target embeds a token: E(x) = scale * weight[x]; scale is None for any other map."""

    module: str
    width: int
    scale: float | None


class HeadForm(Settings):
    """How the target reads a state: scale * c * tanh(z / c), z = W h + b, or scale * z where
    soft_cap, c, is None; scale is None for any other map."""

    scale: float | None
    soft_cap: float | None


class DraftModel(Settings):
    """Block "nextlat" of the draft model's configuration.

    Attributes:
        format: version of this block.
        objective: name of the objective that the sidecar holds.
        needed_at_inference: whether the transformer beside it is only part of the model.
        config: settings of the objective.
        embedding: of the target; there for the objective "nextlat" alone, as is `head`.
        head: of the target.
    """

    format: int
    objective: str
    needed_at_inference: bool
    config: dict[str, Any]
    embedding: Embedding | None = None
    head: HeadForm | None = None


def write_draft_config(sidecar: Path, objective: Objective) -> None:
    """Write `config.json` into the sidecar directory of a saved model.

    Args:
        sidecar: the directory that holds `objective.safetensors`.
        objective: the one saved there, of any kind, with its backbone.
    """
    write_json(sidecar / DRAFT_CONFIG, draft_config(objective))


def draft_config(objective: Objective) -> dict[str, Any]:
    """The configuration of the draft model, in the words of a small Llama, which every reader of
    configurations knows; what the drafter really is stands in the block "nextlat"."""
    backbone = objective.backbone
    lm = backbone.lm
    text_config = lm.config.get_text_config(decoder=True)
    # No attention of the drafter is ever run: all that its heads must do is divide the width, and
    # be divided by the same numbers of tensor-parallel ranks as the target's.
    heads = math.gcd(getattr(text_config, "num_attention_heads", None) or 1, backbone.width)
    block = DraftModel(
        format=FORMAT,
        objective=objective.name,
        needed_at_inference=objective.needed_at_inference,
        config=objective.config.model_dump(mode="json"),
        # The other objectives do not draft in vLLM: there is nothing to find out for them.
        embedding=_embedding(backbone) if isinstance(objective, NextLat) else None,
        head=_head_form(backbone) if isinstance(objective, NextLat) else None,
    )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "dtype": str(lm.dtype).removeprefix("torch."),
        "hidden_size": backbone.width,
        "vocab_size": backbone.vocab_size,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": getattr(text_config, "max_position_embeddings", None) or 2048,
        BLOCK: block.model_dump(mode="json"),
    }


def _embedding(backbone: Backbone) -> Embedding:
    table: Any = backbone.lm.get_input_embeddings()
    ids = probe_ids(backbone.lm)
    with evaluation_mode(backbone.lm):
        rows, embedded = table.weight[ids], backbone.embed(ids)
    scale: float | None = 1.0
    if embedded.shape != rows.shape:
        scale = None
    elif not torch.equal(embedded, rows):
        # A constant of the model's own dtype, which the rounded products blur.
        scale = float(torch.tensor(_ratio(embedded, rows)).to(rows.dtype))
        scale = scale if Backbone.close(rows * scale, embedded) else None
    names = [name for name, module in backbone.lm.named_modules() if module is table]
    return Embedding(module=names[0], width=backbone.embedding_width, scale=scale)


def _head_form(backbone: Backbone) -> HeadForm:
    head = backbone.head
    if head.weight is not None:
        return HeadForm(scale=1.0, soft_cap=None)
    table: Any = backbone.lm.get_output_embeddings()
    if getattr(table.weight, "shape", ())[1:] != (backbone.width,):  # there are layers before it
        return HeadForm(scale=None, soft_cap=None)

    def plain(h: Tensor) -> Tensor:
        return F.linear(h.to(table.weight.dtype), table.weight, getattr(table, "bias", None))

    with evaluation_mode(backbone.lm):
        h = backbone.states(probe_ids(backbone.lm))
        # Where the logits are small a cap is invisible, where they are huge nothing else is.
        largest = plain(h).abs().max().clamp(min=1e-6)
        small, huge = h * (1e-3 / largest), h * (1e6 / largest)
        scale = _ratio(head(small), plain(small))
        if abs(scale - 1) < TOLERANCE.get(backbone.lm.dtype, 1e-4):
            scale = 1.0
        limit = float(head(huge).abs().max())
        capped = limit < 0.5 * scale * float(plain(huge).abs().max())
        soft_cap = limit / scale if capped else None
        for size in (1.0, 30.0, 1000.0):
            z = plain(h * size)
            form = scale * (z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap))
            if not Backbone.close(form, head(h * size)):
                return HeadForm(scale=None, soft_cap=None)
    return HeadForm(scale=scale, soft_cap=soft_cap)


def _ratio(a: Tensor, b: Tensor) -> float:
    """The constant c of a = c * b, each entry of which is rounded."""
    a, b = a.double().flatten(), b.double().flatten()
    return float((a / b)[b != 0].median()) if bool((b != 0).any()) else 0.0


def read_draft_model(table: Any, path: Path) -> DraftModel:
    """Read the block "nextlat".

    Args:
        table: its content; anything else is refused.
        path: of the file, or of its directory, as the sentence begins.

    Raises:
        NextLatError: it is of another version or does not describe a draft model.
    """
    version = table.get("format") if isinstance(table, dict) else None
    check_format(version, FORMAT, path, "open the model with nextlat.load and save it again")
    return DraftModel.from_json(table, f"{path} does not describe a draft model")


def served_settings(draft: DraftModel, path: Path) -> tuple[NextLatConfig, Embedding, HeadForm]:
    """The settings of a draft model that can be served as it is described.

    Args:
        draft: the block "nextlat".
        path: where it comes from, as the sentence begins.

    Returns:
        The settings of the objective, and how the target embeds and reads.

    Raises:
        NextLatError: it cannot, and why.
    """
    if draft.objective != NextLat.name or draft.embedding is None or draft.head is None:
        raise NextLatError(
            f"the model was trained with the objective '{draft.objective}', which cannot draft in "
            f"vLLM: {PLAIN}."
        )
    settings = NextLatConfig.from_json(draft.config, f"{path} cannot be served by this version")
    for name, field in NextLatConfig.model_fields.items():
        value = getattr(settings, name)
        if name not in SERVED and value != field.default:
            raise NextLatError(
                f"the sidecar was trained with {name} = {value!r}, which cannot be served in vLLM "
                f"yet: {PLAIN}."
            )
    if draft.embedding.module != EMBEDDINGS:
        raise NextLatError(
            f"vLLM gives a drafter the target's embeddings only where they are '{EMBEDDINGS}', and "
            f"here they are '{draft.embedding.module}': {PLAIN}."
        )
    for part in ("embedding", "head"):
        if getattr(draft, part).scale is None:
            raise NextLatError(
                f"the {part} of this model does more than scale and cap, which vLLM's layers "
                f"cannot be told: {PLAIN}."
            )
    return settings, draft.embedding, draft.head
