"""Tasks of a prompt and an answer, each of one length: their tokens, and the answers a model gives.

Shapes: P problems, B problems of the running batch, T tokens of a prompt, A tokens of an answer,
    D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers import Regex, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nextlat.backbone import evaluation_mode
from nextlat.tasks.task import FIRST_WORD, SequenceModel, word_tokenizer

END, FIRST_SYMBOL = FIRST_WORD, FIRST_WORD + 1
SAMPLED = {"sampled": True}  # parameter of metrics of answers that are not greedy


def symbol_tokenizer(
    symbols: Sequence[str], numbers: int, *, spaces: str = r"\s"
) -> PreTrainedTokenizerFast:
    """One token per symbol (a single character) and per integer from 0 to `numbers` - 1, after
    `<pad> <unk> end`, where `end` is the end-of-sequence token.

    Text needs no white space but between two integers.

    Args:
        symbols: their tokens start at `FIRST_SYMBOL`, in this order.
        numbers: how many integers; their tokens come after those of the symbols.
        spaces: characters between tokens, as inside the brackets of a regular expression.
    """
    splits = [
        pre_tokenizers.Split(Regex(f"[{spaces}]+"), "removed"),
        pre_tokenizers.Split(Regex(r"\d+|\D"), "isolated"),
    ]
    words = ("end", *symbols, *map(str, range(numbers)))
    return word_tokenizer(words, end="end", pre_tokenizer=pre_tokenizers.Sequence(splits))


def generate_answers(
    model: SequenceModel,
    prompts: np.ndarray,
    length: int,
    *,
    seed: int | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """The `length` tokens (P, A) with which a model continues each prompt; it does not stop at
    `end`.

    Args:
        prompts: (P, T) token ids.
        length: A.
        seed: None = greedy; otherwise sampled at temperature 1, by uniform numbers that depend on
            the seed alone, so that two models meet the same draws, in batches of any size.
        batch_size: prompts continued at a time.
    """
    found = np.empty((len(prompts), length), dtype=np.int64)
    draws = None if seed is None else np.random.default_rng(seed).random(found.shape)
    with evaluation_mode(model):
        for rows, input_ids in _batches(model, prompts, batch_size):
            past = None
            for i in range(length):
                h_BTD, past = model.step(input_ids, past)
                logits_BV = model.next_token_logits(h_BTD[:, -1])
                token = logits_BV.argmax(-1) if draws is None else _drawn(logits_BV, draws[rows, i])
                found[rows, i] = token.cpu().numpy()
                input_ids = token[:, None]
    return found


def _drawn(logits_BV: Tensor, u: np.ndarray) -> Tensor:
    """(B,) tokens of softmax(logits) by inversion of the uniform numbers u (B,)."""
    cumulative = logits_BV.float().softmax(-1).double().cumsum(-1)
    at = torch.from_numpy(u).to(cumulative.device)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, at, right=True).squeeze(1)
    return token.clamp(max=cumulative.shape[-1] - 1)


def forced_answers(
    model: SequenceModel, tokens: np.ndarray, prompt_length: int, *, batch_size: int = 256
) -> np.ndarray:
    """(P, A) the most likely token at every position of the answer, given the true ones before it.

    Args:
        tokens: (P, T + A) prompts with their true answers.
        prompt_length: T.
        batch_size: problems read at a time.
    """
    found = np.empty((len(tokens), tokens.shape[1] - prompt_length), dtype=np.int64)
    with evaluation_mode(model):
        for rows, input_ids in _batches(model, tokens[:, :-1], batch_size):
            h_BTD, _ = model.step(input_ids, None)
            logits_BAV = model.next_token_logits(h_BTD[:, prompt_length - 1 :])
            found[rows] = logits_BAV.argmax(-1).cpu().numpy()
    return found


def _batches(model: SequenceModel, tokens: np.ndarray, size: int) -> Iterator[tuple[slice, Tensor]]:
    for first in range(0, len(tokens), size):
        rows = slice(first, first + size)
        yield rows, torch.from_numpy(tokens[rows].astype(np.int64)).to(model.device)
