"""nextlat: next-latent prediction for any Hugging Face causal LM.

The public names are imported on first use, so that `import nextlat` and `nextlat --help` do not
wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nextlat.errors import NextLatError

if TYPE_CHECKING:
    from nextlat.decoding.generate import speculative
    from nextlat.model import ObjectiveModel, attach, load
    from nextlat.objectives import BSTConfig, JTPConfig, MTPConfig, NextLatConfig, NextTokenConfig
    from nextlat.paper_lm import llama
    from nextlat.training.trainer import NextLatTrainer

__version__ = "0.1.0"

_HOME = {
    "ObjectiveModel": "nextlat.model",
    "attach": "nextlat.model",
    "llama": "nextlat.paper_lm",
    "load": "nextlat.model",
    "speculative": "nextlat.decoding.generate",
    "BSTConfig": "nextlat.objectives",
    "JTPConfig": "nextlat.objectives",
    "MTPConfig": "nextlat.objectives",
    "NextLatConfig": "nextlat.objectives",
    "NextTokenConfig": "nextlat.objectives",
    "NextLatTrainer": "nextlat.training.trainer",
}

__all__ = [
    "BSTConfig",
    "JTPConfig",
    "MTPConfig",
    "NextLatConfig",
    "NextLatError",
    "NextLatTrainer",
    "NextTokenConfig",
    "ObjectiveModel",
    "attach",
    "llama",
    "load",
    "speculative",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nextlat' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
