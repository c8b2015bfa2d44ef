"""The Hugging Face hub: asked once whether it answers, so that without it a file is found in the
cache or missed at once. Tokenizers, of the hub or a directory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nextlat.errors import NextLatError, first_line

NOT_PUSHED = ["checkpoint-*", ".*", "*.pt", "*.pth", "trainer_state.json", "training_args.bin"]
TIMEOUT = 5.0  # seconds for the hub to answer at all


@contextmanager
def hub_or_cache(name: str | Path) -> Iterator[None]:
    """Load `name`, a hub id, inside.

    Where the hub does not answer, the libraries inside go offline: they would ask it again for
    every file, half a minute in all, and log each failure. Nothing is asked for a local path, or
    where the libraries are offline already.
    """
    if Path(name).exists() or constants.is_offline_mode() or _answers():
        yield
        return
    # Each of them has the setting; datasets only where it is in use.
    libraries: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in libraries]
    for module in libraries:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(libraries, before, strict=True):
            module.HF_HUB_OFFLINE = value


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a directory or hub repository; no code in it is run.

    Raises:
        NextLatError: why it cannot be loaded, without a full stop.
    """
    from transformers import AutoTokenizer

    try:
        with hub_or_cache(name):
            tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
        # Used once, since much of its settings is believed until then.
        tokenizer.decode([*tokenizer("a").input_ids, *tokenizer.all_special_ids])
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    # Missing files, no network, foreign classes: each raises its own; a panic of the tokenizers
    # library is not even an Exception.
    except BaseException as error:
        raise NextLatError(f"cannot be loaded ({first_line(error)})") from error


def push_directory(
    directory: str | Path,
    name: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload of nextlat",
) -> str:
    """Upload a saved model, or a finished run with its record and results, to the Hugging Face hub:
    all but its checkpoints and what training goes on from.

    Args:
        directory: of the model.
        name: of the repository, "org/name"; made where there is none.
        private: whether one that is made is private; None = as the organisation has it.
        token: with the right to write; None = that of `hf auth login`.
        revision: a branch; None = main.
        commit_message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        NextLatError: there is no saved model, or the hub does not take it.
    """
    if not any(
        (Path(directory) / file).is_file() for file in ("config.json", "adapter_config.json")
    ):
        raise NextLatError(f"{directory} holds no saved model: name its directory.")
    api = HfApi(token=token)
    try:
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name,
            folder_path=directory,
            commit_message=commit_message,
            revision=revision,
            ignore_patterns=NOT_PUSHED,
        )
    except Exception as error:  # of the network, the hub's client or the hub
        raise NextLatError(
            f"the hub does not take {name} ({first_line(error)}): log in with hf auth login, with "
            "a token that may write there, and try again."
        ) from error
    return str(commit.commit_url)


def document_start(tokenizer: Any) -> list[int]:
    """The tokens that a document begins with in training, and so a prompt: what the tokenizer puts
    there itself, as Llama's does; else the beginning-of-sequence token, if that is also the token
    that ends documents (GPT-2) or the vocabulary is one of words (our tasks); else none. (What
    ChatML calls by that name only ever stands before a role.)"""
    ids, bare = (tokenizer("a", add_special_tokens=added).input_ids for added in (True, False))
    added = next((n for n in range(len(ids)) if ids[n : n + len(bare)] == bare), 0)
    if added:
        return list(ids[:added])
    bos = tokenizer.bos_token_id
    begins = _has_words(tokenizer) or bos == tokenizer.eos_token_id
    return [bos] if begins and bos is not None else []


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that a document begins with, as in training; a start that is written
    out is not said twice."""
    start = document_start(tokenizer)
    if not _has_words(tokenizer):
        text = text.removeprefix(tokenizer.decode(start))
        return [*start, *plain_encoder(tokenizer).encode(text, add_special_tokens=False).ids]
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids if start and ids[: len(start)] == start else [*start, *ids]


def _has_words(tokenizer: Any) -> bool:
    return isinstance(tokenizer.backend_tokenizer.model, WordLevel)


def plain_encoder(tokenizer: Any) -> Any:
    """The core of a tokenizer for text in which special tokens, written out, are ordinary text."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # ours to change
    core.encode_special_tokens = True
    core.no_truncation()
    core.no_padding()
    return core


def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # whatever the hub's client raises, there was no answer
        return False
    return True
