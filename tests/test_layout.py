"""The house: what the README says of it is so, and imports go one way through it."""

import ast
import importlib
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "nextlat"
FILES = sorted(SOURCE.rglob("*.py"))
LINE_LIMIT = 400
SAYS_NOTHING = {"known", "strict", "jobs", "facts", "models", "wording", "writing", "utils"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported_by(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it: at the top, in a function, or
    for type checkers only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in inner}
    return {name for name in found if name.partition(".")[0] == "nextlat"}


def readme_rooms() -> list[str]:
    """The entries of the README's tree, in its order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```\nsrc/nextlat/.*?\n(.*?)```", readme, re.DOTALL)
    assert tree is not None
    lines = [line for line in tree[1].splitlines() if re.match(r"  \w", line)]
    return [
        name
        for line in lines
        for name in re.findall(r"^  ((?:\w+(?:\.py|/)[ ]?)+)", line)[0].split()
    ]


def room(module: str) -> str:
    """The entry of the tree that a module belongs to."""
    first = module.split(".")[1]
    return f"{first}/" if (SOURCE / first).is_dir() else f"{first}.py"


def test_the_tree_in_the_readme_has_every_room() -> None:
    there = {room(name) for name in MODULES if name not in ("nextlat", "nextlat.__main__")}
    assert sorted(readme_rooms()) == sorted(there)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_from_rooms_below_its_own(module: str) -> None:
    if module in ("nextlat", "nextlat.__main__"):
        return  # the front door, which nothing below may open: `room` of it fails the test
    order = readme_rooms()
    upwards = [
        name
        for name in imported_by(MODULES[module])
        if name == "nextlat" or order.index(room(name)) < order.index(room(module))
    ]
    assert upwards == []


def test_no_imports_go_in_a_circle() -> None:
    graph = {name: imported_by(path) - {name} for name, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES)


def test_files_are_short_and_have_names_of_their_own() -> None:
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > LINE_LIMIT}
    names = Counter(path.stem for path in FILES if path.stem != "__init__")
    assert long == {}
    assert [name for name, count in names.items() if count > 1] == []
    assert SAYS_NOTHING.isdisjoint(names)


def test_lines_are_at_most_a_hundred_characters() -> None:
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("src", "tests", "benchmarks", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert wide == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_what_benchmarks_import_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nextlat"):
            module = importlib.import_module(node.module or "")
            missing = [x.name for x in node.names if not hasattr(module, x.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"
