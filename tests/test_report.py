"""The report: one document, which as a page, as Markdown and in a terminal says what the comparison
found, and which no text of a run can break."""

import base64
import errno
import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.image import imread
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from fabricated_runs import (
    FIVE,
    NETWORK,
    write_city_run,
    write_log,
    write_path_star_run,
    write_run,
    write_word_problem_run,
)
from nextlat.cli import app
from nextlat.errors import NextLatError
from nextlat.report import claims, compare, read_runs, terminal_table, write_report
from nextlat.report.claims import difference_text, estimate_text, with_error
from nextlat.report.document import document
from nextlat.report.render import terminal
from nextlat.results import (
    Chart,
    Line,
    Mark,
    Metric,
    Picture,
    Published,
    PublishedFigures,
    Saying,
    Solved,
    TaskFacts,
)
from nextlat.tasks.streets.map import map_record, reconstruct

pytestmark = pytest.mark.slow

OBJECTIVES = ("next-token", "nextlat")
LIMIT = 0.1 * np.log(2) / 4
FALLING = {100: 0.3, 200: LIMIT * 0.9, 300: LIMIT * 1.1, 400: LIMIT * 0.9}
EARLY = {100: 0.3, 200: LIMIT * 0.9, 300: LIMIT * 0.5, 400: LIMIT * 0.9}
NEVER = {100: 0.3, 200: 0.17, 300: 0.17, 400: 0.17}
MARKS = {"better": "▲ better", "worse": "▼ worse", "within noise": "≈ within noise"}
NARROW = "\N{NO-BREAK SPACE}"


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
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.replace(NARROW, " ")


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells, its head first; a cell that is not closed, or a row too many or
    too few of them, fails."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [
            re.split(r"(?<!\\)\|", line.replace(NARROW, " "))[1:-1] for line in block.splitlines()
        ]
        assert {len(row) for row in rows} == {len(rows[0])}
        assert set("".join(rows[1])) <= {"-", " "}
        assert len({len(line) for line in block.splitlines()}) == 1  # columns line up in the text
        found.append([[cell.strip() for cell in row] for row in (rows[0], *rows[2:])])
    return found


def section(text: str, title: str) -> str:
    [found] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def printed(shown: RenderableType, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(shown)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    return text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A city and a word problem by two objectives, at two seeds and at one."""
    folder = tmp_path_factory.mktemp("runs")
    city = [
        write_city_run(folder / f"city-{name}-{seed}", name, seed)
        for seed in (0, 1)
        for name in OBJECTIVES
    ]
    return city + [write_word_problem_run(folder / f"words-{name}", name, 0) for name in OBJECTIVES]


@pytest.fixture(scope="module")
def stars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Path-Star by all objectives: NextLat solves both seeds, BST one of them, the others guess."""
    folder = tmp_path_factory.mktemp("stars")
    exact = {"nextlat": (0.99, 1.0), "bst": (0.985, 0.995)}
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


@pytest.fixture(scope="module")
def report(
    runs: list[Path], stars: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The page and the Markdown of both."""
    folder = tmp_path_factory.mktemp("docs")
    text = folder / "more" / "results.md"
    return write_report(read_runs([*runs, *stars]), folder / "pictures and page", text), text


# ---- the page ----


def test_the_page_is_whole_and_needs_nothing_else(report: tuple[Path, Path]) -> None:
    text = report[0].read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "url(" not in text
    assert "@import" not in text
    anchors = {f"#{attrs['id']}" for _, attrs in page.tags if "id" in attrs}
    links = {attrs["href"] for _, attrs in page.tags if "href" in attrs}
    assert len(links) == 3 and links <= anchors
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    # Two maps at two seeds; metrics, curves and acceptance of the city; metrics, accuracy and
    # curves of the word problem and of Path-Star.
    assert len(images) == 4 + 3 + 3 + 3
    for image in images:
        head, data = str(image["src"]).split(",")
        assert head == "data:image/png;base64"
        assert imread(io.BytesIO(base64.b64decode(data))).shape[1] > 500
        assert len(str(image["alt"])) > 20
    assert any(attrs.get("name") == "viewport" for tag, attrs in page.tags if tag == "meta")
    scopes = [attrs.get("scope") for tag, attrs in page.tags if tag == "th"]
    assert {*scopes} == {"row", "col"}


def test_page_and_record_say_what_the_comparison_found(
    report: tuple[Path, Path], runs: list[Path], stars: list[Path]
) -> None:
    page, _ = report
    words = Page(page.read_text()).words
    found = [claim for task in compare(read_runs([*runs, *stars])) for claim in claims(task)]
    assert {claim.verdict for claim in found} == {"better", "worse", "within noise"}
    for claim in found:
        assert claim.text in words
    assert "± " not in unescape(page.read_text())  # numbers do not come apart at the end of a line
    for needed in (
        "NextLat, MTP, JTP, BST against next-token",
        "another scale",
        "52.7",
        "minus the transformer's own token",
        "nextlat train city-small --objective nextlat --seed 1",
        "123,456",
        "3.11.2",
        "batch_size = 16",
    ):
        assert needed in words
    stored = json.loads((page.parent / "comparison.json").read_text())
    assert [claim["text"] for claim in stored["claims"]] == [claim.text for claim in found]
    metrics = {one["metric"]: one for one in stored["tasks"][0]["metrics"]}
    rank = metrics["effective_latent_rank"]["differences"]["NextLat d=2"]
    assert rank["value"] == pytest.approx(-7.3, abs=1)


@pytest.mark.parametrize("step", ["figures.save", "pictures.draw_maps", "output.move_into"])
def test_a_full_disk_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    run = write_run(
        tmp_path / "run",
        items={"valid_trajectories": np.ones(3)},
        pictures=[Picture(kind="map", file="map.json")],
    )
    write_log(run, [])
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


# ---- Markdown ----


def test_the_table_says_of_every_model_what_the_comparison_found(
    report: tuple[Path, Path], runs: list[Path]
) -> None:
    task = compare(read_runs(runs))[0]
    measured, by_seed, *_ = tables(section(report[1].read_text(), "Streets of a city"))
    assert measured[0] == ["metric", "next-token", "NextLat d=2"]
    assert len(measured) == 1 + len(task.metrics)
    assert by_seed[0] == ["metric", "model", "seed 0", "seed 1"]
    for one, (_, theirs, ours) in zip(task.metrics, measured[1:], strict=True):
        if "next-token" not in one.estimates:
            continue
        difference, estimate = one.differences["NextLat d=2"], one.estimates["NextLat d=2"]
        assert theirs == estimate_text(one.metric, one.estimates["next-token"])
        beside = f"{difference_text(one.metric, difference)}, {MARKS[difference.verdict]}"
        assert ours == f"{estimate_text(one.metric, estimate)} ({beside})"
        [row] = [row for row in by_seed if row[:2] == [one.metric.title, "NextLat d=2"]]
        for (seed, found), cell in zip(difference.seeds.items(), row[2:], strict=True):
            text = with_error(*estimate.seeds[seed], one.metric.unit)
            if one.metric.unit == "share":
                low, high = (100 * end for end in estimate.intervals[seed])
                text += f" ({low:.1f} to {high:.1f})"
            assert cell == f"{text} ({MARKS[found.verdict]})"


def test_every_claim_is_made_and_only_clear_ones_are_in_sight(
    report: tuple[Path, Path], runs: list[Path], stars: list[Path]
) -> None:
    text = re.sub(r"\*\*", "", report[1].read_text().replace(NARROW, " "))
    folded = "".join(re.findall(r"<details>.*?</details>", text, re.DOTALL))
    for claim in (claim for task in compare(read_runs([*runs, *stars])) for claim in claims(task)):
        assert claim.text in text
        assert (claim.text in folded) == (claim.verdict in ("within noise", "no claim"))


def test_a_section_says_its_scale_and_which_commands_made_it(
    report: tuple[Path, Path], tmp_path: Path
) -> None:
    star = section(report[1].read_text(), "Path-Star")
    assert (
        "optimiser steps: 400 · rows per step: 16 · training tokens: 819,200 · parameters, "
        "transformer: 123,456" in star
    )
    assert "seeds: 0, 1 · device: cpu (x86\\_64) · threads: 1." in star.replace(
        "x86_64", "x86\\_64"
    )
    assert "\nnextlat train city-small --objective nextlat --seed 0\n" in star
    assert "another scale" in star and "starts to fail on G(7, 7)" in star
    assert '\nbackbone = {"layers": 2, "width": 32}\n' in star
    own = {"next-token": 0, "nextlat": 7}
    command = ["x", "train", "--out", "/home/me", "--no-progress", "--out=there", "y z"]
    paths = [
        write_run(
            tmp_path / name,
            name,
            items={"solved_seen": np.ones(3)},
            record={"parameters": {"lm": 9, "objective": n}, "command": command},
        )
        for name, n in own.items()
    ]
    write_report(read_runs(paths), tmp_path / "report", tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert "parameters, objective's own: 0 (next-token); 7 (NextLat d=2)" in text
    assert "\nnextlat train 'y z'\n" in text and "/home/me" not in text


def test_links_lead_to_the_pictures_and_the_sections(report: tuple[Path, Path]) -> None:
    page, document = report
    text = document.read_text()
    links = re.findall(r"!\[[^\]]+\]\((\S+)\)", text)
    assert links and all(link.startswith("../") for link in links)
    shown = {(document.parent / unquote(link)).resolve() for link in links}
    drawn = set(page.parent.resolve().glob("*.png"))
    alone = {
        path for path in drawn if path.name.startswith("map-")
    }  # the others have them together
    assert len(alone) == 4 and shown == drawn - alone
    assert {"maps-streets-s0.png", "accuracy-word-problem.png"} <= {path.name for path in drawn}
    assert not [path for path in page.parent.iterdir() if path.name.startswith(".")]
    anchors = {
        re.sub(r"[^\w -]", "", line).lower().replace(" ", "-")
        for line in re.findall(r"^## (.*)$", text, re.MULTILINE)
    }
    sections = re.findall(r"\]\(#(.+?)\)", text)
    assert len(sections) == 3 and set(sections) <= anchors


def test_a_file_that_cannot_be_written_is_one_sentence(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder.md").mkdir()
    for place in (tmp_path / "folder.md", tmp_path / "file" / "results.md"):
        words = ["report", *map(str, runs[-2:]), "-o", str(tmp_path / "report")]
        result = CliRunner().invoke(app, [*words, "--markdown", str(place)])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: cannot write {place}: ")
        assert result.stderr.count("\n") == 1
    with pytest.raises(NextLatError, match="cannot write"):
        write_report(read_runs(runs[-1:]), tmp_path / "file" / "report")
    assert (tmp_path / "file").read_text() == "old"
    assert not [path for path in tmp_path.rglob(".*")]


def test_the_command_names_both_and_replaces_an_older_file(
    stars: list[Path], tmp_path: Path
) -> None:
    text = tmp_path / "results.md"
    text.write_text("old")
    words = ["report", *map(str, stars), "-o", str(tmp_path / "results")]
    result = CliRunner().invoke(app, [*words, "--markdown", str(text)])
    assert result.exit_code == 0, result.stderr
    assert f"report.html and {text}." in result.stderr
    assert text.read_text().startswith("# NextLat, MTP, JTP, BST against next-token\n")
    assert "(results/metrics.png)" in text.read_text()


# ---- the terminal ----


def test_the_terminal_shows_measurements_and_verdicts(runs: list[Path]) -> None:
    text = printed(terminal_table(compare(read_runs(runs))))
    row = re.search(r"Effective latent rank.*\n.*", text.replace(NARROW, " "))
    assert row is not None
    assert re.search(
        r" 28\.\d+ ± 0\.\d+ +21\.\d+ ± 0\.\d+\n +−7\.\d+ ± 0\.\d+ within noise", row[0]
    )
    assert "minus the transformer's own" in text


def test_many_models_are_shown_beside_the_baseline_in_several_tables(stars: list[Path]) -> None:
    tasks = compare(read_runs(stars))
    others = ["NextLat d=2", "MTP d=2", "JTP d=2", "BST"]
    [exact] = [one for one in tasks[0].metrics if one.metric.name == "exact_path_accuracy"]
    assert {label: d.value for label, d in exact.differences.items()} == pytest.approx(
        dict(zip(others, (0.485, 0.0, 0.0, 0.48), strict=True)), abs=1e-9
    )
    text = printed(terminal_table(tasks))
    heads = [line for line in text.splitlines() if line.startswith("metric")]
    assert [[label for label in ("next-token", *others) if label in line] for line in heads] == [
        ["next-token", *others[:2]],
        ["next-token", *others[2:]],
    ]
    assert "cross-entropy" in text  # no word is broken


def test_every_rendering_says_which_seeds_solve_it_and_from_which_step(
    stars: list[Path], report: tuple[Path, Path]
) -> None:
    page, document = report
    stored = json.loads((page.parent / "comparison.json").read_text())["tasks"][2]["solving"]
    assert stored["NextLat d=2"] == {
        "0": {"solved": True, "step": 400},
        "1": {"solved": True, "step": 200},
    }
    assert stored["BST"] == {
        "0": {"solved": False, "step": 200},
        "1": {"solved": True, "step": None},
    }
    assert stored["MTP d=2"]["0"] == {"solved": False, "step": None}
    shown = tables(section(document.read_text(), "Path-Star"))[2]
    assert ["NextLat d=2", "2 of 2", "from step 400", "from step 200"] in shown
    assert ["BST", "1 of 2", "not solved", "solved"] in shown
    for text in (Page(page.read_text()).words, printed(terminal_table(compare(read_runs(stars))))):
        assert re.search(r"NextLat d=2\s+2 of 2\s+from step 400\s+from step 200", text)
        assert "A seed solves it with nearly all paths exact." in text


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
    assert with_error(value, error, unit, signed=signed) == text


# ---- whatever a run says ----

HOSTILE = {
    "HTML": "</td></main><script>alert(1)</script><b>",
    "an image": '"><img src=x onerror="alert(1)">',
    "an entity": "&lt;b&gt; &#60;i&#62; &amp;",
    "table cells": "a|b\\|c\\\\|d",
    "a broken line": "one\n\n# two\r\n| three |\n---\n",
    "emphasis": "*a* _b_ **c** __d__ ~~e~~ snake_case",
    "code": "`a` ``` b\n```\n<script>",
    "a link": "[a](http://b) ![c](d) [e]: f <http://g>",
    "a list": "- a\n1. b\n+ c\n> d",
    "a formula": "$x_{1}$ $\\frac{1}$ $$",
    "rich's markup": "[red]a[/red] [/] [link=b]c[/link] [bold",
    "control characters": "\x1b[2Ja\x07\x00\u202eb\u200b",
    "other letters": "北京 🙂 ½ №",
    "nothing": " ",
    "a heading": "# a ##",
    "a number": "1.",
    "a flood": "long" * 1000,
}


def hostile_runs(folder: Path, text: str) -> list[Path]:
    """Two runs all of whose words are this text."""
    metric = Metric(
        name="metric",
        title=text,
        noun=text,
        definition=text,
        source=text,
        items=text,
        note=text,
        published="p",
    )
    chart = Chart(
        name=text,
        title=text,
        x=text,
        alt=text,
        caption=text,
        lines=[Line(values=[0.1, 0.2], series=text), Line(values=[0.3, 0.2], series=f"{text}!")],
        marks=[
            Mark(text=text, x=1.5),
            Mark(text=text, y=0.1),
            Mark(text=text, y=0.2, start=1, end=2),
        ],
    )
    published = Published(
        setting=text,
        source=text,
        figures={
            "p": PublishedFigures(title=text, by_method={"GPT": 0.1, "NextLat": 0.2, text: 0})
        },
        sayings=[Saying(methods=("GPT", text), text=text, of="p")],
    )
    solved = Solved(metric=metric.key, at_least=0.5, definition=text)
    task = TaskFacts(name="streets", title=text, published=published, solved=solved)
    return [
        write_run(
            folder / name,
            name,
            items={metric.key: values},
            declared=[metric],
            facts={"title": title, "parts": {"next_h": text, "kl": text}},
            record={
                "recipe_name": text,
                "device": text,
                "command": ["x", text],
                "versions": {text: text},
                "git": text,
            },
            changes={"backbone.pretrained": text},
            task_facts=task,
            charts=[chart],
            pictures=[
                Picture(kind="map", file="map.json", title=text, text=text),
                Picture(kind="simplex", file="beliefs.json", title=text, text=text),
            ],
        )
        for name, title, values in (
            ("next-token", text, [0.0, 1.0, 0.0, 1.0]),
            ("nextlat", f"{text} {text}", [1.0, 1.0, 1.0, 0.5]),
        )
    ]


def renderings(folder: Path, text: str) -> tuple[str, str, str]:
    """The page, Markdown and what a terminal shows of a report on such runs."""
    paths = hostile_runs(folder / "runs", text)
    for path in paths:
        (path / "map.json").write_text(json.dumps(map_record(NETWORK, reconstruct(NETWORK, []))))
        beliefs = {"true": np.eye(3).tolist(), "decoded": np.eye(3).tolist(), "r2": 1.0}
        (path / "beliefs.json").write_text(json.dumps(beliefs))
    runs = read_runs(paths)
    page = write_report(runs, folder / "report", folder / "results.md")
    shown = printed(terminal(document(compare(runs), folder)))
    return page.read_text(), (folder / "results.md").read_text(), shown


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    return renderings(tmp_path_factory.mktemp("harmless"), "harmless")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_of_a_run_breaks_a_rendering(
    text: str, harmless: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextlat.report.figures.DPI", 20)
    html, markdown, shown = renderings(tmp_path, text)
    assert not {*shown} & {"\x1b", "\x07", "\x00"}
    if not text.strip():
        return  # what is not said has no paragraph
    assert structure(html) == structure(harmless[0])
    assert blocks(markdown) == blocks(harmless[1])
    words = " ".join(re.sub("[\x00-\x1f\u202e\u200b]", " ", text).split())
    if len(words) < 100:
        visible = unescape(re.sub("<[^>]+>", "", parser().render(markdown)))
        for found in (Page(html).words, visible, shown):
            assert words in " ".join(found.split())


def parser() -> MarkdownIt:
    """Of Markdown with GitHub's tables and deletions."""
    return MarkdownIt("gfm-like", {"linkify": False})


def structure(html: str) -> list[tuple[str, str | None]]:
    """The tags and classes of a page."""
    return [(tag, attrs.get("class")) for tag, attrs in Page(html).tags]


def blocks(text: str) -> list[str]:
    """The tokens of Markdown."""
    tokens = [part for token in parser().parse(text) for part in (token, *(token.children or []))]
    return [token.type for token in tokens if token.type != "text_special"]
