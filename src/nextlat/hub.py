"""The Hugging Face hub: asked once whether it answers, so that without it a file is found in the
cache or missed at once. Tokenizers, of the hub or a directory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session

from nextlat.errors import NextLatError, first_line

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


def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # whatever the hub's client raises, there was no answer
        return False
    return True
