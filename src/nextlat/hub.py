"""The Hugging Face hub, where it can be reached; where it cannot, what is needed from it is found
in the cache or missed at once."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session

TIMEOUT = 5.0  # seconds for the hub to answer at all


@contextmanager
def hub_or_cache(name: str | Path) -> Iterator[None]:
    """Load `name`, a hub id, inside: the libraries would ask a hub that does not answer for half a
    minute, file by file, and tell of it.

    Nothing is asked for a local path, or where the libraries are offline already.
    """
    if Path(name).exists() or constants.is_offline_mode() or _answers():
        yield
        return
    libraries: list[Any] = [
        constants,
        *filter(None, [sys.modules.get("datasets.config")]),
    ]  # each has the setting
    before = [module.HF_HUB_OFFLINE for module in libraries]
    for module in libraries:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(libraries, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # whatever the hub's client raises, it has got no answer
        return False
    return True
