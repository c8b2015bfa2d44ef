"""Strict settings and records: what pydantic finds wrong with them becomes one sentence.

Recipes, the settings of tasks and objectives, and every JSON file that this package reads are
`Settings`: an unknown key, a wrong type or a value out of range is an error, and nothing is
converted behind the user's back.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nextlat.errors import NextLatError

Count = Annotated[int, Field(ge=1, le=2**53)]
CountOrZero = Annotated[int, Field(ge=0, le=2**53)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base class of everything that is read strictly. Instances cannot be changed.

    Raises:
        NextLatError: from the constructor, where pydantic would raise its own error.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=False,
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise NextLatError(sentence(error, type(self), values, type(self).__name__)) from error

    # Told to pydantic so that it validates nested tables itself, with their place in the error.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def from_json(cls, table: Any, source: str | Callable[[str], str]) -> Self:
        """Validate what a JSON or TOML file holds: lists may stand for tuples, words for paths.

        Args:
            table: the content of the file.
            source: where it comes from, as the sentence begins ("recipe city-small.toml"), or a
                function that tells the origin of a dotted key.

        Raises:
            NextLatError: an unknown or missing key, a wrong type or a value out of range.
        """
        try:
            return cls.model_validate_json(json.dumps(table, default=str))
        except ValidationError as error:
            raise NextLatError(sentence(error, cls, table, source)) from error
        except RecursionError as error:
            raise NextLatError(f"{source}: it is nested too deeply.") from error


def read_json(path: Path, way_out: str) -> Any:
    """The content of a JSON file.

    Args:
        path: of the file.
        way_out: what to do if it cannot be read, the second half of the sentence.

    Raises:
        NextLatError: it cannot be read, or is not JSON.
        FileNotFoundError: there is no such file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise NextLatError(f"{path} is corrupt ({error}): {way_out}.") from error


def nearest(name: str, valid: Sequence[str]) -> str:
    """The part of a sentence that names the valid name closest to `name`, or else all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"perhaps {close[0]} is meant"
    if not valid:
        return "it takes no settings"
    return f"there {'is only' if len(valid) == 1 else 'are'} {', '.join(valid)}"


def sentence(
    error: ValidationError,
    model: type[BaseModel],
    table: Any,
    source: str | Callable[[str], str],
) -> str:
    """One sentence for the first thing that is wrong: where, what, and the nearest valid name.

    Args:
        error: of a validation against `model`.
        model: the class that was validated.
        table: what was validated.
        source: see `Settings.from_json`.
    """
    problems = error.errors()
    # A union such as `int | None` reports every branch: the one that was meant is not None's.
    problem = next((p for p in problems if p["type"] != "none_required"), problems[0])
    path, owner = _resolve(model, table, problem["loc"])
    key = ".".join(path)
    where = source(key) if callable(source) else source
    if problem["type"] == "extra_forbidden":
        parent = ".".join(path[:-1])
        fields = [] if owner is None else list(owner.model_fields)
        return (
            f"{where}: {f'[{parent}]' if parent else 'it'} has no '{path[-1]}': "
            f"{nearest(path[-1], fields)}."
        )
    if problem["type"] == "missing":
        return f"{where}: '{key}' is missing."
    if problem["type"] in ("value_error", "assertion_error"):
        return f"{where}: {f'{key}: ' if key else ''}{problem['ctx']['error']}."
    message = problem["msg"][0].lower() + problem["msg"][1:]
    value = json.dumps(problem["input"], default=str)
    if not key:
        return f"{where} is not valid: {message}."
    return f"{where}: '{key}' = {value} is not valid: {message}."


def _resolve(
    model: Any, table: Any, location: Sequence[int | str]
) -> tuple[list[str], type[BaseModel] | None]:
    """The keys of a location without the names of union branches, and the model that owns the last.

    pydantic puts the branch of a union into the location: `("task", "streets", "rows")`.
    """
    path: list[str] = []
    owner = model if isinstance(model, type) and issubclass(model, BaseModel) else None
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(table, Mapping):
            if part not in table and not last:
                continue  # the name of a branch, or of the validator that failed
            table = table.get(part)
        elif isinstance(table, list | tuple) and isinstance(part, int) and part < len(table):
            table = table[part]
        elif path:
            continue
        path.append(str(part))
        if owner is not None and not last:
            field = owner.model_fields.get(str(part))
            owner = None if field is None else _model_in(field.annotation, table)
    return path, owner


def _model_in(annotation: Any, table: Any) -> type[BaseModel] | None:
    """The model that an annotation such as `Model | None` or a union of models stands for."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, Annotated, list, tuple, dict):
        found = [model for a in get_args(annotation) if (model := _model_in(a, table)) is not None]
        named = [m for m in found if isinstance(table, Mapping) and _is_named(m, table)]
        return next(iter(named or found), None)
    return None


def _is_named(model: type[BaseModel], table: Mapping[str, Any]) -> bool:
    """Whether a table's `name` is the one that belongs to this branch of a union."""
    field = model.model_fields.get("name")
    return field is not None and table.get("name") in (field.default, *get_args(field.annotation))
