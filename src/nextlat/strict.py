"""Strict tables: a mapping of keys to values becomes a typed dataclass, and whatever is wrong with
it becomes one sentence."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from nextlat.errors import NextLatError


def nearest(name: str, valid: Sequence[str]) -> str:
    """The part of a sentence that names the valid name most like `name`, or all of them if none is."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"perhaps {close[0]} is meant"
    return (
        f"there {'is only' if len(valid) == 1 else 'are'} {', '.join(valid)}"
        if valid
        else "it takes no settings"
    )


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


class Reader:
    """Turns tables into dataclasses and everything that is wrong with them into one sentence.

    Args:
        requests: keys that were set on the command line -> their text and how to name them in a
            sentence.
        where: how to name the place of all other keys, e.g. "recipe city-small.toml".
    """

    def __init__(self, requests: dict[str, tuple[str, str]], where: str) -> None:
        self.requests, self.where = requests, where

    def source(self, key: str) -> str:
        """Where a key was set: the override, or the file."""
        for requested, (_, source) in self.requests.items():
            if requested == key or requested.startswith(f"{key}."):
                return source
        return self.where

    def read(self, kind: type, table: Any, place: str, extra: Sequence[str] = ()) -> Any:
        """One dataclass from one table.

        Args:
            place: the table's dotted name, "" for the top. extra: names that are valid there
                besides the fields.

        Raises:
            NextLatError: an unknown key, a missing one, a wrong type or a value out of range.
        """
        if not isinstance(table, dict):
            raise NextLatError(f"{self.source(place)}: '{place}' must be a table.")
        self._check_keys(kind, table, place, extra)
        adapter = _adapter(kind)
        try:
            return self._validate(adapter, table)
        except ValidationError as error:
            plain = self._as_plain_words(error, table, place)
            if plain is not None:
                try:
                    return self._validate(adapter, plain)
                except ValidationError:
                    pass
            raise NextLatError(self._sentence(error, table, place)) from error
        except (ValueError, TypeError) as error:
            raise NextLatError(f"{self.where}: [{place}] {error}.") from error

    @staticmethod
    def _validate(adapter: TypeAdapter[Any], table: dict[str, Any]) -> Any:
        # Strict as JSON is: 1.0 or true is no int, "1" is no number, but an array may become a
        # tuple and a word a path.
        return adapter.validate_json(json.dumps(table, default=str), strict=True)

    def _check_keys(
        self, kind: type, table: dict[str, Any], place: str, extra: Sequence[str]
    ) -> None:
        hints = get_type_hints(kind, include_extras=True)
        of_fields = getattr(kind, "model_fields", None)  # of a pydantic model
        valid = [f.name for f in fields(kind) if f.init] if of_fields is None else [*of_fields]
        for key, value in table.items():
            full = f"{place}.{key}".lstrip(".")
            if key not in valid:
                table_name = f"[{place}]" if place else "a recipe"
                raise NextLatError(
                    f"{self.source(full)}: {table_name} has no '{key}': {nearest(key, [*valid, *extra])}."
                )
            nested = next(
                (
                    t
                    for t in (hints[key], *get_args(hints[key]))
                    if isinstance(t, type) and is_dataclass(t)
                ),
                None,
            )
            if nested is not None and isinstance(value, dict):
                self._check_keys(nested, value, full, ())

    def _as_plain_words(
        self, error: ValidationError, table: dict[str, Any], place: str
    ) -> dict[str, Any] | None:
        """The table with overrides that do not fit as numbers taken as plain words:
        `task.place=10115` is a place too."""
        changed = dict(table)
        for problem in error.errors():
            key = str(problem["loc"][0]) if problem["loc"] else ""
            text = self.requests.get(f"{place}.{key}".lstrip("."), ("", ""))[0]
            if text and problem["type"].startswith("string"):
                changed[key] = text
        return changed if changed != table else None

    def _sentence(self, error: ValidationError, table: dict[str, Any], place: str) -> str:
        problems = error.errors()
        # A union such as `int | None` reports every branch: the branch that was meant is the one
        # that is not None's.
        problem = next((p for p in problems if p["type"] != "none_required"), problems[0])
        key = str(problem["loc"][0]) if problem["loc"] else ""
        full = f"{place}.{key}".strip(".")
        message = problem["msg"][0].lower() + problem["msg"][1:]
        if problem["type"] == "missing" and len(problem["loc"]) == 1:
            return f"{self.where}: '{full}' is missing."
        if problem["type"] in ("value_error", "assertion_error"):
            return f"{self.source(full)}: {full + ': ' if full else ''}{problem['ctx']['error']}."
        message = "too few values" if problem["type"] == "missing" else message
        return f"{self.source(full)}: '{full}' = {json.dumps(table.get(key), default=str)} is not valid: {message}."
