"""The sub-folder `nextlat/` of a saved model: what the objective adds, and the description of it.

`AutoModelForCausalLM` and everyone else who opens the directory ignore it.
"""

from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor

from nextlat.adapters import Base
from nextlat.errors import NextLatError
from nextlat.files import write_json
from nextlat.objectives import OBJECTIVES, Objective
from nextlat.serving.draft_config import write_draft_config
from nextlat.validation import Settings, check_format, nearest, read_json
from nextlat.weights import SIDECAR, find, opened

DESCRIPTION, WEIGHTS = "objective.json", "objective.safetensors"
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
        base: what an adapter beside it was trained on.
        note: for whoever opens the directory without this package.
    """

    format: Literal[1] = FORMAT
    objective: str
    config: dict[str, Any]
    needed_at_inference: bool
    backbone: dict[str, str | int]
    base: Base | None = None
    note: str | None = None


def write(directory: Path, objective: Objective, base: Base | None) -> None:
    """Write the sidecar of a model.

    Args:
        directory: of the model.
        objective: what it adds.
        base: what an adapter beside it was trained on.
    """
    sidecar = directory / SIDECAR
    sidecar.mkdir(parents=True, exist_ok=True)
    description = Description(
        objective=objective.name,
        config=objective.config.model_dump(mode="json"),
        needed_at_inference=objective.needed_at_inference,
        backbone=sizes(objective),
        base=base,
        note=PART if objective.needed_at_inference else None,
    )
    state = objective.state_dict().items()
    weights = {name: value.detach().contiguous().cpu() for name, value in state}
    save_file(weights, sidecar / WEIGHTS, metadata={"format": "pt"})
    write_json(sidecar / DESCRIPTION, description.model_dump(mode="json", exclude_none=True))
    write_draft_config(sidecar, objective)


def sizes(objective: Objective) -> dict[str, str | int]:
    """Those of the backbone of an objective."""
    backbone = objective.backbone
    return {
        "model_type": backbone.lm.config.model_type,
        "width": backbone.width,
        "embedding_width": backbone.embedding_width,
        "vocab_size": backbone.vocab_size,
    }


def read_description(directory: str | Path) -> tuple[Path, Description]:
    """The path and content of objective.json."""
    path = _sidecar_file(directory, DESCRIPTION)
    content = read_json(path, "restore it")
    version = content.get("format") if isinstance(content, dict) else None
    check_format(version, FORMAT, path, "save the model again")
    return path, Description.from_json(content, f"{path} does not describe an objective")


def config_of(path: Path, description: Description) -> Settings:
    """The settings of the objective that a description at `path` names."""
    name = description.objective
    if name not in OBJECTIVES:
        raise NextLatError(f"{path} names objective '{name}': {nearest(name, [*OBJECTIVES])}.")
    config_type, _ = OBJECTIVES[name]
    return config_type.from_json(description.config, f"{path}, objective '{name}'")


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """What the objective learned, by name."""
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
