"""The page itself: one HTML file without scripts or links to other files, for light and dark, wide and narrow screens."""

import base64
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from nextlat.report.comparison import Comparison, MetricComparison, TaskComparison, Verdict
from nextlat.report.glossary import PUBLISHED, describe
from nextlat.report.models import TITLES
from nextlat.report.runs import Run
from nextlat.report.solving import definition, solving
from nextlat.report.style import STYLE
from nextlat.report.terminal import ARROWS
from nextlat.report.wording import claims, difference_text, estimate_text, footnotes, summary, with_error

MARKS: dict[Verdict, str] = {"better": "▲ better", "worse": "▼ worse", "within noise": "≈ within noise", "no claim": "no claim"}
CLASSES: dict[Verdict, str] = {"better": "better", "worse": "worse", "within noise": "noise", "no claim": "noise"}
NONE = "\N{EN DASH}"
TASK_TITLES = {
    "streets": "Streets of a city",
    "word-problem": "Word problem",
    "path-star": "Path-Star",
    "countdown": "Countdown",
    "text": "Text",
    "hmm": "Hidden Markov model",
}


@dataclass(frozen=True)
class Picture:
    """One PNG: its file, what it shows (for those who do not see it), and the line below it."""

    path: Path
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Pictures:
    """The pictures of one task: maps of each seed (one per model), and figures."""

    maps: dict[int, list[Picture]]
    figures: list[Picture]


def page(comparison: Comparison, pictures: Sequence[Pictures]) -> str:
    """The whole HTML document; `pictures` go with `comparison.tasks`."""
    runs = [run for task in comparison.tasks for group in task.models.values() for run in group.values()]
    objectives = list(dict.fromkeys(TITLES.get(run.objective, run.objective) for run in runs))
    base = next((task.baseline for task in comparison.tasks if task.baseline is not None), None)
    others = [name for name in objectives if name != base]
    title = ", ".join(others or objectives) + (f" against {base}" if base is not None and others else "")
    sections = "".join(
        _task(task, shown, alone=len(comparison.tasks) == 1) for task, shown in zip(comparison.tasks, pictures, strict=True)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1><p>The same transformer trained with different objectives, measured on what it knows about "
        f"its world. Each difference comes with its error; only what lies beyond the error is claimed.</p></header>\n"
        f"{sections}{_definitions(comparison)}</main>\n</body>\n</html>\n"
    )


def _task(task: TaskComparison, pictures: Pictures, *, alone: bool) -> str:
    title = TASK_TITLES.get(task.task, task.task)
    return (
        f"<section>\n{'' if alone else f'<h2 class=task>{escape(title)}</h2>'}\n"
        f"{_findings(task)}{_maps(pictures)}{_table(task)}{_solving(task)}{''.join(_figure(picture) for picture in pictures.figures)}"
        f"{_every_seed(task)}{_published(task)}{_making(task)}</section>\n"
    )


def _findings(task: TaskComparison) -> str:
    found = claims(task)
    if not found:
        return ""
    items = "".join(
        f'<li class={CLASSES[claim.verdict]}><span class="mark {CLASSES[claim.verdict]}">{MARKS[claim.verdict]}</span>'
        f"<span><b>{escape(claim.lead)}</b>: {_numbers(claim.numbers)}.</span></li>\n"
        for claim in found
    )
    return f"<h2>Findings</h2>\n<p>{escape(summary(task))}</p>\n<ul class=findings>\n{items}</ul>\n"


def _table(task: TaskComparison) -> str:
    head = "".join(f"<th scope=col>{escape(label)}</th>" for label in task.models)
    rows = "".join(
        f"<tr><th scope=row>{escape(describe(metric.name).title)}&nbsp;{ARROWS[metric.higher_is_better]}</th>"
        + "".join(f"<td>{_cell(metric, label)}</td>" for label in task.models)
        + "</tr>\n"
        for metric in task.metrics
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in footnotes(task))
    return (
        f"<h2>Measurements</h2>\n<div class=scroll><table>\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
        f"<ul class=notes><li>{ARROWS[True]} higher is better, {ARROWS[False]} lower is better.</li>{notes}</ul>\n"
    )


def _cell(metric: MetricComparison, label: str) -> str:
    estimate, difference = metric.estimates.get(label), metric.differences.get(label)
    if estimate is None:
        return f"<span class=quiet>{NONE}</span>"
    text = f"<span class=value>{_numbers(estimate_text(metric.name, estimate))}</span>"
    if difference is None:
        return text
    if describe(metric.name).reference is None:
        text += f"<span class=change>{_numbers(difference_text(metric.name, difference))}</span> "
    if difference.verdict != "no claim":
        text += f'<span class="mark {CLASSES[difference.verdict]}">{MARKS[difference.verdict]}</span>'
    return text


def _numbers(text: str) -> str:
    """Numbers stay together with their signs and units at the end of a line."""
    return escape(text).replace(" ±", "&nbsp;±").replace("± ", "±&nbsp;").replace(" %", "&nbsp;%")


def _every_seed(task: TaskComparison) -> str:
    seeds = sorted({seed for runs in task.models.values() for seed in runs})
    if len(seeds) < 2:
        return ""
    head = "".join(f"<th scope=col>seed {seed}</th>" for seed in seeds)
    rows = []
    for metric in task.metrics:
        unit = describe(metric.name).unit
        for label, estimate in metric.estimates.items():
            difference = metric.differences.get(label)
            cells = ""
            for seed in seeds:
                text = _numbers(with_error(*estimate.seeds[seed], unit)) if seed in estimate.seeds else NONE
                if difference is not None and seed in difference.seeds and difference.seeds[seed].verdict != "no claim":
                    found = difference.seeds[seed]
                    text += f'<br><span class="mark {CLASSES[found.verdict]}">{MARKS[found.verdict]}</span>'
                cells += f"<td>{text}</td>"
            name = f"{escape(describe(metric.name).title)}<span class=change>{escape(label)}</span>"
            rows.append(f"<tr><th scope=row>{name}</th>{cells}</tr>\n")
    return (
        "<details><summary>Every seed by itself</summary>\n<p class=quiet>Errors and verdicts over test items.</p>\n"
        f"<div class=scroll><table>\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody></table></div></details>\n"
    )


def _solving(task: TaskComparison) -> str:
    """Which seeds solve Path-Star, and from which step on."""
    found = solving(task.task, task.models)
    if found is None:
        return ""
    seeds = sorted({seed for one in found.values() for seed in one})
    head = "".join(f"<th scope=col>seed {seed}</th>" for seed in seeds)
    rows = ""
    for label, ours in found.items():
        cells = ""
        for seed in seeds:
            one = ours.get(seed)
            step = f"from step {one.step:,}" if one is not None and one.step is not None else "solved"
            cells += f"<td>{NONE if one is None else step if one.solved else '<span class=quiet>not solved</span>'}</td>"
        share = f"{sum(one.solved for one in ours.values())} of {len(ours)}"
        rows += f"<tr><th scope=row>{escape(label)}</th><td>{share}</td>{cells}</tr>\n"
    return (
        f"<h2>Which seeds solve it</h2>\n<div class=scroll><table>\n<thead><tr><td></td><th scope=col>solved</th>{head}</tr></thead>\n"
        f"<tbody>\n{rows}</tbody></table></div>\n<ul class=notes><li>{escape(definition())}</li></ul>\n"
    )


def _published(task: TaskComparison) -> str:
    published = PUBLISHED.get(task.task)
    if published is None:
        return ""
    here = [metric.name for metric in task.metrics]
    given = list(dict.fromkeys(name for row in published.rows.values() for name in row))
    names = [*(name for name in here if name in given), *(name for name in given if name not in here)]
    head = "".join(f"<th scope=col>{escape(describe(name).title)}</th>" for name in names)
    rows = "".join(
        f"<tr><th scope=row>{escape(method)}</th>"
        + "".join(
            f"<td>{_numbers(with_error(row[name], None, describe(name).unit)) if name in row else NONE}</td>" for name in names
        )
        + "</tr>\n"
        for method, row in published.rows.items()
    )
    table = f"<div class=scroll><table>\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>"
    words = "".join(f"<li>{escape(sentence)}</li>" for sentence in published.words)
    return (
        "<details><summary>Published figures, on another scale</summary>\n"
        f"<p>Not comparable number by number, these are of {escape(published.setting)} ({escape(published.source)}). "
        "What can be compared is which method is ahead.</p>\n"
        f"{table if rows else ''}{f'<ul>{words}</ul>' if words else ''}</details>\n"
    )


# ---- pictures ----


def _maps(pictures: Pictures) -> str:
    if not pictures.maps:
        return ""
    (first, shown), *others = pictures.maps.items()
    text = (
        "<h2>The city in the model's head</h2>\n<p>Rebuilt from the rides that each model generates between places it has never seen "
        "paired. A red street does not exist; it bends from the direction the model took to where it must lead for the ride to make "
        f"sense.{f' Seed {first}.' if others else ''}</p>\n{_side_by_side(shown)}"
    )
    for seed, more in others:
        text += f"<details><summary>Seed {seed}</summary>\n{_side_by_side(more)}</details>\n"
    return text


def _side_by_side(pictures: Iterable[Picture]) -> str:
    return f"<div class=maps>{''.join(_figure(picture) for picture in pictures)}</div>\n"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">{caption}</figure>\n'


# ---- how it was made, what it means ----


def _making(task: TaskComparison) -> str:
    head = "".join(f"<th scope=col>{escape(label)}</th>" for label in task.models)
    facts = {label: _facts(list(runs.values())) for label, runs in task.models.items()}
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f"<td>{escape(found[name])}</td>" for found in facts.values())
        + "</tr>\n"
        for name in next(iter(facts.values()))
    )
    runs = [run for group in task.models.values() for run in group.values()]
    commands = escape("\n".join(dict.fromkeys(_command(run) for run in runs)))
    recipes = "".join(
        f"<details><summary>Recipe of {escape(label)}</summary>\n<pre>{escape(json.dumps(_one_recipe(group), indent=2))}</pre></details>\n"
        for label, group in task.models.items()
    )
    return (
        f"<h2>How it was made</h2>\n<div class=scroll><table class=facts>\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{rows}</tbody>"
        f"</table></div>\n<details><summary>Commands</summary>\n<pre>{commands}</pre></details>\n{recipes}"
    )


def _facts(runs: list[Run]) -> dict[str, str]:
    """What to know of one model's runs; facts that differ between its seeds are all given."""
    record = runs[0].record
    versions = record.get("versions", {})
    parameters = record.get("parameters", {})

    def each(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    return {
        "Recipe": each(str(run.record.get("recipe_name", NONE)) for run in runs),
        "Seeds": each(str(run.seed) for run in runs),
        "Optimiser steps": f"{runs[0].recipe['steps']:,}",
        "Rows per step": f"{runs[0].recipe['batch_size']:,}",
        "Training tokens": each(_count(run.record.get("tokens")) for run in runs),
        "Parameters, transformer": _count(parameters.get("lm")),
        "Parameters, objective's own": _count(parameters.get("objective")),
        "Seconds of training": each(f"{run.record['seconds']:,.0f}" if "seconds" in run.record else NONE for run in runs),
        "Device": each(str(run.record.get("device", NONE)) for run in runs),
        "Threads": each(str(run.record.get("threads", NONE)) for run in runs),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or NONE,
        "Git commit": each(_commit(run.record.get("git")) for run in runs),
        "World": str(record["task"]["fingerprint"]),
    }


def _commit(name: object) -> str:
    """Shortened; the plus sign of changed files stays."""
    return name[:12] + "+" * name.endswith("+") if isinstance(name, str) else NONE


def _count(number: object) -> str:
    return f"{number:,}" if isinstance(number, int) else NONE


def _command(run: Run) -> str:
    words = [str(word) for word in run.record.get("command", [])]
    return shlex.join(["nextlat", *words[1:]]) if words else NONE


def _one_recipe(runs: dict[int, Run]) -> dict[str, object]:
    return {**next(iter(runs.values())).recipe, "seed": list(runs)}


def _definitions(comparison: Comparison) -> str:
    names = dict.fromkeys(metric.name for task in comparison.tasks for metric in task.metrics)
    items = ""
    for name in names:
        term = describe(name)
        if term.definition:
            source = f" <span class=quiet>({escape(term.source)})</span>"
            items += f"<dt>{escape(term.title)}</dt><dd>{escape(term.definition)}{source}</dd>\n"
    return f"<section>\n<h2>What was measured</h2>\n<dl>\n{items}</dl>\n</section>\n"
