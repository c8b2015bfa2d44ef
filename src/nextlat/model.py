"""ObjectiveModel = an unmodified causal LM + a training objective: attach, load, forward, generate,
save.

On disk it is a plain Hugging Face directory that loads with this package uninstalled; what the
objective adds lies in its sub-folder `nextlat/`, which everyone else ignores.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from nextlat.backbone import Backbone, evaluation_mode
from nextlat.batch import Batch
from nextlat.decoding import generate
from nextlat.errors import NextLatError
from nextlat.files import write_json
from nextlat.hub import hub_or_cache
from nextlat.losses import Counts, cross_entropy
from nextlat.objectives import OBJECTIVES, NextTokenConfig, Objective
from nextlat.serving.draft_config import write_draft_config
from nextlat.validation import Settings, check_format, nearest, read_json
from nextlat.weights import check, check_sums, copy_into, find, load_lm, opened, read_lm, write_sums

SIDECAR, DESCRIPTION, WEIGHTS = "nextlat", "objective.json", "objective.safetensors"
FORMAT: Literal[1] = 1
PART = (
    "The transformer beside this is only part of the model: open the directory with nextlat.load."
)


class Description(Settings):
    """objective.json, the sidecar's description of itself.

    Attributes:
        format: version of this file.
        objective: key of `OBJECTIVES`.
        config: its settings.
        needed_at_inference: see `Objective`.
        backbone: sizes of the model that it was trained on.
        note: for whoever opens the directory without this package.
    """

    format: Literal[1] = FORMAT
    objective: str
    config: dict[str, Any]
    needed_at_inference: bool
    backbone: dict[str, str | int]
    note: str | None = None


@dataclass
class ObjectiveOutput(ModelOutput):
    """Output of `ObjectiveModel.forward`.

    Attributes:
        loss: one scalar, with labels.
        losses: the named parts before weighting, detached means, with labels.
        logits: (B, T, V), only without labels.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None


class ObjectiveModel(nn.Module):
    """A causal LM with a training objective around it. Made by `attach` or `load`.

    Attributes:
        lm: the causal LM itself, unmodified; `model.lm.generate`, `lm.push_to_hub` ... all work as
            ever.
        objective: what the objective adds, e.g. `objective.dynamics` for NextLat.
    """

    # Told to `transformers.Trainer`: what it passes as num_items_in_batch counts shifted labels.
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"
    _keys_to_ignore_on_save = None

    def __init__(self, lm: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.lm = lm
        self.objective = objective
        # Every weight once: files and the Trainer take no tied ones.
        self.register_state_dict_post_hook(_drop_aliases)
        self.register_load_state_dict_pre_hook(_add_aliases)

    @property
    def backbone(self) -> Backbone:
        """Access to hidden states, embeddings and head of `lm`."""
        return self.objective.backbone

    @property
    def config(self) -> Any:
        """The configuration of `lm`."""
        return self.lm.config

    @property
    def device(self) -> torch.device:
        """Where `lm` is."""
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights of `lm`."""
        return self.lm.dtype

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        counts: Counts | None = None,
        num_items_in_batch: Tensor | int | None = None,
        states: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Loss of the objective on a batch, or logits when there are no labels.

        Args:
            input_ids: (B, T).
            labels: (B, T), aligned with them (shifted inside), -100 = no token-level loss.
            position_ids: (B, T), restarting at 0 with every document of a packed row; None = one
                document per row.
            attention_mask: (B, T), 0 on padding.
            counts: what to divide by, if not the counts of this batch: those of a whole optimiser
                step (see `Objective.counts`).
            num_items_in_batch: the same as far as `transformers.Trainer` knows it: labelled tokens
                of the whole step, by which every part is then divided.
            states: (B, T, D) hidden states, where they are known (of a frozen transformer).

        Raises:
            NextLatError: packed rows for a model that would attend across documents; shapes that
                disagree.
        """
        targets = input_ids if labels is None else labels
        batch = Batch.from_inputs(input_ids, targets, position_ids, attention_mask)
        batch = batch if states is None else replace(batch, states=states)
        if labels is None:
            return ObjectiveOutput(logits=self.next_token_logits(self.hidden(batch)))
        if counts is None and num_items_in_batch is not None:
            counts = {
                name: torch.ones_like(count) * num_items_in_batch
                for name, count in self.objective.counts(batch).items()
            }
        losses = self.objective.loss(batch, counts)
        return ObjectiveOutput(loss=losses.total, losses=losses.means())

    def counts(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Counts:
        """`Objective.counts` of a batch given as in `forward`."""
        batch = Batch.from_inputs(input_ids, labels, position_ids, attention_mask)
        return self.objective.counts(batch)

    def next_token_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the next token, row by row, to measure: no gradients, no dropout.

        Returns:
            (B,) sums in nats, and (B,) the number of tokens that each is over.
        """
        shape = batch.input_ids.shape
        with evaluation_mode(self):
            rows = zip(
                self.hidden(batch),
                batch.targets.view(shape),
                batch.scored.view(shape),
                strict=True,
            )
            sums = [
                cross_entropy(self.next_token_logits, h_TD[scored_T], targets_T[scored_T])
                for h_TD, targets_T, scored_T in rows
            ]
        return torch.stack(sums), batch.scored.view(shape).sum(dim=1)

    def gradient_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """That of the LM."""
        self.lm.gradient_checkpointing_enable(*arguments, **options)

    def activation_checkpointing_enable(self, *arguments: Any, **options: Any) -> None:
        """That of the LM."""
        self.lm.activation_checkpointing_enable(*arguments, **options)

    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, D) states of whole rows, in which `next_token_logits` reads the next token; see
        `Objective.output_states`."""
        return self.objective.output_states(self.backbone.hidden(batch), batch.input_ids)

    def step(self, input_ids: Tensor, cache: Any = None, **arguments: Any) -> tuple[Tensor, Any]:
        """(states, cache): the same states of some more tokens (B, T) of every row, KV-cached. See
        `Backbone.step`."""
        h_BTD, cache = self.backbone.step(input_ids, cache, **arguments)
        return self.objective.output_states(h_BTD, input_ids), cache

    def next_token_logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., V), in states that `hidden` or `step` gave."""
        return self.objective.next_token_logits(h)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        """KV-cached lossless self-speculation with the options of `transformers`' `generate`, and
        `draft_length="auto"` unless it is given (0 = plain decoding). See
        `nextlat.decoding.generate` for everything that it takes and gives."""
        return generate(self, input_ids, attention_mask, **options)

    def save_pretrained(self, directory: str | Path, *, known: Mapping[str, str] = {}) -> None:
        """Write a plain Hugging Face directory and the sidecar `nextlat/` in it. Not atomic by
        itself: see `training`. The LM is not written where the checksums of its files are `known`,
        because they are there."""
        sidecar, objective = Path(directory) / SIDECAR, self.objective
        sidecar.mkdir(parents=True, exist_ok=True)
        if not known:
            with _cache_enabled(self.lm):
                self.lm.save_pretrained(directory)
        description = Description(
            objective=objective.name,
            config=objective.config.model_dump(mode="json"),
            needed_at_inference=objective.needed_at_inference,
            backbone=_sizes(self.backbone),
            note=PART if objective.needed_at_inference else None,
        )
        state = objective.state_dict().items()
        weights = {name: value.detach().contiguous().cpu() for name, value in state}
        save_file(weights, sidecar / WEIGHTS, metadata={"format": "pt"})
        write_json(sidecar / DESCRIPTION, description.model_dump(mode="json", exclude_none=True))
        write_draft_config(sidecar, objective)
        write_sums(Path(directory), known)

    def load_weights(self, directory: str | Path) -> None:
        """Load both halves in place from a directory that `save_pretrained` wrote (resume of a
        training run).

        Raises:
            NextLatError: a part is missing, truncated, not the one that was saved, or belongs to
                another objective or model.
        """
        check_sums(directory)
        path, description = _description(directory)
        config = _config(path, description)
        objective = self.objective
        if description.objective != objective.name or config != objective.config:
            raise NextLatError(
                f"{directory} was trained with {description.objective} ({config}), not "
                f"{objective.name} ({objective.config}): choose another run directory."
            )
        saved = read_lm(directory)
        if saved.keys() - self.lm.state_dict().keys():
            # An architecture that is stored under other names than it has in memory, or an error.
            saved = load_lm(directory, dtype=self.lm.dtype).state_dict()
        weights = _objective_weights(directory)
        check(saved, self.lm, directory)
        check(weights, objective, path.with_name(WEIGHTS))
        copy_into(self.lm, saved)
        copy_into(objective, weights)
        objective.check_vocabulary()


def _aliases(model: nn.Module) -> dict[str, str]:
    """Name of a tied weight -> the name it is saved under."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: kept for name, p in named if (kept := first.setdefault(id(p), name)) != name}


def _drop_aliases(model: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for alias in _aliases(model):
        state.pop(prefix + alias, None)


def _add_aliases(model: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for alias, kept in _aliases(model).items():
        if prefix + kept in state:
            state.setdefault(prefix + alias, state[prefix + kept])


@contextmanager
def _cache_enabled(lm: PreTrainedModel) -> Iterator[None]:
    """Trainer switches `config.use_cache` off for training; a saved model should not carry that to
    its users."""
    before = getattr(lm.config, "use_cache", None)
    if before is not None:
        lm.config.use_cache = True
    try:
        yield
    finally:
        if before is not None:
            lm.config.use_cache = before


def attach(lm: PreTrainedModel, config: Settings | None = None) -> ObjectiveModel:
    """Put a training objective around any causal LM of transformers, from scratch or pretrained.

    Args:
        lm: a decoder-only causal LM; it is not modified. Freeze it (`lm.requires_grad_(False)`) to
            train the objective alone.
        config: `NextLatConfig(...)`, `NextTokenConfig()`, ...; default next-token prediction.

    Raises:
        NextLatError: the model or the configuration is not one we support (see `Backbone`).
    """
    config = NextTokenConfig() if config is None else config
    for config_type, objective_type in OBJECTIVES.values():
        if type(config) is config_type:
            objective = objective_type(config, Backbone(lm)).to(device=lm.device, dtype=lm.dtype)
            return ObjectiveModel(lm, objective)
    names = ", ".join(config_type.__name__ for config_type, _ in OBJECTIVES.values())
    raise NextLatError(
        f"{type(config).__name__} is not an objective's configuration: use one of {names}."
    )


def load(directory: str | Path, **model_arguments: Any) -> ObjectiveModel:
    """Open a directory (or hub repository) that `save_pretrained` wrote.

    Args:
        directory: a local path or a hub id.
        model_arguments: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map ...).

    Raises:
        NextLatError: nothing there, no sidecar, a truncated file, one that is not as it was saved,
            weights that are missing or left over, or a sidecar that belongs to another model.
    """
    if Path(directory).is_dir() and not (Path(directory) / "config.json").is_file():
        raise NextLatError(
            f"cannot open {directory} (it has no config.json): name the directory of a saved model."
        )
    with hub_or_cache(directory):
        check_sums(directory)
        lm = load_lm(directory, **model_arguments)
        path, description = _description(directory)
        weights = _objective_weights(directory)
    model = attach(lm, _config(path, description))
    trained_on, sizes = description.backbone, _sizes(model.backbone)
    if trained_on != sizes:
        raise NextLatError(
            f"the objective in {directory} was trained on another model ({trained_on}) than the "
            f"one beside it ({sizes}): put the files back together."
        )
    converts = model_arguments.get("dtype", "auto") != "auto"
    dtypes = {x.dtype for x in weights.values() if x.is_floating_point()}
    if not converts and len(dtypes) == 1:
        model.objective.to(dtype=dtypes.pop())  # not always the LM's
    check(weights, model.objective, path.with_name(WEIGHTS), converts=converts)
    copy_into(model.objective, weights)
    model.objective.check_vocabulary()
    return model


def _sizes(backbone: Backbone) -> dict[str, str | int]:
    return {
        "model_type": backbone.lm.config.model_type,
        "width": backbone.width,
        "embedding_width": backbone.embedding_width,
        "vocab_size": backbone.vocab_size,
    }


def _description(directory: str | Path) -> tuple[Path, Description]:
    """The path and content of objective.json."""
    path = _sidecar_file(directory, DESCRIPTION)
    content = read_json(path, "restore it")
    version = content.get("format") if isinstance(content, dict) else None
    check_format(version, FORMAT, path, "save the model again")
    return path, Description.from_json(content, f"{path} does not describe an objective")


def _config(path: Path, description: Description) -> Settings:
    name = description.objective
    if name not in OBJECTIVES:
        raise NextLatError(f"{path} names objective '{name}': {nearest(name, [*OBJECTIVES])}.")
    config_type, _ = OBJECTIVES[name]
    return config_type.from_json(description.config, f"{path}, objective '{name}'")


def _objective_weights(directory: str | Path) -> dict[str, Tensor]:
    path = _sidecar_file(directory, WEIGHTS)
    return opened(path, lambda: load_file(path))


def _sidecar_file(directory: str | Path, name: str) -> Path:
    found = find(directory, name, SIDECAR)
    if found is None:
        raise NextLatError(
            f"{directory} has no {SIDECAR}/{name}: it is a model without an objective; "
            "load it with AutoModelForCausalLM and attach one with nextlat.attach."
        )
    return found
