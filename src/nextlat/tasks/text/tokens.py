"""Tokenizers, learned or as published, and what they make of documents."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import __version__ as tokenizers_version
from transformers import PreTrainedTokenizerFast

from nextlat.errors import NextLatError
from nextlat.files import cache_directory, write_text
from nextlat.hub import document_start, load_tokenizer, plain_encoder
from nextlat.tasks.task import find_data, vocabulary_size
from nextlat.tasks.text.chat import encode_chats
from nextlat.tasks.text.documents import Document

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
BYTES = 256  # a byte-level vocabulary begins with all of them, and knows no unknown word
MAX_CHARACTERS = 2**27  # of the documents that a vocabulary is learned from


def trained_tokenizer(documents: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens learned from documents, the first 134 million
    characters of them.

    `<|endoftext|>` is token 0, both beginning and end of a document; a text that is tokenised for
    the model begins with it, as documents do in training. There is no padding token: transformers
    would keep its embedding at zero.

    It is a function of the documents alone, and kept in $NEXTLAT_CACHE under their hash
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
    cached = cache_directory() / "tokenizers" / f"{digest.hexdigest()}.json"
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


class Encoder:
    """Documents as tokens. A text begins with `document_start` and ends with the end-of-sequence
    token; a conversation is what the chat template makes of it.

    It begins with a token, where the tokenizer has one for that, so that the first word is
    predicted too, and from something; it ends with one so that the model learns to stop, which it
    would not if only the next document, across the boundary, told it. (In GPT-2's and our
    vocabularies both are the same token.) Special tokens written out in a text are ordinary text.

    Args:
        tokenizer: with an end-of-sequence token.
        assistant_only: only what the assistant says has a label.

    Attributes:
        dtype: of tokens, uint16 where the vocabulary allows it, else uint32.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, assistant_only: bool = False) -> None:
        self._tokenizer, self.assistant_only = tokenizer, assistant_only
        self._core, self._first = plain_encoder(tokenizer), document_start(tokenizer)
        self._last = [tokenizer.eos_token_id]
        self.dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)

    def identity(self) -> dict[str, Any]:
        """All that decides which tokens a document becomes, JSON-ready. (Not the version of the
        tokenizers library: tokenizer.json is meant to say it all.)"""
        named = {name: str(x) for name, x in self._tokenizer.special_tokens_map.items()}
        whole = [self._core.to_str(), self._tokenizer.chat_template, named]
        return {
            "tokenizer": hashlib.sha256(json.dumps(whole).encode()).hexdigest(),
            "start": self._first,
            "end": self._last,
            "assistant_only": self.assistant_only,
        }

    def __call__(self, batch: list[Any]) -> Iterable[tuple[list[int], list[bool] | None]]:
        """The tokens of each document, and whether each has a label (None = all have).

        Args:
            batch: all of them texts or all conversations, shared among the cores.

        Raises:
            NextLatError: see `chat.encode_chats`.
        """
        chats = sum(not isinstance(document, str) for document in batch)
        if chats == len(batch):
            return [*encode_chats(self._tokenizer, batch, assistant_only=self.assistant_only)]
        if chats or self.assistant_only:
            mixed = "holds both texts and conversations" if chats else "is text, not conversations"
            raise NextLatError(
                f"task.column {mixed}: choose another one, or leave out task.assistant_only."
            )
        encodings = self._core.encode_batch_fast(batch, add_special_tokens=False)
        return ((self._first + encoding.ids + self._last, None) for encoding in encodings)
