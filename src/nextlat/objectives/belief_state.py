"""BST: the belief state transformer (Hu et al., arXiv 2410.23506; in our words: spec METHOD section
5).

Shapes: B rows, T tokens, N = B*T positions, D width, V vocabulary, G documents, P pairs, M of them
    in one chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextlat.backbone import Backbone
from nextlat.batch import IGNORE, Batch
from nextlat.errors import NextLatError
from nextlat.losses import Losses, Term, cross_entropy, one_by_one
from nextlat.objectives.flops import TRAINING, head_weights, transformer_flops, weights
from nextlat.objectives.objective import Objective

CHUNK = 4096  # pairs that are held at a time: two states and the text head's activations for each
NEXT, PREVIOUS = 0, 1


@dataclass(frozen=True)
class BSTConfig:
    """Settings of the belief state transformer.

    Attributes:
        pair_share: share of the (prefix, suffix) pairs that is trained on, above 0 and at most 1
            (0.1 for the training speed in arXiv 2511.05963). Whether a pair is among them is a hash
            of its document's tokens and of where it cuts
            the document: the same in every epoch, packing, micro-batch and resumed run.

    Raises:
        NextLatError: a value outside its range.
    """

    pair_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.pair_share <= 1:
            raise NextLatError(
                f"BSTConfig.pair_share is {self.pair_share}: it must be above 0 and at most 1."
            )


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
            nn.init.normal_(layer.weight, std=0.02)  # as the backbone: weights ~ N(0, 0.02)

    def forward(self, f: Tensor, b: Tensor) -> Tensor:
        """(..., D), (..., D) -> (..., 2, D): next, previous."""
        f, b = torch.broadcast_tensors(f, b)
        x = torch.cat([f, b], dim=-1).to(self.read.weight.dtype)
        return self.write(F.gelu(self.read(x))).unflatten(-1, (2, -1))


@dataclass(frozen=True)
class Pairs:
    """P pairs of a prefix x_1..x_t and a suffix x_{t+k}..x_T of one document, k >= 1.

    `prefix` and `suffix` are the positions that F and B have read last, N for the empty prefix and
    the empty suffix. `targets` (P, 2) are the labels of x_{t+1} and x_{t+k-1}; -100 where the
    document has no such token or it has no label.
    """

    prefix: Tensor
    suffix: Tensor
    targets: Tensor

    @classmethod
    def of(cls, batch: Batch, share: float = 1.0) -> "Pairs":
        """All pairs of a batch, or a share of them, that have anything to predict."""
        start, length = batch.documents()
        N, device = batch.input_ids.numel(), batch.input_ids.device
        # The n + 1 places at which a document of n tokens can be cut, those of all documents in one
        # vector: i tokens before it.
        document = torch.arange(len(start), device=device).repeat_interleave(length + 1)
        i = torch.arange(len(document), device=device) - _before(length + 1)[document]
        # A pair is a place for the prefix to end, and one from there on for the suffix to begin.
        following = length[document] - i + 1
        end = torch.arange(len(document), device=device).repeat_interleave(following)
        begin = end + torch.arange(len(end), device=device) - _before(following)[end]
        if share < 1:
            kept = _chance(_hashes(batch, start, length)[document[end]], i[end], i[begin]) < share
            end, begin = end[kept], begin[kept]
        # `at` is the token right behind a place, `at - 1` the one right before it.
        at, first, last = start[document] + i, i == 0, i == length[document]
        labels = torch.cat([batch.labels.flatten(), torch.full((1,), IGNORE, device=device)])
        next_token = labels[torch.where(last, N, at)][end]
        previous_token = labels[torch.where(first, N, at - 1)][begin]
        targets = torch.stack([next_token, previous_token], dim=1)
        some = (targets != IGNORE).any(dim=1)
        prefix, suffix = torch.where(first, N, at - 1)[end], torch.where(last, N, at)[begin]
        return cls(prefix[some], suffix[some], targets[some])

    def counts(self) -> Tensor:
        """(2,) next and previous tokens to predict."""
        return (self.targets != IGNORE).sum(dim=0)


class BST(Objective):
    """L = mean over pairs of CE(next token x_{t+1}) + mean over pairs of CE(previous token
    x_{t+k-1})

    F is the LM's own transformer, B a second one that reads documents from their end. Every pair
    (t, t + k) of a document with k >= 1 is trained on, with the empty prefix and the empty suffix,
    whose states are learned vectors. Each mean is over the pairs
    whose document has such a token, with a label: prompt tokens are read from both sides and
    predicted from neither.
    """

    name: ClassVar[str] = "bst"
    needed_at_inference: ClassVar[bool] = (
        True  # the next token is predicted by the text head, from F and the empty suffix
    )

    def __init__(self, config: BSTConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.config: BSTConfig = config
        self.backward_encoder = backbone.twin()
        self.text_head = TextHead(backbone.width)
        self.empty_prefix = nn.Parameter(0.02 * torch.randn(backbone.width))
        self.empty_suffix = nn.Parameter(0.02 * torch.randn(backbone.width))

    def counts(self, batch: Batch) -> Tensor:
        """(3,): pairs with a next token to predict, pairs with a previous one, scored positions."""
        return torch.cat(
            [Pairs.of(batch, self.config.pair_share).counts(), batch.scored().sum().view(1)]
        ).float()

    def loss(self, batch: Batch, counts: Tensor | None = None) -> Losses:
        pairs = Pairs.of(batch, self.config.pair_share)
        counts = self.counts(batch) if counts is None else counts
        # F and B run once; then the pairs, chunk by chunk, on their detached states; then one
        # backward through each.
        f_ND = self.backbone.hidden(batch).flatten(0, 1)
        b_ND = self.backbone.hidden(batch.reversed(), self.backward_encoder).flip(1).flatten(0, 1)
        states = [_with(f_ND, self.empty_prefix), _with(b_ND, self.empty_suffix)]
        divisors = counts[:2].clamp(min=1)
        chunks = zip(
            *(x.split(CHUNK) for x in (pairs.prefix, pairs.suffix, pairs.targets)), strict=True
        )
        pieces = [self._piece(Pairs(*chunk), divisors) for chunk in chunks if len(chunk[0])]
        output_head = self.backbone.lm.get_output_embeddings()
        total, parts = one_by_one(
            pieces, states, [*self.text_head.parameters(), *output_head.parameters()]
        )
        parts = parts.expand(2)
        one = torch.ones_like(counts[:1])
        return Losses(
            {
                "pairs": Term(total.view(1), one),
                # Not part of the sum, for the log alone:
                "next_token": Term(self._next_token(f_ND.detach(), batch), counts[2:], weight=0.0),
                "pairs_next": Term(parts[NEXT:][:1], one, weight=0.0),
                "pairs_previous": Term(parts[PREVIOUS:], one, weight=0.0),
            }
        )

    def flops(self, batch: Batch) -> dict[str, float]:
        pairs = Pairs.of(batch, self.config.pair_share)
        return {
            "backward encoder": transformer_flops(self.backbone, batch),
            "text head": TRAINING * weights(self.text_head) * len(pairs.prefix),
            "head": TRAINING * head_weights(self.backbone) * int(pairs.counts().sum()),
        }

    def _piece(self, pairs: Pairs, divisors: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The share of some pairs in both means, as a function of the states of F and B."""

        def piece(f_XD: Tensor, b_XD: Tensor) -> Tensor:
            states_M2D = self.text_head(
                f_XD.index_select(0, pairs.prefix), b_XD.index_select(0, pairs.suffix)
            )
            sums = []
            for which in (NEXT, PREVIOUS):
                scored = (pairs.targets[:, which] != IGNORE).nonzero().squeeze(1)
                states = states_M2D[:, which].index_select(0, scored)
                sums.append(
                    cross_entropy(self.backbone.head, states, pairs.targets[scored, which])
                    if len(scored)
                    else states.sum()
                )
            return torch.stack(sums) / divisors

        return piece

    @torch.no_grad()
    def _next_token(self, f_ND: Tensor, batch: Batch) -> Tensor:
        """(1,) sum of the cross-entropies of plain next-token prediction, as other objectives
        report them."""
        scored = batch.scored().nonzero().squeeze(1)
        return cross_entropy(self.next_token_logits, f_ND[scored], batch.targets()[scored]).view(1)

    def next_token_logits(self, h: Tensor) -> Tensor:
        return self.backbone.head(self.text_head(h, self.empty_suffix.to(h.dtype))[..., NEXT, :])

    @torch.no_grad()
    def generate_towards(
        self, prefix_ids: Tensor, suffix_ids: Tensor, max_new_tokens: int
    ) -> Tensor:
        """Greedy tokens behind a prefix, each chosen in view of a suffix that is to follow sooner
        or later (a goal).

        The number of tokens between the two is not part of what the text head is given: look for
        the suffix in what comes back.

        Args:
            prefix_ids: (B, T), T >= 0. suffix_ids: (B, S), S >= 0. max_new_tokens: per row.

        Returns:
            (B, max_new_tokens) tokens.

        Raises:
            NextLatError: fewer than one new token.
        """
        if max_new_tokens < 1:
            raise NextLatError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        rows = len(prefix_ids)
        b_BD = self.empty_suffix.expand(rows, -1)
        if suffix_ids.shape[1]:
            suffix = Batch.from_inputs(suffix_ids, suffix_ids).reversed()
            b_BD = self.backbone.hidden(suffix, self.backward_encoder)[:, -1]
        f_BD, cache, ids, made = self.empty_prefix.expand(rows, -1), None, prefix_ids, []
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


def _before(sizes: Tensor) -> Tensor:
    """How many elements come before each of several groups of the given sizes."""
    return sizes.cumsum(0) - sizes


# ---- a random share of the pairs without a random state ----


def _mixed(x: Tensor) -> Tensor:
    """Well-mixed 64-bit integers (multiply and shift, thrice; integer overflow wraps)."""
    for factor in (-7046029254386353131, -4658895280553007687, -7723592293110705685):
        x = (x ^ ((x >> 31) & 0x1FFFFFFFF)) * factor
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _hashes(batch: Batch, start: Tensor, length: Tensor) -> Tensor:
    """(G,) one number for each document, from its tokens and their order."""
    document = torch.arange(len(start), device=start.device).repeat_interleave(length)
    place = torch.arange(len(document), device=start.device) - _before(length)[document]
    tokens = batch.input_ids.flatten()[start[document] + place]
    return torch.zeros_like(start).index_add(0, document, _mixed(_mixed(tokens) + place))


def _chance(hashes: Tensor, end: Tensor, begin: Tensor) -> Tensor:
    """(P,) uniform numbers in [0, 1), one for each pair."""
    return (_mixed(_mixed(hashes + end) + begin) >> 11 & 0x1FFFFFFFFFFFFF).double() / 2**53
