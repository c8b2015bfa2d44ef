"""The contract of a training objective: what it adds to an unmodified causal LM, its loss, and how
it drafts."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.losses import Losses


class Objective(nn.Module):
    """One objective around one backbone. Its parameters are its own; those of the LM stay with the
    LM.

    Class attributes:
        name: as in recipes and run directories.
        max_draft_length: tokens it can draft per cycle; None = any number, 0 = it cannot draft.
        needed_at_inference: True when the LM alone does not define the model (JTP, BST).

    Attributes:
        step: number of the optimiser step under way, from 1, set by the trainer for losses that
            change over time; None = none is.

    From a forward pass of the transformer, which gives h_BTD for tokens input_ids_BT (with or
    without a cache), follow
        next_token_logits(output_states(h, input_ids))       what the model says, at every position
        draft(drafting_states(h, input_ids)[:, t], token)   what the objective drafts behind `token`, which was chosen at position t
    """

    name: ClassVar[str]
    max_draft_length: int | None = 0
    needed_at_inference: ClassVar[bool] = False
    step: int | None = None

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone

    @property
    def horizon(self) -> int:
        """d, steps beyond the next token that the training signal reaches; 0 for plain next-token
        prediction."""
        return getattr(self.config, "horizon", 0)

    def counts(self, batch: Batch) -> Tensor:
        """Number of valid positions behind every normalised mean of the loss, as one fp32 vector;
        needs no forward pass.

        Summed over the micro-batches (and ranks) of an optimiser step it is what `loss` divides by,
        so that gradient accumulation gives exactly the loss of the undivided batch.
        """
        raise NotImplementedError

    def loss(self, batch: Batch, counts: Tensor | None = None) -> Losses:
        """The loss parts on a batch; `counts` defaults to `self.counts(batch)`."""
        raise NotImplementedError

    def flops(self, batch: Batch) -> dict[str, float] | None:
        """Floating-point operations of a training step besides those of the transformer's layers,
        by part; see `flops`.

        None where nobody has counted them: the cost is then only measured.
        """
        return None

    def output_states(self, h: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T, D) hidden states and the (B, T) tokens read last in each -> what
        `next_token_logits` takes; h itself by default."""
        return h

    def next_token_logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., V): the distribution of the next token given a state (see
        `output_states`)."""
        return self.backbone.head(h)

    @property
    def cache_config(self) -> PreTrainedConfig:
        """What the KV cache of decoding is built from: the LM's own configuration, or one with more
        layers (MTP)."""
        return self.backbone.cache_config()

    def drafting_states(self, h: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T, D), (B, T) -> (B, T, S): where drafts behind each position start; h itself by
        default.

        To be called right after the forward pass that gave h, and before anything is rolled back
        from its cache.
        """
        return h

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """One draft step: the state after reading `token` (B,) in `state` (B, S), and the logits
        (B, V) of what follows."""
        raise NextLatError(f"the objective '{self.name}' cannot draft tokens: use draft_length=0.")
