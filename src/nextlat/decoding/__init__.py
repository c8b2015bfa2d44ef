"""Decoding: plain and self-speculative, KV-cached, in batches, with the output of the transformer
alone."""

from nextlat.decoding.draft_length import AdaptiveLength, Costs
from nextlat.decoding.generate import generate
from nextlat.decoding.loop import decode
from nextlat.decoding.stats import Cycle, GenerationStats, Pass
from nextlat.decoding.stopping import Stopping

__all__ = [
    "AdaptiveLength",
    "Costs",
    "Cycle",
    "GenerationStats",
    "Pass",
    "Stopping",
    "decode",
    "generate",
]
