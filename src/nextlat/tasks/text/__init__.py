"""Text: next-token loss, perplexity, linear probes of the state, and the benchmarks of the LM
Evaluation Harness."""
