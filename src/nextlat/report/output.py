"""A report on disk: PNG figures, comparison.json, and report.html with all of it inside; beside
them, if wanted, Markdown. And its tables in a terminal."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from nextlat.files import TEMPORARY, move_into, remove, write_errors, write_text
from nextlat.report.claims import claims
from nextlat.report.comparison import BASELINE, TaskComparison, compare
from nextlat.report.document import digest, document, headline
from nextlat.report.published import reproduction
from nextlat.report.render import markdown as render_markdown
from nextlat.report.render import page, terminal
from nextlat.report.runs import Run
from nextlat.results import Metric

PAGE, COMPARISON = "report.html", "comparison.json"


def terminal_table(tasks: Sequence[TaskComparison]) -> RenderableType:
    """The measurements of every task that `compare` found, for rich to print."""
    return terminal(digest(tasks))


def write_report(
    runs: Sequence[Run],
    directory: str | Path,
    markdown: str | Path | None = None,
    *,
    baseline: str = BASELINE,
) -> Path:
    """Compare runs and write the report into a directory (made if need be), where an older report
    is replaced.

    Every file is moved into place whole, the page last; if anything fails, what was there stays.

    Args:
        runs: what to report on.
        directory: of the report.
        markdown: a file for the report as Markdown too, which shows the figures in `directory` by
            relative links; it is written when they are in place.
        baseline: name of the objective that the others are compared with.

    Returns:
        The path of the page.

    Raises:
        NextLatError: the runs cannot be compared, the file of a picture is missing or corrupt, or
            the report cannot be written.
    """
    directory, tasks = Path(directory), compare(runs, baseline)
    staging = directory / f"{TEMPORARY}report"
    if markdown is not None:
        markdown = Path(markdown)
        with write_errors(markdown):
            markdown.parent.mkdir(parents=True, exist_ok=True)
    with write_errors(directory):
        try:
            remove(staging)
            staging.mkdir(parents=True)
            elements = document(tasks, staging)
            text = json.dumps(content(tasks), indent=2, allow_nan=False)
            (staging / COMPARISON).write_text(text + "\n", encoding="utf-8")
            (staging / PAGE).write_text(page(elements, headline(tasks)), encoding="utf-8")
            move_into(staging, directory, last=PAGE)
        finally:
            remove(staging)
    if markdown is not None:
        folder = Path(os.path.relpath(directory.resolve(), markdown.parent.resolve()))
        write_text(markdown, render_markdown(elements, folder.as_posix()))
    return directory / PAGE


def content(tasks: Sequence[TaskComparison]) -> dict[str, Any]:
    """What comparison.json holds of a comparison; numbers that are not finite are None."""
    found = {
        "tasks": [
            {
                "task": task.task.name,
                "fingerprint": task.runs[0].record["task"]["fingerprint"],
                "baseline": task.baseline,
                "models": {
                    label: {seed: str(run.directory) for seed, run in runs.items()}
                    for label, runs in task.models.items()
                },
                "caveats": task.caveats,
                "solving": task.solving,
                "metrics": task.metrics,
            }
            for task in tasks
        ],
        "claims": [
            {**asdict(claim), "text": claim.text} for task in tasks for claim in claims(task)
        ],
        "reproduction": [
            {
                "task": task.task.name,
                **{k: getattr(one, k) for k in ("metric", "model", "published", "outcome")},
            }
            for task in tasks
            for one in reproduction(task)
        ],
    }

    def plain(one: Any) -> Any:
        return one.key if isinstance(one, Metric) else asdict(one)

    return json.loads(json.dumps(found, default=plain), parse_constant=lambda _: None)
