"""Where the documents of a language-modelling task come from: local .txt, .jsonl and .parquet
files, or a Hugging Face dataset."""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nextlat.errors import NextLatError, first_line
from nextlat.hub import hub_or_cache
from nextlat.tasks.task import find_data

FILES = ".txt, .jsonl or .parquet"
INSTALL = "pip install 'nextlat[text]'"
HALF_PAIR = re.compile("[\ud800-\udfff]")  # of surrogates; whole pairs are one character


class Documents:
    """Documents in order, read anew every time they are iterated.

    Those with nothing but white space in them are dropped. Half a surrogate pair, which JSON can
    hold and UTF-8 and tokenizers cannot, is read as U+FFFD.

    Args:
        read: gives the documents.
        where: how to name the source in a sentence.
        way_out: what to do if it cannot be read, the second half of the sentence.

    Attributes:
        dropped: empty documents met in the latest iteration.
        mended: those with half a surrogate pair, likewise.

    Raises:
        NextLatError: (when iterated) it cannot be read, or (at its end) there is no document.
    """

    def __init__(self, read: Callable[[], Iterator[str]], where: str, way_out: str = "") -> None:
        self.read, self.where, self.way_out = read, where, way_out
        self.dropped = self.mended = 0

    def __iter__(self) -> Iterator[str]:
        self.dropped, self.mended, found = 0, 0, False
        try:
            for document in self.read():
                if not document.strip():
                    self.dropped += 1
                    continue
                found = True
                document, halves = HALF_PAIR.subn("\N{REPLACEMENT CHARACTER}", document)
                self.mended += halves > 0
                yield document
        except NextLatError:
            raise
        # pyarrow, datasets, the hub's client and the network raise whatever they like.
        except Exception as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise NextLatError(
                f"{self.where} cannot be read ({reason}): {self.way_out}."
            ) from error
        if not found:
            raise NextLatError(
                f"{self.where} holds no document with any text in it: choose another one."
            )


def from_file(path: str, key: str, *, column: str, separator: str) -> Documents:
    """The documents of one local file.

    Args:
        path: relative to the working directory or to $NEXTLAT_DATA.
        key: the setting that names it.
        column: of the records of a .jsonl or .parquet file.
        separator: of a .txt file, whose line ends all count as "\\n"; white space beside it is not
            text.

    Raises:
        NextLatError: no such file, or of another kind; when iterated: it cannot be read, is
            corrupt, or has no such column.
    """
    file = find_data(path, file=True)
    if file is None:
        raise NextLatError(
            f"there is no file {path} (nor in $NEXTLAT_DATA): set {key} to a {FILES} file."
        )
    readers: dict[str, Callable[[], Iterator[str]]] = {
        ".txt": partial(_separated, file, separator),
        ".jsonl": partial(_records, file, column),
        ".parquet": partial(_parquet, file, column),
    }
    if file.suffix not in readers:
        raise NextLatError(f"{key} = '{path}' is not a {FILES} file: convert it, or rename it.")
    return Documents(readers[file.suffix], str(file), "give a whole file, its text in UTF-8")


def from_dataset(
    name: str, subset: str | None, split: str, *, column: str, streaming: bool
) -> Documents:
    """The documents of one split of a dataset of the Hugging Face hub, or of a local directory of
    its files.

    Args:
        name: hub id, or a directory (relative to the working directory or to $NEXTLAT_DATA).
        subset: its configuration, if any.
        split: of the dataset.
        column: of the records.
        streaming: read over the network as it comes; otherwise it is downloaded whole first and
            kept in the library's cache.

    Raises:
        NextLatError: (when iterated) the library is missing, the dataset cannot be reached, or it
            has no such split or column.
    """
    return Documents(
        partial(_dataset, name, subset, split, column, streaming),
        f"split {split} of dataset {name}{f' ({subset})' if subset else ''}",
        "check its name, subset and split and the network, or set task.train and task.validation "
        f"to local {FILES} files of it, or task.dataset to a directory of them",
    )


def _separated(file: Path, separator: str) -> Iterator[str]:
    separator = separator.replace("\r\n", "\n").replace("\r", "\n")  # as text is read
    for document in file.read_text(encoding="utf-8-sig").split(separator):
        yield document.strip()


def _records(file: Path, column: str) -> Iterator[str]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where, way_out = f"line {number} of {file}", "give one record per line"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise NextLatError(
                    f"{where} is not JSON ({error.msg} at column {error.colno}): {way_out}."
                ) from error
            if not isinstance(record, dict):
                raise NextLatError(f"{where} is not a JSON object: {way_out}.")
            yield _text(record, column, where)


def _parquet(file: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise NextLatError(
            f"reading {file} needs pyarrow: {INSTALL}, or convert it to .jsonl."
        ) from error
    table: Any = pyarrow.parquet.ParquetFile(file)
    _check_column(table.schema_arrow.names, column, str(file))
    for batch in table.iter_batches(columns=[column]):
        for record in batch.to_pylist():
            yield _text(record, column, str(file))


def _dataset(
    name: str, subset: str | None, split: str, column: str, streaming: bool
) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise NextLatError(
            f"task.dataset = '{name}' needs the datasets library: {INSTALL}, or set task.train to "
            "a local file."
        ) from error
    where = str(find_data(name) or name)
    with hub_or_cache(where):
        rows: Any = datasets.load_dataset(where, subset, split=split, streaming=streaming)
    for record in rows:
        yield _text(record, column, f"dataset {name}")


def _text(record: dict[str, Any], column: str, where: str) -> str:
    _check_column(list(record), column, where)
    value = record[column]
    if not isinstance(value, str | None):
        raise NextLatError(
            f"column '{column}' of {where} holds {type(value).__name__} values, not text: choose "
            "another task.column."
        )
    return value or ""


def _check_column(names: list[str], column: str, where: str) -> None:
    if column not in names:
        raise NextLatError(
            f"{where} has no column '{column}' but {', '.join(names) or 'none at all'}: set "
            "task.column."
        )
