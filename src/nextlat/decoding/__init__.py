"""Decoding: plain and self-speculative, KV-cached, with the output of the transformer alone."""

from nextlat.decoding.speculative import Cycle, GenerationStats, decode, generate

__all__ = ["Cycle", "GenerationStats", "decode", "generate"]
