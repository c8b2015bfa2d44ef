"""What every metric means: its title, unit, definition and source, and the published figures beside it.

The report and the tables say about a metric what stands here and nothing else. A metric without an entry is shown, but nothing is
claimed about it.
"""

import re
from dataclasses import dataclass
from typing import Literal

from nextlat.evaluation import HIGHER_IS_BETTER
from nextlat.tasks.streets import Streets
from nextlat.tasks.text import Text

Unit = Literal["share", "nats", "factor", "number"]

VAFA = "Vafa et al., arXiv 2406.03689"
NEXTLAT = "Teoh et al., arXiv 2511.05963"
OURS = "ours"


@dataclass(frozen=True)
class Term:
    """One metric in words.

    Attributes:
        title: in tables and plots. noun: in a sentence, behind "higher" or "lower".
        definition: one line. source: where it comes from.
        unit: share (shown in per cent), nats, factor (times something) or number.
        items: what its error is taken over.
        counterpart: the baseline's metric to compare with, where it is not the one of the same name.
        reference: a fixed value to compare with instead of the baseline's, and reference_name: what that is.
        headline: whether it gets a sentence of its own (another metric may say the same).
    """

    title: str
    noun: str
    definition: str
    source: str
    unit: Unit = "share"
    items: str = "items"
    counterpart: str | None = None
    reference: float | None = None
    reference_name: str = ""
    headline: bool = True


PLAIN = "plain KV-cached decoding"

_TERMS: dict[str, Term] = {
    "next_token_loss": Term(
        "Held-out cross-entropy",
        "held-out cross-entropy",
        "Mean negative log-likelihood of the next token of held-out sequences, in nats per token.",
        "the usual language-modelling loss",
        unit="nats",
        items="held-out rows",
    ),
    "perplexity": Term(
        "Perplexity",
        "perplexity",
        "Exponential of the held-out cross-entropy per token: among how many equally likely tokens the model chooses, as it were. "
        "Comparable for the same vocabulary only.",
        "the usual language-modelling measure",
        unit="number",
        items="held-out rows",
    ),
    "next_token_test": Term(
        "Next-token test",
        "share of legal next tokens",
        "Share of the positions of held-out walks, fed as they are, whose most likely token is legal there.",
        VAFA,
        items="walks",
    ),
    "valid_trajectories": Term(
        "Valid trajectories",
        "share of valid trajectories",
        "Share of unseen (source, destination) pairs that greedy generation connects legally, closing with `end` at the destination.",
        f"{NEXTLAT}, after {VAFA}",
        items="pairs",
    ),
    "sequence_compression": Term(
        "Sequence compression",
        "sequence compression",
        "Share of pairs of prefixes that reach the same place with the same destination where every token of continuations "
        "sampled after the first has a probability above 0.01 after the second.",
        VAFA,
        items="prefix pairs",
    ),
    "identical_continuations": Term(
        "Identical continuations",
        "share of identical continuations",
        "Share of the same pairs of prefixes that the model continues greedily by the same tokens.",
        NEXTLAT,
        items="prefix pairs",
    ),
    "identical_valid_continuations": Term(
        "Identical, valid continuations",
        "share of identical and valid continuations",
        "As identical continuations, counted only if the common continuation is legal and ends at the destination.",
        OURS,
        items="prefix pairs",
    ),
    "detour_robustness": Term(
        "Random detours",
        "robustness to random detours",
        "Share of pairs that still arrive legally when each step is replaced, with the detour probability, by another random "
        "legal move from which the destination can still be reached.",
        VAFA,
        items="pairs",
    ),
    "detour_robustness_least_likely": Term(
        "Least likely detours",
        "robustness to the least likely detours",
        "As random detours, each to the legal move that the model holds least likely.",
        VAFA,
        items="pairs",
    ),
    "effective_latent_rank": Term(
        "Effective latent rank",
        "effective latent rank",
        "Exponential of the entropy of the normalised singular values of the hidden states of 256 held-out rows: "
        "how many dimensions they fill.",
        f"Roy & Vetterli 2007; {NEXTLAT}",
        unit="number",
        items="groups of rows (jackknife)",
    ),
    "mean_acceptance_length": Term(
        "Mean acceptance length",
        "mean acceptance length",
        "Tokens per forward pass of the transformer when the latent dynamics model drafts, the transformer's own token included.",
        "Leviathan et al., arXiv 2211.17192",
        unit="number",
        reference=1.0,
        reference_name=PLAIN,
    ),
    "accepted_tokens_per_cycle": Term(
        "Accepted tokens per cycle",
        "number of accepted tokens per cycle",
        "Drafted tokens accepted per forward pass, the transformer's own token not counted: the \N{LEFT DOUBLE QUOTATION MARK}accepted "
        "tokens\N{RIGHT DOUBLE QUOTATION MARK} of the NextLat paper.",
        NEXTLAT,
        unit="number",
        headline=False,
    ),
    "decoding_speedup": Term(
        "Decoding speed",
        "decoding speed",
        "Tokens per second with drafts, divided by those of our plain KV-cached decoding of the same model, measured in turns in "
        "the same process. The output is the same.",
        OURS,
        unit="factor",
        reference=1.0,
        reference_name=PLAIN,
    ),
    "decoding_speedup_transformers": Term(
        "Decoding speed against transformers",
        "decoding speed",
        "The same, divided by the tokens per second of the generate method of transformers.",
        OURS,
        unit="factor",
        reference=1.0,
        reference_name="transformers' KV-cached generate",
        headline=False,
    ),
}

_WORD_PROBLEM = re.compile(r"(transformer|dynamics)_accuracy_(\d+)")


def describe(metric: str) -> Term:
    """The entry of a metric; of one that is not known, its name and nothing else."""
    match = _WORD_PROBLEM.fullmatch(metric)
    if match is None:
        name = metric.replace("_", " ")
        return _TERMS.get(metric) or Term(name, name, "", "", unit="number")
    length = match[2]
    if match[1] == "transformer":
        return Term(
            f"Transformer, {length} elements",
            f"accuracy of the transformer at {length} elements",
            "Share of word problems whose last product the transformer predicts.",
            f"Merrill, Petty & Sabharwal 2024; {NEXTLAT}",
            items="sequences",
        )
    return Term(
        f"Dynamics alone, {length} elements",
        f"accuracy at {length} elements of the latent dynamics model run alone",
        "The same of the latent dynamics model run alone, as an RNN, from the transformer's first state; compared with the baseline's "
        "transformer at the same length, which has no such model.",
        NEXTLAT,
        items="sequences",
        counterpart=f"transformer_accuracy_{length}",
    )


def higher_is_better(metric: str) -> bool | None:
    """The direction of a metric as its task or the evaluation states it; None for one that is not known."""
    known = {**HIGHER_IS_BETTER, **Streets.higher_is_better, **Text.higher_is_better}
    return True if _WORD_PROBLEM.fullmatch(metric) else known.get(metric)


def order(metric: str) -> tuple[int, int, str]:
    """Sorting key: metrics as they stand here, word problems by length, unknown ones last."""
    if match := _WORD_PROBLEM.fullmatch(metric):
        return (len(_TERMS), int(match[2]), "" if match[1] == "transformer" else match[1])
    known = list(_TERMS)
    return (known.index(metric), 0, "") if metric in known else (len(_TERMS) + 1, 0, metric)


@dataclass(frozen=True)
class Published:
    """Figures of a paper for one task: `rows` maps a method to its metrics."""

    setting: str
    source: str
    rows: dict[str, dict[str, float]]


def _manhattan(test: float, valid: float, compression: float, rank: float | None, detours: float) -> dict[str, float]:
    row = {
        "next_token_test": test,
        "valid_trajectories": valid,
        "sequence_compression": compression,
        "detour_robustness": detours,
    }
    return row if rank is None else {**row, "effective_latent_rank": rank}


PUBLISHED: dict[str, Published] = {
    "streets": Published(
        "all of Manhattan, random walks, 91 million sequences, 48 layers of width 384, horizon 8",
        f"{NEXTLAT}v4",
        {
            "GPT": _manhattan(1.0, 0.970, 0.65, 160.1, 0.850),
            "MTP": _manhattan(1.0, 0.981, 0.64, 57.7, 0.950),
            "JTP": _manhattan(1.0, 0.971, 0.32, 215.8, 0.870),
            "NextLat": _manhattan(1.0, 0.987, 0.71, 52.7, 0.950),
            "true world model": _manhattan(1.0, 1.0, 1.0, None, 1.0),
        },
    ),
}
