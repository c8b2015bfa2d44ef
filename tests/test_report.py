"""The report: pictures that show every seed, and one page that needs nothing but itself and claims
only what the verdicts allow."""

import base64
import errno
import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from fabricated_runs import (
    CITY,
    FIVE,
    NETWORK,
    PARTS,
    write_city_run,
    write_countdown_run,
    write_hmm_run,
    write_path_star_run,
    write_run,
    write_text_run,
    write_word_problem_run,
)
from nextlat.errors import NextLatError
from nextlat.report import (
    claims,
    compare,
    plots,
    read_runs,
    task_plots,
    terminal_table,
    write_report,
)
from nextlat.report.comparison import TaskComparison
from nextlat.report.drawing import PALETTE
from nextlat.report.wording import with_error
from nextlat.tasks.streets.map import map_record, read_map_record, reconstruct

OBJECTIVES = ("next-token", "nextlat")
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page consists of; fails on a tag that is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    paths = [
        write_city_run(folder / f"city-{name}-{seed}", name, seed)
        for seed in (0, 1)
        for name in OBJECTIVES
    ]
    return paths + [
        write_word_problem_run(folder / f"words-{name}", name, 0) for name in OBJECTIVES
    ]


@pytest.fixture(scope="module")
def report(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(read_runs(runs), tmp_path_factory.mktemp("report") / "new")


@pytest.fixture
def city(runs: list[Path]) -> TaskComparison:
    return compare(read_runs(runs)).tasks[0]


def test_the_page_is_whole_and_needs_nothing_else(report: Path) -> None:
    text = report.read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "url(" not in text
    assert "@import" not in text
    assert not [attrs for _, attrs in page.tags if "href" in attrs]
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    # two models x two seeds; metrics, curves and acceptance of the city; metrics, accuracy and
    # curves of the word problem
    assert len(images) == 4 + 3 + 3
    for image in images:
        head, data = str(image["src"]).split(",")
        assert head == "data:image/png;base64"
        assert imread(io.BytesIO(base64.b64decode(data))).shape[1] > 500
        assert len(str(image["alt"])) > 20
    assert any(
        "name" in attrs and attrs["name"] == "viewport" for tag, attrs in page.tags if tag == "meta"
    )


def test_the_page_says_what_the_comparison_found(report: Path, runs: list[Path]) -> None:
    words = Page(report.read_text()).words
    comparison = compare(read_runs(runs))
    found = [claim for task in comparison.tasks for claim in claims(task)]
    assert {claim.verdict for claim in found} == {"better", "worse", "within noise"}
    for claim in found:
        assert claim.text in words
    assert "±\N{NO-BREAK SPACE}" in unescape(
        report.read_text()
    )  # numbers do not come apart at the end of a line
    for needed in (
        "another scale",
        "52.7",
        "minus the transformer's own token",
        "nextlat train city-small --objective nextlat --seed 1",
        "123,456",
        "3.11.2",
    ):
        assert needed in words
    stored = json.loads((report.parent / "comparison.json").read_text())
    assert [claim["text"] for claim in stored["claims"]] == [claim.text for claim in found]
    [rank] = [
        metric
        for metric in stored["tasks"][0]["metrics"]
        if metric["name"] == "effective_latent_rank"
    ]
    assert rank["differences"]["NextLat d=2"]["value"] == pytest.approx(-7.3, abs=1)


def test_pictures_lie_beside_the_page(report: Path) -> None:
    names = {path.name for path in report.parent.iterdir()}
    assert {
        "maps-streets-s0.png",
        "maps-streets-s1.png",
        "learning-curves-streets.png",
        "accuracy-word-problem.png",
    } <= names
    assert not [name for name in names if name.startswith(".")]


def test_whatever_is_in_a_run_is_escaped(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        items={"<b>metric": np.ones(3)},
        record={"recipe_name": "<script>", "command": ["x", "<img src=x>"]},
    )
    page = Page(write_report(read_runs([run]), tmp_path / "report").read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<b>metric" in page.words
    assert "<img src=x>" in page.words
    assert "nothing is compared" in page.words


@pytest.mark.parametrize("step", ["drawing.save", "pictures.draw_maps", "writing.move_into"])
def test_a_full_disk_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    run = write_run(tmp_path / "run", items={"valid_trajectories": np.ones(3)})
    (run / "metrics.jsonl").unlink()
    (run / "map.json").write_text(json.dumps(map_record(NETWORK, reconstruct(NETWORK, []))))
    page = tmp_path / "report" / "report.html"
    page.parent.mkdir()
    page.write_text("old")

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"nextlat.report.{step}", full)
    with pytest.raises(NextLatError, match="No space left"):
        write_report(read_runs([run]), page.parent)
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    assert page.read_text() == "old"


def test_bad_places_and_maps_are_one_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", items={"valid_trajectories": np.ones(3)})
    (run / "metrics.jsonl").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(NextLatError, match="cannot write"):
        write_report(read_runs([run]), tmp_path / "file" / "report")
    (run / "map.json").write_text('{"used": []}')
    with pytest.raises(NextLatError, match=r"map.json is corrupt"):
        write_report(read_runs([run]), tmp_path / "report")


# ---- pictures ----


def test_learning_curves_draw_every_seed(city: TaskComparison) -> None:
    figure = plots.learning_curves(city)
    assert figure is not None
    top, *parts = figure.axes
    training = [line for line in top.lines if len(line.get_xdata()) == 40]
    held_out = [line for line in top.lines if len(line.get_xdata()) == 4]
    assert (len(training), len(held_out)) == (4, 4)
    assert len({line.get_color() for line in training}) == 2
    assert [len(ax.lines) for ax in parts] == [2, 2]  # only NextLat has these losses, at two seeds


def test_metric_panel_draws_every_seed_at_its_value(city: TaskComparison) -> None:
    figure = plots.metric_panel(city)
    assert figure is not None
    titles = [ax.get_title(loc="left").replace("\n", " ") for ax in figure.axes]
    assert (
        len(titles) == len(CITY) + 2
    )  # mean acceptance length and decoding speed, but not the metrics that repeat them
    assert [title[-1] for title in titles[:2]] == ["\N{DOWNWARDS ARROW}", "\N{UPWARDS ARROW}"]
    [rank] = [metric for metric in city.metrics if metric.name == "effective_latent_rank"]
    ax = figure.axes[titles.index("Effective latent rank\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}")]
    drawn = sorted(float(bars.lines[0].get_ydata()[0]) for bars in ax.containers)  # type: ignore[union-attr, index, arg-type]
    assert drawn == sorted(
        value for estimate in rank.estimates.values() for value, _ in estimate.seeds.values()
    )


def test_accuracy_marks_training_length_and_chance(runs: list[Path]) -> None:
    figure = task_plots.accuracy_by_position(compare(read_runs(runs)).tasks[1])
    assert figure is not None
    [ax] = figure.axes
    ends = [np.asarray(line.get_xydata()) for line in ax.lines]
    assert sum(len(line) == 24 for line in ends) == 3  # two transformers, one dynamics model
    assert any((line[:, 0] == 8).all() for line in ends)
    assert any((line[:, 1] == 1 / 5).all() for line in ends)


def test_nothing_to_draw_is_no_picture(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    [task] = compare(read_runs([run])).tasks
    assert plots.learning_curves(task) is plots.metric_panel(task) is plots.acceptance(task) is None
    assert task_plots.accuracy_by_position(task) is None


def test_a_map_survives_its_record() -> None:
    reconstructed = reconstruct(NETWORK, [(0, 3, [2, 2, 0, 5]), (1, 1, None)])
    network, again = read_map_record(json.loads(json.dumps(map_record(NETWORK, reconstructed))))
    assert network.fingerprint() == NETWORK.fingerprint()
    assert again.invented == reconstructed.invented
    assert np.array_equal(again.used, reconstructed.used)
    assert again.counts() == reconstructed.counts()


# ---- five objectives ----

LIMIT = (
    0.1 * np.log(2) / 4
)  # G(2, 3): a tenth of guessing one of two arms, over three nodes and the end
FALLING = {100: 0.3, 200: LIMIT * 0.9, 300: LIMIT * 1.1, 400: LIMIT * 0.9}
EARLY = {100: 0.3, 200: LIMIT * 0.9, 300: LIMIT * 0.5, 400: LIMIT * 0.9}
NEVER = {100: 0.3, 200: 0.17, 300: 0.17, 400: 0.17}


@pytest.fixture(scope="module")
def stars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Path-Star by all objectives: NextLat solves both seeds, BST one of them, the others guess."""
    folder, exact = (
        tmp_path_factory.mktemp("stars"),
        {"nextlat": (0.99, 1.0), "bst": (0.985, 0.995)},
    )
    logs = {"nextlat": (FALLING, EARLY), "bst": (EARLY, NEVER)}
    return [
        write_path_star_run(
            folder / f"{name}-{seed}",
            name,
            seed,
            logs.get(name, (NEVER, NEVER))[seed],
            exact.get(name, (0.5, 0.52))[seed],
        )
        for name in FIVE
        for seed in (0, 1)
    ]


def test_five_objectives_are_each_compared_with_next_token(
    stars: list[Path], tmp_path: Path
) -> None:
    runs = read_runs(stars)
    [task] = compare(runs).tasks
    others = ["NextLat d=2", "MTP d=2", "JTP d=2", "BST"]
    assert list(task.models) == ["next-token", *others]
    [exact] = [metric for metric in task.metrics if metric.name == "exact_path_accuracy"]
    assert {label: d.value for label, d in exact.differences.items()} == pytest.approx(
        dict(zip(others, (0.485, 0.0, 0.0, 0.48), strict=True)), abs=1e-9
    )
    page = Page(write_report(runs, tmp_path / "report").read_text())
    assert "NextLat, MTP, JTP, BST against next-token" in page.words
    assert all(claim.text in page.words for claim in claims(task))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(compare(runs)))
    text = console.export_text()
    heads = [
        line.split("next-token ")[1]
        for line in text.splitlines()
        if line.startswith("   ") and "next-token " in line
    ]
    assert [[label for label in others if label in line] for line in heads] == [
        others[:2],
        others[2:],
    ]
    assert max(map(len, text.splitlines())) <= 80
    assert "cross-entropy" in text  # no word is broken


def test_learning_curves_of_five_objectives_have_a_panel_for_every_part_of_the_loss(
    stars: list[Path],
) -> None:
    figure = plots.learning_curves(compare(read_runs(stars)).tasks[0])
    assert figure is not None
    _, *parts = figure.axes
    names = dict.fromkeys(part for objective in FIVE for part in PARTS.get(objective, {}))
    titles = [ax.get_title(loc="left").replace("\n", " ") for ax in parts]
    assert titles == [plots.PART_TITLES[name] for name in names]
    lines = dict(zip(titles, (len(ax.lines) for ax in parts), strict=True))
    assert lines[plots.PART_TITLES["multi_token"]] == 4  # of MTP and JTP
    assert lines[plots.PART_TITLES["pairs"]] == 2
    boxes = [ax.get_position() for ax in parts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_path_star_says_which_seeds_solve_it_and_from_which_step(
    stars: list[Path], tmp_path: Path
) -> None:
    runs = read_runs(stars)
    page = write_report(runs, tmp_path / "report")
    stored = json.loads((page.parent / "comparison.json").read_text())["tasks"][0]["solving"]
    assert stored["NextLat d=2"] == {
        "0": {"solved": True, "step": 400},
        "1": {"solved": True, "step": 200},
    }
    assert stored["BST"] == {
        "0": {"solved": False, "step": 200},
        "1": {"solved": True, "step": None},
    }
    assert stored["MTP d=2"]["0"] == {"solved": False, "step": None}
    text = re.sub(r"<[^>]+>", " ", page.read_text())
    assert re.search(r"NextLat d=2\s+2 of 2\s+from step 400\s+from step 200", text)
    assert re.search(r"BST\s+1 of 2\s+not solved\s+solved", text)
    assert "starts to fail on G(7, 7)" in text
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal_table(compare(runs)))
    words = " ".join(console.export_text().split())
    assert (
        "next-token 0 of 2; NextLat d=2 2 of 2, from step 400 (seed 0), 200 (seed 1); MTP" in words
    )


def test_path_accuracy_draws_every_seed_and_chance(stars: list[Path]) -> None:
    figure = task_plots.path_accuracy(compare(read_runs(stars)).tasks[0])
    assert figure is not None
    lines = [np.asarray(line.get_xydata()) for line in figure.axes[0].lines]
    assert sorted(line[1, 1] for line in lines if len(line) == 3) == [
        *[0.5] * 3,
        *[0.52] * 3,
        0.985,
        0.99,
        0.995,
        1.0,
    ]
    assert [line[:, 1].tolist() for line in lines if len(line) == 2] == [[0.5, 0.5]]


def test_equations_are_drawn_for_seen_and_held_out_targets(tmp_path: Path) -> None:
    paths = [
        write_countdown_run(tmp_path / name, name, 0, 0.3 + 0.1 * place)
        for place, name in enumerate(FIVE)
    ]
    runs = read_runs(paths)
    [task] = compare(runs).tasks
    figure = task_plots.equation_accuracy(task)
    assert figure is not None
    assert len(figure.axes[0].lines) == 10
    run = runs[FIVE.index("bst")]
    drawn = [line.get_ydata() for line in figure.axes[0].lines if line.get_color() == PALETTE[4]]
    for split, line in zip(("seen", "held_out"), drawn, strict=True):
        assert list(line) == [run.metrics[f"true_equation_{place}_{split}"] for place in (1, 2)]
    words = Page(write_report(runs, tmp_path / "report").read_text()).words
    assert "58.7 %" in words and "another scale" in words


def test_probe_curves_are_relative_to_next_token_of_the_same_seed(tmp_path: Path) -> None:
    better = {"next-token": 0.0, "nextlat": 0.1, "mtp": -0.2}
    paths = [
        write_text_run(tmp_path / f"{name}-{seed}", name, seed, x)
        for name, x in better.items()
        for seed in (0, 1)
    ]
    alone = write_text_run(tmp_path / "alone", "nextlat", 2, 0.5)  # no baseline of this seed
    figure = task_plots.probe_curves(compare(read_runs([*paths, alone])).tasks[0])
    assert figure is not None
    curves = [
        np.asarray(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 20
    ]
    assert sorted(round(float(curve[-1]), 6) for curve in curves) == [-0.1, -0.1, 0.2, 0.2]
    assert all(abs(curve[0]) < 1e-9 for curve in curves)
    assert (
        task_plots.probe_curves(compare(read_runs(paths[:2])).tasks[0]) is None
    )  # next-token alone


def test_the_hmm_is_compared_and_its_entropy_is_no_finding(tmp_path: Path) -> None:
    paths = [
        write_hmm_run(tmp_path / name, name, 0, r2)
        for name, r2 in (("next-token", 0.8), ("nextlat", 0.9))
    ]
    [task] = compare(read_runs(paths)).tasks
    found = {claim.metric: claim.verdict for claim in claims(task)}
    assert found == {"belief_r2": "better", "next_token_kl": "within noise"}
    assert "transition_consistency_error" in {metric.name for metric in task.metrics}


def test_beliefs_are_drawn_in_the_simplex_and_coloured_by_the_exact_ones(tmp_path: Path) -> None:
    paths = [
        write_hmm_run(tmp_path / f"{name}-{s}", name, s, 0.5 + 0.1 * s)
        for name in FIVE
        for s in (0, 1)
    ]
    [task] = compare(read_runs(paths)).tasks
    figure = task_plots.beliefs(task)
    assert figure is not None
    exact, *decoded = [ax.collections[0] for ax in figure.axes]
    assert len(decoded) == 5
    points = np.asarray(exact.get_offsets())
    np.testing.assert_allclose(
        points[:3], [[0, 0], [1, 0], [0.5, 3**0.5 / 2]]
    )  # certainty of one state is its corner
    assert len(np.unique(exact.get_facecolor()[:3], axis=0)) == 3  # type: ignore[index]
    for scatter in decoded:
        assert np.array_equal(scatter.get_facecolor(), exact.get_facecolor())
        assert not np.allclose(scatter.get_offsets(), points)  # type: ignore[arg-type]
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[2].split("\n") == [
        "NextLat d=2",
        "R\N{SUPERSCRIPT TWO} = 0.500",
    ]  # the first seed
    figure.draw_without_rendering()
    boxes = [ax.get_position() for ax in figure.axes]
    assert [round(box.x0 - boxes[place % 3].x0, 3) for place, box in enumerate(boxes)] == [
        0
    ] * 6  # two rows of three
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1


def test_beliefs_about_other_than_three_states_are_not_drawn(tmp_path: Path) -> None:
    [task] = compare(
        read_runs([write_hmm_run(tmp_path / "four", "nextlat", 0, 0.9, states=4)])
    ).tasks
    assert task_plots.beliefs(task) is None
    (tmp_path / "four" / "beliefs.json").unlink()
    assert task_plots.beliefs(compare(read_runs([tmp_path / "four"])).tasks[0]) is None


# ---- words ----


def test_terminal_table_fits_and_shows_the_verdicts(runs: list[Path]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(compare(read_runs(runs))))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    row = re.search(r"Effective latent rank .*\n.*", text)
    assert row is not None
    assert re.search(r" 28\.\d+ ± 0\.\d+ +21\.\d+ ± 0\.\d+\n +−7\.\d+ ± 0\.\d+ better", row[0])
    assert "minus the transformer's own" in text


@pytest.mark.parametrize(
    ("value", "error", "unit", "signed", "text"),
    [
        (0.973, 0.005, "share", False, "97.3 ± 0.5 %"),
        (0.99973, 0.0002, "share", False, "99.97 ± 0.02 %"),
        (-0.021, 0.01, "share", True, "−2.1 ± 1.0 points"),
        (-0.00001, 0.0004, "share", True, "0.00 ± 0.04 points"),
        (28.43, 0.12, "number", False, "28.4 ± 0.1"),
        (-1.234, None, "number", True, "−1.23"),
        (2.3, 0.04, "factor", False, "2.30× ± 0.04"),
        (0.98765, 0.0, "nats", False, "0.988 ± 0.000"),
        (0.98765, 1e-17, "nats", False, "0.988 ± 0.000"),
        (float("nan"), None, "number", False, "not a number"),
    ],
)
def test_numbers_show_as_many_digits_as_their_error_deserves(
    value: float, error: float | None, unit: str, signed: bool, text: str
) -> None:
    assert with_error(value, error, unit, signed=signed) == text  # type: ignore[arg-type]


def test_logs_of_a_comparison_are_no_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", items={"valid_trajectories": np.ones(3)})
    (tmp_path / "run.log").write_text("loss 1.0")
    assert [found.directory for found in read_runs(tmp_path.iterdir())] == [run]
    with pytest.raises(NextLatError, match="no runs"):
        read_runs([tmp_path / "run.log"])
