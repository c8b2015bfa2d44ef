"""The parts of the documentation that are generated from the code, so that nothing is said twice.

A page asks for one by a comment on a line of its own: `<!-- generated: NAME -->`, where NAME is a
key of `PARTS` and may be followed by an argument. Nothing here depends on mkdocs.
"""

import importlib
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
import typer.cli
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

import nextlat
from nextlat import evaluation
from nextlat.cli import app
from nextlat.objectives import OBJECTIVES
from nextlat.results import Metric
from nextlat.tasks import TASKS
from nextlat.tasks.text.text import TextConfig
from nextlat.tasks.text.tokens import END_OF_TEXT
from nextlat.training.recipe import BUILT_IN, Recipe, built_in_recipes, load_recipe
from nextlat.validation import Settings

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"^<!-- generated: (\S+)(.*) -->$", re.MULTILINE)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table of plain text with code in it."""
    lines = [[*head], *([*row] for row in rows)]
    cells = [[plain(" ".join(cell.split())).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(
        f"| {' | '.join(line)} |" for line in [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    )


def plain(text: str) -> str:
    """Text in which Markdown finds no HTML: `<` is escaped, but in code."""
    pieces = re.split(r"(```.*?```|`[^`]*`)", text, flags=re.DOTALL)
    pieces[::2] = [prose.replace("<", "&lt;") for prose in pieces[::2]]
    return "".join(pieces)


# ---- Python reference ----

# Besides `nextlat.__all__`: what a task or an objective of one's own, or a training from Python,
# builds on.
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
        "nextlat.scores.mean_score",
        "nextlat.scores.ratio_score",
        "nextlat.tasks.task.word_tokenizer",
        "nextlat.tasks.task.world_fingerprint",
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
    if missing := [*undocumented()]:
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
    return plain("".join(sections))


# ---- metrics ----

# A recipe for each task whose settings the lengths and the like in its metrics are taken from.
SMALL = {
    "streets": "city-tiny",
    "word-problem": "word-problem-small",
    "path-star": "path-star-small",
    "countdown": "countdown-small",
    "hmm": "hmm-small",
}
UNITS = {"share": "per cent", "nats": "nats", "factor": "times", "number": "number"}
DIRECTIONS = {True: "higher", False: "lower", None: ""}


def metrics(task: str | None = None) -> str:
    """The definitions of the metrics of a task; without one, of those that every task has."""
    if task is None:
        declared = [value for value in vars(evaluation).values() if isinstance(value, Metric)]
    elif task == "text":
        declared = text_metrics()
    else:
        declared = [*load_recipe(SMALL[task]).task.build().metrics]
    return table(
        ("metric", "unit", "better", "over", "definition", "source"), map(metric_row, declared)
    )


def text_metrics() -> list[Metric]:
    """Of the task that needs a text, which is this documentation."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "text.txt"
        path.write_text(END_OF_TEXT.join(p.read_text() for p in sorted(ROOT.glob("*.md"))))
        task = TextConfig(train=str(path), vocab_size=300, held_out=1, prompt_length=8).build()
        return [*task.metrics]


def metric_row(metric: Metric) -> tuple[str, ...]:
    """A metric as its task declares it."""
    return (
        metric.title,
        UNITS[metric.unit],
        DIRECTIONS[metric.higher_is_better],
        "" if metric.items == Metric.model_fields["items"].default else metric.items,
        metric.definition,
        metric.source,
    )


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


# ---- recipe keys ----


def recipe_keys() -> str:
    """Every key of a recipe: its type, its default, and what its class says of it."""
    fields, texts = Recipe.model_fields, described(Recipe)
    tables = {name: f.annotation for name, f in fields.items() if is_settings(f.annotation)}
    top = [
        (f"`{name}`", type_words(field), default_words(field), texts[name])
        for name, field in fields.items()
        if name not in ("task", "objectives", *tables)
    ]
    kinds = {
        **{f"`[{name}]`": kind for name, kind in tables.items()},
        **{f"`[objectives.{name}]`": kind for name, (kind, _) in OBJECTIVES.items()},
        **{f'`[task]` with `name = "{name}"`': kind for name, kind in TASKS.items()},
    }
    parts = [section("Above all tables", "", top)]
    parts += [section(name, first_line(kind), settings(kind)) for name, kind in kinds.items()]
    return "\n\n".join(parts)


def section(heading: str, about: str, rows: Sequence[Sequence[str]]) -> str:
    """The keys of one table of a recipe."""
    keys = table(("key", "type", "default", "meaning"), rows) if rows else "There are no settings."
    return f"### {heading}\n\n{plain(about)}\n\n{keys}"


def settings(kind: type[Settings]) -> list[tuple[str, str, str, str]]:
    """Key, type, default and description of every field of a class.

    Raises:
        ValueError: a field without a description.
    """
    texts = described(kind)
    if missing := [name for name in kind.model_fields if not texts.get(name)]:
        raise ValueError(f"{kind.__name__} does not describe {', '.join(missing)}")
    return [
        (f"`{name}`", type_words(field), default_words(field), texts[name])
        for name, field in kind.model_fields.items()
    ]


def type_words(field: FieldInfo) -> str:
    """The type of a field, with its lower bound."""
    annotated: Any = (
        Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    )
    return schema_words(TypeAdapter(annotated).json_schema())


def schema_words(schema: dict[str, Any]) -> str:
    """A JSON schema in words; that a key need not be set goes without saying."""
    if "anyOf" in schema:
        return " or ".join(
            schema_words(one) for one in schema["anyOf"] if one.get("type") != "null"
        )
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    if schema.get("type") == "array":
        return f"list of {schema_words(schema.get('items') or schema['prefixItems'][0])}"
    words = {"boolean": "true or false", "string": "text"}.get(schema["type"], schema["type"])
    bounds = {"minimum": "≥", "exclusiveMinimum": ">"}
    return " ".join(
        [words, *(f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema)]
    )


def default_words(field: FieldInfo) -> str:
    """The default of a field as it would stand in a recipe; nothing where the key is simply not
    set."""
    if field.is_required():
        return "required"
    value = field.default
    return "" if value is None else f"`{json.dumps(value)}`"


def described(kind: type) -> dict[str, str]:
    """Field -> its description, from the docstrings of a class and its bases.

    An entry is `name: text` (or `name, name: text`), indented by four, its other lines further.
    """
    found: dict[str, str] = {}
    for cls in kind.__mro__:
        entries = re.findall(
            r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)",
            inspect.cleandoc(cls.__doc__ or ""),
            re.MULTILINE,
        )
        for names, text in entries:
            for name in names.split(", "):
                found.setdefault(name, " ".join(text.split()))
    return found


def first_line(kind: type) -> str:
    """The first paragraph of a docstring."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())


def is_settings(kind: Any) -> bool:
    """Whether the type of a field is a table of settings."""
    return inspect.isclass(kind) and issubclass(kind, Settings)


# ---- examples ----


def example(name: str) -> str:
    """A file of examples/ as a code block."""
    text = (ROOT / "examples" / name).read_text(encoding="utf-8").strip()
    return f"```{'python' if name.endswith('.py') else 'toml'}\n{text}\n```"


PARTS: dict[str, Callable[..., str]] = {
    "recipe-keys": recipe_keys,
    "metrics": metrics,
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
