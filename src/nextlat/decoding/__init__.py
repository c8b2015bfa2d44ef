"""Decoding: plain and self-speculative, KV-cached, in batches, with the output of the transformer
alone."""

from nextlat.decoding.draft_length import AdaptiveLength, Costs
from nextlat.decoding.generate import generate
from nextlat.decoding.loop import Request, Stopping, decode
from nextlat.decoding.stats import Cycle, GenerationStats, Pass

__all__ = [
    "AdaptiveLength",
    "Costs",
    "Cycle",
    "GenerationStats",
    "Pass",
    "Request",
    "Stopping",
    "decode",
    "generate",
]
