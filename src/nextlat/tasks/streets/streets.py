"""Taxi rides through a street network: the task of Vafa et al. (arXiv 2406.03689), for any city and
four kinds of rides."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import product
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from nextlat.errors import NextLatError
from nextlat.model import ObjectiveModel
from nextlat.results import Chart, Line, Mark, Measurement, Metric, Picture, Published
from nextlat.scores import Score, mean_score
from nextlat.tasks.dynamics_alone import DRIVERS, DYNAMICS, Driver, driver
from nextlat.tasks.latent_rank import EFFECTIVE_LATENT_RANK, latent_rank
from nextlat.tasks.rows import Rows
from nextlat.tasks.streets import measuring
from nextlat.tasks.streets import metrics as declared
from nextlat.tasks.streets.map import map_record, reconstruct
from nextlat.tasks.streets.metrics import MAP, PUBLISHED, DetourKind, detours, variant, words
from nextlat.tasks.streets.network import Pairs, StreetNetwork, held_out_pairs
from nextlat.tasks.streets.packing import pack, ride_stream, tokenizer
from nextlat.tasks.streets.rides import Prompts, Rides, prefix_pairs
from nextlat.tasks.streets.sources import download_place, generate_city, read_csv
from nextlat.tasks.streets.walks import (
    Walks,
    again,
    conditioned_walks,
    random_walks,
    stopping_rides,
)
from nextlat.tasks.task import Measure, Seed, SequenceModel, Task, TaskConfig, find_data
from nextlat.validation import Share

MAP_RIDES = 1000  # at least so many are driven for the map
LATENT_ROWS, LATENT_TOKENS = 256, 256  # of the effective latent rank, as in arXiv 2511.05963
PROMPT = 2  # tokens of source and destination
NOISE = 0.2  # of noisy shortest paths
MAX_MOVES = 10_000

Scores = Callable[[SequenceModel], Iterable[Score]]
RideKind = Literal["random-walks", "shortest-paths", "noisy-shortest-paths", "stop-on-arrival"]
Lines = Annotated[int, Field(ge=4, le=200)]  # of a generated city
Moves = Annotated[int, Field(ge=1, le=MAX_MOVES)]
Multiple = Annotated[int, Field(ge=1, le=100)]
Degrees = Annotated[float, Field(ge=-180, le=180)]


class StreetsConfig(TaskConfig):
    """Which city, which rides, and how much is measured.

    Attributes:
        path: directory with nodes.csv and edges.csv, relative to the working directory or to
            $NEXTLAT_DATA.
        place: a place known to OpenStreetMap, downloaded when there is no `path` (needs the extra
            `nextlat[osm]`).
        box: (south, west, north, east) in degrees: only this part of the network, cut to its
            largest strongly connected part.
        rows: streets of the generated city, when there is neither path nor place.
        columns: avenues of the generated city.
        city_seed: of the generated city.
        one_way: share of the inner streets, and of the inner avenues, that are one-way.
        missing: share of the blocks that are closed.
        diagonal: whether there are a diagonal avenue and a diagonal lane.
        park: whether there is a park, with no streets inside.
        rides: random-walks (the paper's), of a length drawn uniformly, their destination where they
            end; or, to a destination drawn uniformly, shortest-paths, noisy-shortest-paths (see
            `noise`), or stop-on-arrival, random moves until it is reached, cut at max_moves.
        noise: of noisy-shortest-paths, the share of the moves that are random.
        cut: shortest and noisy shortest paths that have not arrived within max_moves are cut there,
            without `end`, instead of drawn again: `multiples` ask for longer ones.
        distinct: rides to train on, again and again; default: ever new ones.
        min_moves: length of the shortest random walk; 1 for other rides.
        max_moves: length of the longest ride (paper: at most 100 tokens, so 97 moves).
        row_length: tokens in a packed training row.
        held_out: (source, destination) pairs that never occur in training.
        held_out_share: limit of `held_out` as a share of all pairs.
        max_hops: the held-out destinations are at most this many moves away (paper: 50).
        tests: pairs, walks and prefix pairs that the metrics use.
        multiples: of max_moves, up to which rides are measured, besides 1.
        dynamics_alone: also measure the rides of the latent dynamics model alone, begun after
            source and destination.
        detour_probability: one or several (paper: 0.75; Vafa et al.: 0.01, 0.1, 0.5, 0.75).
        detour_kinds: random, least_likely, second_most_likely.
        detour_draws: of each kind at each probability for each pair.
    """

    path: str | None = None
    place: str | None = None
    box: tuple[Degrees, Degrees, Degrees, Degrees] | None = None
    rows: Lines = 8
    columns: Lines = 8
    city_seed: Seed = 0
    one_way: Share = 0.5
    missing: Share = 0.1
    diagonal: bool = True
    park: bool = True
    rides: RideKind = "random-walks"
    noise: Share = NOISE
    cut: bool = False
    distinct: Annotated[int, Field(ge=1, le=10**7)] | None = None
    min_moves: Moves = 4
    max_moves: Moves = 40
    row_length: Annotated[int, Field(ge=4, le=2**20)] = 128
    held_out: Annotated[int, Field(ge=1, le=10**6)] = 1000
    held_out_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    max_hops: Moves = 50
    tests: Annotated[int, Field(ge=2, le=10**5)] = 1000
    multiples: Annotated[tuple[Multiple, ...], Field(max_length=8)] = (1,)
    dynamics_alone: bool = False
    detour_probability: Share | Annotated[tuple[Share, ...], Field(min_length=1)] = 0.75
    detour_kinds: tuple[DetourKind, ...] = ("random", "least_likely")
    detour_draws: Annotated[int, Field(ge=1, le=1000)] = 1

    @model_validator(mode="after")
    def _rides_fit(self) -> Self:
        if self.rides != "random-walks" and self.min_moves != 1:
            raise ValueError(
                f"rides of the kind {self.rides} are as long as their way: set min_moves = 1"
            )
        owners = {"noise": "noisy-shortest-paths", "cut": "shortest-paths"}
        for key, owner in owners.items():
            default = type(self).model_fields[key].default
            if not self.rides.endswith(owner) and getattr(self, key) != default:
                raise ValueError(
                    f"rides of the kind {self.rides} have no {key}: leave it out, or set rides = "
                    f"{owner}"
                )
        if self.min_moves > self.max_moves:
            raise ValueError(
                f"walks of {self.min_moves} to {self.max_moves} moves: give min_moves <= max_moves"
            )
        if self.row_length < self.max_moves + 3:
            raise ValueError(
                f"row_length = {self.row_length} is too short for a walk of {self.max_moves} "
                f"moves: give at least {self.max_moves + 3}"
            )
        if (longest := max(1, *self.multiples) * self.max_moves) > MAX_MOVES:
            raise ValueError(
                f"rides of {longest:,} moves are too long to be measured: give multiples of "
                f"max_moves up to {MAX_MOVES:,}"
            )
        return self

    def build(self) -> "Streets":
        return Streets(self)

    def network(self) -> StreetNetwork:
        """The street network, every part of it reachable from every other.

        Raises:
            NextLatError: no such directory, file or place; a faulty file; an empty box.
        """
        if self.path is not None and (directory := find_data(self.path)):
            network = read_csv(directory)
        elif self.place is not None:
            network = download_place(self.place)
        elif self.path is not None:
            raise NextLatError(
                f"there is no directory {self.path} (nor in $NEXTLAT_DATA): set task.path to that "
                "of nodes.csv and edges.csv."
            )
        else:
            network = generate_city(
                self.rows, self.columns, self.city_seed,
                self.one_way, self.missing, self.diagonal, self.park,
            )  # fmt: skip
        return network.within(*self.box) if self.box is not None else network.strongly_connected()


class Streets(Task):
    """See the module. Evaluation pairs, walks and prefixes are drawn with fixed seeds: the same for
    every model."""

    name = "streets"
    title = "Streets of a city"
    published: Published | None = PUBLISHED

    def __init__(self, config: StreetsConfig) -> None:
        self.config = config
        self.network = config.network()
        self.tokenizer = tokenizer(self.network)
        self._multiples = sorted({1, *config.multiples})
        self._variants = [*product(DRIVERS[: 1 + config.dynamics_alone], self._multiples)]
        self._cut = config.cut or config.rides == "stop-on-arrival"
        farthest = config.max_moves * (self._multiples[-1] if self._cut else 1)
        self.max_length = self._multiples[-1] * config.max_moves + 3
        self.pairs = held_out_pairs(
            self.network,
            config.held_out,
            max_hops=min(config.max_hops, farthest),
            seed=1,
            max_share=config.held_out_share,
        )
        self._tested = self.pairs[: config.tests]
        self._stop = config.rides != "random-walks"
        if self._stop:
            self.published = None  # is about random walks
            _ = self.network.hops  # refuses a network that is too large for it
        self._drawn: dict[int, Walks] = {}

    def _laws(self, multiple: int = 1) -> tuple[Callable[..., Walks], Callable[..., Walks]]:
        """What draws rides as those of training, called with their number and `rng`; and such rides
        between given pairs, called with those.

        Args:
            multiple: of max_moves, the limit. All random walks are longer than at one less.
        """
        config = self.config
        max_moves = multiple * config.max_moves
        if not self._stop:
            shortest = config.min_moves if multiple == 1 else max_moves - config.max_moves + 1
            lengths: dict[str, Any] = {"min_moves": shortest, "max_moves": max_moves}
            return (
                partial(random_walks, self.network, **lengths),
                partial(conditioned_walks, self.network, **lengths),
            )
        draw = partial(
            stopping_rides,
            self.network,
            max_moves=max_moves,
            noise={"shortest-paths": 0.0, "stop-on-arrival": 1.0}.get(config.rides, config.noise),
            arrive=not self._cut,
        )
        return draw, lambda pairs, rng: draw(len(pairs), rng=rng, pairs=pairs)

    def train_dataset(self, seed: int) -> Dataset[dict[str, Tensor]]:
        config = self.config
        return ride_stream(
            again(partial(self._laws()[0], exclude=self.pairs), config.distinct, seed),
            row_length=config.row_length,
            seed=seed,
            mean_moves=(
                None if self._stop or config.distinct else (config.min_moves + config.max_moves) / 2
            ),
        )

    def eval_dataset(self) -> Dataset[dict[str, Tensor]]:
        return Rows(pack(self._walks(), self.config.row_length))

    def fingerprint(self) -> str:
        return self.network.fingerprint()

    def prompts(self, count: int) -> list[Tensor]:
        return list(torch.from_numpy(Prompts.of_pairs(self.pairs[:count]).tokens()))

    def _walks(self, multiple: int = 1) -> Walks:
        """One ride for each held-out pair that is measured."""
        if multiple not in self._drawn:
            rng = np.random.default_rng(3)
            self._drawn[multiple] = self._laws(multiple)[1](self._tested, rng=rng)
        return self._drawn[multiple]

    @property
    def metrics(self) -> Sequence[Metric]:
        stages = [metrics for variant in self._variants for _, metrics, _ in self._stages(*variant)]
        return [*(metric for metrics in stages for metric in metrics), EFFECTIVE_LATENT_RANK]

    def measures(self) -> Mapping[str, Measure]:
        found: dict[str, Measure] = {
            name: partial(_measure, who, metrics, scores)
            for who, multiple in self._variants
            for name, metrics, scores in self._stages(who, multiple)
        }
        if self._multiples[-1] > 1:
            found["legal tokens by position"] = self.legal_tokens
        return found | {"effective latent rank": self.latent_rank}

    def _stages(self, who: Driver, multiple: int) -> Iterator[tuple[str, Sequence[Metric], Scores]]:
        """What is shown while measuring, the metrics, and what gives their scores."""
        config, city, stop = self.config, self.network, self._stop
        max_moves = multiple * config.max_moves
        pairs = self._tested
        if self._cut:  # some of them are too far for the fewest moves
            pairs = pairs[city.hops[pairs.destination, pairs.source] <= max_moves]
        given, draws = config.detour_probability, config.detour_draws
        probabilities = given if isinstance(given, tuple) else (given,)
        off = [(kind, p) for p in dict.fromkeys(probabilities) for kind in config.detour_kinds]
        prefixes = cache(
            lambda: prefix_pairs(city, config.tests, max_moves=max_moves, stop=stop, seed=4)
        )
        stages: dict[str, tuple[list[Metric], Scores]] = {
            "next-token test": (
                [declared.NEXT_TOKEN_TEST],
                lambda model: [
                    measuring.next_token_test(model, city, self._walks(multiple), stop=stop)
                ],
            ),
            "valid trajectories": (
                [declared.VALID_TRAJECTORIES],
                lambda model: [measuring.valid_trajectories(model, city, pairs, max_moves)],
            ),
            "sequence compression": (
                [declared.SEQUENCE_COMPRESSION],
                lambda model: [measuring.sequence_compression(model, city, prefixes(), max_moves)],
            ),
            "identical continuations": (
                [declared.IDENTICAL_CONTINUATIONS, declared.IDENTICAL_VALID_CONTINUATIONS],
                lambda model: measuring.identical_continuations(model, city, prefixes(), max_moves),
            ),
            "detours": (
                [detours(kind, p, draws) for kind, p in off],
                lambda model: [
                    measuring.detour_robustness(
                        model, city, pairs, max_moves, probability=p, kind=kind, draws=draws
                    )
                    for kind, p in off
                ],
            ),
            "sampled rides": (
                [declared.LEGAL_RIDES, declared.REAL_RIDES],
                lambda model: self._shares_of_rides(model, max_moves),
            ),
        }
        length, longest = self._length(multiple), multiple == self._multiples[-1]
        for name, (metrics, scores) in stages.items():
            if who == "dynamics" or length:
                metrics = [variant(metric, who, length, headline=longest) for metric in metrics]
            yield name + words(who, length), metrics, scores

    def _length(self, multiple: int) -> int | None:
        """In moves, if it is not that of training."""
        return multiple * self.config.max_moves if multiple > 1 else None

    def _sampled_rides(self, model: SequenceModel, max_moves: int) -> tuple[Pairs, Rides]:
        """1,000 rides or more that the model holds possible, all pairs in turn."""
        times = -(-MAP_RIDES // len(self.pairs))
        pairs = self.pairs[np.tile(np.arange(len(self.pairs)), times)]
        return pairs, measuring.sampled_rides(model, self.network, pairs, max_moves)

    def _shares_of_rides(self, model: SequenceModel, max_moves: int) -> list[Score]:
        """Of legal and of real ones; the errors are clustered by pair."""
        _, rides = self._sampled_rides(model, max_moves)
        by_pair = [x.reshape(-1, len(self.pairs)).mean(axis=0) for x in (rides.legal, rides.real)]
        return [mean_score(shares) for shares in by_pair]

    def legal_tokens(self, model: ObjectiveModel) -> Iterable[Chart]:
        """The next-token test by position, on the longest rides."""
        multiple = self._multiples[-1]
        walks, lines = self._walks(multiple), []
        for who in dict.fromkeys(who for who, _ in self._variants):
            if at_the_wheel := driver(model, who, PROMPT):
                legal = measuring.legal_positions(
                    at_the_wheel, self.network, walks, stop=self._stop
                )
                means = np.nanmean(legal[:, : walks.lengths.max() + 1], axis=0)
                series = DYNAMICS if who == "dynamics" else who
                lines.append(Line(values=means.tolist(), series=series, first=0))
        yield Chart(
            name="legal-tokens",
            title="Legal next tokens by position",
            x="moves made",
            lines=lines,
            alt="Share of legal next tokens of {models} by the number of moves made.",
            marks=[Mark(text="trained up to here", x=self.config.max_moves)],
        )

    def artifacts(self, model: ObjectiveModel) -> Iterable[tuple[Picture, Any]]:
        """The city in the model's head, rebuilt from rides that it holds possible."""
        for who, multiple in self._variants:
            if at_the_wheel := driver(model, who, PROMPT):
                max_moves = multiple * self.config.max_moves
                pairs, rides = self._sampled_rides(at_the_wheel, max_moves)
                # Where training rides are cut, those without an end belong to the language.
                sequences = rides.sequences(pairs, cut=self._cut)
                base = (who, multiple) == ("transformer", 1)
                cell = {
                    "row": DYNAMICS if who == "dynamics" else "",
                    "column": f"{max_moves} moves" if self._multiples[-1] > 1 else "",
                    "file": MAP.file if base else f"map-{who}-{max_moves}.json",
                }
                picture = MAP.model_copy(update=cell)
                yield picture, map_record(self.network, reconstruct(self.network, sequences))

    def latent_rank(self, model: ObjectiveModel) -> list[Measurement]:
        """Effective rank of the states of 256 packed rows of 256 tokens."""
        length = max(LATENT_TOKENS, self.max_length)
        # Enough to fill the rows: 2 E(moves), and of rides that may be short, 4 tokens.
        size = 4 if self._stop else (self.config.min_moves + self.config.max_moves) / 2
        count = int(LATENT_ROWS * length // size)
        rows = pack(self._laws()[0](count, rng=np.random.default_rng(5)), length, LATENT_ROWS)
        score = latent_rank(model, rows["input_ids"], rows["position_ids"], rows["attention_mask"])
        return [Measurement(EFFECTIVE_LATENT_RANK, score)]


def _measure(
    who: Driver, metrics: Sequence[Metric], scores: Scores, model: ObjectiveModel
) -> Iterable[Measurement]:
    """Nothing where the model has no such driver."""
    at_the_wheel = driver(model, who, PROMPT)
    return map(Measurement, metrics, scores(at_the_wheel)) if at_the_wheel else []
