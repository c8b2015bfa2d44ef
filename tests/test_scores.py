"""Scores, their errors, and the effective rank, against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextlat.scores import (
    effective_rank,
    exp_score,
    jackknife_score,
    mean_score,
    paired_difference,
    ratio_score,
    share_interval,
    triangular_factor,
)


def test_rank_of_an_isotropic_matrix_is_its_width_and_of_a_line_is_one():
    q, _ = torch.linalg.qr(
        torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    assert effective_rank(3.7 * q) == pytest.approx(8, abs=1e-9)
    assert effective_rank(torch.ones(20, 5)) == pytest.approx(1, abs=1e-6)


def test_rank_is_the_exponential_entropy_of_the_singular_values_not_of_their_squares():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    left, _ = torch.linalg.qr(
        torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    right, _ = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    )
    expected = math.exp(-float((p * p.log()).sum()))
    assert effective_rank(left @ torch.diag(10 * p) @ right) == pytest.approx(expected, rel=1e-12)


def test_rank_sees_singular_values_that_a_gram_matrix_would_drown():
    """Sixty values of 1e-9 beside one of 1: their share of the entropy is lost when squares of
    1e-18 are added to 1."""
    values = torch.tensor([1.0] + [1e-9] * 60, dtype=torch.float64)
    p = values / values.sum()
    expected = -float((p * p.log()).sum())
    assert math.log(effective_rank(torch.diag(values))) == pytest.approx(expected, rel=1e-5)


def test_rank_drops_normalised_values_under_1e_12():
    """A value p adds about p (1 - log p) to the rank: 2.6e-11 for the first, 5.6e-11 for the
    second."""
    assert effective_rank(torch.diag(torch.tensor([1.0, 9e-13], dtype=torch.float64))) < 1 + 2e-12
    assert effective_rank(torch.diag(torch.tensor([1.0, 2e-12], dtype=torch.float64))) > 1 + 5e-11


def test_rank_of_nothing_is_zero_and_nan_is_refused():
    assert effective_rank(torch.zeros(4, 3)) == 0.0
    assert effective_rank(torch.zeros(0, 3)) == 0.0
    with pytest.raises(ValueError, match="finite"):
        effective_rank(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match="matrix"):
        effective_rank(torch.zeros(2, 3, 4))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 10_000))
def test_rank_is_bounded_and_blind_to_scale_rotation_and_order(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    rotation, _ = torch.linalg.qr(
        torch.randn(width, width, dtype=torch.float64, generator=generator)
    )
    rank = effective_rank(h)
    assert 1 - 1e-9 <= rank <= min(rows, width) + 1e-9
    assert effective_rank(
        5 * h[torch.randperm(rows, generator=generator)] @ rotation
    ) == pytest.approx(rank, rel=1e-9)


def test_triangular_factors_of_parts_stack_to_the_whole():
    h = torch.randn(300, 7, generator=torch.Generator().manual_seed(3))
    parts = torch.cat(
        [triangular_factor(h[:5]), triangular_factor(h[5:100]), triangular_factor(h[100:])]
    )
    assert len(parts) == 5 + 7 + 7
    assert effective_rank(parts) == pytest.approx(effective_rank(h), rel=1e-12)


def test_mean_score():
    score = mean_score([True, False, True, True])
    assert score.value == 0.75
    assert score.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert math.isnan(mean_score([1.0]).stderr)
    with pytest.raises(ValueError, match="at least one"):
        mean_score([])


def test_the_interval_of_a_share_is_wilsons_and_there_for_no_other_score():
    n, z = 50, 1.959964
    for hits in (0, 7, 50):
        p = hits / n
        centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        expected = [max(0.0, (centre + sign * half) / (1 + z**2 / n)) for sign in (-1, 1)]
        assert share_interval(mean_score(np.arange(n) < hits)) == pytest.approx(expected, abs=1e-6)
    assert share_interval(mean_score([0.0, 0.5, 1.0])) is None


def test_ratio_score_pools_trials_and_clusters_the_error():
    """Duplicating each sequence's trials must not shrink the error: positions of one sequence are
    not independent."""
    hits, trials = np.array([3, 0, 5, 2]), np.array([3, 4, 5, 4])
    score = ratio_score(hits, trials)
    assert score.value == pytest.approx(10 / 16)
    residual = hits - score.value * trials
    assert score.stderr == pytest.approx(math.sqrt((residual**2).sum() / 3 / 4) / trials.mean())
    assert ratio_score(10 * hits, 10 * trials).stderr == pytest.approx(score.stderr)
    assert score.per_item.mean() == pytest.approx(score.value)
    with pytest.raises(ValueError, match="trials"):
        ratio_score([0], [0])


def test_jackknife_of_a_mean_is_the_mean_score():
    items = np.array([1.0, 4.0, 2.0, 8.0])
    without = [np.delete(items, i).mean() for i in range(4)]
    score, expected = jackknife_score(items.mean(), without), mean_score(items)
    assert score.stderr == pytest.approx(expected.stderr)
    np.testing.assert_allclose(score.per_item, expected.per_item)


def test_paired_difference_uses_the_pairing():
    a = np.array([1, 1, 0, 1, 0], dtype=float)
    same = paired_difference(mean_score(a), mean_score(a))
    assert (same.value, same.stderr) == (0, 0)
    other = paired_difference(mean_score(a), mean_score(1 - a))
    assert other.value == pytest.approx(0.2)
    assert other.stderr > mean_score(a).stderr
    with pytest.raises(ValueError, match="same items"):
        paired_difference(mean_score(a), mean_score(a[:3]))


def test_paired_difference_of_ratios_is_the_difference_of_the_pooled_ratios():
    trials = np.array([2, 9, 4])
    first, second = ratio_score([2, 9, 1], trials), ratio_score([1, 9, 0], trials)
    assert paired_difference(first, second).value == pytest.approx(12 / 15 - 10 / 15)


def test_the_exponential_of_a_score_has_the_error_of_the_delta_method() -> None:
    rng = np.random.default_rng(0)
    losses = ratio_score(rng.gamma(20, 10, size=400), rng.integers(80, 120, size=400))
    perplexity = exp_score(losses)
    assert perplexity.value == pytest.approx(math.exp(losses.value))
    assert perplexity.stderr == pytest.approx(math.exp(losses.value) * losses.stderr)
    assert perplexity.per_item.mean() == pytest.approx(perplexity.value)
    assert perplexity.per_item.std(ddof=1) / 20 == pytest.approx(perplexity.stderr)
    resampled = [
        math.exp(rng.choice(losses.per_item, 400).mean()) for _ in range(2000)
    ]  # the bootstrap agrees
    assert np.std(resampled) == pytest.approx(perplexity.stderr, rel=0.1)
