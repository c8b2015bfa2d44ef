"""Hidden Markov models with known parameters: sampling, and the exact belief state by forward
filtering.

Shapes: P sequences, L tokens of a sequence, S hidden states, M symbols.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nextlat.errors import NextLatError

TOLERANCE = 1e-6  # of the sum of a row of probabilities


@dataclass(frozen=True, eq=False)
class HiddenMarkov:
    """A hidden Markov chain in its stationary distribution, which gives a symbol in every state
    that it enters.

    Attributes:
        transition: (S, S) P(next state | state).
        emission: (S, M) P(symbol | state).
        stationary: (S,) the distribution of the state before the first symbol.
    """

    transition: np.ndarray
    emission: np.ndarray
    stationary: np.ndarray

    @classmethod
    def of(
        cls,
        transition: Sequence[Sequence[float]] | np.ndarray,
        emission: Sequence[Sequence[float]] | np.ndarray,
    ) -> "HiddenMarkov":
        """From two row-stochastic matrices.

        Raises:
            NextLatError: not two matrices of the same number of states, a row that is not a
                distribution, or several stationary distributions (the chain falls apart).
        """
        t, e = _distributions(transition, "transition"), _distributions(emission, "emission")
        if t.shape != (len(e), len(e)):
            raise NextLatError(
                f"the transition matrix is {t.shape[0]} x {t.shape[1]}, the emission matrix "
                f"{e.shape[0]} x {e.shape[1]}: with {len(e)} states the first must be {len(e)} x "
                f"{len(e)}."
            )
        return cls(t, e, _stationary(t))

    @classmethod
    def mess3(cls, alpha: float, x: float) -> "HiddenMarkov":
        """The process Mess3 (Marzen & Crutchfield 2017): three states, three symbols.

        Args:
            alpha: a state gives its own symbol with this probability, and each other one with
                (1 - alpha) / 2.
            x: a state is left for each other one with this probability, at most 1/2, and kept with
                1 - 2 x.
        """
        same = np.eye(3)
        beta = (1 - alpha) / 2
        return cls.of(same * (1 - 2 * x) + (1 - same) * x, same * alpha + (1 - same) * beta)

    @classmethod
    def rrxor(cls) -> "HiddenMarkov":
        """The process "random, random, XOR of the two", endlessly, at a random phase (Crutchfield's
        group; Shai et al., arXiv 2405.15943): its next-token distribution is the same in many
        different beliefs.

        The states are those of its automaton by the symbol on which they are entered: S0, S1 (a new
        round begins), 0, 1 (one bit has come), T0, T1 (the XOR is 1), F0, F1 (it is 0).
        """
        successors = [(2, 3), (2, 3), (6, 5), (4, 7), (1, 1), (1, 1), (0, 0), (0, 0)]
        transition = np.eye(8)[np.array(successors)].mean(axis=1)
        return cls.of(transition, np.eye(2)[np.arange(8) % 2])

    @classmethod
    def random(cls, states: int, symbols: int, concentration: float, seed: int) -> "HiddenMarkov":
        """Every row of both matrices from a symmetric Dirichlet distribution: the lower the
        concentration, the more peaked."""
        rng = np.random.default_rng((states, symbols, seed))
        rows = [
            rng.dirichlet(np.full(size, concentration), size=states) for size in (states, symbols)
        ]
        return cls.of(*rows)

    def sample(self, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """(P, L) symbols."""
        # One draw per step decides both the next state and its symbol: an edge (state, symbol) of
        # the joint distribution.
        joint = self.transition[:, :, None] * self.emission
        edges = joint.reshape(len(joint), -1).cumsum(axis=1)
        edges[:, -1] = 1.0
        state = np.searchsorted(self.stationary.cumsum()[:-1], rng.random(count), side="right")
        symbols = np.empty((count, length), dtype=np.int32)
        for t in range(length):
            edge = (edges[state] <= rng.random((count, 1))).sum(axis=1)
            state, symbols[:, t] = np.divmod(edge, self.emission.shape[1])
        return symbols

    def beliefs(self, symbols: np.ndarray) -> np.ndarray:
        """(P, L) symbols -> (P, L + 1, S): P(state at t | x_1 .. x_t), from t = 0 (the stationary
        distribution) on."""
        count, length = symbols.shape
        belief = np.empty((count, length + 1, len(self.transition)))
        belief[:, 0] = self.stationary
        for t in range(length):
            joint = belief[:, t] @ self.transition * self.emission[:, symbols[:, t]].T
            belief[:, t + 1] = joint / joint.sum(axis=1, keepdims=True)
        return belief

    def next_symbol(self, beliefs: np.ndarray) -> np.ndarray:
        """(..., S) -> (..., M): the distribution of the next symbol given the belief."""
        return beliefs @ self.transition @ self.emission


def _distributions(rows: Sequence[Sequence[float]] | np.ndarray, name: str) -> np.ndarray:
    if len({len(row) for row in rows}) != 1:
        raise NextLatError(f"the {name} matrix needs rows of one length.")
    matrix = np.array(rows, dtype=np.float64)
    for i, row in enumerate(matrix):
        if not (row >= 0).all() or abs(row.sum() - 1) > TOLERANCE:
            raise NextLatError(
                f"row {i + 1} of the {name} matrix, {row.tolist()}, is not a distribution: give "
                "numbers from 0 on that sum to 1."
            )
    return matrix / matrix.sum(axis=1, keepdims=True)


def _stationary(transition: np.ndarray) -> np.ndarray:
    """The one distribution that the chain leaves as it is."""
    states = len(transition)
    system = np.concatenate([transition.T - np.eye(states), np.ones((1, states))])
    if np.linalg.matrix_rank(system) < states:
        raise NextLatError(
            "the states of this HMM fall into parts that never meet: give a transition matrix that "
            "joins them."
        )
    solution = np.linalg.lstsq(system, np.eye(states + 1)[-1], rcond=None)[0].clip(min=0)
    return solution / solution.sum()
