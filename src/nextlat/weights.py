"""Weights on disk and in a model, compared key by key: none may be missing, left over, of another
shape or of another dtype. Only safetensors are read.

What no comparison of names and shapes can find, a flipped bit or the weights of another run, is
found by the checksums that every save leaves beside the sidecar.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import transformers
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as library_logging
from transformers.utils.hub import cached_file

from nextlat.errors import NextLatError, first_line
from nextlat.files import write_text
from nextlat.validation import Settings, read_json

T = TypeVar("T")

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SIDECAR, WEIGHTS = "nextlat", "objective.safetensors"
SUMS = f"{SIDECAR}/SHA256SUMS"  # as sha256sum writes and checks it
# Those that define a model, and those that a run goes on from.
MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    INDEX,
    "adapter_config.json",
    "adapter_model.safetensors",
    "nextlat/objective.*",
)
STATE_FILES = ("*.pt", "*.pth", "trainer_state.json", "optimizer/*.safetensors")
FSDP = "torch.distributed.fsdp"
SHOWN = 3  # names in an error
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]  # -1 = none, in some old models


class _GenerationConfig(Settings, extra="allow"):
    """What decoding takes from generation_config.json without a look at it."""

    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | None = None


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
    except NextLatError:
        raise
    except Exception as error:  # a library stumbles over what a file holds in its own ways
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
    names = [FILE]
    # As transformers: one file, or else several.
    if find(directory, FILE) is None and (index := find(directory, INDEX)) is not None:
        names = opened(index, lambda: [*{*json.loads(index.read_text())["weight_map"].values()}])
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = find(directory, name)
        if path is None:
            raise NextLatError(f"{directory} has no {name}: restore it.")
        tensors |= opened(path, partial(load_file, path))
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
        config = opened(directory, lambda: _checked_config(directory, arguments))
        loaded: Any = opened(
            directory,
            lambda: _architecture(config).from_pretrained(
                directory, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
            ),
        )
    finally:
        library_logging.set_verbosity(verbosity)
    lm, info = loaded
    refuse(
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
        if not converts and read_sums(directory):  # then several dtypes are no damage
            for name, p in lm.named_parameters():
                if name in saved and p.is_floating_point() and saved[name].is_floating_point():
                    p.data = p.data if p.dtype == saved[name].dtype else saved[name].to(p.device)
            both = {name: x for name, x in lm.state_dict().items() if name in saved}
        refuse(
            directory,
            misread=_other_dtypes(saved, both, converts),
            not_finite=not_finite(lm.named_parameters()),
        )
    return lm


def _architecture(config: PreTrainedConfig) -> Any:
    """`AutoModelForCausalLM`, or the class that a configuration names which that does not know: the
    text halves of some multimodal models."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    return AutoModelForCausalLM


def _checked_config(directory: str | Path, arguments: dict[str, Any]) -> PreTrainedConfig:
    """The configuration, without what would do harm while a model is made of it: code of the hub,
    and absurd sizes.

    Raises:
        NextLatError: config.json asks for such.
    """
    config = AutoConfig.from_pretrained(directory, **arguments)
    for name in ("attn_implementation", "experts_implementation"):
        kernel = getattr(config, f"_{name}", None)
        if "/" in str(kernel) and name not in arguments:
            raise NextLatError(
                f"config.json of {directory} asks for code of the hub ({name} = {kernel!r}): if "
                f"you trust that, load it with {name} given."
            )
    generation = find(directory, "generation_config.json")
    if generation is not None:  # transformers passes over one that it cannot read
        again = "restore it, or delete it"
        content = read_json(generation, again)
        _GenerationConfig.from_json(content, f"{generation} is damaged, {again}")
    if getattr(config, "quantization_config", None) is not None:
        return config
    saved = read_lm(directory)
    parts = max([len(saved), *(size for x in saved.values() for size in x.shape)], default=0)
    for name, number in vars(config.get_text_config(decoder=True)).items():
        counted = name == "num_hidden_layers" or "experts" in name
        if counted and isinstance(number, int) and number > parts:
            raise NextLatError(f"{directory} has no weights for {name} = {number}: restore it.")
    with torch.device("meta"):
        kind = _architecture(config)
        auto = kind is AutoModelForCausalLM
        lm = (
            kind.from_config(config, trust_remote_code=False) if auto else kind._from_config(config)
        )
    expected, found = (sum(x.numel() for x in xs) for xs in (lm.parameters(), saved.values()))
    if expected > 2 * found:
        raise NextLatError(
            f"config.json of {directory} describes {expected:,} weights, and its files hold "
            f"{found:,}: restore it or use an earlier checkpoint."
        )
    return config


def check_restorable(lm: PreTrainedModel) -> None:
    """Refuse to save what would not come back: modules or weights that a model of the same class
    and configuration does not have, such as adapters.

    Raises:
        NextLatError: there are such.
    """
    if getattr(lm, "is_quantized", False):  # its configuration says how
        return
    with torch.device("meta"):
        plain = type(lm)._from_config(copy.deepcopy(lm.config))
    ours, theirs = (
        {name: x.shape for name, x in model.state_dict().items()} for model in (lm, plain)
    )
    other = [n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)]
    modules = dict(plain.named_modules())
    for name, module in lm.named_modules():  # some of the library's own change as they run
        # FSDP puts classes of its own before that of a module.
        kind: Any = next(k for k in type(module).__mro__ if not k.__module__.startswith(FSDP))
        same = kind.forward is type(modules.get(name, module)).forward
        other += [] if same or kind.__module__.startswith("transformers.") else [name]
    if other:
        raise NextLatError(
            f"{type(lm).__name__} cannot be saved so that it comes back: {min(other)} is not what "
            "its configuration says; merge adapters into it, and take off what is around its "
            "modules."
        )


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
    refuse(
        where,
        missing=[n for n, x in state.items() if n not in saved and x.data_ptr() not in present],
        left_over=saved.keys() - state.keys(),
        misshapen=[name for name, x in both.items() if x.shape != saved[name].shape],
        misread=_other_dtypes(saved, both, converts),
        not_finite=not_finite((n, saved[n]) for n, _ in module.named_parameters() if n in saved),
    )


def not_finite(parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of those in which some number is not finite."""
    # torch does not tell it of numbers of one byte.
    found = [(name, torch.isfinite(x).all()) for name, x in parameters if x.itemsize > 1]
    if not found or torch.stack([x for _, x in found]).all():  # so that a GPU is waited for once
        return []
    return [name for name, finite in found if not finite]


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


def refuse(
    where: object,
    missing: Collection[str] = (),
    left_over: Collection[str] = (),
    misshapen: Collection[str] = (),
    misread: Collection[str] = (),
    not_finite: Collection[str] = (),
) -> None:
    """Raise a NextLatError that names what is wrong with the tensors of a file or directory, if
    anything is."""
    faults = {
        "lacks": missing,
        "holds, beyond the weights of the model,": left_over,
        "holds in another shape than the model": misshapen,
        "holds in another dtype than the model": misread,
        "holds numbers that are not finite in": not_finite,
    }
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise NextLatError(
                f"{where} {fault} {', '.join(sorted(names)[:SHOWN])}{more}: "
                "restore it or use an earlier checkpoint."
            )


def write_sums(directory: Path, known: Mapping[str, str] = {}) -> None:
    """Write the checksums of a saved model, and of what a run goes on from, beside its sidecar.

    Args:
        directory: of the model.
        known: sums of some of its files.
    """
    files = {path for pattern in MODEL_FILES + STATE_FILES for path in directory.glob(pattern)}
    sums = {path.relative_to(directory).as_posix(): path for path in sorted(files)}
    lines = (f"{known.get(name) or _sum(path)}  {name}\n" for name, path in sums.items())
    write_text(directory / SUMS, "".join(lines))


def read_sums(directory: str | Path) -> dict[str, str]:
    """Name of a file -> its checksum; none for a directory that has no checksums.

    Raises:
        NextLatError: they are damaged.
    """
    path = find(directory, Path(SUMS).name, subfolder=Path(SUMS).parent.name)
    if path is None:
        return {}
    lines = opened(path, lambda: path.read_text(encoding="utf-8").splitlines())
    found = [re.fullmatch(r"([0-9a-f]{64})  ((?:\w+/)?[\w.-]+)", line) for line in lines]
    if None in found:
        raise NextLatError(f"{path} is damaged: restore it.")
    return {match[2]: match[1] for match in found if match}


def check_sums(directory: str | Path, patterns: Sequence[str] = MODEL_FILES) -> None:
    """Compare files with the checksums that were written when they were saved.

    Args:
        directory: a local path or a hub id; nothing is compared where it has no checksums.
        patterns: of the names of the files.

    Raises:
        NextLatError: one is missing, or is another.
    """
    for name, expected in read_sums(directory).items():
        if any(Path(name).match(pattern) for pattern in patterns):
            folder, _, file = name.rpartition("/")
            path = find(directory, file, subfolder=folder)
            found = path and opened(path, partial(_sum, path))
            if found != expected:
                fault = "is missing" if path is None else "is not the file that was saved there"
                raise NextLatError(
                    f"{Path(directory) / name} {fault} (see {SUMS}): restore it or use an earlier "
                    f"checkpoint; if it was changed on purpose, delete {SUMS}."
                )


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
