"""Documents become tokens on the disk, once, in shards.

    $NEXTLAT_CACHE/corpora/stories-3f0c.../      one source, tokenizer and settings: their hash
        corpus.json                              what they are, and how many shards are the end
        000000.safetensors ...                   `ids`, `sizes` of documents, `scored` of chats
        lock                                     of the process that makes them

A shard gets its name when all of it is on the disk, so that whatever has a name is whole. Whoever
makes tokens goes on after the last shard; how many are made depends on who asks, so that a longer
run goes on where a shorter one stopped.
"""

import hashlib
import json
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from nextlat.errors import NextLatError
from nextlat.files import (
    TEMPORARY,
    cache_directory,
    remove,
    remove_unfinished,
    sole_maker,
    sync,
    write_errors,
    write_json,
)
from nextlat.tasks.text.documents import Document, Documents, Progress
from nextlat.tasks.text.shards import Shard, Tokens, read_shard
from nextlat.tasks.text.tokens import Encoder
from nextlat.validation import read_json

logger = logging.getLogger(__name__)

FORMAT = 1
SHARD = 2**26  # tokens after which a shard is closed: a minute's work of two cores
CHARACTERS = 2**21  # encoded at a time, some 50 MB while they are
AHEAD = 2  # batches that are encoded while an earlier one is stored
RECORD = "corpus.json"
WAY_OUT = "free some space, or set NEXTLAT_CACHE to a directory with more of it"


class Corpus:
    """The tokens of one source.

    Args:
        documents: the source.
        encoder: makes them tokens.

    Attributes:
        directory: where they are.
        shards: those that are whole.

    Raises:
        NextLatError: the source cannot be reached.
    """

    def __init__(self, documents: Documents, encoder: Encoder) -> None:
        self.documents, self.encoder = documents, encoder
        self.shards: list[Shard] = []
        self._source = documents.identity()
        self._key = {"format": FORMAT, **self._source, **encoder.identity()}
        self._digest = hashlib.sha256(json.dumps(self._key).encode()).hexdigest()[:24]
        name = re.sub(r"[^\w.-]+", "-", Path(str(self._key["source"][0])).name)[:60]
        self.directory = cache_directory() / "corpora" / f"{name}-{self._digest}"

    def tokens(self, limit: int) -> Tokens:
        """The tokens on the disk, those that are not there yet made now.

        One process makes them; others that ask for them meanwhile wait, and go on themselves if it
        ends early.

        Args:
            limit: no document is taken after the one that reaches it.

        Raises:
            NextLatError: the source cannot be read, is empty, or changes meanwhile;
                `chat.encode_chats` refuses a document; the cache cannot be written or the disk is
                full (the shards that are whole stay); or there is what should not be there.
        """
        if not self._enough(limit):
            waiting = f"the tokens of {self.documents.where} are being made: waiting for them."
            with write_errors(self.directory, WAY_OUT):
                self.directory.mkdir(parents=True, exist_ok=True)
                with sole_maker(self.directory / "lock", lambda: logger.info(waiting)):
                    if not self._enough(limit):
                        self._make(limit)
        return Tokens(self.shards, limit)

    def expected(self, limit: int) -> int:
        """How many tokens there can be, at most: the limit, or what is known of the source."""
        if self.ended:
            return min(limit, self.total)
        return min(limit, self.documents.size or limit)  # a token is at least a byte

    @property
    def total(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def ended(self) -> bool:
        """Whether the shards are all that the source gives."""
        try:
            end = read_json(self.directory / RECORD, "")["shards"]
        except (NextLatError, OSError, LookupError, TypeError):
            return False
        return bool(end) and end == len(self.shards)

    def _enough(self, limit: int) -> bool:
        """Look at what is there: whether it reaches the limit, or is all that there is."""
        self.shards, self._damaged = [], ""
        for number in count():
            path = self.directory / f"{number:06}.safetensors"
            if not path.exists():
                break
            try:
                digest, shard = read_shard(path)
            except (OSError, SafetensorError, ValueError, LookupError, TypeError):
                self._damaged = str(path)
                break
            if digest != self._digest:
                raise NextLatError(
                    f"{path} holds tokens of another text or tokenizer: delete {self.directory}, "
                    "and they are made again."
                )
            self.shards.append(shard)
        return self.total >= limit or self.ended

    def _make(self, limit: int) -> None:
        if self._damaged:
            logger.warning("%s is damaged: made again, with all after it.", self._damaged)
        for path in {*self.directory.glob("*.safetensors")} - {x.path for x in self.shards}:
            remove(path)
        remove_unfinished(self.directory)
        write_json(self.directory / RECORD, {"of": self._key, "shards": None})
        pending = Pending(self.encoder)
        at = self.shards[-1].progress if self.shards else None
        for batch, progress in _encoded(self.documents.batches(at), self.encoder):
            pending.add(batch)
            if progress is None:
                continue
            at = progress
            if (enough := self.total + pending.tokens >= limit) or pending.tokens >= SHARD:
                self._store(pending, at, limit)
                pending = Pending(self.encoder)
            if enough:
                return
        if at and pending.documents:
            self._store(pending, at, limit)
        write_json(self.directory / RECORD, {"of": self._key, "shards": len(self.shards)})

    def _store(self, pending: "Pending", progress: Progress, limit: int) -> None:
        if self.documents.identity() != self._source:
            raise NextLatError(f"{self.documents.where} changed while it was read: start again.")
        path = self.directory / f"{len(self.shards):06}.safetensors"
        if path.exists():  # where the file system has no locks
            raise NextLatError(f"another process has just made {path}: start again.")
        left = (self.expected(limit) - self.total) * pending.dtype.itemsize
        kept = f"{self.total:,} tokens are kept, and up to {left / 1e9:.2g} GB more are needed"
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        with write_errors(path, f"{kept}: {WAY_OUT}"):
            try:
                # In one entry: safetensors writes several in any order.
                about = json.dumps({"corpus": self._digest, "progress": progress})
                save_file(pending.arrays(), temporary, {"nextlat": about})
                sync(temporary)
                temporary.replace(path)
                sync(path.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        self.shards.append(read_shard(path)[1])
        logger.info("%s: %d tokens are on the disk.", self.documents.where, self.total)


class Pending:
    """Documents of the shard to come."""

    def __init__(self, encoder: Encoder) -> None:
        self.dtype, self._masked = encoder.dtype, encoder.assistant_only
        # A bytearray grows in place: one copy in memory, not two.
        self._ids, self._scored, self._sizes = bytearray(), bytearray(), bytearray()

    @property
    def tokens(self) -> int:
        return len(self._ids) // self.dtype.itemsize

    @property
    def documents(self) -> int:
        return len(self._sizes) // 4

    def add(self, batch: Iterable[tuple[list[int], list[bool] | None]]) -> None:
        ids, labelled = zip(*batch, strict=True)
        self._sizes += np.array([len(document) for document in ids], np.uint32).tobytes()
        self._ids += np.fromiter(chain.from_iterable(ids), self.dtype).tobytes()
        if self._masked:
            self._scored += bytes(chain.from_iterable(labelled))

    def arrays(self) -> dict[str, np.ndarray]:
        arrays = {
            "ids": np.frombuffer(self._ids, self.dtype),
            "sizes": np.frombuffer(self._sizes, np.uint32),
        }
        return arrays | ({"scored": np.frombuffer(self._scored, bool)} if self._masked else {})


def _encoded(
    batches: Iterator[tuple[list[Document], Progress]], encoder: Encoder
) -> Iterator[tuple[Iterable[tuple[list[int], list[bool] | None]], Progress | None]]:
    """Batches as tokens, encoded in a thread of its own, which lets Python read and store others
    meanwhile; with the progress at the end of what was read at a time."""
    ahead: deque[tuple[Future[Any], Progress | None]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for batch, progress in batches:
            parts = [*_portions(batch)]
            for number, part in enumerate(parts, 1):
                at = progress if number == len(parts) else None
                ahead.append((pool.submit(encoder, part), at))
                if len(ahead) > AHEAD:
                    future, at = ahead.popleft()
                    yield future.result(), at
        for future, at in ahead:
            yield future.result(), at


def _portions(batch: list[Document]) -> Iterator[list[Document]]:
    portion: list[Document] = []
    room = CHARACTERS
    for document in batch:
        portion.append(document)
        room -= len(document) if isinstance(document, str) else sum(map(_length, document))
        if room <= 0:
            yield portion
            portion, room = [], CHARACTERS
    if portion:
        yield portion


def _length(message: dict[str, Any]) -> int:
    return len(str(message.get("content", "")))
