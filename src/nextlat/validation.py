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

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from nextlat.errors import NextLatError

SHOWN = 200  # characters of a value in an error

Count = Annotated[int, Field(ge=1, le=2**53)]
CountOrZero = Annotated[int, Field(ge=0, le=2**53)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _tuples(value: Any) -> Any:
    """Lists as tuples, which settings have, for they cannot be changed; whoever writes a list in
    Python means the same."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


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
        fields = type(self).model_fields
        for name in fields.keys() & values.keys():
            if "list[" not in str(fields[name].annotation):
                values[name] = _tuples(values[name])
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
            where = source("") if callable(source) else source
            raise NextLatError(f"{where}: it is nested too deeply.") from error


class Lookup:
    """Annotates a field whose class is looked up when a table is validated, e.g. in a registry,
    which may have grown since this module was imported.

    Args:
        find: of a table -> the type that it belongs to, and what of the table is validated. It
            raises ValueError for a name that it does not know.
    """

    def __init__(self, find: Callable[[Any], tuple[Any, Any]]) -> None:
        self.find = find

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def _validate(self, table: Any) -> Any:
        kind, content = self.find(table)
        return TypeAdapter(kind).validate_json(json.dumps(content))


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
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_int=_whole_number)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise NextLatError(f"{path} is corrupt ({error}): {way_out}.") from error


def _whole_number(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**63:
        raise ValueError("it holds a whole number beyond 64 bits")
    return number


def check_format(version: Any, known: int, path: Path, again: str) -> None:
    """Refuse a file of another version of this package.

    Args:
        version: the format that the file names.
        known: the one that this version reads.
        path: of the file.
        again: what to do about an older one.

    Raises:
        NextLatError: it is another format.
    """
    if type(version) is not int or version == known:
        return
    age, way_out = (
        ("n older", again) if version < known else (" newer", "update nextlat to read it")
    )
    raise NextLatError(f"{path} is of a{age} version of nextlat (format {version}): {way_out}.")


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
        model: the class that was validated; the title in its configuration ("a recipe") names it.
        table: what was validated.
        source: see `Settings.from_json`.
    """
    problems = error.errors()
    # A union such as `int | None` reports every branch: the one that was meant is not None's.
    problem = next((p for p in problems if p["type"] != "none_required"), problems[0])
    path, owner = locate(problem["loc"], model, table)
    kind, value = problem["type"], problem["input"]
    message = problem["msg"][0].lower() + problem["msg"][1:]
    if kind == "missing" and isinstance(problem["loc"][-1], int):
        kind, message = "too_short", "too few values"
    key = ".".join(path)
    where = source(key) if callable(source) else source
    if kind == "extra_forbidden":
        parent = ".".join(path[:-1])
        holder = f"[{parent}]" if parent else model.model_config.get("title") or "it"
        guess = nearest(path[-1], [*owner.model_fields] if owner else [])
        return f"{where}: {holder} has no '{path[-1]}': {guess}."
    if kind == "missing":
        return f"{where}: '{key}' is missing."
    if kind in ("value_error", "assertion_error"):
        return f"{where}: {f'{key}: ' if key else ''}{problem['ctx']['error']}."
    if kind in ("model_type", "dict_type", "typed_dict_type"):
        return f"{where}: '{key}' must be a table." if key else f"{where}: it is not a table."
    if not key:
        return f"{where}: it is not valid: {message}."
    return (
        f"{where}: '{clip(key)}' = {clip(json.dumps(value, default=str))} is not valid: {message}."
    )


def clip(text: str) -> str:
    """A text that fits into a sentence."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def locate(
    location: Sequence[int | str], model: type[BaseModel], table: Any
) -> tuple[list[str], type[BaseModel] | None]:
    """The keys of a location without the names of union branches, and the class that owns the last.

    pydantic puts the branch of a union into the location: `("task", "streets", "rows")`.

    Args:
        location: of a problem that pydantic reports.
        model: the class that was validated.
        table: what was validated.
    """
    path: list[str] = []
    owner: type[BaseModel] | None = model
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
        if not last and owner is not None and (field := owner.model_fields.get(str(part))):
            lookup = next((mark for mark in field.metadata if isinstance(mark, Lookup)), None)
            owner = lookup.find(table)[0] if lookup else _model_in(field.annotation)
    return path, owner


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation such as `Model | None` or `list[Model]` stands for."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, Annotated, list, tuple, dict):
        return next(filter(None, map(_model_in, get_args(annotation))), None)
    return None
