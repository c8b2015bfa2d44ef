"""What to know of the runs in a report besides their results: titles, scale, commands, and what was
measured."""

import shlex
from collections.abc import Iterable

from nextlat.report.comparison import Comparison, TaskComparison
from nextlat.report.glossary import Term, describe
from nextlat.report.models import TITLES
from nextlat.report.published import Published
from nextlat.report.runs import Run

NONE = "\N{EN DASH}"
TASK_TITLES = {
    "streets": "Streets of a city",
    "word-problem": "Word problem",
    "path-star": "Path-Star",
    "countdown": "Countdown",
    "text": "Text",
    "hmm": "Hidden Markov model",
}
INTRODUCTION = (
    "The same transformer trained with different objectives, measured on what it knows about its world. Each difference comes with "
    "its error; only what lies beyond the error is claimed."
)
BY_ITEMS = "Errors and verdicts over test items; in brackets the 95 % interval (Wilson) of what is a share of them."
OTHER_SCALE = "Published figures, on another scale"
SCALE = (  # what of `facts` says how large a run was
    "Recipe",
    "Optimiser steps",
    "Rows per step",
    "Training tokens",
    "Parameters, transformer",
    "Parameters, objective's own",
    "Seeds",
    "Device",
    "Threads",
)

LEFT_OUT = ("--out", "--progress", "--no-progress")  # of commands


def headline(comparison: Comparison) -> str:
    """Which objectives are compared with which."""
    runs = [
        run for task in comparison.tasks for group in task.models.values() for run in group.values()
    ]
    objectives = list(dict.fromkeys(TITLES.get(run.objective, run.objective) for run in runs))
    base = next((task.baseline for task in comparison.tasks if task.baseline is not None), None)
    others = [name for name in objectives if name != base]
    return ", ".join(others or objectives) + (
        f" against {base}" if base is not None and others else ""
    )


def title(task: TaskComparison) -> str:
    """Of its section."""
    return TASK_TITLES.get(task.task, task.task)


def facts(runs: Iterable[Run]) -> dict[str, str]:
    """What to know of one model's runs; facts that differ between its seeds are all given."""
    runs = list(runs)
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
        "Seconds of training": each(
            f"{run.record['seconds']:,.0f}" if "seconds" in run.record else NONE for run in runs
        ),
        "Device": each(str(run.record.get("device", NONE)) for run in runs),
        "Threads": each(str(run.record.get("threads", NONE)) for run in runs),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or NONE,
        "Git commit": each(_commit(run.record.get("git")) for run in runs),
        "World": str(record["task"]["fingerprint"]),
    }


def scale(task: TaskComparison) -> str:
    """How large the runs were, in one line; what differs between models is given for each value."""
    found = {label: facts(runs.values()) for label, runs in task.models.items()}
    parts = []
    for name in SCALE:
        owners: dict[str, list[str]] = {}
        for label, known in found.items():
            owners.setdefault(known[name], []).append(label)
        values = [
            value + (f" ({', '.join(labels)})" if len(owners) > 1 else "")
            for value, labels in owners.items()
        ]
        parts.append(f"{name[0].lower()}{name[1:]}: {'; '.join(values)}")
    return " \N{MIDDLE DOT} ".join(parts)


def _commit(name: object) -> str:
    """Shortened; the plus sign of changed files stays."""
    return name[:12] + "+" * name.endswith("+") if isinstance(name, str) else NONE


def _count(number: object) -> str:
    return f"{number:,}" if isinstance(number, int) else NONE


def commands(task: TaskComparison) -> str:
    """Those that trained the runs, a line each."""
    return "\n".join(
        dict.fromkeys(_command(run) for group in task.models.values() for run in group.values())
    )


def _command(run: Run) -> str:
    """Without where the run went and how it was watched, which changes nothing and says where
    somebody keeps files."""
    words = [str(word) for word in run.record.get("command", [])][1:]
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before != "--out" and word.partition("=")[0] not in LEFT_OUT
    ]
    return shlex.join(["nextlat", *kept]) if words else NONE


def of_another_scale(published: Published) -> str:
    """What must be said beside published figures."""
    return (
        f"Not comparable number by number, these are of {published.setting} ({published.source}). "
        "What can be compared is which method is ahead."
    )


def sayings(published: Published) -> list[str]:
    """What the paper says in words, a sentence each."""
    return [f"{', '.join(saying.methods)}: {saying.text}." for saying in published.sayings]


def definitions(comparison: Comparison) -> list[Term]:
    """What was measured: the metrics that have a definition."""
    names = dict.fromkeys(metric.name for task in comparison.tasks for metric in task.metrics)
    return [term for term in map(describe, names) if term.definition]
