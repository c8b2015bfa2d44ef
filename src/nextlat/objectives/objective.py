"""The contract of a training objective: what it adds to an unmodified causal LM, its loss, and how
it drafts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.losses import Counts, Losses, Term, cross_entropy


class Objective(nn.Module):
    """One objective around one backbone. Its parameters are its own; those of the LM stay with the
    LM.

    Decoding reads a forward pass of the transformer, which gives h_BTD for tokens input_ids_BT
    (with or without a cache), in two ways:

        next_token_logits(output_states(h, input_ids))      what the model says, at every position
        draft(drafting_states(h, input_ids)[:, t], token)   what is drafted after `token`, which
                                                            was chosen at position t

    Class attributes:
        name: in recipes and run directories.
        title: in reports.
        published_as: what the paper calls it.
        parts: titles of the loss parts that it logs besides `next_token`, by name.
        max_draft_length: tokens it can draft per cycle; None = any number, 0 = it cannot draft.
        cached_layers: layers of its own that keep keys and values while it drafts, in the cache of
            the LM and after its layers.
        needed_at_inference: whether the LM alone is not the model (JTP, BST).
        tokens_only: why it has nothing to learn where labels are not the tokens themselves, but a
            function of inputs that it has not read yet, or of all before; "" = it has.

    Attributes:
        config: its settings.
        backbone: of the LM.
        step: number of the optimiser step under way, from 1, set by the trainer for losses that
            change over time; None outside of one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    published_as: ClassVar[str]
    parts: ClassVar[Mapping[str, str]] = {}
    max_draft_length: int | None = 0
    cached_layers: int = 0
    needed_at_inference: ClassVar[bool] = False
    tokens_only: ClassVar[str] = ""
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

    def check_vocabulary(self) -> None:
        """Whether the tokens that it names are the LM's.

        Raises:
            NextLatError: one is not.
        """

    # ---- training ----

    def counts(self, batch: Batch) -> Counts:
        """Number of valid positions in every mean of the loss; needs no forward pass.

        Summed over the micro-batches (and ranks) of an optimiser step it is what `loss` divides by,
        so that gradient accumulation gives exactly the loss of the undivided batch.
        """
        return {"next_token": batch.scored.sum().view(1)}

    def loss(self, batch: Batch, counts: Counts | None = None) -> Losses:
        """The loss parts on a batch.

        Args:
            batch: rows of documents.
            counts: what to divide by; None = those of this batch.
        """
        raise NotImplementedError

    def next_token_term(self, h_ND: Tensor, batch: Batch, counts: Counts) -> Term:
        """L_next_token = mean_t CE(W h_t, x_{t+1}), which every objective shares."""
        scored = batch.scored_positions
        if len(scored) == 0:  # every weight gets a gradient, which other processes wait for
            return Term(self.backbone.head(h_ND[:1]).sum().view(1) * 0, counts["next_token"])
        h_ND, targets = h_ND.index_select(0, scored), batch.targets[scored]
        return Term(cross_entropy(self.backbone.head, h_ND, targets).view(1), counts["next_token"])

    def acceptance(self, batch: Batch) -> Tensor | None:
        """(2, d): at how many positions of the batch the i-th drafted token is the model's own
        choice, after a draft of the batch's tokens, and at how many that was asked; None where it
        is not."""
        return None

    def flops(self, batch: Batch) -> dict[str, float] | None:
        """Floating-point operations of a training step besides those of the transformer's layers,
        by part (see the module `flops`); None = there is no formula, and the cost is only measured.
        """
        return None

    # ---- decoding ----

    def output_states(self, h: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T, D) hidden states and the (B, T) tokens read last in each -> the states that
        `next_token_logits` takes; h itself by default."""
        return h

    def next_token_logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., V): the distribution of the next token in a state (see
        `output_states`)."""
        return self.backbone.head(h)

    def drafting_states(self, h: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T, D), (B, T) -> (B, T, S): where drafts after each position start; h itself by
        default.

        To be called right after the forward pass that gave h, before anything is taken back from
        its cache.
        """
        return h

    def prepare_drafts(self) -> None:
        """Get ready for calls of `draft` with the weights as they are now; before every
        decoding."""

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """One draft step: the state after reading `token` (B,) in `state` (B, S), and the logits
        (B, V) of the next token there."""
        raise NextLatError(f"the objective '{self.name}' cannot draft tokens: use draft_length=0.")
