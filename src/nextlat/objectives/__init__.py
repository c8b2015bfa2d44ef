"""Training objectives, one file each. A new one is one new file and one line here."""

from nextlat.objectives.belief_state import BST, BSTConfig
from nextlat.objectives.joint_multi_token import JTP, JTPConfig
from nextlat.objectives.multi_token import MTP, MTPConfig
from nextlat.objectives.next_latent import NextLat, NextLatConfig
from nextlat.objectives.next_token import NextToken, NextTokenConfig
from nextlat.objectives.objective import Objective
from nextlat.validation import Settings

OBJECTIVES: dict[str, tuple[type[Settings], type[Objective]]] = {
    NextToken.name: (NextTokenConfig, NextToken),
    NextLat.name: (NextLatConfig, NextLat),
    MTP.name: (MTPConfig, MTP),
    JTP.name: (JTPConfig, JTP),
    BST.name: (BSTConfig, BST),
}
"""Name in recipes -> configuration and objective."""

__all__ = [
    "BST",
    "JTP",
    "MTP",
    "OBJECTIVES",
    "BSTConfig",
    "JTPConfig",
    "MTPConfig",
    "NextLat",
    "NextLatConfig",
    "NextToken",
    "NextTokenConfig",
    "Objective",
]
