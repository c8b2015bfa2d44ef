"""A model as it is saved, and not as it is while it is trained: tied weights once, the cache on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from nextlat.weights import MODEL_FILES, read_sums


def keep_tied_weights_once(module: nn.Module) -> None:
    """In the state dict of a module: files and the Trainer take no weight that is there twice."""
    module.register_state_dict_post_hook(_drop_aliases)
    module.register_load_state_dict_pre_hook(_add_aliases)


def _aliases(module: nn.Module) -> dict[str, str]:
    """Name of a tied weight -> the name it is saved under."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: kept for name, p in named if (kept := first.setdefault(id(p), name)) != name}


def _drop_aliases(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for alias in _aliases(module):
        state.pop(prefix + alias, None)


def _add_aliases(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for alias, kept in _aliases(module).items():
        if prefix + kept in state:
            state.setdefault(prefix + alias, state[prefix + kept])


@contextmanager
def cache_enabled(lm: PreTrainedModel) -> Iterator[None]:
    """The Trainer switches `config.use_cache` off; a saved model should not carry that to its
    users."""
    before = getattr(lm.config, "use_cache", None)
    if before is not None:
        lm.config.use_cache = True
    try:
        yield
    finally:
        if before is not None:
            lm.config.use_cache = before


def link_lm(source: Path, directory: Path) -> dict[str, str]:
    """Give the files of a saved LM a second name in another directory.

    Returns:
        Their checksums by name; none where they cannot be linked, and nothing was done.
    """
    sums = {name: value for name, value in read_sums(source).items() if "/" not in name}
    of_lm = {name: sums[name] for name in sums if any(Path(name).match(x) for x in MODEL_FILES)}
    if "config.json" not in of_lm:
        return {}
    extra = [name for name in ("generation_config.json",) if (source / name).exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for name in [*of_lm, *extra]:
            (directory / name).unlink(missing_ok=True)
            os.link(source / name, directory / name)
    except OSError:  # another disk, or a file system without links
        for name in of_lm:
            (directory / name).unlink(missing_ok=True)
        return {}
    return of_lm
