"""ObjectiveModel = an unmodified causal LM + a training objective: attach, load, forward, generate,
save.

On disk it is a plain Hugging Face directory that loads with this package uninstalled; what the
objective adds lies in its sub-folder `nextlat/`, which everyone else ignores.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.decoding import generate
from nextlat.errors import NextLatError, first_line
from nextlat.hub import hub_or_cache
from nextlat.objectives import OBJECTIVES, NextTokenConfig, Objective
from nextlat.serving.draft_config import write_draft_config

SIDECAR, SIDECAR_CONFIG, SIDECAR_WEIGHTS, SIDECAR_FORMAT = (
    "nextlat",
    "objective.json",
    "objective.safetensors",
    1,
)


@dataclass
class ObjectiveOutput(ModelOutput):
    """Output of `ObjectiveModel.forward`.

    Attributes:
        loss: one scalar, with labels. losses: the named parts before weighting, detached means.
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
        backbone: access to hidden states, embeddings and head of `lm`.
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
        return self.objective.backbone

    @property
    def config(self) -> Any:
        return self.lm.config

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.dtype

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        counts: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ObjectiveOutput:
        """Loss of the objective on a batch, or logits when there are no labels.

        Args:
            input_ids: (B, T). labels: (B, T), aligned with them (shifted inside), -100 = no
                token-level loss.
            position_ids: (B, T), restarting at 0 with every document of a packed row; None = one
                document per row.
            attention_mask: (B, T), 0 on padding.
            counts: what to divide by, if not the counts of this batch: those of a whole optimiser
                step (see `Objective.counts`).
            num_items_in_batch: the same as far as `transformers.Trainer` knows it: labelled tokens
                of the whole step, by which every part is then divided.

        Raises:
            NextLatError: packed rows for a model that would attend across documents; shapes that
                disagree.
        """
        batch = Batch.from_inputs(
            input_ids, input_ids if labels is None else labels, position_ids, attention_mask
        )
        if labels is None:
            return ObjectiveOutput(logits=self.next_token_logits(self.hidden(batch)))
        if counts is None and num_items_in_batch is not None:
            counts = torch.ones_like(self.objective.counts(batch)) * num_items_in_batch
        losses = self.objective.loss(batch, counts)
        return ObjectiveOutput(loss=losses.total, losses=losses.means())

    def counts(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """`Objective.counts` of a batch given as in `forward`."""
        return self.objective.counts(
            Batch.from_inputs(input_ids, labels, position_ids, attention_mask)
        )

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
        """The same states of some more tokens (B, T) of every row, KV-cached: (states, cache). See
        `Backbone.step`."""
        h_BTD, cache = self.backbone.step(input_ids, cache, **arguments)
        return self.objective.output_states(h_BTD, input_ids), cache

    def next_token_logits(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., V): of states that `hidden` or `step` gave."""
        return self.objective.next_token_logits(h)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Any:
        """KV-cached lossless self-speculation, in the words of `transformers`' `generate`, with
        `draft_length="auto"` unless it is given (0 = plain decoding). See
        `nextlat.decoding.generate` for everything that it takes and gives."""
        return generate(self, input_ids, attention_mask, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a plain Hugging Face directory and the sidecar `nextlat/` in it. Not atomic by
        itself: see `training`."""
        directory = Path(directory)
        sidecar = directory / SIDECAR
        sidecar.mkdir(parents=True, exist_ok=True)
        with _cache_enabled(self.lm):
            self.lm.save_pretrained(directory)
        description = {
            "format": SIDECAR_FORMAT,
            "objective": self.objective.name,
            "config": asdict(self.objective.config),
            "needed_at_inference": self.objective.needed_at_inference,
            "backbone": self._backbone_description(),
        }
        if self.objective.needed_at_inference:
            description["note"] = (
                "The transformer beside this is only part of the model: open the directory with nextlat.load."
            )
        weights = {
            name: value.detach().contiguous().cpu()
            for name, value in self.objective.state_dict().items()
        }
        save_file(weights, sidecar / SIDECAR_WEIGHTS, metadata={"format": "pt"})
        (sidecar / SIDECAR_CONFIG).write_text(json.dumps(description, indent=2) + "\n")
        write_draft_config(sidecar, self.objective)

    def _backbone_description(self) -> dict[str, Any]:
        backbone = self.backbone
        return {
            "model_type": self.lm.config.model_type,
            "width": backbone.width,
            "embedding_width": backbone.embedding_width,
            "vocab_size": backbone.vocab_size,
        }

    def load_weights(self, directory: str | Path) -> None:
        """Load both halves in place from a directory that `save_pretrained` wrote (resume of a
        training run).

        Raises:
            NextLatError: a part is missing, truncated, or belongs to another objective or model.
        """
        other = load(directory)
        if (
            other.objective.name != self.objective.name
            or other.objective.config != self.objective.config
        ):
            raise NextLatError(
                f"{directory} was trained with {other.objective.name} {other.objective.config}, "
                f"not {self.objective.name} {self.objective.config}: choose another run directory."
            )
        try:
            self.lm.load_state_dict(other.lm.state_dict())
        except RuntimeError as error:
            raise NextLatError(
                f"{directory} holds a model of another shape: choose another run directory."
            ) from error
        self.objective.load_state_dict(other.objective.state_dict())


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


def attach(lm: PreTrainedModel, config: Any = None) -> ObjectiveModel:
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
        directory: a local path or a hub id. model_arguments: passed to
            `AutoModelForCausalLM.from_pretrained` (dtype, device_map ...).

    Raises:
        NextLatError: nothing there, no sidecar, a truncated file, or a sidecar that belongs to
            another model.
    """
    if Path(directory).is_dir() and not (Path(directory) / "config.json").is_file():
        raise NextLatError(
            f"cannot open {directory} (it has no config.json): name the directory of a saved model."
        )
    with hub_or_cache(directory):
        lm = _open(
            directory, lambda: AutoModelForCausalLM.from_pretrained(directory, **model_arguments)
        )
        sidecar = {
            name: _sidecar_file(directory, name) for name in (SIDECAR_CONFIG, SIDECAR_WEIGHTS)
        }
    description = _open(
        sidecar[SIDECAR_CONFIG], lambda: json.loads(sidecar[SIDECAR_CONFIG].read_text())
    )
    if not isinstance(description, dict):
        raise NextLatError(f"{sidecar[SIDECAR_CONFIG]} does not describe an objective: restore it.")
    name = description.get("objective")
    if description.get("format") != SIDECAR_FORMAT or name not in OBJECTIVES:
        raise NextLatError(
            f"{sidecar[SIDECAR_CONFIG]} names objective '{name}' in format {description.get('format')}, "
            f"this version knows {', '.join(OBJECTIVES)} in format {SIDECAR_FORMAT}: upgrade nextlat."
        )
    config_type, _ = OBJECTIVES[name]
    try:
        model = attach(lm, config_type(**description["config"]))
    except (TypeError, KeyError, AttributeError) as error:
        raise NextLatError(
            f"{sidecar[SIDECAR_CONFIG]} does not describe objective '{name}' ({error}): restore it."
        ) from error
    if description.get("backbone") != model._backbone_description():
        raise NextLatError(
            f"the objective in {directory} was trained on {description.get('backbone')}, but the model beside it is "
            f"{model._backbone_description()}: put the files back together."
        )
    weights = _open(
        sidecar[SIDECAR_WEIGHTS], lambda: load_file(sidecar[SIDECAR_WEIGHTS], device=str(lm.device))
    )
    _open(sidecar[SIDECAR_WEIGHTS], lambda: model.objective.load_state_dict(weights))
    return model


def _sidecar_file(directory: str | Path, name: str) -> Path:
    try:
        found = cached_file(str(directory), name, subfolder=SIDECAR)
    except OSError:
        found = None
    if found is None:
        raise NextLatError(
            f"{directory} has no {SIDECAR}/{name}: it is a model without an objective; "
            "load it with AutoModelForCausalLM and attach one with nextlat.attach."
        )
    return Path(found)


def _open(path: str | Path, read: Any) -> Any:
    """Run a reader and turn what can be wrong with files into one sentence."""
    try:
        return read()
    except SafetensorError as error:
        raise NextLatError(
            f"{path} is corrupt or truncated ({error}): restore it or use an earlier checkpoint."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        missing = (
            "" if Path(path).exists() else "there is no such directory, and as a name of the hub: "
        )
        raise NextLatError(
            f"cannot open {path} ({missing}{first_line(error)}): restore it, or name a model that can be reached."
        ) from error


def llama(
    vocab_size: int,
    *,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    max_length: int = 1024,
    intermediate_size: int | None = None,
    initializer_range: float | None = None,
    tie_embeddings: bool = False,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
) -> LlamaForCausalLM:
    """The paper's backbone from scratch: rotary positions, RMSNorm, SwiGLU, no biases, untied head,
    weights ~ N(0, initializer_range).

    Args:
        vocab_size: V. layers, width, heads: of the transformer (D = width). max_length: positions.
        intermediate_size: of the SwiGLU; None = 8/3 of the width, rounded up to a multiple of 32
            (Llama's rule).
        initializer_range: standard deviation of the weights; None = 0.02, the paper's.
        seed: of the initial weights, without touching torch's global random state; None = drawn
            from that state.

    Raises:
        NextLatError: a width that the heads do not divide.
    """
    if width % heads or (width // heads) % 2:
        raise NextLatError(
            f"width {width} over {heads} heads does not give an even head size: change width or heads."
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=intermediate_size or -(-width * 8 // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=tie_embeddings,
        initializer_range=initializer_range or 0.02,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    if seed is None:
        return LlamaForCausalLM(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
