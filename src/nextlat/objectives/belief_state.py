"""BST: the belief state transformer (Hu et al., arXiv 2410.23506).

Shapes: B rows, T tokens, N = B*T positions, D width, V vocabulary, G documents, P pairs, M of them
    in one chunk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from nextlat.backbone import Backbone
from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError
from nextlat.losses import Counts, Losses, Term, cross_entropy, one_by_one
from nextlat.objectives.flops import TRAINING, head_weights, transformer_flops, weights
from nextlat.objectives.latent_dynamics import INIT_STD
from nextlat.objectives.objective import Objective
from nextlat.validation import Settings

CHUNK = 4096  # pairs held at a time: two states and the text head's activations for each
NEXT, PREVIOUS = 0, 1


class BSTConfig(Settings):
    """Settings of the belief state transformer.

    Attributes:
        pair_share: share of the (prefix, suffix) pairs that is trained on (0.1 for the training
            speed in arXiv 2511.05963). Whether a pair is among them is a hash of its document's
            tokens and of where it cuts the document: the same in every epoch, packing, micro-batch
            and resumed run.

    Raises:
        NextLatError: a value outside its range.
    """

    pair_share: Annotated[float, Field(gt=0, le=1)] = 1.0


class TextHead(nn.Module):
    """[F_t ; B_{t+k}] -> a state for the next token and one for the previous; the output head W of
    the LM reads both.

    Two linear layers of width 2 D with GELU between, no biases, like the paper's backbone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(2 * width, 2 * width, bias=False)
        self.write = nn.Linear(2 * width, 2 * width, bias=False)
        for layer in (self.read, self.write):
            nn.init.normal_(layer.weight, std=INIT_STD)

    def forward(self, f: Tensor, b: Tensor) -> Tensor:
        """(..., D), (..., D) -> (..., 2, D): next, previous."""
        f, b = torch.broadcast_tensors(f, b)
        x = torch.cat([f, b], dim=-1).to(self.read.weight.dtype)
        return self.write(F.gelu(self.read(x))).unflatten(-1, (2, -1))


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of a prefix x_1..x_t and a suffix x_{t+k}..x_T of one document, k >= 1.

    Attributes:
        prefix: (P,) the position that F has read last, N for the empty prefix.
        suffix: (P,) the position that B has read last, N for the empty suffix.
        targets: (P, 2) the labels of x_{t+1} and x_{t+k-1}; -100 where the document has no such
            token, or it has no label.
    """

    prefix: Tensor
    suffix: Tensor
    targets: Tensor

    @classmethod
    def of(cls, batch: Batch, share: float = 1.0) -> "Pairs":
        """The pairs of a batch that have anything to predict, or a share of them."""
        start, length = batch.documents()
        N, device = batch.input_ids.numel(), batch.input_ids.device
        # The n + 1 cuts of a document of n tokens, those of all documents in one vector: which
        # document, and how many of its tokens come before the cut.
        document, i = _groups(length + 1)
        # A pair is a cut where the prefix ends, and one from there on where the suffix begins.
        end, further = _groups(length[document] - i + 1)
        begin = end + further
        if share < 1:
            hashes = _hashes(batch, start, length)
            kept = _chance(hashes[document[end]], i[end], i[begin]) < share
            end, begin = end[kept], begin[kept]
        after = start[document] + i  # the token right after a cut; the one before is after - 1
        after = torch.where(i == length[document], N, after)
        before = torch.where(i == 0, N, start[document] + i - 1)
        labels = torch.cat([batch.labels.flatten(), torch.full((1,), IGNORE, device=device)])
        targets = torch.stack([labels[after][end], labels[before][begin]], dim=1)
        some = (targets != IGNORE).any(dim=1)
        return cls(before[end][some], after[begin][some], targets[some])

    def counts(self) -> Counts:
        """(1,) next and (1,) previous tokens to predict."""
        next_tokens, previous_tokens = (self.targets != IGNORE).sum(dim=0).split(1)
        return {"pairs_next": next_tokens, "pairs_previous": previous_tokens}

    def chunks(self) -> list["Pairs"]:
        """At most `CHUNK` of them each."""
        parts = (x.split(CHUNK) for x in (self.prefix, self.suffix, self.targets))
        return [Pairs(*part) for part in zip(*parts, strict=True) if len(part[0])]


class BST(Objective):
    """L = mean over pairs of CE(next token x_{t+1}) + mean over pairs of CE(previous token
    x_{t+k-1})

    F is the LM's own transformer, B a second one that reads documents from their end. Every pair
    (t, t + k) of a document with k >= 1 is trained on, with the empty prefix and the empty suffix,
    whose states are learned vectors. Each mean is over the pairs whose document has such a token,
    with a label: prompt tokens are read from both sides and predicted from neither.
    """

    name = "bst"
    title = published_as = "BST"
    tokens_only = "it predicts the tokens before a suffix, which here are no labels"
    parts: ClassVar[Mapping[str, str]] = {
        "pairs": "Pairs: next and previous token",
        "pairs_next": "Pairs: next token, nats",
        "pairs_previous": "Pairs: previous token, nats",
    }
    # The next token is predicted by the text head, from F and the empty suffix.
    needed_at_inference = True

    def __init__(self, config: BSTConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.backward_encoder = backbone.twin()
        self.text_head = TextHead(backbone.width)
        self.empty_prefix = nn.Parameter(INIT_STD * torch.randn(backbone.width))
        self.empty_suffix = nn.Parameter(INIT_STD * torch.randn(backbone.width))

    def counts(self, batch: Batch) -> Counts:
        """Besides `next_token`, the pairs with a next and with a previous token to predict."""
        return super().counts(batch) | Pairs.of(batch, self.config.pair_share).counts()

    def loss(self, batch: Batch, counts: Counts | None = None) -> Losses:
        pairs = Pairs.of(batch, self.config.pair_share)
        counts = counts or super().counts(batch) | pairs.counts()
        # F and B run once; then the pairs, chunk by chunk, on their detached states; then one
        # backward pass through each.
        f_ND = self.backbone.hidden(batch).flatten(0, 1)
        b_ND = self.backbone.hidden(batch.reversed(), self.backward_encoder).flip(1).flatten(0, 1)
        states = [_with(f_ND, self.empty_prefix), _with(b_ND, self.empty_suffix)]
        divisors = torch.cat([counts["pairs_next"], counts["pairs_previous"]]).clamp(min=1)
        pieces = [self._piece(chunk, divisors) for chunk in pairs.chunks()]
        learning = [*self.text_head.parameters(), *self.backbone.head.parameters()]
        total, parts = one_by_one(pieces, states, learning)
        next_tokens, previous_tokens = parts.expand(2).split(1)
        once, next_token = torch.ones_like(counts["next_token"]), self._next_token(f_ND, batch)
        return Losses(
            {
                "pairs": Term(total.view(1), once),
                # Not part of the sum, for the log alone:
                "next_token": Term(next_token, counts["next_token"], weight=0.0),
                "pairs_next": Term(next_tokens, once, weight=0.0),
                "pairs_previous": Term(previous_tokens, once, weight=0.0),
            }
        )

    def _piece(self, pairs: Pairs, divisors: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The share of some pairs in both means, as a function of the states of F and B."""

        def piece(f_XD: Tensor, b_XD: Tensor) -> Tensor:
            f_MD, b_MD = f_XD.index_select(0, pairs.prefix), b_XD.index_select(0, pairs.suffix)
            states_M2D = self.text_head(f_MD, b_MD)
            sums = []
            for which in (NEXT, PREVIOUS):
                scored = (pairs.targets[:, which] != IGNORE).nonzero().squeeze(1)
                states = states_M2D[:, which].index_select(0, scored)
                targets, head = pairs.targets[scored, which], self.backbone.head
                sums.append(cross_entropy(head, states, targets) if len(scored) else states.sum())
            return torch.stack(sums) / divisors

        return piece

    @torch.no_grad()
    def _next_token(self, f_ND: Tensor, batch: Batch) -> Tensor:
        """(1,) sum of the cross-entropies of plain next-token prediction, as other objectives
        report them."""
        scored = batch.scored_positions
        return cross_entropy(self.next_token_logits, f_ND[scored], batch.targets[scored]).view(1)

    def flops(self, batch: Batch) -> dict[str, float]:
        pairs = Pairs.of(batch, self.config.pair_share)
        targets = sum(int(count) for count in pairs.counts().values())
        return {
            "backward encoder": transformer_flops(self.backbone, batch),
            "text head": TRAINING * weights(self.text_head) * len(pairs.prefix),
            "head": TRAINING * head_weights(self.backbone) * targets,
        }

    def next_token_logits(self, h: Tensor) -> Tensor:
        return self.backbone.head(self.text_head(h, self.empty_suffix.to(h.dtype))[..., NEXT, :])

    @torch.no_grad()
    def generate_towards(
        self, prefix_ids: Tensor, suffix_ids: Tensor, max_new_tokens: int
    ) -> Tensor:
        """Greedy tokens after a prefix, each chosen in view of a suffix that is to come sooner or
        later (a goal).

        How many tokens lie between the two is not something the text head is told: look for the
        suffix in what comes back.

        Args:
            prefix_ids: (B, T), T >= 0.
            suffix_ids: (B, S), S >= 0.
            max_new_tokens: per row.

        Returns:
            (B, max_new_tokens) tokens.

        Raises:
            NextLatError: fewer than one new token.
        """
        if max_new_tokens < 1:
            raise NextLatError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        rows = len(prefix_ids)
        f_BD, b_BD = self.empty_prefix.expand(rows, -1), self.empty_suffix.expand(rows, -1)
        if suffix_ids.shape[1]:
            suffix = Batch.from_inputs(suffix_ids, suffix_ids).reversed()
            b_BD = self.backbone.hidden(suffix, self.backward_encoder)[:, -1]
        cache, ids, made = None, prefix_ids, []
        for _ in range(max_new_tokens):
            if ids.shape[1]:
                f_BTD, cache = self.backbone.step(ids, cache)
                f_BD = f_BTD[:, -1]
            ids = self.backbone.head(self.text_head(f_BD, b_BD)[:, NEXT]).argmax(-1, keepdim=True)
            made.append(ids)
        return torch.cat(made, dim=1)


def _with(states_ND: Tensor, empty_D: Tensor) -> Tensor:
    """(N + 1, D): the state of having read nothing comes last."""
    return torch.cat([states_ND, empty_D[None].to(states_ND.dtype)])


def _groups(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The elements of several groups in one vector: the group of each, and its index there."""
    group = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    before = sizes.cumsum(0) - sizes
    return group, torch.arange(len(group), device=sizes.device) - before[group]


# ---- a random share of the pairs without a random state ----


def _mixed(x: Tensor) -> Tensor:
    """Well-mixed 64-bit integers (multiply and shift, thrice; integer overflow wraps)."""
    for factor in (-7046029254386353131, -4658895280553007687, -7723592293110705685):
        x = (x ^ ((x >> 31) & 0x1FFFFFFFF)) * factor
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _hashes(batch: Batch, start: Tensor, length: Tensor) -> Tensor:
    """(G,) one number for each document, from its tokens and their order."""
    document, i = _groups(length)
    tokens = batch.input_ids.flatten()[start[document] + i]
    return torch.zeros_like(start).index_add(0, document, _mixed(_mixed(tokens) + i))


def _chance(hashes: Tensor, end: Tensor, begin: Tensor) -> Tensor:
    """(P,) uniform numbers in [0, 1), one for each pair."""
    return (_mixed(_mixed(hashes + end) + begin) >> 11 & 0x1FFFFFFFFFFFFF).double() / 2**53
