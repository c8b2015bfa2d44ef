"""What every metric means: its title, unit, definition and source, and the published figures beside
it.

The report and the tables say about a metric what stands here and nothing else. A metric without an
entry is shown, but nothing is claimed about it.
"""

import re
from dataclasses import dataclass
from typing import Literal

from nextlat.evaluation import HIGHER_IS_BETTER
from nextlat.tasks.answers import SAMPLED
from nextlat.tasks.hmm import HMM
from nextlat.tasks.streets.streets import Streets
from nextlat.tasks.text.lm_eval import METRICS, PREFIX
from nextlat.tasks.text.text import Text

Unit = Literal["share", "nats", "factor", "number"]

VAFA = "Vafa et al., arXiv 2406.03689"
NEXTLAT = "Teoh et al., arXiv 2511.05963"
PATH_STAR = f"Bachmann & Nagarajan 2024; {NEXTLAT}"
COUNTDOWN = f"Gandhi et al. 2024; {NEXTLAT}"
OURS = "ours"


@dataclass(frozen=True)
class Term:
    """One metric in words.

    Attributes:
        title: in tables and plots. noun: in a sentence, behind "higher" or "lower".
        definition: one line. source: where it comes from.
        unit: share (shown in per cent), nats, factor (times something) or number.
        items: what its error is taken over.
        counterpart: the baseline's metric to compare with, where it is not the one of the same
            name.
        reference: a fixed value to compare with instead of the baseline's, and reference_name: what
            that is.
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
    "exact_path_accuracy": Term(
        "Exact paths",
        "share of exact paths",
        "Share of unseen graphs whose whole path from the centre to the goal the model gives greedily, node by node.",
        PATH_STAR,
        items="graphs",
    ),
    "exact_path_accuracy_sampled": Term(
        "Exact paths (sampled)",
        "share of exact paths when sampling",
        "The same with every node sampled at temperature 1.",
        PATH_STAR,
        items="graphs",
    ),
    "solved": Term(
        "Problems solved",
        "share of problems solved",
        "The paper's accuracy: share of test problems solved by a valid derivation.",
        COUNTDOWN,
        items="problems",
    ),
    "solved_seen": Term(
        "Solved, targets seen in training",
        "share of problems solved with targets seen in training",
        "Share of unseen problems that the model solves greedily by any valid derivation: each number used once, every equation true, "
        "the last one yielding the target. The targets occur in training, in other problems.",
        COUNTDOWN,
        items="problems",
    ),
    "solved_held_out": Term(
        "Solved, held-out targets",
        "share of problems solved with held-out targets",
        "The same for targets that never occur in training.",
        COUNTDOWN,
        items="problems",
    ),
    "solved_seen_sampled": Term(
        "Solved, targets seen in training (sampled)",
        "share of problems solved by one sampled answer with targets seen in training",
        "The same by one answer for each, sampled at temperature 1; the targets occur in training.",
        COUNTDOWN,
        items="problems",
    ),
    "solved_held_out_sampled": Term(
        "Solved, held-out targets (sampled)",
        "share of problems solved by one sampled answer with held-out targets",
        "The same for targets that never occur in training, by one sampled answer for each.",
        COUNTDOWN,
        items="problems",
    ),
    "belief_r2": Term(
        "Belief state, R\N{SUPERSCRIPT TWO}",
        "share of the belief's variance that a linear probe reads off the state",
        "How much of the variance of the exact belief (the probabilities of the hidden states given all symbols so far) a linear probe "
        "of the transformer's state explains, fitted on half of the held-out sequences and read on the others; 1 = all.",
        OURS,
        unit="number",
        items="sequences",
    ),
    "next_token_kl": Term(
        "KL from the exact distribution",
        "divergence from the exact next-token distribution",
        "KL divergence of the model's next-token distribution from the exact one, which is known here; nats, mean over places.",
        OURS,
        unit="nats",
        items="sequences",
    ),
    "entropy_floor": Term(
        "Entropy of the process",
        "entropy of the process",
        "Mean entropy of the exact next-token distribution at the same places, below which no cross-entropy can lie; of the data, "
        "not of a model.",
        OURS,
        unit="nats",
        items="sequences",
        headline=False,
    ),
    "transition_consistency_error": Term(
        "Transition consistency error",
        "transition consistency error",
        "How far the latent dynamics model misses the next state, divided by how far the state moves: sums of "
        "||p(h, x) \N{MINUS SIGN} h'|| and of ||h' \N{MINUS SIGN} h|| over all held-out sequences; "
        "0 = exact. Without such a model there is none.",
        f"{OURS}, after the theorem of {NEXTLAT}",
        unit="number",
        items="sequences",
    ),
    "mean_acceptance_length": Term(
        "Mean acceptance length",
        "mean acceptance length",
        "Tokens per forward pass of the transformer when what the objective added to it drafts (NextLat: the latent dynamics model), the "
        "transformer's own token included.",
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
_PATH = re.compile(r"(accuracy)_position_(\d+)")
_EQUATION = re.compile(r"true_equation_(\d+)_(seen|held_out)")
_BENCHMARK = re.compile(rf"{PREFIX}_(.+?)_({'|'.join(METRICS)})")
BRANCH = 2  # the one place of a path in a star that does not follow from the place before it


def describe(metric: str) -> Term:
    """The entry of a metric; of one that is not known, its name and nothing else."""
    if match := _WORD_PROBLEM.fullmatch(metric):
        return _word_problem(match[1], match[2])
    if match := _PATH.fullmatch(metric):
        return _place_of_path(int(match[2]))
    if match := _EQUATION.fullmatch(metric):
        return _equation(match[1], match[2])
    if match := _BENCHMARK.fullmatch(metric):
        return _benchmark(match[1], match[2])
    name = metric.replace("_", " ")
    return _TERMS.get(metric) or Term(name, name, "", "", unit="number")


def _word_problem(who: str, length: str) -> Term:
    if who == "transformer":
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


def _place_of_path(place: int) -> Term:
    branch = place == BRANCH
    return Term(
        f"Node {place} of the path{', the branch' if branch else ''}",
        f"accuracy at {'the branch' if branch else f'node {place} of the path'}",
        f"Share of unseen graphs of whose path the model predicts node {place}, given the true ones before it"
        + ("; the only hard one, chance is one over the number of arms." if branch else "."),
        PATH_STAR,
        items="graphs",
        headline=branch,  # the others are in the curve, and of no interest
    )


def _equation(place: str, split: str) -> Term:
    targets = "targets seen in training" if split == "seen" else "held-out targets"
    return Term(
        f"Equation {place} true, {targets}",
        f"share of true equations at place {place} with {targets}",
        f"Share of unseen problems ({targets}) whose equation {place}, given greedily, is one and is true, be its numbers available or not.",
        COUNTDOWN,
        items="problems",
        headline=False,  # in the curve; whether the problem is solved is what counts
    )


def _benchmark(name: str, metric: str) -> Term:
    accuracy = metric.startswith("acc")
    words = {"acc": "accuracy", "acc_norm": "accuracy, normalised by length"}.get(
        metric, metric.replace("_", " ")
    )
    return Term(
        f"{name}, {words}",
        f"{words.partition(',')[0]} on {name}"
        + (", normalised by length" if metric == "acc_norm" else ""),
        f"{words[0].upper()}{words[1:]} on {name}, as the harness defines it.",
        "LM Evaluation Harness, Gao et al., EleutherAI",
        unit="share" if accuracy else "number",
        items="documents",
    )


def higher_is_better(metric: str) -> bool | None:
    """The direction of a metric as its task or the evaluation states it; None for one that is not
    known."""
    known = {
        **HIGHER_IS_BETTER,
        **Streets.higher_is_better,
        **Text.higher_is_better,
        **HMM.higher_is_better,
        **_ANSWERS,
    }
    if match := _BENCHMARK.fullmatch(metric):
        return METRICS[match[2]]
    return (
        True
        if any(pattern.fullmatch(metric) for pattern in (_WORD_PROBLEM, _PATH, _EQUATION))
        else known.get(metric)
    )


_ANSWERS = dict.fromkeys(
    [
        name + way
        for name in ("exact_path_accuracy", "solved_seen", "solved_held_out")
        for way in ("", SAMPLED)
    ],
    True,
)


def order(metric: str) -> tuple[int, int, str]:
    """Sorting key: metrics as they stand here, then those by length or place, unknown ones last."""
    if match := _WORD_PROBLEM.fullmatch(metric) or _PATH.fullmatch(metric):
        return (len(_TERMS), int(match[2]), "" if match[1] == "transformer" else match[1])
    if match := _EQUATION.fullmatch(metric):
        return (len(_TERMS), int(match[1]), "" if match[2] == "seen" else match[2])
    known = list(_TERMS)
    return (known.index(metric), 0, "") if metric in known else (len(_TERMS) + 1, 0, metric)
