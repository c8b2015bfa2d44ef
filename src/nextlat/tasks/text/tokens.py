"""Documents become tokens, once, and tokens become packed rows with explicit document boundaries.

Shapes: C documents, N tokens of all of them, R rows of T tokens.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

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
from nextlat.hub import document_start, load_tokenizer, plain_encoder
from nextlat.tasks.rows import STREAM, epoch_order
from nextlat.tasks.task import find_data, vocabulary_size
from nextlat.tasks.text.chat import encode_chats
from nextlat.tasks.text.documents import Document

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
BYTES = 256  # a byte-level vocabulary begins with all of them, and knows no unknown word
MAX_CHARACTERS = 2**27  # of the documents that a vocabulary is learned from
BATCH = 512  # that the tokenizers library shares among the cores


def trained_tokenizer(documents: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerFast:
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


def _first_characters(documents: Iterable[Document]) -> Iterator[str]:
    room = MAX_CHARACTERS
    for document in documents:
        if not isinstance(document, str):
            raise NextLatError(
                "the text is conversations, for which a tokenizer with a chat template is needed: "
                "give task.tokenizer, not task.vocab_size."
            )
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
    vocabulary has that, as beginning of a document, too.

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
        tokenizer.bos_token = tokenizer.bos_token or END_OF_TEXT
    for token in filter(None, (tokenizer.bos_token, tokenizer.eos_token)):
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
        scored: (N,) bool, the tokens that have a label; None = all.
    """

    ids: np.ndarray
    starts: np.ndarray
    scored: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts)

    def document(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def labels(self, index: int) -> np.ndarray:
        """Of the tokens of a document, -100 where they have none."""
        ids = self.document(index).astype(np.int64)
        if self.scored is None:
            return ids
        return np.where(self.scored[self.starts[index] : self.starts[index + 1]], ids, IGNORE)


def tokenize(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int | None = None,
    *,
    assistant_only: bool = False,
) -> Tokens:
    """Documents as tokens. A text begins with `document_start` and ends with the end-of-sequence
    token; a conversation is what the chat template makes of it.

    It begins with a token, where the tokenizer has one for that, so that the first word is
    predicted too, and from something; it ends with one so that the model learns to stop, which it
    would not if only the next document, across the boundary, told it. (In GPT-2's and our
    vocabularies both are the same token.) Special tokens written out in a text are ordinary text.

    Args:
        documents: to tokenise, all of them texts or all conversations.
        tokenizer: with an end-of-sequence token.
        max_tokens: no document is taken after the one that reaches this; None = all are.
        assistant_only: only what the assistant says has a label.

    Raises:
        NextLatError: see `chat.encode_chats`.
    """
    core, first = plain_encoder(tokenizer), document_start(tokenizer)
    last = [tokenizer.eos_token_id]

    def encode(batch: list[Any]) -> Iterator[tuple[list[int], list[bool] | None]]:
        chats = sum(not isinstance(document, str) for document in batch)
        if chats == len(batch):
            return encode_chats(tokenizer, batch, assistant_only=assistant_only)
        if chats or assistant_only:
            mixed = "holds both texts and conversations" if chats else "is text, not conversations"
            raise NextLatError(
                f"task.column {mixed}: choose another one, or leave out task.assistant_only."
            )
        encodings = core.encode_batch_fast(batch, add_special_tokens=False)
        return ((first + encoding.ids + last, None) for encoding in encodings)

    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    # A bytearray grows in place: one copy of all tokens in memory, not two.
    ids, scored, sizes = bytearray(), bytearray(), [0]
    batches = iter(documents)
    taken = chain.from_iterable(map(encode, iter(lambda: [*islice(batches, BATCH)], [])))
    total = 0
    for document, labelled in taken:
        ids += np.array(document, dtype=dtype).tobytes()
        scored += bytes(labelled or ())
        sizes.append(len(document))
        total += len(document)
        if max_tokens is not None and total >= max_tokens:
            break
    labels = np.frombuffer(scored, bool) if assistant_only else None
    return Tokens(np.frombuffer(ids, dtype), np.cumsum(sizes), labels)


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
        labels = np.full(T, IGNORE, dtype=np.int64)
        filled = 0
        while filled < T:
            epoch, position = divmod(index * T + filled, total)
            if epoch and self.seed is None:
                break
            self._shuffle(epoch)
            c = int(np.searchsorted(self._starts, position, side="right")) - 1
            start = position - self._starts[c]
            piece = self.tokens.document(self._order[c])[start : start + T - filled]
            end = filled + len(piece)
            input_ids[filled:end] = piece
            labels[filled:end] = self.tokens.labels(self._order[c])[start : start + len(piece)]
            position_ids[filled:end] = np.arange(len(piece))
            filled = end
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
