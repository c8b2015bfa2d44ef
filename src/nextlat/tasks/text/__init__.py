"""Text: next-token loss, perplexity, linear probes of the state, and the benchmarks of the LM
Evaluation Harness."""

from nextlat.tasks.text.text import Text, TextConfig

__all__ = ["Text", "TextConfig"]
