"""What is measured of taxi rides: does a model that predicts legal moves also know where it is?

The metrics of Vafa et al., "Evaluating the World Model Implicit in a Generative Model", arXiv
2406.03689, and of Teoh et al., "Next-Latent Prediction Transformers Learn Compact World Models",
arXiv 2511.05963, as they are declared; `measuring` measures them.
"""

from typing import Any, Literal

from nextlat.results import Metric, Picture, Published, PublishedFigures
from nextlat.tasks.dynamics_alone import ALONE_NOTE, DYNAMICS, Driver
from nextlat.tasks.task import NEXTLAT, OURS

VAFA = "Vafa et al., arXiv 2406.03689"
PAPER_PROBABILITY = 0.75  # of a detour, arXiv 2511.05963

MAP = Picture(
    kind="map",
    file="map.json",
    title="The city in the model's head",
    text="Rebuilt from the rides that each model generates between places it has never seen "
    "paired. A red street does not exist; it bends from the direction the model took to where it "
    "must lead for the ride to make sense.",
)


DetourKind = Literal["random", "least_likely", "second_most_likely"]

NEXT_TOKEN_TEST = Metric(
    name="next_token_test",
    title="Next-token test",
    noun="share of legal next tokens",
    definition="Share of the positions of held-out walks, fed as they are, whose most likely token "
    "is legal there.",
    source=VAFA,
    items="walks",
    published="next_token_test",
)
VALID_TRAJECTORIES = Metric(
    name="valid_trajectories",
    title="Valid trajectories",
    noun="share of valid trajectories",
    definition="Share of unseen (source, destination) pairs that greedy generation connects "
    "legally, closing with `end` at the destination.",
    source=f"{NEXTLAT}, after {VAFA}",
    items="pairs",
    published="valid_trajectories",
)
SEQUENCE_COMPRESSION = Metric(
    name="sequence_compression",
    title="Sequence compression",
    definition="Share of pairs of prefixes that reach the same place with the same destination "
    "where every token of continuations sampled after the first has a probability above 0.01 after "
    "the second.",
    source=VAFA,
    items="prefix pairs",
    published="sequence_compression",
)
IDENTICAL_CONTINUATIONS = Metric(
    name="identical_continuations",
    title="Identical continuations",
    noun="share of identical continuations",
    definition="Share of the same pairs of prefixes that the model continues greedily by the same "
    "tokens.",
    source=NEXTLAT,
    items="prefix pairs",
)
IDENTICAL_VALID_CONTINUATIONS = Metric(
    name="identical_valid_continuations",
    title="Identical, valid continuations",
    noun="share of identical and valid continuations",
    definition="As identical continuations, counted only if the common continuation is legal and "
    "ends at the destination.",
    source=OURS,
    items="prefix pairs",
)
LEGAL_RIDES = Metric(
    name="legal_rides",
    title="Legal rides",
    noun="share of legal rides",
    definition="Share of rides between unseen pairs, every token drawn among those of a "
    "probability above 0.01, that take only streets which exist, and that end, if they do, at the "
    "destination.",
    source=OURS,
    items="pairs",
)


def detours(kind: DetourKind, probability: float, draws: int = 1) -> Metric:
    """The metric of detours of one kind at one probability (PAPER_PROBABILITY in arXiv 2511.05963),
    for each pair the mean over some draws of them."""
    words = {
        "random": (
            "Random detours",
            "robustness to random detours",
            "Share of pairs that still arrive legally when each step is replaced, with the detour "
            "probability, by another random legal move from which the destination can still be "
            "reached.",
        ),
        "least_likely": (
            "Least likely detours",
            "robustness to the least likely detours",
            "As random detours, each to the legal move that the model holds least likely.",
        ),
        "second_most_likely": (
            "Second most likely detours",
            "robustness to the second most likely detours",
            "As random detours, each to the legal move that the model holds most likely after its "
            "own.",
        ),
    }
    title, noun, definition = words[kind]
    usual = probability == PAPER_PROBABILITY
    return Metric(
        name="detour_robustness",
        title=title if usual else f"{title}, probability {probability:g}",
        noun=noun if usual else f"{noun} of probability {probability:g}",
        definition=definition + (f" Mean over {draws} draws for each pair." if draws > 1 else ""),
        source=VAFA,
        items="pairs",
        parameters={"kind": kind, "probability": probability},
        published="detour_robustness" if kind == "random" and usual else None,
    )


def words(who: Driver, length: int | None) -> str:
    """What sets a variant apart, to come after a title."""
    return f", {DYNAMICS}" * (who == "dynamics") + (f", {length} moves" if length else "")


def variant(metric: Metric, who: Driver, length: int | None, *, headline: bool) -> Metric:
    """A metric of the rides of another driver, or of longer ones.

    Args:
        metric: of the transformer, within the training length.
        who: drives.
        length: up to how many moves; None = the training length.
        headline: whether that of legal rides is to be one; others are not.
    """
    noun, definition = metric.noun or metric.title.lower(), metric.definition
    changes: dict[str, Any] = {}
    parameters = dict(metric.parameters)
    if length:
        parameters["length"] = length
        noun += f" up to {length} moves"
        definition += f" Rides of up to {length} moves."
    if who == "dynamics":
        same = metric if length is None else variant(metric, "transformer", length, headline=False)
        changes = {
            "counterpart": same.key,
            "counterpart_name": "the transformer of",
            "note": ALONE_NOTE,
        }
        parameters["driver"] = who
        noun += f" of the {DYNAMICS}"
        definition += (
            f" Driven by the {DYNAMICS}, from the transformer's state after source and destination."
        )
    return metric.model_copy(
        update={
            "title": metric.title + words(who, length),
            "noun": noun,
            "definition": definition,
            "parameters": parameters,
            "published": None,
            "headline": headline and metric.name == LEGAL_RIDES.name,
            **changes,
        }
    )


def _figures(title: str, *values: float, **options: Any) -> PublishedFigures:
    methods = ("GPT", "MTP", "JTP", "NextLat", "true world model")
    return PublishedFigures(
        title=title, by_method=dict(zip(methods, values, strict=False)), **options
    )


PUBLISHED = Published(
    setting="all of Manhattan, random walks, 91 million sequences, 48 layers of width 384, "
    "horizon 8",
    source=f"{NEXTLAT}v4",
    figures={
        "next_token_test": _figures("Next-token test", 1.0, 1.0, 1.0, 1.0, 1.0),
        "valid_trajectories": _figures("Valid trajectories", 0.97, 0.981, 0.971, 0.987, 1.0),
        "sequence_compression": _figures("Sequence compression", 0.65, 0.64, 0.32, 0.71, 1.0),
        "detour_robustness": _figures("Random detours", 0.85, 0.95, 0.87, 0.95, 1.0),
        "effective_latent_rank": _figures(
            "Effective latent rank", 160.1, 57.7, 215.8, 52.7, unit="number"
        ),
    },
)
