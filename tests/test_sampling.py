"""Draws and the acceptance test of speculative sampling, against enumerated probabilities;
processors and their prefixes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

from conftest import sampling
from nextlat.decoding.sampling import (
    Draw,
    Greedy,
    Prefixes,
    Sampling,
    Scores,
    draw,
    race,
    residual,
    verify,
)
from reference import p_value

V = 5
NONE = Prefixes((), ())  # for samplers that look at the scores alone
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"temperature": 1.3, "top_k": 3},
    "top_p": {"top_p": 0.7},
}


def p_of(tokens: Tensor, expected: Tensor) -> float:
    """p-value of drawn tokens (R, n) under the joint distribution `expected` (V, ..., V)."""
    cells = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.unbind(dim=1):
        cells = cells * V + column
    return p_value(torch.bincount(cells, minlength=expected.numel()), expected)


class ToyLanguage:
    """Next-token logits that depend on the last two of five tokens, for a target and for a drafter
    that differs from it."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = torch.randn(V, V, V, generator=generator) * 1.5
        self.drafter = 0.5 * self.target + torch.randn(V, V, V, generator=generator)

    def joint(self, sampler: Sampling) -> Tensor:
        """Exact distribution (V, V, V) of the three tokens behind the context (0, 1)."""
        p = probabilities(sampler, self.target).double()
        first, second = p[0, 1], p[1]
        return first[:, None, None] * second[:, :, None] * p


def probabilities(sampler: Sampling, logits: Tensor) -> Tensor:
    """Distribution that the sampler draws from, of the shape of `logits` (..., V)."""
    return sampler.scores(logits.reshape(1, -1, V), NONE).softmax(dim=-1).view(logits.shape)


def some_draw(sampler: Sampling, weights: Tensor) -> Tensor:
    return draw(weights, race(weights.shape, weights.device, sampler.generator))


Verify = Callable[..., tuple[Tensor, Tensor]]


def speculate(
    language: ToyLanguage,
    sampler: Sampling,
    length: int,
    rows: int,
    draft: Callable | None = None,
    check: Verify | None = None,
) -> tuple[Tensor, Tensor]:
    """The first three tokens of `rows` independent generations with `length` drafts per cycle, and
    all accepted counts."""
    draft, check = draft or sampler.draw, check or sampler.verify
    sequence = torch.zeros(rows, 5 + length, dtype=torch.long)
    sequence[:, 1] = 1
    end = torch.full((rows,), 2)
    counts = []
    while (active := (end < 5).nonzero().squeeze(1)).numel():
        noise = sampler.noise(len(active), length, torch.device("cpu"))
        before, last = sequence[active, end[active] - 2], sequence[active, end[active] - 1]
        drafts, target = [], [language.target[before, last]]
        for index in range(length):
            drafts.append(
                draft(
                    sampler.scores(language.drafter[before, last][:, None], NONE)[:, 0],
                    noise,
                    index,
                )
            )
            before, last = last, drafts[-1].tokens
            target.append(language.target[before, last])
        scores = sampler.scores(torch.stack(target, dim=1), NONE)
        accepted, bonus = check(scores, drafts, noise, torch.full_like(active, length))
        counts.append(accepted)
        for j, drawn in enumerate(drafts):
            kept = (accepted > j) & (end[active] + j < 5)
            sequence[active[kept], end[active[kept]] + j] = drawn.tokens[kept]
        sequence[active, end[active] + accepted] = bonus
        end[active] += accepted + 1
    return sequence[:, 2:5], torch.cat(counts)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("length", range(9))
def test_output_distribution_is_exact_for_every_draft_length(name: str, length: int):
    sampler = sampling(**SETTINGS[name], seed=100 + length)
    language = ToyLanguage(seed=3)
    tokens, accepted = speculate(language, sampler, length, rows=20_000)
    assert p_of(tokens, language.joint(sampler)) > 1e-4
    # It would prove nothing if nearly all or nearly no drafts were accepted.
    assert length == 0 or 0.1 < (accepted > 0).float().mean() < 0.9
    assert length != 2 or {0, 1, 2} == set(accepted.tolist())


def biased_by_softmax_q(sampler: Sampling):
    """The fault: the drafter's most likely token is drafted, but verified as if it had been drawn
    from the softmax."""

    def draft(scores: Tensor, noise: object, index: int) -> Draw:
        return Draw(scores.argmax(dim=-1), scores.softmax(dim=-1))

    return draft, sampler.verify


def biased_by_dropping(sampler: Sampling):
    """The fault: a drafted token of low probability is thrown away, with all behind it, and p is
    drawn from instead."""

    def check(scores: Tensor, drafts: list[Draw], *rest) -> tuple[Tensor, Tensor]:
        q = torch.stack(
            [drawn.q.gather(-1, drawn.tokens[:, None])[:, 0] for drawn in drafts], dim=1
        )
        length = (q > 0.2).long().cumprod(dim=1).sum(dim=1)
        accepted, bonus = sampler.verify(scores, drafts, *rest)
        fresh = some_draw(sampler, scores[torch.arange(len(scores)), length].softmax(dim=-1))
        return accepted.minimum(length), torch.where(accepted < length, bonus, fresh)

    return sampler.draw, check


def biased_by_drawing_from_p(sampler: Sampling):
    """The fault: after a rejection the token is drawn from p instead of the residual."""

    def check(scores: Tensor, drafts: list[Draw], *rest) -> tuple[Tensor, Tensor]:
        accepted, _ = sampler.verify(scores, drafts, *rest)
        return accepted, some_draw(
            sampler, scores[torch.arange(len(scores)), accepted].softmax(dim=-1)
        )

    return sampler.draw, check


def biased_by_one_position(sampler: Sampling):
    """The fault: the token behind the accepted ones is taken from the last position instead of the
    first rejected one."""

    def check(scores: Tensor, drafts: list[Draw], *rest) -> tuple[Tensor, Tensor]:
        accepted, bonus = sampler.verify(scores, drafts, *rest)
        late = some_draw(sampler, scores[:, -1].softmax(dim=-1))
        return accepted, torch.where(accepted < len(drafts), late, bonus)

    return sampler.draw, check


def biased_by_a_late_limit(sampler: Sampling):
    """The fault: a row's own limit cuts its accepted tokens, but the next one still comes from the
    residual there."""

    def check(scores: Tensor, drafts: list[Draw], noise, most: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.stack([drawn.q for drawn in drafts], dim=1)
        accepted, bonus = sampler.verify(scores, drafts, noise, most)
        at_limit, row = accepted.clamp(max=1), torch.arange(len(scores))
        wrong = some_draw(
            sampler, residual(scores[row, at_limit].softmax(dim=-1), q[row, at_limit])
        )
        return at_limit, torch.where(accepted > 1, wrong, bonus)

    return sampler.draw, check


@pytest.mark.parametrize(
    "fault",
    [
        biased_by_softmax_q,
        biased_by_dropping,
        biased_by_drawing_from_p,
        biased_by_one_position,
        biased_by_a_late_limit,
    ],
)
def test_the_test_above_sees_every_known_fault(fault: Callable):
    sampler = sampling(seed=7)
    language = ToyLanguage(seed=3)
    tokens, _ = speculate(language, sampler, 3, 20_000, *fault(sampler))
    assert p_of(tokens, language.joint(sampler)) < 1e-12


def acceptance(
    p: Tensor, q: Tensor, generator: torch.Generator, drafted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The acceptance test on drafts drawn from q (rows, K, V), or on the given ones."""
    if drafted is None:
        drafted = draw(q, race(q.shape, q.device, generator))
    uniform = torch.rand(drafted.shape, generator=generator)
    times, limits = race((len(p), V), p.device, generator), torch.full((len(p),), drafted.shape[1])
    return verify(p, q, drafted, uniform, times, limits)


def test_each_row_has_its_own_limit_and_stays_exact():
    # What lies behind a row's limit counts for nothing: the token there comes from p, as if no
    # draft had been made.
    generator = torch.Generator().manual_seed(3)
    rows = 40_000
    p, q = torch.randn(2, 1, 3, V, generator=generator).softmax(dim=-1)
    p, q = p.expand(rows, 3, V), q[:, :2].expand(rows, 2, V)
    drafted, most = draw(q, race(q.shape, q.device, generator)), torch.arange(rows) % 3
    uniform, times = torch.rand(rows, 2, generator=generator), race((rows, V), p.device, generator)
    accepted, bonus = verify(p, q, drafted, uniform, times, most)
    assert (accepted <= most).all()
    for limit in range(3):
        of_row = most == limit
        reached = of_row & (accepted == limit)
        assert reached.sum() / of_row.sum() > 0.05
        assert p_of(bonus[reached][:, None], p[0, limit]) > 1e-4
        first = torch.where(accepted > 0, drafted[:, 0], bonus)[of_row]
        assert p_of(first[:, None], p[0, 0]) > 1e-4


def test_acceptance_probability_is_one_minus_total_variation():
    # Accepting less often than sum min(p, q) would still be lossless, only slow.
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 1, 1, V, generator=generator).softmax(dim=-1)
    rows = 50_000
    p, q = (p * 3).softmax(-1).expand(rows, 2, V), q.expand(rows, 1, V)
    accepted, _ = acceptance(p, q, generator)
    expected = torch.minimum(p[0, 0], q[0, 0]).sum()
    assert abs(accepted.float().mean() - expected) < 4 * (0.25 / rows) ** 0.5


def test_equal_distributions_accept_everything():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, 5, V, generator=generator).softmax(dim=-1)
    q = p[:, :-1]
    accepted, _ = acceptance(p, q, generator)
    assert accepted.eq(4).all()


def test_a_token_that_the_target_excludes_is_never_accepted():
    p = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]).expand(1000, 2, V)
    q = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).expand(1000, 1, V)
    accepted, bonus = acceptance(p, q, torch.Generator().manual_seed(0), torch.full((1000, 1), 4))
    assert accepted.eq(0).all()
    assert set(bonus.tolist()) == {0, 1}


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
    weights = weights.expand(40_000, V)
    tokens = draw(weights, race(weights.shape, weights.device, torch.Generator().manual_seed(0)))
    assert p_of(tokens[:, None], weights[0] / 8) > 1e-4
    assert set(tokens.tolist()) == {1, 2, 4}


class LastTokenForbidden(LogitsProcessor):
    """The token just read may not come again, in any row but the one of a number."""

    def __init__(self, spared: int) -> None:
        self.spared = spared

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = scores.scatter(1, input_ids[:, -1:], -torch.inf)
        out[self.spared] = scores[self.spared]
        return out


def test_every_position_of_every_row_is_shown_its_own_prefix():
    logits = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
    rows = [torch.tensor([0, 1, 2]), torch.tensor([4, 4, 4, 1])]
    # Logits belong to the last three tokens of each.
    read = torch.tensor([[2, 3, 2, 0], [1, 1, 0, 2]])
    found = Scores(
        [RepetitionPenaltyLogitsProcessor(2.0), LastTokenForbidden(2)], batch=4, first=1
    )(logits, Prefixes(rows, read.unbind(dim=1)))
    for b in range(2):
        for k in range(3):
            prefix = [*rows[b].tolist(), *read[b, 1 : k + 2].tolist()]
            expected = logits[b, k].clone()
            for token in set(prefix):
                expected[token] = (
                    expected[token] / 2 if expected[token] > 0 else expected[token] * 2
                )
            if b + 1 != 2:
                expected[prefix[-1]] = -torch.inf
            torch.testing.assert_close(found[b, k], expected)


def test_processors_that_look_at_the_scores_alone_need_no_prefix():
    assert not sampling(temperature=0.5, top_k=3, top_p=0.9).scores.need_prefixes
    assert Scores([RepetitionPenaltyLogitsProcessor(2.0)]).need_prefixes


def test_greedy_accepts_by_equality_and_not_by_probability():
    # The drafted token is nearly as likely as the target's choice; a ratio test would keep it most
    # of the time.
    target = torch.tensor([[[1.0, 0.99, 0.0], [0.0, 5.0, 0.0]]]).repeat(200, 1, 1)
    drafts = [Draw(torch.ones(200, dtype=torch.long), None)]
    accepted, bonus = Greedy().verify(target, drafts, None, torch.ones(200))
    assert accepted.eq(0).all()
    assert bonus.eq(0).all()


def test_greedy_counts_only_the_leading_matches_within_the_limit():
    target = torch.eye(4)[torch.tensor([[1, 2, 3, 0], [1, 2, 3, 0], [1, 2, 3, 0]])]
    drafts = [Draw(torch.tensor(tokens), None) for tokens in ([1, 1, 1], [0, 2, 2], [3, 3, 3])]
    accepted, bonus = Greedy().verify(target, drafts, None, torch.tensor([3, 3, 2]))
    assert accepted.tolist() == [1, 3, 2]
    assert bonus.tolist() == [2, 0, 3]
