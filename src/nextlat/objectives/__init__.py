"""Training objectives, one file each. A new one is one new file and one line here."""

from nextlat.objectives.base import Objective
from nextlat.objectives.latent_dynamics import LatentDynamics
from nextlat.objectives.next_latent import NextLat, NextLatConfig
from nextlat.objectives.next_token import NextToken, NextTokenConfig

ObjectiveConfig = NextTokenConfig | NextLatConfig

OBJECTIVES: dict[str, tuple[type[ObjectiveConfig], type[Objective]]] = {
    NextToken.name: (NextTokenConfig, NextToken),
    NextLat.name: (NextLatConfig, NextLat),
}

__all__ = ["OBJECTIVES", "LatentDynamics", "NextLat", "NextLatConfig", "NextToken", "NextTokenConfig", "Objective"]
