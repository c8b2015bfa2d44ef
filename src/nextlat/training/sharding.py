"""FSDP2: weights, gradients and optimiser state in shards, one of each on every process.

The plan is one: every decoder layer is a unit, and everything else (embeddings, head, objective)
one more, whose weights are whole while the model's `forward` runs. An objective calls the head and
the embeddings from there, apart from the transformer and several times.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed import checkpoint as _checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainingArguments

from nextlat.errors import NextLatError, first_line
from nextlat.model import ObjectiveModel
from nextlat.training import ranks
from nextlat.training.checkpoints import OF_PARAMETER_SHAPE, SHARDS, load_state
from nextlat.weights import FSDP

# Methods that compute with weights, besides `forward`; all processes call them together.
METHODS = ("acceptance", "generate", "hidden", "next_token_logits", "next_token_loss", "step")
REFUSED = {
    "cpu_offload": "the CPU holds no shards: leave cpu_offload (fsdp_offload_params) out",
    "cpu_ram_efficient_loading": "attach needs the weights on every process: set "
    "cpu_ram_efficient_loading to false",
    "activation_checkpointing": "set gradient_checkpointing=True of the TrainingArguments instead "
    "of FSDP's activation_checkpointing",
    "ignored_modules": "every weight is sharded: leave ignored_modules out",
}
# Of the Trainer's `fsdp_config`, which takes and forgets whatever else is in it.
HEEDED = {
    "version",
    "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
    "cpu_offload",
    "cpu_ram_efficient_loading",
    "activation_checkpointing",
    "reshard_after_forward",
    "state_dict_type",  # of either type, weights are saved in one piece and the optimiser in shards
}


def plugin_of(args: TrainingArguments) -> Any:
    """accelerate's FSDP plugin, as the arguments or accelerate's own configuration ask for it; None
    where they do not.

    Raises:
        NextLatError: a setting that would be ignored, or cannot work.
    """
    config: Any = args.fsdp_config or {}
    if config and not args.fsdp:
        raise NextLatError("fsdp_config does nothing without fsdp=True: set that, or leave it out.")
    if not (args.fsdp or ranks.asked("ACCELERATE_USE_FSDP")):
        return None
    if args.world_size == 1:
        raise NextLatError(
            "FSDP divides a model among several processes, and this one is alone: start them with "
            "torchrun, or leave FSDP out."
        )
    if args.mixed_precision == "fp16":
        raise NextLatError("FSDP trains an objective model in fp32 or bf16: leave fp16 out.")
    if args.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise NextLatError("FSDP shards an objective model uncompiled: leave torch_compile out.")
    try:
        plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    except (ValueError, TypeError, KeyError) as error:
        raise NextLatError(f"FSDP cannot be configured so: {first_line(error)}.") from error
    if plugin.fsdp_version != 2:
        raise NextLatError(
            "FSDP1 cannot train an objective model, whose parts are called apart: set "
            "fsdp_config['version'] to 2 (fsdp_version in a configuration of accelerate)."
        )
    if unheeded := sorted(name for name, value in config.items() if value and name not in HEEDED):
        raise NextLatError(f"fsdp_config has {unheeded[0]}, which FSDP2 has not: leave it out.")
    if args.save_on_each_node:
        raise NextLatError(
            "with FSDP all processes write into one directory: leave save_on_each_node out, and "
            "let output_dir be one that all machines see."
        )
    for name, way_out in REFUSED.items():
        value = getattr(plugin, name)
        if value and type(value).__name__ != "OffloadPolicy":  # which is accelerate's False
            raise NextLatError(f"FSDP is configured with {name}: {way_out}.")
    if "size_based" in str(plugin.auto_wrap_policy):
        raise NextLatError(
            "FSDP is configured to wrap modules by their size, which can split the output head "
            "from the objective that calls it: choose TRANSFORMER_BASED_WRAP."
        )
    return plugin


def units(model: ObjectiveModel, plugin: Any) -> list[nn.Module]:
    """The modules that are sharded by themselves: the decoder layers of its transformers.

    Raises:
        NextLatError: the plugin names classes that are none, or others.
    """
    if plugin.auto_wrap_policy is None:
        return []
    transformers = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    asked = plugin.transformer_cls_names_to_wrap
    found = list[nn.Module]()
    for module in {m: None for t in transformers for m in t.modules()}:
        names = asked or {x for t in transformers for x in t._no_split_modules or ()}
        found += [module] if type(module).__name__ in names else []
    apart = [*model.backbone.head.parameters(), *model.lm.get_input_embeddings().parameters()]
    held = {id(p) for p in apart}
    for module in found:
        if module in transformers or any(id(p) in held for p in module.parameters()):
            raise NextLatError(
                f"the FSDP plan wraps {type(module).__name__}, which holds the output head or the "
                "embeddings that the objective calls apart: wrap the decoder layers alone (leave "
                "transformer_layer_cls_to_wrap out)."
            )
    for name in set(asked or ()) - {type(module).__name__ for module in found}:
        raise NextLatError(
            f"the FSDP plan wraps {name}, which is no part of the transformer "
            f"{type(model.lm).__name__}: leave transformer_layer_cls_to_wrap out."
        )
    return found


checkpoint: Any = _checkpoint  # which exports nothing by name


class Shards:
    """An objective model whose weights lie in shards, made so in place.

    Args:
        model: the same on all processes.
        plugin: see `plugin_of`.
        device: of this process.
        bf16: compute in it under autocast, as without shards: the weights that are gathered are
            fp32.

    Raises:
        NextLatError: see `units`.
    """

    def __init__(
        self, model: ObjectiveModel, plugin: Any, device: torch.device, *, bf16: bool
    ) -> None:
        self._model = model
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        layers = units(model, plugin)
        self._scalars = {name for name, p in model.named_parameters() if p.ndim == 0}
        for name in self._scalars:  # which FSDP2 does not take
            _set(model, name, nn.Parameter(_get(model, name).detach().view(1)))
        for layer in reversed(layers):  # from the inside
            fully_shard(layer, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
        fully_shard(model, mesh=mesh)
        if bf16:  # a cast that is kept would be a weight that is not freed
            autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            model.forward = autocast(model.forward)  # type: ignore[method-assign]
        for method in METHODS:
            register_fsdp_forward_method(model, method)

    @contextmanager
    def whole(self, *, changed: bool = False) -> Iterator[None]:
        """Inside, every weight of the model is in one piece on the CPU: on the first process, to be
        saved, or with `changed` on all of them, to be loaded into."""
        kept = changed or ranks.is_first()
        hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []
        for module in self._model.modules():
            tables: list[dict[int, Any]] = [module._load_state_dict_post_hooks]
            if isinstance(module, FSDPModule):
                module.reshard()
                tables += [module._forward_pre_hooks, module._forward_hooks]
            hooks += [(table, {**table}) for table in tables if table]
        shards = dict(self._model.named_parameters(remove_duplicate=False))
        pieces = dict[int, nn.Parameter]()
        for name, p in self._model.named_parameters():
            full: Any = p.full_tensor() if isinstance(p, DTensor) else p  # all take part
            if kept:
                full = full.detach().cpu().view(() if name in self._scalars else p.shape)
                pieces[id(p)] = nn.Parameter(full, p.requires_grad)
        try:
            for name, p in shards.items() if kept else ():
                _set(self._model, name, pieces[id(p)])
            for table, before in hooks:  # a save may run the model, on this process alone
                for number, hook in before.items():
                    if getattr(hook, "__module__", "").startswith(FSDP):
                        del table[number]
            yield
        finally:
            for name, p in shards.items():
                _set(self._model, name, p)
            for table, before in hooks:
                table.clear()
                table.update(before)
        with torch.no_grad():
            for p in self._model.parameters() if changed else ():
                p.copy_(_like(p, pieces[id(p)]))


def _get(model: nn.Module, name: str) -> Tensor:
    folder, _, last = name.rpartition(".")
    return getattr(model.get_submodule(folder), last)


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    folder, _, last = name.rpartition(".")
    model.get_submodule(folder)._parameters[last] = parameter


def _like(p: Tensor, full: Tensor) -> Tensor:
    """A tensor that every process has all of, in shards as a parameter is."""
    full = full.detach().view(p.shape)
    if not isinstance(p, DTensor):
        return full
    full = full.to(p.device)
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


# ---- the optimiser: what is in shards lies in files of their own, all else in optimizer.pt ----


def names_of(model: nn.Module, optimizer: Any) -> list[str]:
    """Names of the parameters of an optimiser, in order."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]


def take_shards(model: nn.Module, optimizer: Any, names: Sequence[str]) -> None:
    """Let an optimiser have the parameters of these names as they are now, by the order of what
    `names_of` gave. (accelerate goes by addresses, and empty shards have none.)"""
    parameters, left = dict(model.named_parameters()), iter(names)
    for group in optimizer.param_groups:
        group["params"] = [parameters[next(left)] for _ in group["params"]]


def save_optimizer(directory: Path, optimizer: Any, names: Sequence[str]) -> None:
    """Write the state of an optimiser as the shards in which it lies. All processes together.

    Args:
        directory: a checkpoint.
        optimizer: of a model in shards.
        names: of its parameters, in order.
    """
    packed = optimizer.state_dict()
    shards = {
        f"{names[index]}.{key}": x
        for index, values in packed["state"].items()
        for key, x in values.items()
        if isinstance(x, DTensor)
    }
    if shards:
        writer = checkpoint.HuggingFaceStorageWriter(str(directory / SHARDS), save_distributed=True)
        checkpoint.save(shards, storage_writer=writer)
    if ranks.is_first():
        rest = {
            index: {key: x for key, x in values.items() if not isinstance(x, DTensor)}
            for index, values in packed["state"].items()
        }
        torch.save({**packed, "state": rest}, directory / "optimizer.pt")


def load_optimizer(directory: Path, parameters: Sequence[Tensor], names: Sequence[str]) -> Any:
    """What `optimizer.load_state_dict` takes, however many processes wrote it, in shards or not.

    Args:
        directory: a checkpoint.
        parameters: of the optimiser, in order.
        names: theirs.

    Raises:
        ValueError: it is of a model with other parameters, or not whole.
    """
    state = load_state(directory / "optimizer.pt")
    known = {name: index for index, name in enumerate(names)}
    if (directory / SHARDS).is_dir():
        reader = checkpoint.HuggingFaceStorageReader(str(directory / SHARDS))
        read = dict[str, Tensor]()
        saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
        for full_name, of_tensor in saved.items():
            name, _, key = full_name.rpartition(".")
            if name not in known:
                raise ValueError("it is of a model with other parameters")
            p, size = parameters[known[name]], of_tensor.size
            like = p if p.shape == size else torch.empty(size)
            # What no file holds stays NaN.
            read[full_name] = torch.full_like(like, torch.nan, dtype=of_tensor.properties.dtype)
            state["state"].setdefault(known[name], {})[key] = read[full_name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it reads alone, which is what it is to do
            checkpoint.load(read, storage_reader=reader, no_dist=True)
        for full_name, x in read.items():
            if not torch.isfinite(x.to_local() if isinstance(x, DTensor) else x).all():
                raise ValueError(f"{full_name} is not whole")
    for index, values in state["state"].items():
        p = parameters[index]
        for key in OF_PARAMETER_SHAPE & values.keys():
            if not isinstance(x := values[key], DTensor) and x.numel() == p.numel():
                values[key] = _like(p, x)
    return state
