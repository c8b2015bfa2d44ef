"""The report as Markdown: the same words and numbers as everywhere, whole tables, and links that
lead to the pictures."""

import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from typer.testing import CliRunner

from fabricated_runs import FIVE, write_city_run, write_path_star_run, write_run
from nextlat.cli import app
from nextlat.errors import NextLatError
from nextlat.report import claims, compare, read_runs, write_report
from nextlat.report.glossary import describe
from nextlat.report.wording import difference_text, estimate_text, with_error

NARROW, WIDE = "\N{NO-BREAK SPACE}", " "
NEVER = {100: 0.3, 400: 0.17}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    city = [
        write_city_run(folder / f"city-{name}-{s}", name, s)
        for s in (0, 1)
        for name in ("next-token", "nextlat")
    ]
    solved = {"next-token": 0.5, "nextlat": 1.0}
    problems = [
        write_run(
            folder / f"sums-{name}",
            name,
            task="countdown",
            items={"solved_seen": np.arange(200) < 200 * share},
        )
        for name, share in {"next-token": 0.9, "nextlat": 0.5}.items()
    ]
    return [
        *city,
        *problems,  # NextLat is worse
        *(
            write_path_star_run(folder / f"star-{name}", name, 0, NEVER, share)
            for name, share in solved.items()
        ),
    ]


@pytest.fixture(scope="module")
def document(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    write_report(read_runs(runs), folder / "pictures and page", folder / "more" / "results.md")
    return folder / "more" / "results.md"


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells, its head first; a cell that is not closed, or a row too many or
    too few of them, fails."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [
            re.split(r"(?<!\\)\|", line.replace(NARROW, WIDE))[1:-1] for line in block.splitlines()
        ]
        assert {len(row) for row in rows} == {len(rows[0])}
        assert set("".join(rows[1])) <= {"-", " "}
        assert (
            len({len(line) for line in block.splitlines()}) == 1
        )  # columns are aligned in the text itself
        found.append([[cell.strip() for cell in row] for row in (rows[0], *rows[2:])])
    return found


def section(text: str, title: str) -> str:
    [found] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def test_the_table_says_of_every_model_what_the_comparison_found(
    document: Path, runs: list[Path]
) -> None:
    task = compare(read_runs(runs)).tasks[0]
    measured, by_seed, *_ = tables(section(document.read_text(), "Streets of a city"))
    assert measured[0] == ["metric", "next-token", "NextLat d=2"]
    assert len(measured) == 1 + len(task.metrics)
    marks = {"better": "▲ better", "worse": "▼ worse", "within noise": "≈ within noise"}
    for metric, (_, theirs, ours) in zip(task.metrics, measured[1:], strict=True):
        difference = metric.differences.get("NextLat d=2")
        if "next-token" in metric.estimates:
            assert difference is not None and theirs == estimate_text(
                metric.name, metric.estimates["next-token"]
            )
            beside = f"{difference_text(metric.name, difference)}, {marks[difference.verdict]}"
            assert (
                ours == f"{estimate_text(metric.name, metric.estimates['NextLat d=2'])} ({beside})"
            )
    assert by_seed[0] == ["metric", "model", "seed 0", "seed 1"]
    for metric in task.metrics:
        difference = metric.differences.get("NextLat d=2")
        if "next-token" in metric.estimates and difference is not None:
            [row] = [
                row for row in by_seed if row[:2] == [describe(metric.name).title, "NextLat d=2"]
            ]
            for (seed, found), cell in zip(difference.seeds.items(), row[2:], strict=True):
                estimate = metric.estimates["NextLat d=2"]
                text = with_error(*estimate.seeds[seed], describe(metric.name).unit)
                if describe(metric.name).unit == "share":
                    low, high = (100 * end for end in estimate.intervals[seed])
                    text += f" ({low:.1f} to {high:.1f})"
                assert cell == f"{text} ({marks[found.verdict]})"


def test_every_claim_is_made_and_only_clear_ones_are_in_sight(
    document: Path, runs: list[Path]
) -> None:
    text = re.sub(r"\*\*", "", document.read_text().replace(NARROW, WIDE))
    folded = "".join(re.findall(r"<details>.*?</details>", text, re.DOTALL))
    found = [claim for task in compare(read_runs(runs)).tasks for claim in claims(task)]
    assert {claim.verdict for claim in found} >= {"better", "worse", "within noise"}
    for claim in found:
        assert claim.text in text
        assert (claim.text in folded) == (claim.verdict in ("within noise", "no claim"))


def test_a_section_says_its_scale_who_solves_it_and_which_commands_made_it(document: Path) -> None:
    star = section(document.read_text(), "Path-Star")
    assert (
        "optimiser steps: 400 · rows per step: 16 · training tokens: 819,200 · parameters, transformer: 123,456"
        in star
    )
    assert "seeds: 0 · device: cpu (x86_64) · threads: 1." in star
    assert ["NextLat d=2", "1 of 1", "solved"] in tables(star)[1]
    assert "\nnextlat train city-small --objective nextlat --seed 0\n" in star
    assert "another scale" in star and "starts to fail on G(7, 7)" in star


def test_what_differs_in_scale_is_given_of_each_model(tmp_path: Path) -> None:
    own = {"next-token": 0, "nextlat": 7}
    paths = [
        write_run(
            tmp_path / name,
            name,
            items={"solved_seen": np.ones(3)},
            record={"parameters": {"lm": 9, "objective": n}},
        )
        for name, n in own.items()
    ]
    write_report(read_runs(paths), tmp_path / "report", tmp_path / "results.md")
    assert (
        "parameters, objective's own: 0 (next-token); 7 (NextLat d=2)"
        in (tmp_path / "results.md").read_text()
    )


def test_links_lead_to_the_pictures(document: Path) -> None:
    links = re.findall(r"!\[[^\]]+\]\((\S+)\)", document.read_text())
    assert links and all(link.startswith("../") for link in links)
    shown = {(document.parent / unquote(link)).resolve() for link in links}
    drawn = set((document.parents[1] / "pictures and page").resolve().glob("*.png"))
    alone = {
        path for path in drawn if path.name.startswith("map-")
    }  # the same maps are in the pictures side by side
    assert len(alone) == 4 and shown == drawn - alone


def test_links_of_the_contents_lead_to_the_sections(document: Path) -> None:
    text = document.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", line).lower().replace(" ", "-")
        for line in re.findall(r"^## (.*)$", text, re.MULTILINE)
    }
    links = re.findall(r"\]\(#(.+?)\)", text)
    assert len(links) == 3 and set(links) <= anchors


def test_whatever_is_in_a_run_changes_no_table_and_makes_no_tag(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        items={"<b>one|other*": np.ones(3)},
        record={
            "recipe_name": "a|b<script>",
            "command": ["x", "train", "--out", "/home/me", "--no-progress", "--out=there", "y"],
        },
    )
    write_report(read_runs([run]), tmp_path / "report", tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    assert [row[0] for row in tables(text)[0]] == ["metric", r"\<b>one\|other\*"]
    assert not re.search(r"(?<!\\)<(b|script)>", text)
    assert "\nnextlat train y\n" in text and "/home/me" not in text


def test_a_file_that_cannot_be_written_is_one_sentence(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder.md").mkdir()
    for place in (tmp_path / "folder.md", tmp_path / "file" / "results.md"):
        command = [
            "report",
            *map(str, runs[-2:]),
            "-o",
            str(tmp_path / "report"),
            "--markdown",
            str(place),
        ]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert (
            result.stderr.startswith(f"error: cannot write {place}: ")
            and result.stderr.count("\n") == 1
        )
    assert (tmp_path / "file").read_text() == "old"
    with pytest.raises(NextLatError, match="cannot write"):
        write_report(read_runs(runs[-1:]), tmp_path / "report", tmp_path / "folder.md")
    assert not [path for path in tmp_path.rglob(".*")]


def test_the_command_names_both_and_replaces_an_older_file(tmp_path: Path) -> None:
    paths = [write_path_star_run(tmp_path / name, name, 0, NEVER, 0.5) for name in FIVE]
    (tmp_path / "results.md").write_text("old")
    command = [
        "report",
        *map(str, paths),
        "-o",
        str(tmp_path / "results"),
        "--markdown",
        str(tmp_path / "results.md"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert f"report.html and {tmp_path / 'results.md'}." in result.stderr
    text = (tmp_path / "results.md").read_text()
    assert (
        text.startswith("# NextLat, MTP, JTP, BST against next-token\n")
        and "(results/metrics.png)" in text
    )
