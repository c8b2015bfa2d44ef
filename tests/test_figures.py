"""The figures and pictures of a report: every seed is in them at its value."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from fabricated_runs import (
    CITY,
    FIVE,
    PARTS,
    write_city_run,
    write_countdown_run,
    write_hmm_run,
    write_log,
    write_path_star_run,
    write_run,
    write_text_run,
    write_word_problem_run,
)
from nextlat.errors import NextLatError
from nextlat.report import claims, compare, figures, pictures, read_runs, write_report
from nextlat.report.comparison import TaskComparison
from nextlat.report.elements import SideBySide

OBJECTIVES = ("next-token", "nextlat")


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> TaskComparison:
    folder = tmp_path_factory.mktemp("runs")
    paths = [write_city_run(folder / f"{name}-{s}", name, s) for s in (0, 1) for name in OBJECTIVES]
    return compare(read_runs(paths))[0]


def title(ax: Axes) -> str:
    return ax.get_title(loc="left").replace("\n", " ")


def lines(figure: Figure | None, points: int) -> list[np.ndarray]:
    """(x, y) of the lines of the first axes with so many points."""
    assert figure is not None
    found = [np.asarray(line.get_xydata()) for line in figure.axes[0].lines]
    return [line for line in found if len(line) == points]


def test_learning_curves_draw_every_seed(city: TaskComparison) -> None:
    figure = figures.learning_curves(city)
    assert figure is not None
    top, *parts = figure.axes
    training = [line for line in top.lines if len(line.get_xdata()) == 40]
    held_out = [line for line in top.lines if len(line.get_xdata()) == 4]
    assert (len(training), len(held_out)) == (4, 4)
    assert len({line.get_color() for line in training}) == 2
    assert [len([line for line in ax.lines if len(line.get_xdata())]) for ax in parts] == [2, 2]


def test_learning_curves_have_a_panel_for_every_part_of_the_loss(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"{name}-{s}", name, s) for name in FIVE for s in (0, 1)]
    figure = figures.learning_curves(compare(read_runs(paths))[0])
    assert figure is not None
    _, *parts = figure.axes
    titles = dict.fromkeys(part for name in FIVE for part, _ in PARTS.get(name, {}).values())
    assert [title(ax) for ax in parts] == [*titles]
    drawn = [len([line for line in ax.lines if len(line.get_xdata())]) for ax in parts]
    assert drawn == [2, 2, 4, 2, 2, 2]  # MTP and JTP share one
    boxes = [ax.get_position() for ax in parts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_metric_panel_draws_every_seed_at_its_value(city: TaskComparison) -> None:
    figure = figures.metric_panel(city)
    assert figure is not None
    titles = [title(ax) for ax in figure.axes]
    assert len(titles) == len(CITY) + 2  # mean acceptance length and speed, but not what repeats it
    assert [text[-1] for text in titles[:2]] == ["\N{DOWNWARDS ARROW}", "\N{UPWARDS ARROW}"]
    [rank] = [one for one in city.metrics if one.metric.name == "effective_latent_rank"]
    ax = figure.axes[titles.index("Effective latent rank\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}")]
    drawn = sorted(float(bars.lines[0].get_ydata()[0]) for bars in ax.containers)
    estimates = rank.estimates.values()
    assert drawn == sorted(value for one in estimates for value, _ in one.seeds.values())


def test_a_counterpart_stands_for_the_baseline_in_its_panel(tmp_path: Path) -> None:
    paths = [write_word_problem_run(tmp_path / name, name, 0) for name in OBJECTIVES]
    figure = figures.metric_panel(compare(read_runs(paths))[0])
    assert figure is not None
    [ax] = [ax for ax in figure.axes if title(ax).startswith("Dynamics, 24")]
    heights = [float(bars.lines[0].get_ydata()[0]) for bars in ax.containers]
    assert heights == [pytest.approx(0.2, abs=0.01), pytest.approx(0.8, abs=0.01)]


def test_a_chart_has_the_lines_of_all_models_and_its_marks(tmp_path: Path) -> None:
    paths = [write_word_problem_run(tmp_path / name, name, 0) for name in OBJECTIVES]
    figure = figures.chart(compare(read_runs(paths))[0], "accuracy")
    assert figure is not None
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 24]
    assert [line.get_linestyle() for line in drawn] == ["-", "-", "--"]
    marks = lines(figure, 2)
    assert any((mark[:, 0] == 8).all() for mark in marks)
    assert any((mark[:, 1] == 1 / 5).all() for mark in marks)
    assert {text.get_text() for text in figure.axes[0].texts} == {"trained up to here", "chance"}
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"next-token", "NextLat d=2", "transformer", "dynamics"}


def test_a_chart_draws_every_seed_and_a_mark_between_two_places(tmp_path: Path) -> None:
    exact = {"next-token": (0.5, 0.52), "nextlat": (0.99, 1.0)}
    paths = [
        write_path_star_run(tmp_path / f"{name}-{seed}", name, seed, {}, shares[seed])
        for name, shares in exact.items()
        for seed in (0, 1)
    ]
    figure = figures.chart(compare(read_runs(paths))[0], "accuracy")
    assert sorted(line[1, 1] for line in lines(figure, 3)) == [0.5, 0.52, 0.99, 1.0]
    assert [line.tolist() for line in lines(figure, 2)] == [[[1.75, 0.5], [2.25, 0.5]]]


def test_series_of_one_model_share_its_colour(tmp_path: Path) -> None:
    paths = [
        write_countdown_run(tmp_path / name, name, 0, 0.3 + 0.1 * place)
        for place, name in enumerate(FIVE)
    ]
    runs = read_runs(paths)
    figure = figures.chart(compare(runs)[0], "equations")
    assert figure is not None and len(figure.axes[0].lines) == 10
    color = figures.PALETTE[FIVE.index("bst")]
    drawn = [line.get_ydata() for line in figure.axes[0].lines if line.get_color() == color]
    [chart] = runs[FIVE.index("bst")].result.charts
    assert [[*values] for values in drawn] == [line.values for line in chart.lines]


def test_a_chart_can_be_relative_to_the_baseline_of_the_same_seed(tmp_path: Path) -> None:
    better = {"next-token": 0.0, "nextlat": 0.1, "mtp": -0.2}
    paths = [
        write_text_run(tmp_path / f"{name}-{seed}", name, seed, x)
        for name, x in better.items()
        for seed in (0, 1)
    ]
    alone = write_text_run(tmp_path / "alone", "nextlat", 2, 0.5)  # no baseline of this seed
    figure = figures.chart(compare(read_runs([*paths, alone]))[0], "probes")
    curves = lines(figure, 20)
    assert sorted(round(float(curve[-1, 1]), 6) for curve in curves) == [-0.1, -0.1, 0.2, 0.2]
    assert all(abs(curve[0, 1]) < 1e-9 for curve in curves)
    assert figure is not None
    assert title(figure.axes[0]).endswith("minus that of next-token, nats")
    assert figures.chart(compare(read_runs(paths[:2]))[0], "probes") is None  # the baseline alone
    assert figures.chart(compare(read_runs(paths[2:4]))[0], "probes") is None  # and without it


def test_accepted_drafts_are_a_chart(city: TaskComparison) -> None:
    drawn = lines(figures.chart(city, "acceptance"), 8)
    expected = [line.values for run in city.runs for x in run.result.charts for line in x.lines]
    assert [line[:, 1].tolist() for line in drawn] == expected
    assert [*drawn[0][:, 0]] == [*range(1, 9)]


def test_decoding_speeds_are_bars_of_means_with_their_seeds(tmp_path: Path) -> None:
    rates = {"transformers": [90.0, 110.0], "0": [100.0, 102.0], "4": [150.0, 170.0]}
    for seed in (0, 1):
        path = write_run(tmp_path / str(seed), "nextlat", seed)
        results = json.loads((path / "results.json").read_text())
        results["runs"][0]["decoding"] = {
            "draft_length": 4, "prompts": 2, "identical": True, "acceptance_by_position": [0.5],
            "tokens_per_second": {way: seeds[seed] for way, seeds in rates.items()},
        }  # fmt: skip
        (path / "results.json").write_text(json.dumps(results))
    figure = figures.decoding_speeds(compare(read_runs([tmp_path / "0", tmp_path / "1"]))[0])
    assert figure is not None
    [ax] = figure.axes
    assert [[*line.get_xdata()] for line in ax.lines] == [*rates.values()]
    assert [bar.get_width() for bar in ax.patches] == [100, 101, 160]  # type: ignore[attr-defined]
    assert ax.get_yticklabels()[2].get_text().endswith("ours, 4 tokens drafted")


def test_nothing_to_draw_is_no_picture(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_log(run, [])
    [task] = compare(read_runs([run]))
    assert figures.learning_curves(task) is figures.metric_panel(task) is None
    drawer = pictures.Drawer(task, tmp_path)
    assert drawer.of_models() == drawer.of_comparison() == []


@pytest.mark.slow
def test_figures_of_one_name_do_not_replace_one_another(tmp_path: Path) -> None:
    """Labels that differ in what no file name keeps."""
    paths = [write_city_run(tmp_path / "base", "next-token", 0)]
    for value in (1, -1):
        run = write_city_run(tmp_path / str(value), "nextlat", 0)
        record = json.loads((run / "run.json").read_text())
        record["recipe"]["objectives"]["nextlat"]["lambda_kl"] = value
        (run / "run.json").write_text(json.dumps(record))
        paths.append(run)
    page = write_report(read_runs(paths), tmp_path / "report")
    assert len([*page.parent.glob("map-*.png")]) == 3


@pytest.mark.slow
def test_several_maps_of_a_model_are_rows_and_columns_of_one_picture(tmp_path: Path) -> None:
    """Those of the transformer above, of the dynamics alone below."""
    paths = [write_city_run(tmp_path / name, name, 0) for name in ("next-token", "nextlat")]
    cells = [("", 24), ("", 48), ("dynamics alone", 24), ("dynamics alone", 48)]
    for path, shown in zip(paths, (cells[:2], cells), strict=True):
        results = json.loads((path / "results.json").read_text())
        [picture] = results["runs"][0]["pictures"]
        results["runs"][0]["pictures"] = [
            {**picture, "file": f"map-{row}-{n}.json", "row": row, "column": f"{n} moves"}
            for row, n in shown
        ]
        (path / "results.json").write_text(json.dumps(results))
        for row, n in shown:
            shutil.copy(path / "map.json", path / f"map-{row}-{n}.json")
    folder = tmp_path / "drawn"
    folder.mkdir()
    [_, beside] = pictures.Drawer(compare(read_runs(paths))[0], folder).of_models()
    assert isinstance(beside, SideBySide)
    told = [figure.alt.split(", seed")[0].split("rides of ")[1] for figure in beside.figures]
    assert told == [
        "next-token, 24 moves", "next-token, 48 moves", "NextLat d=2, 24 moves",
        "NextLat d=2, 48 moves", "NextLat d=2, dynamics alone, 24 moves",
        "NextLat d=2, dynamics alone, 48 moves",
    ]  # fmt: skip
    with Image.open(beside.together.path) as drawn:
        assert drawn.height > 1.2 * drawn.width  # three rows of two


# ---- beliefs ----


def test_beliefs_are_drawn_in_the_simplex_and_coloured_by_the_exact_ones(tmp_path: Path) -> None:
    paths = [
        write_hmm_run(tmp_path / f"{name}-{s}", name, s, 0.5 + 0.1 * s)
        for name in FIVE
        for s in (0, 1)
    ]
    [task] = compare(read_runs(paths))
    found = {claim.metric: claim.verdict for claim in claims(task) if claim.model == "NextLat d=2"}
    assert {*found} == {"belief_r2", "next_token_kl"}  # the entropy of the data is no finding
    files = {
        label: pictures.Simplex.from_json(
            json.loads((runs[0].directory / "beliefs.json").read_text()), ""
        )
        for label, runs in task.models.items()
    }
    figure = pictures.draw_simplexes(files)
    exact, *decoded = [ax.collections[0] for ax in figure.axes]
    assert len(decoded) == 5
    points = np.asarray(exact.get_offsets())
    corners = [[0, 0], [1, 0], [0.5, 3**0.5 / 2]]
    np.testing.assert_allclose(
        points[:3], corners, atol=1e-9
    )  # certainty of one state is its corner
    assert len(np.unique(exact.get_facecolor()[:3], axis=0)) == 3
    for scatter in decoded:
        assert np.array_equal(scatter.get_facecolor(), exact.get_facecolor())
        assert not np.allclose(scatter.get_offsets(), points)
    assert figure.axes[2].get_title().split("\n") == ["NextLat d=2", "R\N{SUPERSCRIPT TWO} = 0.500"]
    figure.draw_without_rendering()
    boxes = [ax.get_position() for ax in figure.axes]  # two rows of three
    assert [round(box.x0 - boxes[place % 3].x0, 3) for place, box in enumerate(boxes)] == [0] * 6
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1


def test_beliefs_about_more_states_are_drawn_in_a_polygon(tmp_path: Path) -> None:
    path = write_hmm_run(tmp_path / "eight", "nextlat", 0, 0.9, states=8)
    content = json.loads((path / "beliefs.json").read_text())
    figure = pictures.draw_simplexes({"NextLat": pictures.Simplex.from_json(content, "")})
    exact = figure.axes[0].collections[0]
    corners = np.asarray(exact.get_offsets())[:8]
    radii = np.linalg.norm(corners - corners.mean(axis=0), axis=1)
    np.testing.assert_allclose(radii, radii[0])  # certainty of a state is as far out for each
    assert len(np.unique(exact.get_facecolor()[:8], axis=0)) == 8


def test_beliefs_about_too_many_states_are_not_drawn(tmp_path: Path) -> None:
    run = write_hmm_run(tmp_path / "many", "nextlat", 0, 0.9, states=13)
    assert pictures.Drawer(compare(read_runs([run]))[0], tmp_path).of_models() == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        ("[1, 2", "is corrupt"),
        ({"true": [[1, 0, 0]], "decoded": [[1, 0, 0]]}, "'r2' is missing"),
        ({"true": [[1, 0, 0]], "decoded": [[1, 0]], "r2": 1}, "not of one shape"),
        ({"true": [[1]], "decoded": [[float("nan")]], "r2": 1}, "is corrupt"),
        ({"true": [], "decoded": [], "r2": 1}, "not of one shape"),
    ],
)
def test_a_faulty_picture_is_refused_in_one_sentence(
    tmp_path: Path, content: Any, words: str
) -> None:
    run = write_hmm_run(tmp_path / "run", "nextlat", 0, 0.9)
    (run / "beliefs.json").unlink()
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (run / "beliefs.json").write_text(text)
    city = write_city_run(tmp_path / "city", "nextlat", 0)
    (city / "map.json").write_text('{"used": []}')
    for path, expected in ((run, words), (city, "map.json is corrupt")):
        with pytest.raises(NextLatError, match=expected) as error:
            write_report(read_runs([path]), tmp_path / "report")
        assert "\n" not in str(error.value) and f"'nextlat evaluate {path}'" in str(error.value)
        assert not [*(tmp_path / "report").iterdir()]
