"""Documents become tokens, once, and tokens become packed rows with explicit document boundaries.

Shapes: C documents, N tokens of all of them, R rows of T tokens.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import __version__ as tokenizers_version
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from nextlat.batch import IGNORE
from nextlat.errors import NextLatError
from nextlat.files import write_text
from nextlat.hub import load_tokenizer
from nextlat.tasks.rows import STREAM, epoch_order
from nextlat.tasks.task import find_data, vocabulary_size

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
BYTES = 256  # a byte-level vocabulary begins with all of them, and knows no unknown word
MAX_CHARACTERS = 2**27  # of the documents that a vocabulary is learned from
DOCUMENTS_PER_BATCH = 512  # that the tokenizers library shares among the cores


def trained_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens learned from documents, the first 134 million
    characters of them.

    `<|endoftext|>` is token 0, both beginning and end of a document; a text that is tokenised for
    the model begins with it, as documents do in training. There is no padding token: transformers
    would keep its embedding at zero.

    It is a function of the documents alone, and kept in the user's cache directory under their hash
    only to save time.

    Raises:
        NextLatError: a vocabulary with no room for the 256 bytes and the end of text.
    """
    if vocab_size < BYTES + 1:
        raise NextLatError(
            f"task.vocab_size is {vocab_size}: a byte-level vocabulary has at least {BYTES + 1} "
            "tokens."
        )
    sample = list(_first_characters(documents))
    settings = f"byte-level BPE 1, tokenizers {tokenizers_version}, {vocab_size}"
    digest = hashlib.sha256(settings.encode())
    for document in sample:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = cache / "nextlat/tokenizers" / f"{digest.hexdigest()}.json"
    core = _cached(cached)
    if core is None:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(sample, trainer)
        core.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A",
            special_tokens=[(END_OF_TEXT, core.token_to_id(END_OF_TEXT))],
        )
        _keep(core, cached)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _first_characters(documents: Iterable[str]) -> Iterator[str]:
    room = MAX_CHARACTERS
    for document in documents:
        yield document
        room -= len(document)
        if room <= 0:
            return


def _cached(path: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_file(str(path)) if path.is_file() else None
    # The tokenizers library raises nothing more precise; what cannot be read is learned again.
    except Exception:
        return None


def _keep(core: Tokenizer, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, core.to_str())
    except (OSError, NextLatError) as error:
        logger.info("the tokenizer is not cached: %s", error)


def existing_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer as published: a directory (relative to the working directory or to $NEXTLAT_DATA)
    or a hub id.

    One without an end-of-sequence token, as the bare files of GPT-2's, gets `<|endoftext|>` if its
    vocabulary has that; one without a beginning-of-sequence token begins documents with the
    end-of-sequence token.

    Raises:
        NextLatError: it cannot be loaded, is not one of the tokenizers library, or has no token
            that ends a document.
    """
    try:
        tokenizer = load_tokenizer(find_data(name) or name)
    except NextLatError as error:
        raise NextLatError(
            f"task.tokenizer = '{name}' {error}: give a directory with tokenizer.json, or leave it "
            "out and set task.vocab_size."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise NextLatError(
            f"task.tokenizer = '{name}' has no tokenizer.json: convert it to a fast tokenizer."
        )
    if tokenizer.eos_token is None:
        if END_OF_TEXT not in tokenizer.get_vocab():
            raise NextLatError(
                f"task.tokenizer = '{name}' has no end-of-sequence token: set eos_token in "
                "tokenizer_config.json."
            )
        tokenizer.eos_token = END_OF_TEXT
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    for token in (tokenizer.bos_token, tokenizer.eos_token):
        # The library gives one that the vocabulary lacks the number of its entries, which where
        # there are gaps is another token's.
        number = tokenizer.convert_tokens_to_ids(token)
        vocabulary = tokenizer.get_vocab().items()
        if others := [word for word, i in vocabulary if i == number and word != token]:
            raise NextLatError(
                f"task.tokenizer = '{name}' has one id, {number}, for '{token}' and '{others[0]}': "
                "set its special tokens in tokenizer_config.json to some of its vocabulary."
            )
    return tokenizer


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised documents, one after the other.

    Attributes:
        ids: (N,) uint16 where the vocabulary allows it, else uint32.
        starts: (C + 1,) int64: document c is `ids[starts[c] : starts[c + 1]]`.
    """

    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts)

    def document(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.starts[index + 1]]


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, max_tokens: int | None = None
) -> Tokens:
    """Documents as tokens: each begins with the beginning-of-sequence token and ends with the
    end-of-sequence token.

    It begins with one so that the first word is predicted too, and from something; it ends with one
    so that the model learns to stop, which it would not if only the next document, across the
    boundary, told it. (In GPT-2's and our vocabularies both are the same token.) Special tokens
    written out in a document are ordinary text.

    Args:
        documents: to tokenise.
        tokenizer: with a beginning- and an end-of-sequence token.
        max_tokens: no document is taken after the one that reaches this; None = all are.
    """
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # ours to change
    core.encode_special_tokens = True
    core.no_truncation()
    core.no_padding()
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    first, last = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    # A bytearray grows in place: one copy of all tokens in memory, not two.
    ids, sizes, total = bytearray(), [0], 0
    iterator = iter(documents)
    while batch := list(islice(iterator, DOCUMENTS_PER_BATCH)):
        for encoding in core.encode_batch_fast(batch, add_special_tokens=False):
            document = np.array(first + encoding.ids + last, dtype=dtype)
            ids += document.tobytes()
            sizes.append(len(document))
            total += len(document)
            if max_tokens is not None and total >= max_tokens:
                return Tokens(np.frombuffer(ids, dtype), np.cumsum(sizes))
    return Tokens(np.frombuffer(ids, dtype), np.cumsum(sizes))


class PackedDocuments(Dataset[dict[str, Tensor]]):
    """Rows of T tokens cut from the documents laid end to end; nothing is left out and only the
    last row is padded.

    A document that reaches the end of its row goes on at the start of the next one as a segment of
    its own: positions restart there as they do at every document, so that nothing ever looks
    across.

    Args:
        tokens: the documents.
        row_length: T.
        seed: a stream without end, in which the documents are shuffled anew for every epoch by
            (seed, epoch): row i depends on (seed, i) alone. None: once, in order.
        rows: without a seed, how many at most.

    The items have `input_ids`, `labels`, `position_ids`, each (T,) int64; without a seed also
    `attention_mask`, 0 on the padded end.
    """

    def __init__(
        self, tokens: Tokens, row_length: int, *, seed: int | None, rows: int | None = None
    ) -> None:
        self.tokens, self.row_length, self.seed = tokens, row_length, seed
        whole = -(-len(tokens.ids) // row_length)
        self.rows = whole if rows is None else min(rows, whole)
        self._epoch = -1
        self._order, self._starts = np.arange(len(tokens)), tokens.starts

    def __len__(self) -> int:
        return self.rows if self.seed is None else STREAM

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        T, total = self.row_length, len(self.tokens.ids)
        input_ids, position_ids = np.zeros(T, dtype=np.int64), np.zeros(T, dtype=np.int64)
        filled = 0
        while filled < T:
            epoch, position = divmod(index * T + filled, total)
            if epoch and self.seed is None:
                break
            self._shuffle(epoch)
            c = int(np.searchsorted(self._starts, position, side="right")) - 1
            rest = self.tokens.document(self._order[c])[position - self._starts[c] :]
            piece = rest[: T - filled]
            input_ids[filled : filled + len(piece)] = piece
            position_ids[filled : filled + len(piece)] = np.arange(len(piece))
            filled += len(piece)
        labels = input_ids.copy()
        labels[filled:] = IGNORE
        row = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        if self.seed is None:
            row["attention_mask"] = (np.arange(T) < filled).astype(np.int64)
        return {name: torch.from_numpy(x) for name, x in row.items()}

    def _shuffle(self, epoch: int) -> None:
        """`order[c]` is the document that comes c-th in this epoch, `starts[c]` where it begins
        among the epoch's tokens."""
        if self.seed is not None and epoch != self._epoch:
            self._epoch = epoch
            self._order = epoch_order(len(self.tokens), self.seed, epoch)
            self._starts = np.concatenate([[0], np.cumsum(self.tokens.sizes[self._order])])
