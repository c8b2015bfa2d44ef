"""Problems per second on one core: `python benchmarks/problems.py`. Path-Star graphs, Countdown
problems, HMM sequences."""

import time
from collections.abc import Callable

import numpy as np

from nextlat.tasks.countdown import CountdownConfig, rows
from nextlat.tasks.countdown_problems import draw_problems, first_solutions
from nextlat.tasks.hmm_process import HiddenMarkov
from nextlat.tasks.path_star import PathStarConfig, draw_stars

GRAPHS, PROBLEMS, CANDIDATES, SEQUENCES = 50_000, 20_000, 50_000, 50_000


def countdown(rng: np.random.Generator) -> None:
    """The paper's problems: numbers drawn until they can be solved, solved, and written as rows of
    tokens."""
    config, targets = CountdownConfig(), np.arange(10, 101)
    problems = draw_problems(
        targets,
        PROBLEMS,
        rng,
        numbers=config.numbers,
        max_number=config.max_number,
        max_value=config.max_value,
    )
    rows(problems, config.pause)


def search(rng: np.random.Generator) -> None:
    """Random candidates, most of which have no solution, searched exhaustively."""
    first_solutions(
        rng.integers(1, 100, size=(CANDIDATES, 4)), rng.integers(10, 101, size=CANDIDATES)
    )


def main() -> None:
    """Print one line per generator: what it makes, how many a second."""
    mess3 = HiddenMarkov.mess3(0.85, 0.05)
    jobs: dict[str, tuple[int, Callable[[np.random.Generator], object]]] = {
        "Path-Star G(5, 5), N = 100": (
            GRAPHS,
            lambda rng: draw_stars(PathStarConfig(), GRAPHS, rng),
        ),
        "Path-Star G(7, 7), N = 100": (
            GRAPHS,
            lambda rng: draw_stars(PathStarConfig(arms=7, length=7), GRAPHS, rng),
        ),
        "Countdown, four numbers to 99": (PROBLEMS, countdown),
        "Countdown, candidates searched": (CANDIDATES, search),
        "Mess3, 32 symbols": (SEQUENCES, lambda rng: mess3.sample(SEQUENCES, 32, rng)),
        "Mess3, exact beliefs": (
            SEQUENCES,
            lambda rng: mess3.beliefs(rng.integers(3, size=(SEQUENCES, 32))),
        ),
    }
    print(f"{'one core':<32} {'per second':>12}")
    for name, (count, job) in jobs.items():
        start = time.process_time()
        job(np.random.default_rng(0))
        print(f"{name:<32} {count / (time.process_time() - start):>12,.0f}")


if __name__ == "__main__":
    main()
