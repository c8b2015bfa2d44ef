"""The paper's transformer, from scratch."""

from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nextlat.errors import NextLatError


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
    positions: Literal["rotary", "none"] = "rotary",
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
) -> LlamaForCausalLM:
    """The paper's backbone from scratch: rotary positions, RMSNorm, SwiGLU, no biases, untied head,
    weights ~ N(0, initializer_range).

    Args:
        vocab_size: V.
        layers: of the transformer.
        width: D.
        heads: of each layer.
        max_length: positions.
        intermediate_size: of the SwiGLU; None = 8/3 of the width, rounded up to a multiple of 32
            (Llama's rule).
        initializer_range: standard deviation of the weights; None = 0.02, the paper's.
        tie_embeddings: one table for embeddings and head.
        positions: none = no layer is told of them, and only the causal mask orders the tokens, so
            that no position is new in a longer text.
        bos_token_id: of the tokenizer.
        eos_token_id: of the tokenizer.
        pad_token_id: of the tokenizer.
        seed: of the initial weights, without touching torch's global random state; None = drawn
            from that state.

    Raises:
        NextLatError: a width that the heads do not divide.
    """
    if width % heads or (width // heads) % 2:
        raise NextLatError(
            f"width {width} over {heads} heads does not give an even head size: change width or "
            "heads."
        )
    # The angles of rotary positions vanish in fp32 where positions are divided by this.
    stretched = {"rope_type": "linear", "factor": 1e15, "rope_theta": 10_000.0}
    config = LlamaConfig(
        rope_parameters=stretched if positions == "none" else None,
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
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return LlamaForCausalLM(config)
