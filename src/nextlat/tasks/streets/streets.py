"""Taxi rides through a street network: the task of Vafa et al. (arXiv 2406.03689), for any city and
four kinds of rides."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from nextlat.errors import NextLatError
from nextlat.results import Measurement, Metric, Picture, Published, PublishedFigures
from nextlat.scores import Score
from nextlat.tasks.latent_rank import EFFECTIVE_LATENT_RANK, latent_rank
from nextlat.tasks.rows import Rows
from nextlat.tasks.streets.map import map_record, reconstruct
from nextlat.tasks.streets.metrics import (
    IDENTICAL_CONTINUATIONS,
    IDENTICAL_VALID_CONTINUATIONS,
    NEXT_TOKEN_TEST,
    SEQUENCE_COMPRESSION,
    VALID_TRAJECTORIES,
    DetourKind,
    detour_robustness,
    detours,
    identical_continuations,
    next_token_test,
    sampled_rides,
    sequence_compression,
    valid_trajectories,
)
from nextlat.tasks.streets.network import StreetNetwork, held_out_pairs
from nextlat.tasks.streets.packing import pack, ride_stream, tokenizer
from nextlat.tasks.streets.rides import PrefixPairs, Prompts, prefix_pairs
from nextlat.tasks.streets.sources import download_place, generate_city, read_csv
from nextlat.tasks.streets.walks import Walks, conditioned_walks, random_walks, stopping_rides
from nextlat.tasks.task import NEXTLAT, Measure, Seed, Task, TaskConfig, find_data
from nextlat.validation import Share

if TYPE_CHECKING:
    from nextlat.model import ObjectiveModel

MAP_RIDES = 1000  # at least so many are driven for the map
LATENT_ROWS, LATENT_TOKENS = 256, 256  # of the effective latent rank, as in arXiv 2511.05963
DETOURS: tuple[DetourKind, ...] = ("random", "least_likely")
MAP = Picture(
    kind="map",
    file="map.json",
    title="The city in the model's head",
    text="Rebuilt from the rides that each model generates between places it has never seen "
    "paired. A red street does not exist; it bends from the direction the model took to where it "
    "must lead for the ride to make sense.",
)

NOISE = 0.2  # of noisy shortest paths
MAX_TABLE = 20_000  # intersections up to which the distances between all of them are kept

RideKind = Literal["random-walks", "shortest-paths", "noisy-shortest-paths", "stop-on-arrival"]
Lines = Annotated[int, Field(ge=4, le=200)]  # of a generated city
Moves = Annotated[int, Field(ge=1, le=10_000)]
Degrees = Annotated[float, Field(ge=-180, le=180)]


def _figures(title: str, *values: float, **options: Any) -> PublishedFigures:
    methods = ("GPT", "MTP", "JTP", "NextLat", "true world model")
    return PublishedFigures(
        title=title, by_method=dict(zip(methods, values, strict=False)), **options
    )


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
        columns: its avenues.
        city_seed: what it follows from.
        one_way: see `sources.generate_city`.
        missing: see `sources.generate_city`.
        diagonal: see `sources.generate_city`.
        park: see `sources.generate_city`.
        rides: random-walks (the paper's), of a length drawn uniformly, their destination where they
            end; or, to a destination drawn uniformly, shortest-paths, noisy-shortest-paths (see
            `noise`), or stop-on-arrival, random moves until it is reached, cut at max_moves.
        noise: of noisy-shortest-paths, the share of the moves that are random.
        min_moves: length of the shortest random walk; 1 for other rides.
        max_moves: length of the longest ride (paper: at most 100 tokens, so 97 moves).
        row_length: tokens in a packed training row.
        held_out: (source, destination) pairs that never occur in training.
        held_out_share: limit of `held_out` as a share of all pairs.
        max_hops: the held-out destinations are at most this many moves away (paper: 50).
        tests: pairs, walks and prefix pairs that the metrics use.
        detour_probability: paper: 0.75.
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
    min_moves: Moves = 4
    max_moves: Moves = 40
    row_length: Annotated[int, Field(ge=4, le=2**20)] = 128
    held_out: Annotated[int, Field(ge=1, le=10**6)] = 1000
    held_out_share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    max_hops: Moves = 50
    tests: Annotated[int, Field(ge=2, le=10**5)] = 1000
    detour_probability: Share = 0.75

    @model_validator(mode="after")
    def _rides_fit(self) -> Self:
        if self.rides != "random-walks" and self.min_moves != 1:
            raise ValueError(
                f"rides of the kind {self.rides} are as long as their way: set min_moves = 1"
            )
        if self.rides != "noisy-shortest-paths" and self.noise != NOISE:
            raise ValueError(
                f"rides of the kind {self.rides} have no noise: leave it out, or set rides = "
                "noisy-shortest-paths"
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
    published: Published | None = Published(
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

    def __init__(self, config: StreetsConfig) -> None:
        self.config = config
        self.network = config.network()
        self.tokenizer = tokenizer(self.network)
        self.max_length = config.max_moves + 3
        self.pairs = held_out_pairs(
            self.network,
            config.held_out,
            max_hops=min(config.max_hops, config.max_moves),
            seed=1,
            max_share=config.held_out_share,
        )
        self._tested = self.pairs[: config.tests]
        self._stop = config.rides != "random-walks"
        if self._stop:
            self.published = None  # is about random walks
            if len(self.network) > MAX_TABLE:
                raise NextLatError(
                    f"rides of the kind {config.rides} need the distances between all "
                    f"{len(self.network):,} intersections, too many to be kept: take a part of the "
                    f"network of at most {MAX_TABLE:,} (task.box)."
                )

    def _laws(self) -> tuple[Callable[..., Walks], Callable[..., Walks]]:
        """What draws rides as those of training, called with their number and `rng`; and such rides
        between given pairs, called with those."""
        config = self.config
        if not self._stop:
            lengths: dict[str, Any] = {"min_moves": config.min_moves, "max_moves": config.max_moves}
            return (
                partial(random_walks, self.network, **lengths),
                partial(conditioned_walks, self.network, **lengths),
            )
        draw = partial(
            stopping_rides,
            self.network,
            max_moves=config.max_moves,
            noise={"shortest-paths": 0.0, "stop-on-arrival": 1.0}.get(config.rides, config.noise),
            arrive=config.rides != "stop-on-arrival",
        )
        return draw, lambda pairs, rng: draw(len(pairs), rng=rng, pairs=pairs)

    def train_dataset(self, seed: int) -> Dataset[dict[str, Tensor]]:
        config = self.config
        return ride_stream(
            partial(self._laws()[0], exclude=self.pairs),
            row_length=config.row_length,
            seed=seed,
            mean_moves=None if self._stop else (config.min_moves + config.max_moves) / 2,
        )

    def eval_dataset(self) -> Dataset[dict[str, Tensor]]:
        return Rows(pack(self._walks, self.config.row_length))

    def fingerprint(self) -> str:
        return self.network.fingerprint()

    def prompts(self, count: int) -> list[Tensor]:
        return list(torch.from_numpy(Prompts.of_pairs(self.pairs[:count]).tokens()))

    @cached_property
    def _walks(self) -> Walks:
        """One ride for each held-out pair that is measured."""
        return self._laws()[1](self._tested, rng=np.random.default_rng(3))

    @cached_property
    def _prefixes(self) -> PrefixPairs:
        config = self.config
        return prefix_pairs(
            self.network, config.tests, max_moves=config.max_moves, stop=self._stop, seed=4
        )

    @property
    def metrics(self) -> Sequence[Metric]:
        return [
            NEXT_TOKEN_TEST,
            VALID_TRAJECTORIES,
            SEQUENCE_COMPRESSION,
            IDENTICAL_CONTINUATIONS,
            IDENTICAL_VALID_CONTINUATIONS,
            *(detours(kind, self.config.detour_probability) for kind in DETOURS),
            EFFECTIVE_LATENT_RANK,
        ]

    def measures(self) -> Mapping[str, Measure]:
        city, pairs, max_moves = self.network, self._tested, self.config.max_moves
        probability = self.config.detour_probability

        def scored(metric: Metric, score: Callable[..., Score], *of: Any) -> Measure:
            return lambda model: [Measurement(metric, score(model, city, *of))]

        def continuations(model: "ObjectiveModel") -> list[Measurement]:
            scores = identical_continuations(model, city, self._prefixes, max_moves)
            metrics = (IDENTICAL_CONTINUATIONS, IDENTICAL_VALID_CONTINUATIONS)
            return list(map(Measurement, metrics, scores))

        def driven_off(model: "ObjectiveModel") -> Iterable[Measurement]:
            for kind in DETOURS:
                score = detour_robustness(
                    model, city, pairs, max_moves, probability=probability, kind=kind
                )
                yield Measurement(detours(kind, probability), score)

        return {
            "next-token test": scored(NEXT_TOKEN_TEST, next_token_test, self._walks),
            "valid trajectories": scored(VALID_TRAJECTORIES, valid_trajectories, pairs, max_moves),
            "sequence compression": scored(
                SEQUENCE_COMPRESSION, sequence_compression, self._prefixes, max_moves
            ),
            "identical continuations": continuations,
            "detours": driven_off,
            "effective latent rank": self.latent_rank,
        }

    def artifacts(self, model: "ObjectiveModel") -> list[tuple[Picture, Any]]:
        """The city in the model's head, rebuilt from 1,000 rides or more that it holds possible
        (`sampled_rides`)."""
        times = -(-MAP_RIDES // len(self.pairs))
        pairs = self.pairs[np.tile(np.arange(len(self.pairs)), times)]
        rides = sampled_rides(model, self.network, pairs, self.config.max_moves)
        return [(MAP, map_record(self.network, reconstruct(self.network, rides.sequences(pairs))))]

    def latent_rank(self, model: "ObjectiveModel") -> list[Measurement]:
        """Effective rank of the states of 256 packed rows of 256 tokens."""
        length = max(LATENT_TOKENS, self.max_length)
        # Enough to fill the rows: 2 E(moves), and of rides that may be short, 4 tokens.
        size = 4 if self._stop else (self.config.min_moves + self.config.max_moves) / 2
        draw = self._laws()[0]
        rides = draw(int(LATENT_ROWS * length // size), rng=np.random.default_rng(5))
        rows = pack(rides, length, LATENT_ROWS)
        score = latent_rank(model, rows["input_ids"], rows["position_ids"], rows["attention_mask"])
        return [Measurement(EFFECTIVE_LATENT_RANK, score)]
