"""Draws and the acceptance test of speculative sampling, against enumerated probabilities and against transformers."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nextlat.decoding.sampling import Draw, Greedy, Sampling, draw, probabilities, residual, verify
from nextlat.errors import NextLatError

V = 5
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"temperature": 1.3, "top_k": 3},
    "top_p": {"top_p": 0.7},
}


def p_value(tokens: Tensor, expected: Tensor) -> float:
    """Chi-square p-value of drawn tokens (R, n) under the joint distribution `expected` (V, ..., V); thin cells are pooled."""
    cell = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.unbind(dim=1):
        cell = cell * V + column
    counts, mean = torch.bincount(cell, minlength=expected.numel()).double(), expected.double().flatten() * len(tokens)
    assert counts[mean == 0].sum() == 0, "a token was drawn that the settings exclude"
    thin = mean < 5
    counts = torch.cat([counts[~thin], counts[thin].sum()[None]])
    mean = torch.cat([mean[~thin], mean[thin].sum()[None]])
    kept = mean > 0
    return chisquare(counts[kept], mean[kept] * (counts.sum() / mean.sum())).pvalue


class ToyLanguage:
    """Next-token logits that depend on the last two of five tokens, for a target and for a drafter that differs from it."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = torch.randn(V, V, V, generator=generator) * 1.5
        self.drafter = 0.5 * self.target + torch.randn(V, V, V, generator=generator)

    def joint(self, rule: Sampling) -> Tensor:
        """Exact distribution (V, V, V) of the three tokens behind the context (0, 1)."""
        p = rule.probabilities(self.target).double()
        first, second = p[0, 1], p[1]
        return first[:, None, None] * second[:, :, None] * p


Verify = Callable[[Tensor, list[Draw]], tuple[Tensor, Tensor, Tensor]]


def speculate(
    language: ToyLanguage, rule: Sampling, length: int, rows: int, draft: Callable | None = None, check: Verify | None = None
) -> tuple[Tensor, Tensor]:
    """The first three tokens of `rows` independent generations with `length` drafts per cycle, and all accepted counts."""
    draft, check = draft or rule.draw, check or rule.verify
    sequence = torch.zeros(rows, 5 + length, dtype=torch.long)
    sequence[:, 1] = 1
    end = torch.full((rows,), 2)
    counts = []
    while (active := (end < 5).nonzero().squeeze(1)).numel():
        before, last = sequence[active, end[active] - 2], sequence[active, end[active] - 1]
        drafts, target = [], [language.target[before, last]]
        for _ in range(length):
            drafts.append(draft(language.drafter[before, last]))
            before, last = last, drafts[-1].tokens
            target.append(language.target[before, last])
        accepted, following, _ = check(torch.stack(target, dim=1), drafts)
        counts.append(accepted)
        for j, drawn in enumerate(drafts):
            kept = (accepted > j) & (end[active] + j < 5)
            sequence[active[kept], end[active[kept]] + j] = drawn.tokens[kept]
        sequence[active, end[active] + accepted] = following
        end[active] += accepted + 1
    return sequence[:, 2:5], torch.cat(counts)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("length", range(9))
def test_output_distribution_is_exact_for_every_draft_length(name: str, length: int):
    rule = Sampling(**SETTINGS[name], generator=torch.Generator().manual_seed(100 + length))
    language = ToyLanguage(seed=3)
    tokens, accepted = speculate(language, rule, length, rows=20_000)
    assert p_value(tokens, language.joint(rule)) > 1e-4
    # It would prove nothing if nearly all or nearly no drafts were accepted.
    assert length == 0 or 0.1 < (accepted > 0).float().mean() < 0.9
    assert length != 2 or {0, 1, 2} == set(accepted.tolist())


def biased_by_softmax_q(rule: Sampling):
    """The fault: the drafter's most likely token is drafted, but verified as if it had been drawn from the softmax."""

    def draft(logits: Tensor) -> Draw:
        return Draw(logits.argmax(dim=-1), rule.probabilities(logits), logits.amax(dim=-1))

    return draft, rule.verify


def biased_by_dropping(rule: Sampling):
    """The fault: a drafted token of low probability is thrown away, with all behind it, and p is drawn from instead."""

    def check(logits: Tensor, drafts: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.stack([drawn.q.gather(-1, drawn.tokens[:, None])[:, 0] for drawn in drafts], dim=1)
        length = (q > 0.2).long().cumprod(dim=1).sum(dim=1)
        accepted, following, peak = rule.verify(logits, drafts)
        row = torch.arange(len(logits))
        fresh = draw(rule.probabilities(logits[row, length]), rule.generator)
        return accepted.minimum(length), torch.where(accepted < length, following, fresh), peak

    return rule.draw, check


def biased_by_drawing_from_p(rule: Sampling):
    """The fault: after a rejection the token is drawn from p instead of the residual."""

    def check(logits: Tensor, drafts: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        accepted, _, peak = rule.verify(logits, drafts)
        return accepted, draw(rule.probabilities(logits[torch.arange(len(logits)), accepted]), rule.generator), peak

    return rule.draw, check


def biased_by_one_position(rule: Sampling):
    """The fault: the token behind the accepted ones is taken from the last position instead of the first rejected one."""

    def check(logits: Tensor, drafts: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        accepted, following, peak = rule.verify(logits, drafts)
        late = draw(rule.probabilities(logits[:, -1]), rule.generator)
        return accepted, torch.where(accepted < len(drafts), late, following), peak

    return rule.draw, check


@pytest.mark.parametrize("fault", [biased_by_softmax_q, biased_by_dropping, biased_by_drawing_from_p, biased_by_one_position])
def test_the_test_above_sees_every_known_fault(fault: Callable):
    rule = Sampling(generator=torch.Generator().manual_seed(7))
    language = ToyLanguage(seed=3)
    tokens, _ = speculate(language, rule, 3, 20_000, *fault(rule))
    assert p_value(tokens, language.joint(rule)) < 1e-12


def test_acceptance_probability_is_one_minus_total_variation():
    # Accepting less often than sum min(p, q) would still be lossless, only slow.
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 1, 1, V, generator=generator).softmax(dim=-1)
    rows = 50_000
    p, q = (p * 3).softmax(-1).expand(rows, 2, V), q.expand(rows, 1, V)
    accepted, _ = verify(p, q, draw(q, generator), generator)
    expected = torch.minimum(p[0, 0], q[0, 0]).sum()
    assert abs(accepted.float().mean() - expected) < 4 * (0.25 / rows) ** 0.5


def test_equal_distributions_accept_everything():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, 5, V, generator=generator).softmax(dim=-1)
    q = p[:, :-1]
    accepted, _ = verify(p, q, draw(q, generator), generator)
    assert accepted.eq(4).all()


def test_a_token_that_the_target_excludes_is_never_accepted():
    p = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]).expand(1000, 2, V)
    q = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).expand(1000, 1, V)
    accepted, following = verify(p, q, torch.full((1000, 1), 4), torch.Generator().manual_seed(0))
    assert accepted.eq(0).all()
    assert set(following.tolist()) == {0, 1}


def test_residual_is_the_normalised_positive_part():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    torch.testing.assert_close(residual(p, q), torch.tensor([[0.75, 0.25, 0.0]]))
    torch.testing.assert_close(residual(p, torch.zeros_like(p)), p)


def test_residual_of_equal_distributions_is_p():
    # What rounding leaves of p - q may be nothing at all; 0 / 0 would then draw token 0 for ever.
    p = torch.tensor([[0.25, 0.75]])
    torch.testing.assert_close(residual(p, p), p)
    torch.testing.assert_close(residual(p, p * 1.000001), p)


def test_draw_follows_the_weights_and_never_takes_a_zero():
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0, 4.0])
    tokens = draw(weights.expand(40_000, V), torch.Generator().manual_seed(0))
    assert p_value(tokens[:, None], weights / 8) > 1e-4
    assert set(tokens.tolist()) == {1, 2, 4}


@given(
    logits=st.lists(
        st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.7, 2.0, 6.0]), min_size=6, max_size=6), min_size=1, max_size=3
    ),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 2, 4, 6, 50]),
    top_p=st.sampled_from([None, 0.05, 0.5, 0.9, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_probabilities_are_those_of_transformers(logits, temperature, top_k, top_p):
    scores = torch.tensor(logits)
    # Ties at the edge of top-p are cut by sort order in both; a tiny slope makes the comparison well defined.
    scores = scores + torch.arange(6) * 1e-3 if top_p not in (None, 1.0) else scores
    expected = scores
    if temperature != 1.0:
        expected = TemperatureLogitsWarper(temperature)(None, expected)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(probabilities(scores, temperature, top_k, top_p), expected.softmax(dim=-1))


def test_probabilities_take_any_leading_shape():
    logits = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
    whole = probabilities(logits, 0.7, 3, 0.8)
    for i in range(2):
        torch.testing.assert_close(whole[i], probabilities(logits[i], 0.7, 3, 0.8))


def test_greedy_accepts_by_equality_and_not_by_probability():
    # The drafted token is nearly as likely as the target's choice; a ratio test would keep it most of the time.
    target = torch.tensor([[[1.0, 0.99, 0.0], [0.0, 5.0, 0.0]]]).repeat(200, 1, 1)
    drafts = [Draw(torch.ones(200, dtype=torch.long), None, torch.ones(200))]
    accepted, following, _ = Greedy().verify(target, drafts)
    assert accepted.eq(0).all()
    assert following.eq(0).all()


def test_greedy_counts_only_the_leading_matches():
    target = torch.eye(4)[torch.tensor([[1, 2, 3, 0]])]
    drafts = [Draw(torch.tensor([token]), None, torch.ones(1)) for token in (1, 0, 3)]
    accepted, following, _ = Greedy().verify(target, drafts)
    assert (accepted.item(), following.item()) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_settings_out_of_range_are_named(arguments: dict, word: str):
    with pytest.raises(NextLatError, match=word):
        Sampling(**arguments)
