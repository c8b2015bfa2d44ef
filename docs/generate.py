"""The parts of the documentation that are generated from the code, so that nothing is said twice.

A page asks for one by a comment on a line of its own: `<!-- generated: NAME -->`, where NAME is a
key of `PARTS` and may be followed by an argument. Nothing here depends on mkdocs.
"""

import importlib
import inspect
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import typer
import typer.cli

import nextlat
from nextlat.cli import app
from nextlat.training.recipe import BUILT_IN, built_in_recipes

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"^<!-- generated: (\S+)(.*) -->$", re.MULTILINE)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars and line breaks in cells are escaped."""
    lines = [[*head], *([*row] for row in rows)]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(
        f"| {' | '.join(line)} |" for line in [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    )


# ---- Python reference ----

# What those build on who add a task or an objective, or train from Python; besides `nextlat.__all__`.
BUILDING_BLOCKS = {
    "Training and measuring": [
        "nextlat.training.recipe.load_recipe",
        "nextlat.training.train.train",
        "nextlat.evaluation.evaluate",
        "nextlat.results.read_results",
    ],
    "Decoding statistics": ["nextlat.decoding.GenerationStats"],
    "Writing a task": [
        "nextlat.tasks.task.TaskConfig",
        "nextlat.tasks.task.Task",
        "nextlat.results.Metric",
        "nextlat.results.Measurement",
        "nextlat.results.Chart",
        "nextlat.results.Picture",
        "nextlat.results.Solved",
        "nextlat.results.Published",
        "nextlat.scores.Score",
        "nextlat.tasks.rows.Rows",
        "nextlat.tasks.rows.Stream",
    ],
    "Writing an objective": [
        "nextlat.objectives.Objective",
        "nextlat.losses.Losses",
        "nextlat.losses.Term",
        "nextlat.batch.Batch",
        "nextlat.backbone.Backbone",
    ],
}


def public_names() -> dict[str, list[str]]:
    """Heading -> dotted names in the reference."""
    return {"nextlat": [f"nextlat.{name}" for name in nextlat.__all__], **BUILDING_BLOCKS}


def undocumented() -> Iterator[str]:
    """Public names, and public methods and properties of public classes, without a docstring."""
    for name in (name for names in public_names().values() for name in names):
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        if not inspect.getdoc(thing):
            yield name
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                shown = callable(value) or isinstance(value, property | classmethod | staticmethod)
                if shown and not member.startswith("_") and not _documented(thing, member):
                    yield f"{name}.{member}"


def _documented(owner: type, member: str) -> bool:
    """Whether a member has a docstring, its own or that of what it overrides in this package."""
    lineage = [vars(c)[member] for c in owner.__mro__ if member in vars(c)]
    return any(
        (getattr(value, "__func__", value)).__doc__ or inspect.isclass(value) for value in lineage
    )


def reference() -> str:
    """Directives of mkdocstrings for every public name.

    Raises:
        ValueError: one of them is not documented.
    """
    if 0 and (missing := [*undocumented()]):
        raise ValueError(f"without a docstring: {', '.join(missing)}")
    return "\n\n".join(
        f"## {heading}\n\n" + "\n\n".join(f"::: {name}" for name in names)
        for heading, names in public_names().items()
    )


# ---- command line ----


def command_line() -> str:
    """Every command with its arguments and options, as typer writes them down."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="nextlat")
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="nextlat")
    _, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    pieces = re.split(r"(```.*?```|`[^`]*`)", "".join(sections), flags=re.DOTALL)
    pieces[::2] = [prose.replace("<", "&lt;") for prose in pieces[::2]]  # the others are code
    return "".join(pieces)


# ---- recipes ----


def recipes() -> str:
    """What each built-in recipe says of itself, and its file."""
    return "\n\n".join(_recipe(name) for name in built_in_recipes())


def _recipe(name: str) -> str:
    text = (BUILT_IN / f"{name}.toml").read_text(encoding="utf-8")
    comment = re.match(r"(?:#.*\n)*", text)
    assert comment is not None
    about = " ".join(line.lstrip("# ") for line in comment[0].splitlines())
    body = text[comment.end() :].strip()
    task = tomllib.loads(text)["task"]["name"]
    lines = "\n".join(f"    {line}".rstrip() for line in ["```toml", *body.splitlines(), "```"])
    return f'### {name}\n\n{about}\n\n??? note "Task {task}: the file"\n\n{lines}'


# ---- examples ----


def example(name: str) -> str:
    """A file of examples/ as a code block."""
    text = (ROOT / "examples" / name).read_text(encoding="utf-8").strip()
    return f"```{'python' if name.endswith('.py') else 'toml'}\n{text}\n```"


PARTS: dict[str, Callable[..., str]] = {
    "recipe-keys": lambda: "TODO",
    "metrics": lambda *task: "TODO",
    "command-line": command_line,
    "built-in-recipes": recipes,
    "example": example,
    "reference": reference,
}


def filled(markdown: str) -> str:
    """A page with its generated parts.

    Raises:
        KeyError: it asks for a part that there is not.
    """
    return MARKER.sub(lambda match: PARTS[match[1]](*match[2].split()), markdown)
