"""What reproduces: directions beside those published, and nothing said where there is none."""

import json
from pathlib import Path

import numpy as np
import pytest

from fabricated_runs import ITEMS, write_city_run, write_path_star_run, write_run
from nextlat.report import compare, read_runs, write_report
from nextlat.report.comparison import TaskComparison
from nextlat.report.published import reproduction, reproduction_summary

pytestmark = pytest.mark.slow


def compared(
    folder: Path, metric: str, values: dict[str, float], task: str = "streets", horizon: int = 2
) -> TaskComparison:
    """One run of each objective; the metric differs from the baseline's by this much in every item,
    give or take a hundredth."""
    noise = 0.01 * np.sin(np.arange(ITEMS))
    paths = []
    for name, value in values.items():
        items = {metric: 0.5 + value + noise * (name != "next-token")}
        changes = (
            {f"objectives.{name}.horizon": horizon} if name in ("nextlat", "mtp", "jtp") else {}
        )
        paths.append(write_run(folder / name, name, task=task, items=items, changes=changes))
    [found] = compare(read_runs(paths))
    return found


def outcomes(task: TaskComparison) -> dict[str, str]:
    return {one.model: one.outcome for one in reproduction(task)}


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        # Published: NextLat 0.71, MTP 0.64, JTP 0.32 against 0.65; higher is better.
        (
            "sequence_compression",
            {"nextlat": 0.1, "mtp": 0.1, "jtp": -0.1},
            {"NextLat d=2": "same direction", "MTP d=2": "opposite", "JTP d=2": "same direction"},
        ),
        # Published: NextLat 52.7, MTP 57.7, JTP 215.8 against 160.1; lower is better.
        (
            "effective_latent_rank",
            {"nextlat": -0.1, "mtp": 0.1, "jtp": -0.1},
            {"NextLat d=2": "same direction", "MTP d=2": "opposite", "JTP d=2": "opposite"},
        ),
        ("valid_trajectories", {"nextlat": 1e-5}, {"NextLat d=2": "within noise here"}),
        (
            "next_token_test",
            {"nextlat": 0.1, "mtp": -0.1},
            dict.fromkeys(("NextLat d=2", "MTP d=2"), "no difference published"),
        ),
        ("detour_robustness", {"bst": 0.1}, {}),  # not published of BST
        ("identical_continuations", {"nextlat": 0.1}, {}),  # not published at all
    ],
)
def test_directions_are_compared_beyond_the_noise(
    tmp_path: Path, metric: str, values: dict[str, float], expected: dict[str, str]
) -> None:
    assert outcomes(compared(tmp_path, metric, {"next-token": 0.0, **values})) == expected


def test_the_row_of_the_same_horizon_is_taken_or_the_nearest(tmp_path: Path) -> None:
    values = {"next-token": 0.0, "nextlat": 0.1, "bst": 0.1}
    for horizon, figure, other in (
        (4, 0.576, None),
        (8, 0.587, None),
        (2, 0.548, 1),
        (3, 0.576, 4),
        (20, 0.587, 8),
    ):
        task = compared(tmp_path / str(horizon), "solved_held_out", values, "countdown", horizon)
        found = {one.model: one.published for one in reproduction(task)}
        assert found == {f"NextLat d={horizon}": (figure, 0.331), "BST": (0.423, 0.331)}
        assert {one.model: one.horizon for one in reproduction(task)} == {
            f"NextLat d={horizon}": other,
            "BST": None,
        }


def test_without_a_baseline_or_an_error_nothing_is_claimed(tmp_path: Path) -> None:
    assert reproduction(compared(tmp_path / "alone", "valid_trajectories", {"nextlat": 0.1})) == []
    paths = [
        write_run(tmp_path / name, name, items={"valid_trajectories": [0.5]})
        for name in ("nextlat", "next-token")
    ]
    [task] = compare(read_runs(paths))
    assert outcomes(task) == {"NextLat d=2": "no claim here"}
    assert reproduction_summary(task).endswith("0 within the noise, 1 without an error here.")


def test_words_stand_beside_the_numbers_of_the_methods_they_are_about(tmp_path: Path) -> None:
    shares = {"next-token": 0.5, "nextlat": 1.0, "bst": 0.5}
    paths = [
        write_path_star_run(tmp_path / name, name, 0, {}, share) for name, share in shares.items()
    ]
    [task] = compare(read_runs(paths))
    found = {
        one.model: (one.published, one.estimate.value, one.outcome) for one in reproduction(task)
    }
    assert {model: value for model, (_, value, _) in found.items()} == {
        "NextLat d=2": 1.0,
        "BST": 0.5,
        "next-token": 0.5,
    }
    assert "near 100 %" in str(found["NextLat d=2"][0]) and found["next-token"][0] == "failed"
    assert {outcome for *_, outcome in found.values()} == {"in words only"}
    assert "words" in reproduction_summary(task)


def test_the_page_and_the_record_show_it(tmp_path: Path) -> None:
    runs = read_runs(
        [
            write_city_run(tmp_path / f"{name}-{s}", name, s)
            for name in ("next-token", "nextlat")
            for s in range(3)
        ]
    )
    [task] = compare(runs)
    page = write_report(runs, tmp_path / "report")
    text = page.read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert reproduction_summary(task) in text
    for words in (
        "What reproduces",
        "52.7 against 160.1",
        "98.7 % against 97.0 %",
        "no difference published",
    ):
        assert words in text
    stored = json.loads((page.parent / "comparison.json").read_text())["reproduction"]
    assert [(one["metric"], one["outcome"]) for one in stored] == [
        (one.metric.key, one.outcome) for one in reproduction(task)
    ]
    assert {"metric": "effective_latent_rank", "outcome": "same direction"}.items() <= stored[
        -1
    ].items()


def test_figures_are_given_for_every_method_with_those_measured_here_first(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "run", items={"effective_latent_rank": [1.0, 2.0]})])
    write_report(runs, tmp_path / "report", tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text().replace("\N{NO-BREAK SPACE}", " ")
    lines = [
        line for line in text.splitlines() if line.startswith(("| method", "| JTP", "| truth"))
    ]
    assert [line.split()[3] for line in lines] == ["Rank", "215.8", "–"]
    assert "a whole city (a paper)" in text
