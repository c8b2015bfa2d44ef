"""Weights on disk and in a model, compared key by key: none may be missing, left over, of another
shape or of another dtype. Only safetensors are read.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as library_logging
from transformers.utils.hub import cached_file

from nextlat.errors import NextLatError, first_line

T = TypeVar("T")

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN = 3  # names in an error


def find(directory: str | Path, name: str, subfolder: str = "") -> Path | None:
    """A file of a local directory or hub repository; None where there is none."""
    try:
        found = cached_file(str(directory), name, subfolder=subfolder)
    except OSError:
        return None
    return None if found is None else Path(found)


def opened(path: str | Path, read: Callable[[], T]) -> T:
    """What `read` returns, with one sentence for whatever can be wrong with a file.

    Raises:
        NextLatError: it is corrupt, or cannot be read.
    """
    try:
        return read()
    except SafetensorError as error:
        raise NextLatError(
            f"{path} is corrupt or truncated ({error}): restore it or use an earlier checkpoint."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        hub = (
            "" if Path(path).exists() else "there is no such directory, and as a name of the hub: "
        )
        raise NextLatError(
            f"cannot open {path} ({hub}{first_line(error)}): restore it, or name a model that can "
            "be reached."
        ) from error


def read_lm(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of a causal LM's directory, mapped into memory, by their names on disk.

    Raises:
        NextLatError: a file is missing or corrupt.
    """
    index, names = find(directory, INDEX), [FILE]
    if index is not None:
        names = opened(index, lambda: [*{*json.loads(index.read_text())["weight_map"].values()}])
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = find(directory, name)
        if path is None:
            raise NextLatError(f"{directory} has no {name}: restore it.")
        tensors |= opened(path, lambda path=path: load_file(path))  # type: ignore[misc]
    return tensors


def load_lm(directory: str | Path, **model_arguments: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, but an error where that would draw missing weights at
    random, or convert their dtype unasked.

    Args:
        directory: a local path or a hub id.
        model_arguments: of `from_pretrained`.

    Raises:
        NextLatError: it cannot be opened, or its weights are not those of the architecture.
    """
    arguments = {"trust_remote_code": False, "use_safetensors": True} | model_arguments
    verbosity = library_logging.get_verbosity()
    library_logging.set_verbosity_error()  # what it reports is a table; ours is a sentence
    try:
        loaded: Any = opened(
            directory,
            lambda: AutoModelForCausalLM.from_pretrained(
                directory, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
            ),
        )
    finally:
        library_logging.set_verbosity(verbosity)
    lm, info = loaded
    _refuse(
        directory,
        missing=info["missing_keys"],
        left_over=info["unexpected_keys"],
        misshapen=[name for name, *_ in info["mismatched_keys"]],
    )
    if not getattr(lm, "is_quantized", False):
        saved, state = read_lm(directory), lm.state_dict()
        # Some architectures are stored under other names than they have in memory.
        both = {name: x for name, x in state.items() if name in saved}
        converts = arguments.get("dtype", "auto") != "auto"
        _refuse(directory, misread=_other_dtypes(saved, both, converts))
    return lm


def check(
    saved: Mapping[str, Tensor], module: nn.Module, where: object, *, converts: bool = False
) -> None:
    """Compare saved tensors with a module, key by key.

    Args:
        saved: name -> tensor.
        module: what they are to be copied into.
        where: the file or directory that they come from.
        converts: whether a floating-point number may become another kind of one.

    Raises:
        NextLatError: they are not those of the module.
    """
    state = module.state_dict()
    present = {x.data_ptr() for name, x in state.items() if name in saved}  # tied: saved once
    both = {name: x for name, x in state.items() if name in saved}
    _refuse(
        where,
        missing=[n for n, x in state.items() if n not in saved and x.data_ptr() not in present],
        left_over=saved.keys() - state.keys(),
        misshapen=[name for name, x in both.items() if x.shape != saved[name].shape],
        misread=_other_dtypes(saved, both, converts),
    )


def copy_into(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy tensors that have been checked into a module, in place."""
    with torch.no_grad():
        for name, x in module.state_dict().items():
            if name in saved:
                x.copy_(saved[name])


def _other_dtypes(
    saved: Mapping[str, Tensor], state: Mapping[str, Tensor], converts: bool
) -> list[str]:
    """Names whose dtype differs; if it `converts`, whose kind of number does."""

    def kind(x: Tensor) -> object:
        return x.is_floating_point() if converts else x.dtype

    return [name for name, x in state.items() if kind(x) != kind(saved[name])]


def _refuse(
    where: object,
    missing: Collection[str] = (),
    left_over: Collection[str] = (),
    misshapen: Collection[str] = (),
    misread: Collection[str] = (),
) -> None:
    faults = {
        "lacks": missing,
        "holds, beyond the weights of the model,": left_over,
        "holds in another shape than the model": misshapen,
        "holds in another dtype than the model": misread,
    }
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise NextLatError(
                f"{where} {fault} {', '.join(sorted(names)[:SHOWN])}{more}: "
                "restore it or use an earlier checkpoint."
            )
