"""ObjectiveModel = an unmodified causal LM + a training objective: attach, load, forward, generate,
save.

On disk it is a plain Hugging Face directory that loads with this package uninstalled; what the
objective adds lies in its sub-folder `nextlat/`, which everyone else ignores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from nextlat import adapters, sidecar
from nextlat.backbone import Backbone, evaluation_mode
from nextlat.batch import Batch
from nextlat.decoding import generate
from nextlat.errors import NextLatError
from nextlat.hub import hub_or_cache, push_directory
from nextlat.losses import Counts, cross_entropy
from nextlat.model_card import write_card
from nextlat.objectives import OBJECTIVES, NextTokenConfig, Objective
from nextlat.saving import cache_enabled, keep_tied_weights_once
from nextlat.validation import Settings
from nextlat.weights import (
    check,
    check_restorable,
    check_sums,
    copy_into,
    find,
    load_lm,
    not_finite,
    opened,
    read_lm,
    write_sums,
)

# What trainers do to the LM through the model around it.
OF_THE_LM = {
    "activation_checkpointing_enable",
    "add_model_tags",
    "generation_config",
    "gradient_checkpointing_enable",
}


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
            ever. Of a `PeftModel` it is the model inside, with the adapters in its layers.
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
        keep_tied_weights_once(self)

    def __getattr__(self, name: str) -> Any:
        if name in OF_THE_LM:
            return getattr(self.lm, name)
        if name in self._modules:
            return self._modules[name]
        raise AttributeError(
            f"an ObjectiveModel has no '{name}', its language model may: model.lm.{name}. (A "
            "trainer that computes a loss of its own needs ours before it, as in class "
            "Trainer(nextlat.NextLatTrainer, SFTTrainer).)"
        )

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

    def acceptance(self, states: Tensor | None = None, **inputs: Any) -> Tensor | None:
        """`Objective.acceptance` of a batch given as in `forward`."""
        return self.objective.acceptance(replace(Batch.from_inputs(**inputs), states=states))

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

    @property
    def peft_config(self) -> Any:
        """There is none: adapters are in the LM."""
        raise AttributeError("peft_config")

    @peft_config.setter
    def peft_config(self, value: Any) -> None:
        raise NextLatError(adapters.ON_THE_LM)  # PEFT sets it on what it has put adapters into

    def save_pretrained(
        self, directory: str | Path, *, merge: bool = False, known: Mapping[str, str] = {}
    ) -> None:
        """Write a plain Hugging Face directory and the sidecar `nextlat/` in it. Not atomic by
        itself: see `training`.

        Args:
            directory: a new one, or one written before.
            merge: write the LM with its adapters added to its weights, as a plain model. Otherwise
                a model with an adapter is saved as PEFT does: the adapter, and the name of its
                base.
            known: checksums of the LM's files, which are there already and are not written again.

        Raises:
            NextLatError: a weight is not finite; an adapter that could not be opened again (see
                `adapters`), or another module that would not come back.
        """
        if names := not_finite(self.named_parameters()):
            raise NextLatError(f"{names[0]} is not finite: the model is not saved.")
        directory = Path(directory)
        adapted = adapters.is_adapted(self.lm) and not merge
        if (directory / ("config.json" if adapted else adapters.CONFIG)).exists():
            other = "a plain model" if adapted else "an adapter"
            raise NextLatError(f"{directory} holds {other}: choose another directory.")
        base = adapters.base_of(self.lm) if adapted else None
        lm = adapters.merged(self.lm) if merge else self.lm
        if not adapted:
            check_restorable(lm)
        directory.mkdir(parents=True, exist_ok=True)
        if adapted:
            adapters.save(lm, directory)
        elif not known:
            with cache_enabled(lm):
                lm.save_pretrained(directory)
        sidecar.write(directory, self.objective, base)
        write_sums(directory, known)
        write_card(directory)

    def push_to_hub(
        self, name: str, *, merge: bool = False, tokenizer: Any = None, **options: Any
    ) -> str:
        """Save the model, its sidecar and its card, and upload them to the Hugging Face hub.

        Args:
            name: of the repository, "org/name"; made where there is none.
            merge: see `save_pretrained`.
            tokenizer: uploaded with it.
            options: of `hub.push_directory` (private, token, revision, commit_message).

        Returns:
            The address of the commit.

        Raises:
            NextLatError: it cannot be saved, or the hub does not take it.
        """
        with TemporaryDirectory() as folder:
            directory = Path(folder) / name.rpartition("/")[2]
            self.save_pretrained(directory, merge=merge)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
            return push_directory(directory, name, **options)

    def load_weights(self, directory: str | Path) -> None:
        """Load both halves in place from a directory that `save_pretrained` wrote (resume of a
        training run).

        Raises:
            NextLatError: a part is missing, truncated, not the one that was saved, or belongs to
                another objective or model.
        """
        check_sums(directory)
        path, description = sidecar.read_description(directory)
        config = sidecar.config_of(path, description)
        objective = self.objective
        if description.objective != objective.name or config != objective.config:
            raise NextLatError(
                f"{directory} was trained with {description.objective} ({config}), not "
                f"{objective.name} ({objective.config}): choose another run directory."
            )
        weights = sidecar.read_weights(directory)
        check(weights, objective, path.with_name(sidecar.WEIGHTS))
        if description.base is not None:
            if not adapters.is_adapted(self.lm) or adapters.base_of(self.lm) != description.base:
                raise NextLatError(
                    f"the adapter in {directory} was trained on another model: choose another run "
                    "directory."
                )
            adapters.read_into(self.lm, directory)
        else:
            saved = read_lm(directory)
            if saved.keys() - self.lm.state_dict().keys():
                # An architecture that is stored under other names than in memory, or an error.
                saved = load_lm(directory, dtype=self.lm.dtype).state_dict()
            check(saved, self.lm, directory)
            copy_into(self.lm, saved)
        copy_into(objective, weights)
        objective.check_vocabulary()


def attach(lm: PreTrainedModel, config: Settings | None = None) -> ObjectiveModel:
    """Put a training objective around any causal LM of transformers, from scratch or pretrained.

    Args:
        lm: a decoder-only causal LM, or a `PeftModel` of one, whose adapters are then trained with
            the objective; it is not modified. Freeze it (`lm.requires_grad_(False)`) to train the
            objective alone.
        config: `NextLatConfig(...)`, `NextTokenConfig()`, ...; default next-token prediction.

    Raises:
        NextLatError: the model or the configuration is not one we support (see `Backbone`).
    """
    config = NextTokenConfig() if config is None else config
    lm = adapters.language_model(lm)
    for config_type, objective_type in OBJECTIVES.values():
        if type(config) is config_type:
            # What is found out is kept, and what is made is trained, wherever this is called.
            with torch.inference_mode(False), torch.autocast(lm.device.type, enabled=False):
                objective = objective_type(config, Backbone(lm))
                return ObjectiveModel(lm, objective.to(device=lm.device, dtype=lm.dtype))
    names = ", ".join(config_type.__name__ for config_type, _ in OBJECTIVES.values())
    raise NextLatError(
        f"{type(config).__name__} is not an objective's configuration: use one of {names}."
    )


def load(directory: str | Path, **model_arguments: Any) -> ObjectiveModel:
    """Open a directory (or hub repository) that `save_pretrained` wrote.

    Args:
        directory: a local path or a hub id.
        model_arguments: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map ...),
            with an adapter to that of its base.

    Raises:
        NextLatError: nothing there, no sidecar, a truncated file, one that is not as it was saved,
            weights that are missing or left over, or a sidecar that belongs to another model.
    """
    names = ("config.json", adapters.CONFIG)
    if Path(directory).is_dir() and not any((Path(directory) / name).is_file() for name in names):
        raise NextLatError(
            f"cannot open {directory} (it has no config.json): name the directory of a saved model."
        )
    with hub_or_cache(directory):
        check_sums(directory)
        adapted = find(directory, adapters.CONFIG) is not None
        lm: Any = None if adapted else load_lm(directory, **model_arguments)
        path, description = sidecar.read_description(directory)
        if adapted:
            lm = adapters.load(directory, description.base, **model_arguments)
        weights = sidecar.read_weights(directory)
    config = sidecar.config_of(path, description)
    model = opened(path, lambda: attach(lm, config))  # a size may be beyond all memory
    trained_on, sizes = description.backbone, sidecar.sizes(model.objective)
    if trained_on != sizes:
        raise NextLatError(
            f"the objective in {directory} was trained on another model ({trained_on}) than the "
            f"one beside it ({sizes}): put the files back together."
        )
    converts = model_arguments.get("dtype", "auto") != "auto"
    dtypes = {x.dtype for x in weights.values() if x.is_floating_point()}
    if not converts and len(dtypes) == 1:
        model.objective.to(dtype=dtypes.pop())  # not always the LM's
    check(weights, model.objective, path.with_name(sidecar.WEIGHTS), converts=converts)
    copy_into(model.objective, weights)
    model.objective.check_vocabulary()
    return model
