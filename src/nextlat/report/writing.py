"""A report on disk: PNG pictures, comparison.json, and report.html with all of it inside; beside
them, if wanted, Markdown."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nextlat.files import TEMPORARY, move_into, remove, write_errors, write_text
from nextlat.report.comparison import compare
from nextlat.report.markdown import markdown as write_markdown
from nextlat.report.page import page
from nextlat.report.pictures import draw
from nextlat.report.reproduction import reproduction
from nextlat.report.runs import Run
from nextlat.report.wording import claims

PAGE, COMPARISON = "report.html", "comparison.json"


def write_report(
    runs: Sequence[Run], directory: str | Path, markdown: str | Path | None = None
) -> Path:
    """Compare runs and write the report into a directory (made if need be), where an older report
    is replaced.

    Every file is moved into place whole, the page last; if anything fails, what was there stays.

    Args:
        markdown: a file for the report as Markdown too, which shows the pictures in `directory` by
            relative links; it is written when they are in place.

    Returns:
        The path of the page.

    Raises:
        NextLatError: the runs cannot be compared, a map.json is corrupt, or the report cannot be
            written.
    """
    directory, comparison = Path(directory), compare(runs)
    staging = directory / f"{TEMPORARY}report"
    if markdown is not None:
        markdown = Path(markdown)
        with write_errors(markdown):
            markdown.parent.mkdir(parents=True, exist_ok=True)
    with write_errors(directory):
        try:
            remove(staging)
            staging.mkdir(parents=True)
            pictures = [
                draw(task, staging, "" if len(comparison.tasks) == 1 else f"-{task.task}")
                for task in comparison.tasks
            ]
            said = [
                {**asdict(claim), "text": claim.text}
                for task in comparison.tasks
                for claim in claims(task)
            ]
            beside = [
                {
                    "task": task.task,
                    "metric": one.metric,
                    "model": one.model,
                    "published": one.published,
                    "outcome": one.outcome,
                }
                for task in comparison.tasks
                for one in reproduction(task)
            ]
            content = json.dumps(
                {**comparison.to_dict(), "claims": said, "reproduction": beside},
                indent=2,
                allow_nan=False,
            )
            (staging / COMPARISON).write_text(content + "\n", encoding="utf-8")
            (staging / PAGE).write_text(page(comparison, pictures), encoding="utf-8")
            move_into(staging, directory, last=PAGE)
        finally:
            remove(staging)
    if markdown is not None:
        folder = Path(os.path.relpath(directory.resolve(), markdown.parent.resolve()))
        write_text(markdown, write_markdown(comparison, pictures, folder.as_posix()))
    return directory / PAGE
