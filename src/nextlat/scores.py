"""Scores with their errors, and the effective rank of a set of latent states.

Pure functions of arrays and tensors: nothing here knows a model or a task. Shapes: n items, N
states, D width of a state.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import binomtest
from torch import Tensor

# Normalised singular values below this are noise of the arithmetic (arXiv 2511.05963).
NEGLIGIBLE_SINGULAR_VALUE = 1e-12


@dataclass(frozen=True, eq=False)
class Score:
    """One number, its standard error over items, and what each item contributed.

    Whatever the metric, `per_item` is scaled so that its mean is `value` and its standard deviation
    over sqrt(n) is `stderr`. Scores of two models on the same items can therefore be subtracted
    item by item (`paired_difference`).

    Attributes:
        value: the metric.
        stderr: one standard error over items; NaN for fewer than two items.
        per_item: (n,) float64, n = pairs, sequences or groups of sequences, as the metric says.
    """

    value: float
    stderr: float
    per_item: np.ndarray


def mean_score(per_item: ArrayLike) -> Score:
    """Mean of independent items and the standard error of that mean, std(ddof = 1) / sqrt(n).

    Raises:
        ValueError: no items, or not one number per item.
    """
    items = np.asarray(per_item, dtype=np.float64)
    if items.ndim != 1 or items.size == 0:
        raise ValueError(
            f"a mean needs a vector of at least one item, not an array of shape {items.shape}"
        )
    stderr = float(items.std(ddof=1)) / math.sqrt(items.size) if items.size > 1 else math.nan
    return Score(float(items.mean()), stderr, items)


def share_interval(score: Score) -> tuple[float, float] | None:
    """95 % confidence interval of a share; None where items are not each 0 or 1.

    Wilson's (1927, as recommended by Brown, Cai & DasGupta 2001): unlike value +- 2 standard errors
    it stays inside [0, 1], and does not shrink to nothing where all items, or none, succeed.
    """
    items = score.per_item
    if not np.isin(items, (0.0, 1.0)).all():
        return None
    interval = binomtest(int(items.sum()), len(items)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def ratio_score(hits: ArrayLike, trials: ArrayLike) -> Score:
    """Pooled share sum(hits) / sum(trials) with the standard error clustered by item: the trials of
    one item (the positions of one sequence) are not independent, items are.

    The error is that of the ratio estimator (Cochran, Sampling Techniques, 3rd ed., section 2.11):
    the item values R + (hits - R trials) / mean(trials) have mean R and its linearised spread.

    Args:
        hits: (n,) successes per item.
        trials: (n,) trials per item, at least one of them positive.

    Raises:
        ValueError: different shapes, or no trial at all.
    """
    hit, trial = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    if hit.shape != trial.shape or trial.size == 0 or trial.sum() <= 0:
        raise ValueError(
            f"a ratio needs trials: hits {hit.shape}, trials {trial.shape} with sum {trial.sum()}"
        )
    ratio = hit.sum() / trial.sum()
    return mean_score(ratio + (hit - ratio * trial) / trial.mean())


def jackknife_score(value: float, leave_one_out: ArrayLike) -> Score:
    """Score of a statistic that is not a mean, from its values with each item left out (Efron &
    Stein 1981).

    The items are the pseudo-values n value - (n - 1) value_without_i, shifted so that their mean is
    `value`: the statistic is not bias-corrected.
    """
    without = np.asarray(leave_one_out, dtype=np.float64)
    score = mean_score(value - (without.size - 1) * (without - without.mean()))
    return Score(value, score.stderr, score.per_item)


def exp_score(score: Score) -> Score:
    """exp of a score (perplexity from cross-entropy), with the error of the delta method.

    The items are those of the linearisation, exp(value) * (1 + item - value).
    """
    value = math.exp(score.value)
    return Score(value, value * score.stderr, value * (1 + score.per_item - score.value))


def paired_difference(first: Score, second: Score) -> Score:
    """`first` minus `second` on the same items in the same order, with the paired error.

    Raises:
        ValueError: the scores have a different number of items.
    """
    if first.per_item.shape != second.per_item.shape:
        raise ValueError(
            f"paired scores need the same items: {first.per_item.shape} and {second.per_item.shape}"
        )
    return mean_score(first.per_item - second.per_item)


def effective_rank(h_ND: Tensor) -> float:
    """Effective rank of a matrix of states: exp of the Shannon entropy of its singular values
    normalised to sum 1 (Roy & Vetterli, EUSIPCO 2007, definition 1; arXiv 2511.05963).

    States are not centred. Normalised singular values under 1e-12 are dropped. Between 1 (all
    states on one line) and min(N, D); 0 for a matrix of zeros or without rows.

    The singular values are those of the matrix in float64 (or of its `triangular_factor`, with
    which nothing is lost), not of the D x D Gram matrix, whose eigenvalues are their squares: every
    normalised value below about 1e-8 would drown in rounding.

    Args:
        h_ND: (N, D) states, any floating dtype and device.

    Raises:
        ValueError: not a matrix, or a value that is not finite.
    """
    singular = torch.linalg.svdvals(_checked(h_ND)) if h_ND.numel() else h_ND.flatten()
    total = singular.sum()
    if total == 0:
        return 0.0
    p = singular / total
    p = p[p > NEGLIGIBLE_SINGULAR_VALUE]
    return math.exp(float(-(p * p.log()).sum()))


def triangular_factor(h_ND: Tensor) -> Tensor:
    """A matrix of at most D rows with the singular values of `h_ND`, in float64: R of its QR
    decomposition. Factors of parts can be stacked: cat(R_1, R_2) has those of cat(h_1, h_2).

    Raises:
        ValueError: not a matrix, or a value that is not finite.
    """
    h_ND = _checked(h_ND)
    rows, width = h_ND.shape
    return torch.linalg.qr(h_ND, mode="r").R if rows > width else h_ND


def _checked(h_ND: Tensor) -> Tensor:
    if h_ND.ndim != 2:
        raise ValueError(f"states must be a matrix (N, D), not of shape {tuple(h_ND.shape)}")
    if not bool(h_ND.isfinite().all()):
        raise ValueError("states must be finite: the model's hidden states contain NaN or infinity")
    return h_ND.detach().to(torch.float64)
