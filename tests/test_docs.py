"""The documentation says what the code says: its generated parts are complete, its programs run."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

from nextlat import evaluation
from nextlat.cli import app
from nextlat.objectives import OBJECTIVES
from nextlat.tasks import TASKS
from nextlat.training.recipe import Recipe, built_in_recipes, load_recipe
from nextlat.validation import Settings

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WRITTEN = [page for page in PAGES if page.stem not in ("log", "results")]  # as it is now
PROGRAMS = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]

TABLES = ("backbone", "optimizer", "schedule", "run")
ABOVE_ALL_TABLES = ("objective", "steps", "batch_size", "gradient_accumulation", "seed")


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """docs/generate.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_in_pages_run(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "program", "exec"), {})


@pytest.mark.parametrize("path", [ROOT / "CONTRIBUTING.md", *WRITTEN], ids=lambda path: path.stem)
def test_every_file_that_a_page_names_exists(path: Path) -> None:
    code = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for name in re.findall(r"`([\w/.-]+\.(?:py|toml|txt|md))`", code):
        if "NAME" not in name and "/" in name:
            assert (ROOT / name).exists() or (ROOT / "src" / "nextlat" / name).exists(), name


def test_what_the_method_points_to_is_there() -> None:
    file, checked = "", 0
    for place in re.findall(r"\*In the code:\*(.*?)(?:\n\n|$)", page("method"), re.DOTALL):
        for token in re.findall(r"`([\w/.]+)`", place):
            if token.endswith(".py"):
                file = (ROOT / "src" / "nextlat" / token).read_text()
                continue
            for name in token.split("."):
                assert re.search(rf"(class|def) {name}\b", file), token
                checked += 1
    assert checked > 8


def test_every_public_name_is_documented(generate: ModuleType) -> None:
    assert [*generate.undocumented()] == []
    assert "::: nextlat.attach" in generate.reference()


def test_a_public_name_without_a_docstring_is_noticed(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextlat.model.attach.__doc__", None)
    monkeypatch.setattr("nextlat.model.ObjectiveModel.hidden.__doc__", None)
    assert [*generate.undocumented()] == ["nextlat.ObjectiveModel.hidden", "nextlat.attach"]
    with pytest.raises(ValueError, match="without a docstring: nextlat"):
        generate.reference()


def test_every_command_and_option_is_there(generate: ModuleType) -> None:
    page = generate.command_line()
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert f"## `nextlat {name}`" in page
        section = page.partition(f"## `nextlat {name}`")[2].partition("\n## ")[0]
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                assert parameter.help and parameter.help.split("<")[0] in section.replace("\n", " ")
                assert all(
                    option in section
                    for option in [*parameter.opts, *parameter.secondary_opts]
                    if option.startswith("-")
                )


def test_every_task_and_each_of_its_metrics_is_there(generate: ModuleType) -> None:
    asked_for = re.findall(r"<!-- generated: metrics ?(\S*) -->", page("tasks"))
    assert asked_for == ["", *TASKS]
    text = generate.filled(page("tasks"))
    tasks = [load_recipe(name).task.build() for name in generate.SMALL.values()]
    declared = [metric for task in tasks for metric in task.metrics] + generate.text_metrics()
    assert len({metric.name for metric in declared}) > 15
    for metric in [*declared, evaluation.NEXT_TOKEN_LOSS, evaluation.SPEEDUP]:
        row = next(line for line in text.splitlines() if line.startswith(f"| {metric.title} |"))
        assert metric.definition.replace("|", "\\|").replace("<", "&lt;") in row


def test_every_recipe_and_every_key_is_there(generate: ModuleType) -> None:
    text = generate.filled(page("recipes"))
    for name in built_in_recipes():
        assert f"### {name}\n" in text
    kinds = {
        **{f'`[task]` with `name = "{name}"`': kind for name, kind in TASKS.items()},
        **{f"`[objectives.{name}]`": kind for name, (kind, _) in OBJECTIVES.items()},
        **{f"`[{name}]`": Recipe.model_fields[name].annotation for name in TABLES},
    }
    for heading, kind in kinds.items():
        section = text.partition(f"### {heading}\n")[2].partition("\n### ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [*kind.model_fields]
    assert {*Recipe.model_fields} == {*TABLES, *ABOVE_ALL_TABLES, "task", "objectives"}
    assert all(f"| `{key}` |" in text for key in ABOVE_ALL_TABLES)
    row = next(line for line in text.splitlines() if line.startswith("| `lambda_kl` |"))
    assert "| number ≥ 0 | `1.0` |" in row and "paper" in row


def test_a_key_without_a_description_is_an_error(generate: ModuleType) -> None:
    class Undescribed(Settings):
        """A class.

        Attributes:
            steps: optimiser steps.
        """

        steps: int = 1
        rate: float = 0.1

    with pytest.raises(ValueError, match="Undescribed does not describe rate"):
        generate.settings(Undescribed)


def test_generated_parts_are_deterministic(generate: ModuleType) -> None:
    for page in PAGES:
        text = page.read_text()
        assert generate.filled(text) == generate.filled(text)
        assert "<!-- generated" not in generate.filled(text)


def test_an_unknown_part_is_an_error(generate: ModuleType) -> None:
    with pytest.raises(KeyError, match="nonsense"):
        generate.filled("a\n\n<!-- generated: nonsense -->\n")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    method = (tmp_path / "method.html").read_text()
    assert "<math" in method and "arithmatex" not in method
    everything = "".join(path.read_text() for path in tmp_path.glob("*.html"))
    assert not re.search(
        r'(?:src|<link[^>]* href)="https?://', everything
    )  # works without a network
