"""Adapters of PEFT in the layers of a language model (LoRA and its kin): found, saved as PEFT saves
them, opened on the base that they were trained on, merged.

What is in a directory of such a model: `adapter_config.json` and `adapter_model.safetensors`, which
`peft` opens by itself, and the sidecar. The base is named there, not copied.
"""

import copy
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from nextlat.backbone import Backbone, evaluation_mode, probe_ids
from nextlat.errors import NextLatError, first_line
from nextlat.hub import hub_or_cache
from nextlat.validation import Settings
from nextlat.weights import find, load_lm, opened, refuse

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in the file, as PEFT has it
SAMPLES = 16  # numbers of each weight that tell one base from another
ON_THE_LM = (
    "adapters go into the language model, not into its objective, which is trained whole: "
    "nextlat.attach(get_peft_model(lm, config), ...)."
)


class Base(Settings):
    """What an adapter was trained on.

    Attributes:
        dtype: of its weights in memory.
        sha256: of some numbers of each of its weights.
    """

    dtype: str
    sha256: str


def language_model(lm: Any) -> Any:
    """The transformers model inside a `PeftModel`, with the adapter in its layers; any other model
    as it is.

    Raises:
        NextLatError: an adapter that is not in the layers (prompt learning).
    """
    if (peft := sys.modules.get("peft")) is None or not isinstance(lm, peft.PeftModel):
        return lm
    if lm.active_peft_config.is_prompt_learning:
        kind = lm.active_peft_config.peft_type.value
        raise NextLatError(
            f"{kind} puts tokens of its own before the text, which no objective knows of: use an "
            "adapter in the layers, such as LoRA."
        )
    return lm.get_base_model()


def is_adapted(lm: nn.Module) -> bool:
    """Whether there are adapters in the layers of a model as it is now."""
    return next(_adapter_layers(lm), None) is not None


def _adapter_layers(lm: nn.Module) -> Iterator[tuple[str, Any]]:
    if "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        for name, module in lm.named_modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                yield name, module


def _state(lm: Any) -> tuple[str, dict[str, Tensor]]:
    """The name of the adapter of a model, and its weights by their names on disk.

    Raises:
        NextLatError: there are several.
    """
    from peft import get_peft_model_state_dict

    names = [*lm.peft_config]
    if len(names) > 1:
        raise NextLatError(
            f"the model has the adapters {', '.join(names)}, a directory holds one: delete the "
            "others (delete_adapter), or save with merge=True."
        )
    # "auto" would ask the hub whether the vocabulary has been resized.
    state = get_peft_model_state_dict(lm, adapter_name=names[0], save_embedding_layers=False)
    return names[0], {PREFIX + name: x for name, x in state.items()}


def base_of(lm: Any) -> Base:
    """What the adapter of a model is on.

    Raises:
        NextLatError: something of it is trained besides the adapter.
    """
    adapter = {x.data_ptr() for x in _state(lm)[1].values()}
    digest = hashlib.sha256()
    for name, parameter in lm.named_parameters():
        if parameter.data_ptr() in adapter:
            continue
        if parameter.requires_grad:
            raise NextLatError(
                f"{name} is trained besides the adapter, and what is saved holds the adapter only: "
                "freeze it, list it in the adapter's modules_to_save, or save with merge=True."
            )
        numbers = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLES)]
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(numbers.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return Base(dtype=str(lm.dtype).removeprefix("torch."), sha256=digest.hexdigest())


def save(lm: Any, directory: Path) -> None:
    """Write the adapter of a model as PEFT does.

    Raises:
        NextLatError: it cannot be opened again: several adapters, one that is merged or switched
            off, a base without a name.
    """
    for name, layer in _adapter_layers(lm):
        how = "merged" if getattr(layer, "merged", False) else "switched off"
        if how == "merged" or layer.disable_adapters:
            raise NextLatError(f"the adapter at {name} is {how}: undo that before it is saved.")
    adapter, state = _state(lm)
    config = copy.copy(lm.peft_config[adapter])
    config.base_model_name_or_path = config.base_model_name_or_path or lm.name_or_path
    if not config.base_model_name_or_path:
        raise NextLatError(
            "the model under the adapter was made in memory, and an adapter only names its base: "
            "save that first and open it with from_pretrained, or save with merge=True."
        )
    config.task_type, config.inference_mode = config.task_type or "CAUSAL_LM", True
    config.save_pretrained(str(directory))
    weights = {name: x.detach().contiguous().cpu() for name, x in state.items()}
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def load(directory: str | Path, base: Base | None, **model_arguments: Any) -> PreTrainedModel:
    """The base of a saved adapter, with the adapter in its layers; that alone is trainable.

    Args:
        directory: a local path or a hub id.
        base: what it was trained on.
        model_arguments: of `from_pretrained` of the base, whose dtype is that of the training
            unless it is given.

    Raises:
        NextLatError: PEFT is missing; the base cannot be opened or is another; the weights are not
            those of the adapter.
    """
    try:
        from peft import PeftConfig, inject_adapter_in_model
    except ImportError as error:
        raise NextLatError(
            f"{directory} holds an adapter, which needs PEFT: pip install 'nextlat[peft]'."
        ) from error
    path = find(directory, CONFIG)
    assert path is not None
    config: Any = opened(path, lambda: PeftConfig.from_pretrained(str(path.parent)))
    if config.is_prompt_learning or getattr(config, "megatron_config", None):
        raise NextLatError(f"{path} is not of an adapter in the layers, such as LoRA.")
    arguments = dict(model_arguments)
    if base is not None:
        arguments.setdefault("dtype", base.dtype)
    if config.revision:
        arguments.setdefault("revision", config.revision)
    named = config.base_model_name_or_path
    with hub_or_cache(named):
        lm = load_lm(named, **arguments)
    try:
        config.inference_mode = False
        inject_adapter_in_model(config, lm)
    except ValueError as error:
        raise NextLatError(f"{path} does not fit {named} ({first_line(error)}).") from error
    lm.eval()
    read_into(lm, directory)
    if base is not None and arguments["dtype"] == base.dtype and base_of(lm) != base:
        raise NextLatError(
            f"{named} is not the model that the adapter in {directory} was trained on: restore it, "
            f"or name the right one in {CONFIG}."
        )
    return lm


def read_into(lm: Any, directory: str | Path) -> None:
    """Read saved weights into the adapter of a model, in place.

    Raises:
        NextLatError: they are missing, or are not those of the adapter.
    """
    from peft import set_peft_model_state_dict

    path = find(directory, WEIGHTS)
    if path is None:
        raise NextLatError(f"{directory} has no {WEIGHTS}: restore it.")
    saved = opened(path, lambda: load_file(path))
    name, state = _state(lm)
    both = saved.keys() & state.keys()
    refuse(
        path,
        missing=state.keys() - saved.keys(),
        left_over=saved.keys() - state.keys(),
        misshapen=[name for name in both if saved[name].shape != state[name].shape],
        not_finite=[name for name in both if not torch.isfinite(saved[name]).all()],
    )
    dtypes = {state[name].data_ptr(): saved[name].dtype for name in both}
    for parameter in lm.parameters():  # PEFT would convert what it reads
        if (dtype := dtypes.get(parameter.data_ptr())) is not None:
            parameter.data = parameter.data.to(dtype)
    set_peft_model_state_dict(
        lm, {name.removeprefix(PREFIX): x for name, x in saved.items()}, adapter_name=name
    )


def merged(lm: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with its adapters added to the weights that they adapt.

    Raises:
        NextLatError: the copy computes something else: the adapter is on a weight that another
            layer shares.
    """
    plain: Any = copy.deepcopy(lm)
    while (found := next(_adapter_layers(plain), None)) is not None:
        name, layer = found
        parent, _, attribute = name.rpartition(".")
        if hasattr(layer, "unload_and_optionally_merge_module"):
            inner = layer.unload_and_optionally_merge_module(True, True, layer.active_adapters)
        else:
            layer.merge(safe_merge=True)
            inner = layer.get_base_layer()
        setattr(plain.get_submodule(parent), attribute, inner)
    plain.__dict__.pop("peft_config", None)
    plain._hf_peft_config_loaded = False
    plain.requires_grad_(True)
    with evaluation_mode(lm, plain):
        ids = probe_ids(lm)
        before, after = (m(input_ids=ids, use_cache=False).logits for m in (lm, plain))
    if not Backbone.close(after, before):
        raise NextLatError(
            "the adapter cannot be merged without changing what the model computes: it is on a "
            "weight that another layer shares (tied embeddings). Save it as an adapter."
        )
    return plain
