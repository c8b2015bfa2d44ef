"""Tasks of a prompt and an answer, both of one length: their rows, and the answers that a model
gives.

Shapes: P problems, B problems of the running batch, T tokens of a prompt, A tokens of an answer, D
    width, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence as InTurn
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nextlat.tasks.rows import Rows
from nextlat.tasks.task import SequenceModel, inference

SAMPLED = "_sampled"  # behind the names of metrics of answers that are not greedy
PAD, UNK, END = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<unk>", "end")


def symbol_tokenizer(
    symbols: Sequence[str], numbers: int, *, spaces: str = r"\s"
) -> PreTrainedTokenizerFast:
    """One token per symbol (a single character) and per integer from 0 to `numbers` - 1, after
    `<pad> <unk> end`.

    `end` is the end-of-sequence token. Text needs no white space but between two integers; decoding
    joins with single spaces.

    Args:
        spaces: the characters that separate tokens and are none themselves, as inside the brackets
            of a regular expression.
    """
    words = (*SPECIAL_TOKENS, *symbols, *map(str, range(numbers)))
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = InTurn(
        [Split(Regex(f"[{spaces}]+"), "removed"), Split(Regex(r"\d+|\D"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="end",
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


class AnswerRows(Rows):
    def __init__(self, tokens: np.ndarray, prompt_length: int, seed: int | None = None) -> None:
        super().__init__({"input_ids": tokens}, seed=seed, prompt_length=prompt_length)


def generate_answers(
    model: SequenceModel,
    prompts: np.ndarray,
    length: int,
    *,
    seed: int | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """The `length` tokens (P, A) with which a model continues each prompt, whatever they are: it is
    not stopped at `end`.

    Args:
        prompts: (P, T) token ids.
        seed: None = greedy; otherwise sampled at temperature 1, by a uniform number for every
            problem and place that depends on nothing but the seed, so that two models meet the same
            draws in whatever batches.
    """
    found = np.empty((len(prompts), length), dtype=np.int64)
    draws = None if seed is None else np.random.default_rng(seed).random(found.shape)
    with inference(model):
        for first in range(0, len(prompts), batch_size):
            rows, past = slice(first, first + batch_size), None
            input_ids = torch.from_numpy(prompts[rows].astype(np.int64)).to(model.device)
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
    return (
        torch.searchsorted(cumulative, at, right=True)
        .squeeze(1)
        .clamp(max=cumulative.shape[-1] - 1)
    )


def forced_answers(
    model: SequenceModel, tokens: np.ndarray, prompt_length: int, *, batch_size: int = 256
) -> np.ndarray:
    """(P, A) the most likely token at every place of the answer when all before it are the true
    ones (P, T + A)."""
    found = np.empty((len(tokens), tokens.shape[1] - prompt_length), dtype=np.int64)
    with inference(model):
        for first in range(0, len(tokens), batch_size):
            rows = slice(first, first + batch_size)
            input_ids = torch.from_numpy(tokens[rows, :-1].astype(np.int64)).to(model.device)
            h_BTD, _ = model.step(input_ids, None)
            found[rows] = (
                model.next_token_logits(h_BTD[:, prompt_length - 1 :]).argmax(-1).cpu().numpy()
            )
    return found
