"""Where the documents of a language-modelling task come from: local .txt, .jsonl and .parquet
files, or a Hugging Face dataset. A document is a text, or a conversation."""

import hashlib
import json
import logging
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from nextlat.errors import NextLatError, first_line
from nextlat.files import cache_directory, write_text
from nextlat.hub import hub_or_cache
from nextlat.tasks.task import find_data
from nextlat.tasks.text.chat import Message, conversation

logger = logging.getLogger(__name__)

FILES = ".txt, .jsonl or .parquet"
INSTALL = "pip install 'nextlat[text]'"
DOCUMENTS = 512  # read at a time
CHARACTERS = 2**20  # of a .txt file, likewise
Document = str | list[Message]
Read = Callable[[Any], Iterator[tuple[list[Document], Any]]]
HALF_PAIR = re.compile("[\ud800-\udfff]")  # of surrogates; whole pairs are one character


class Progress(NamedTuple):
    """How far a source has been read.

    Attributes:
        at: the position in it.
        seen: documents with text, those that are left out included.
        dropped: empty ones.
        mended: those with half a surrogate pair.
    """

    at: Any
    seen: int
    dropped: int
    mended: int


class Documents:
    """Documents in order, read anew every time.

    Those with nothing but white space in them are dropped. Half a surrogate pair, which JSON can
    hold and UTF-8 and tokenizers cannot, is read as U+FFFD.

    Args:
        read: gives lists of documents, each with the position after it, from a position on (None =
            the beginning).
        where: how to name the source in a sentence.
        way_out: what to do if it cannot be read, the second half of the sentence.
        identity: what tells its content from any other, JSON-ready. A file is told by path, size
            and time of change, as `make` does: a hash of all its bytes would be a second reading of
            it at every start.
        size: bytes of text, at most; None = it is not known.
        skip: so many documents, the first, are left out.
        take: how many at most, of those that are left.
    """

    def __init__(
        self,
        read: Read,
        where: str,
        way_out: str,
        identity: Callable[[], Any],
        size: int | None = None,
        skip: int = 0,
        take: int | None = None,
    ) -> None:
        self._read, self.where, self._way_out, self._identity = read, where, way_out, identity
        self.size, self._skip, self._take = size, skip, take

    def split(self, count: int) -> "tuple[Documents, Documents]":
        """All but the first `count` documents, and those."""
        parts = (self._read, self.where, self._way_out, self._identity, self.size)
        return Documents(*parts, skip=count), Documents(*parts, take=count)

    def identity(self) -> dict[str, Any]:
        """See the arguments.

        Raises:
            NextLatError: the source cannot be reached.
        """
        with self._readable():
            return {"source": self._identity(), "skip": self._skip, "take": self._take}

    def __iter__(self) -> Iterator[Document]:
        return (document for batch, _ in self.batches() for document in batch)

    def batches(self, after: Progress | None = None) -> Iterator[tuple[list[Document], Progress]]:
        """Lists of documents, each with how far one has come with it.

        Args:
            after: where to go on, as it was given before; None = at the beginning.

        Raises:
            NextLatError: the source cannot be read, or (at its end) there is no document.
        """
        start, seen, dropped, mended = after or (None, 0, 0, 0)
        limit = None if self._take is None else self._skip + self._take
        with self._readable():
            for raw, at in self._read(start) if limit is None or seen < limit else ():
                texts = [x for x in raw if (x.strip() if isinstance(x, str) else x)]
                dropped += len(raw) - len(texts)
                first = max(0, self._skip - seen)
                batch = texts[first : None if limit is None else limit - seen]
                seen += len(texts)
                whole = [_mended(document) for document in batch]
                mended += sum(a is not b and a != b for a, b in zip(batch, whole, strict=True))
                if whole:
                    yield whole, Progress(at, seen, dropped, mended)
                if limit is not None and seen >= limit:
                    break
        if seen == 0:
            raise NextLatError(
                f"{self.where} holds no document with any text in it: choose another one."
            )
        if seen <= self._skip:
            raise NextLatError(
                f"{self.where} has no more documents than the {self._skip} to be held out: set "
                "task.validation, or a smaller task.held_out."
            )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except NextLatError:
            raise
        # pyarrow, datasets, the hub's client and the network raise whatever they like.
        except Exception as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise NextLatError(
                f"{self.where} cannot be read ({reason}): {self._way_out}."
            ) from error


def _mended(part: Any) -> Any:
    """A text, or whatever holds texts, with half pairs replaced."""
    if isinstance(part, str):
        return part if part.isascii() else HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", part)
    if isinstance(part, dict):
        return {key: _mended(x) for key, x in part.items()}
    return [_mended(x) for x in part] if isinstance(part, list) else part


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
    readers: dict[str, Read] = {
        ".txt": partial(_separated, file, separator),
        ".jsonl": partial(_records, file, column),
        ".parquet": partial(_parquet, file, column),
    }
    if file.suffix not in readers:
        raise NextLatError(f"{key} = '{path}' is not a {FILES} file: convert it, or rename it.")
    settings = separator if file.suffix == ".txt" else column
    return Documents(
        readers[file.suffix],
        str(file),
        "give a whole file, its text in UTF-8",
        lambda: [*_state_of(file), settings],
        None if file.suffix == ".parquet" else file.stat().st_size,  # that is compressed
    )


def _state_of(file: Path) -> tuple[str, int, int]:
    state = file.stat()
    return str(file.resolve()), state.st_size, state.st_mtime_ns


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
    where = find_data(name) or name
    builder = cache(partial(_dataset_builder, where, subset, name))  # asked of the hub once

    def identity() -> list[Any]:
        """For the hub, the commit of the repository is in the names of the files. Where the hub is
        out of reach, the dataset is the one that it was last: its tokens may all be there."""
        asked = [str(where), subset, split, column]
        kept = cache_directory() / "datasets" / f"{_digest([str(where), subset])}.txt"
        try:
            made = builder()
        except Exception as error:  # as `Documents` tells it
            if isinstance(error, NextLatError) or not kept.is_file():
                raise
            logger.warning("%s: dataset %s is taken to be as it was.", first_line(error), name)
            return [*asked, kept.read_text(encoding="utf-8")]
        files = [file for listed in (made.config.data_files or {}).values() for file in listed]
        states = [_state_of(Path(file)) if Path(file).exists() else file for file in files]
        found = _digest([made.hash, sorted(map(str, states))])
        if not Path(where).exists():
            with suppress(OSError, NextLatError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_text(kept, found)
        return [*asked, found]

    def read(at: Any) -> Iterator[tuple[list[Document], Any]]:
        made = builder()
        with hub_or_cache(where):
            if streaming:
                rows: Any = made.as_streaming_dataset(split=split)
            else:
                made.download_and_prepare()
                rows = made.as_dataset(split=split)
        if streaming and at is not None:
            rows.load_state_dict(at)
        count = 0 if streaming else at or 0
        if count:
            rows = rows.skip(count) if count < len(rows) else rows.select([])
        for batch in rows.iter(batch_size=DOCUMENTS):
            _check_column(list(batch), column, f"dataset {name}")
            count += len(batch[column])
            documents = [_document(x, column, f"dataset {name}") for x in batch[column]]
            yield documents, rows.state_dict() if streaming else count

    return Documents(
        read,
        f"split {split} of dataset {name}{f' ({subset})' if subset else ''}",
        "check its name, subset and split and the network, or set task.train and task.validation "
        f"to local {FILES} files of it, or task.dataset to a directory of them",
        identity,
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _dataset_builder(where: str | Path, subset: str | None, name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise NextLatError(
            f"task.dataset = '{name}' needs the datasets library: {INSTALL}, or set task.train to "
            "a local file."
        ) from error
    with hub_or_cache(where):
        return datasets.load_dataset_builder(str(where), subset)


def _separated(file: Path, separator: str, at: int | None) -> Iterator[tuple[list[Document], int]]:
    separator = separator.replace("\r\n", "\n").replace("\r", "\n")  # as text is read
    count, rest = 0, ""
    with file.open(encoding="utf-8-sig") as text:
        while True:
            try:
                # As much again as is waiting, so that a long document is not searched too often.
                read = text.read(max(CHARACTERS, len(rest)))
            except UnicodeDecodeError as error:
                raise _not_utf8(file) from error
            *pieces, rest = (rest + read).split(separator)
            if not read:
                pieces.append(rest)
            count += len(pieces)
            if count > (at or 0):
                yield [piece.strip() for piece in pieces], count
            if not read:
                return


def _not_utf8(file: Path) -> NextLatError:
    """Which line it is that cannot be read."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return NextLatError(
                    f"{file} cannot be read: line {number} is not UTF-8 ({error.reason} at byte "
                    f"{error.start + 1}): convert it."
                )
    return NextLatError(f"{file} cannot be read: it is not UTF-8: convert it.")


def _records(file: Path, column: str, at: int | None) -> Iterator[tuple[list[Document], int]]:
    with file.open("rb") as lines:
        numbered = islice(enumerate(lines, 1), at or 0, None)
        while batch := [*islice(numbered, DOCUMENTS)]:
            yield [x for n, line in batch for x in _record(file, column, n, line)], batch[-1][0]


def _record(file: Path, column: str, number: int, line: bytes) -> Iterator[Document]:
    if number == 1:
        line = line.removeprefix(BOM_UTF8)
    if not line.strip():
        return
    where = f"line {number} of {file}"
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error
    except json.JSONDecodeError as error:
        raise NextLatError(
            f"{where} is not JSON ({error.msg} at column {error.colno}): give one record per line."
        ) from error
    if not isinstance(record, dict):
        raise NextLatError(f"{where} is not a JSON object: give one record per line.")
    _check_column(list(record), column, where)
    yield _document(record[column], column, where)


def _parquet(file: Path, column: str, at: int | None) -> Iterator[tuple[list[Document], int]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise NextLatError(
            f"reading {file} needs pyarrow: {INSTALL}, or convert it to .jsonl."
        ) from error
    count = 0
    with pyarrow.parquet.ParquetFile(file) as table:
        _check_column(table.schema_arrow.names, column, str(file))
        for batch in table.iter_batches(DOCUMENTS, columns=[column]):
            start, count = count, count + len(batch)
            if count > (at or 0):
                values = enumerate(batch.column(0).to_pylist(), start + 1)
                yield [_document(x, column, f"row {n} of {file}") for n, x in values], count


def _document(value: Any, column: str, where: str) -> Document:
    if isinstance(value, list):
        return conversation(value, where)
    if not isinstance(value, str | None):
        raise NextLatError(
            f"column '{column}' of {where} holds {type(value).__name__} values, neither text "
            "nor conversations: choose another task.column."
        )
    return value or ""


def _check_column(names: list[str], column: str, where: str) -> None:
    if column not in names:
        raise NextLatError(
            f"{where} has no column '{column}' but {', '.join(names) or 'none at all'}: set "
            "task.column."
        )
