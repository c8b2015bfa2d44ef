"""Taxi rides through a street network: the task of Vafa et al. (arXiv 2406.03689) in its
random-walks variant, for any city."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextlat.errors import NextLatError
from nextlat.scores import Score
from nextlat.tasks.latent_rank import latent_rank
from nextlat.tasks.rows import STREAM
from nextlat.tasks.streets import metrics as score
from nextlat.tasks.streets.conditioned_walks import conditioned_walks
from nextlat.tasks.streets.map import reconstruct
from nextlat.tasks.streets.map_record import map_record
from nextlat.tasks.streets.network import StreetNetwork
from nextlat.tasks.streets.prefixes import PrefixPairs, prefix_pairs
from nextlat.tasks.streets.walks import (
    FIRST_NODE,
    Pairs,
    WalkDataset,
    held_out_pairs,
    pack,
    random_walks,
    tokenizer,
)
from nextlat.tasks.task import Metric, Task, find_data

if TYPE_CHECKING:
    from nextlat.model import ObjectiveModel

MAP, MAP_RIDES = "map.json", 1000
LATENT_ROWS, LATENT_TOKENS = 256, 256  # of the effective latent rank, as in arXiv 2511.05963


@dataclass(frozen=True)
class StreetsConfig:
    """Which city, which walks, and how much is measured.

    Attributes:
        path: directory with nodes.csv and edges.csv, relative to the working directory or to
            $NEXTLAT_DATA.
        place: a place known to OpenStreetMap, downloaded when there is no `path` (needs the extra
            `nextlat[osm]`).
        box: (south, west, north, east) in degrees: only this part of the network, cut to its
            largest strongly connected part.
        rows, columns, city_seed, one_way, missing, diagonal, park: of the generated city, when
            there is neither path nor place.
        min_moves, max_moves: length of a walk (paper: at most 100 tokens, so 97 moves).
        row_length: tokens in a packed training row.
        held_out: (source, destination) pairs that never occur in training; at most a tenth of all.
        max_hops: the held-out destinations are at most so many moves away (paper: 50).
        tests: pairs, walks and prefix pairs that the metrics use.
        detour_probability: paper: 0.75.
    """

    path: str | None = None
    place: str | None = None
    box: tuple[float, float, float, float] | None = None
    rows: int = 8
    columns: int = 8
    city_seed: int = 0
    one_way: float = 0.5
    missing: float = 0.1
    diagonal: bool = True
    park: bool = True
    min_moves: int = 4
    max_moves: int = 40
    row_length: int = 128
    held_out: int = 1000
    max_hops: int = 50
    tests: int = 1000
    detour_probability: float = 0.75

    def build(self) -> "Streets":
        return Streets(self)

    def network(self) -> StreetNetwork:
        """The street network, every part of it reachable from every other.

        Raises:
            NextLatError: no such directory, file or place; a faulty file; an empty box.
        """
        if self.path is not None and (directory := find_data(self.path)):
            network = StreetNetwork.from_csv(directory)
        elif self.place is not None:
            network = StreetNetwork.from_place(self.place)
        elif self.path is not None:
            raise NextLatError(
                f"there is no directory {self.path} (nor in $NEXTLAT_DATA): set task.path to nodes.csv and edges.csv."
            )
        else:
            network = StreetNetwork.embedded(
                self.rows,
                self.columns,
                self.city_seed,
                self.one_way,
                self.missing,
                self.diagonal,
                self.park,
            )
        return network.within(*self.box) if self.box is not None else network.strongly_connected()


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows that `pack` made, one by one."""

    def __init__(self, rows: dict[str, Tensor]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: x[index] for name, x in self.rows.items()}


class Streets(Task):
    """See the module. Evaluation pairs, walks and prefixes are drawn with fixed seeds: the same for
    every model."""

    name = "streets"
    higher_is_better: Mapping[str, bool] = {
        "next_token_test": True,
        "valid_trajectories": True,
        "sequence_compression": True,
        "identical_continuations": True,
        "identical_valid_continuations": True,
        "effective_latent_rank": False,
        "detour_robustness": True,
        "detour_robustness_least_likely": True,
    }

    def __init__(self, config: StreetsConfig) -> None:
        if config.tests < 2:
            raise NextLatError(f"task.tests is {config.tests}: give at least 2.")
        self.config = config
        self.network = config.network()
        self.tokenizer = tokenizer(self.network)
        self.max_length = config.max_moves + 3
        self.pairs: Pairs = held_out_pairs(
            self.network, config.held_out, max_hops=min(config.max_hops, config.max_moves), seed=1
        )

    def train_dataset(self, seed: int) -> Dataset[dict[str, Tensor]]:
        config = self.config
        return WalkDataset(
            self.network,
            rows=STREAM,
            row_length=config.row_length,
            min_moves=config.min_moves,
            max_moves=config.max_moves,
            seed=seed,
            exclude=self.pairs,
        )

    def eval_dataset(self) -> Dataset[dict[str, Tensor]]:
        return PackedRows(pack(*self._walks, self.config.row_length))

    def fingerprint(self) -> str:
        return self.network.fingerprint()

    def prompts(self, count: int) -> list[Tensor]:
        chosen = self.pairs[:count]
        return list(torch.from_numpy(np.stack([chosen.source, chosen.destination], 1) + FIRST_NODE))

    @cached_property
    def _walks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One random walk for each held-out pair that is measured."""
        config = self.config
        pairs, rng = self.pairs[: config.tests], np.random.default_rng(3)
        return conditioned_walks(
            self.network, pairs, min_moves=config.min_moves, max_moves=config.max_moves, rng=rng
        )

    @cached_property
    def _prefixes(self) -> PrefixPairs:
        return prefix_pairs(
            self.network, self.config.tests, max_moves=self.config.max_moves, seed=4
        )

    def metrics(self) -> Mapping[str, Metric]:
        network, pairs, most = self.network, self.pairs[: self.config.tests], self.config.max_moves

        def detours(model: "ObjectiveModel") -> dict[str, Score]:
            p = self.config.detour_probability
            return {
                "detour_robustness": score.detour_robustness(
                    model, network, pairs, most, probability=p
                ),
                "detour_robustness_least_likely": score.detour_robustness(
                    model, network, pairs, most, probability=p, kind="least_likely"
                ),
            }

        def continuations(model: "ObjectiveModel") -> dict[str, Score]:
            found = score.identical_continuations(model, network, self._prefixes, most)
            return {
                "identical_continuations": found.identical,
                "identical_valid_continuations": found.identical_valid,
            }

        return {
            "next-token test": lambda model: {
                "next_token_test": score.next_token_test(model, network, *self._walks)
            },
            "valid trajectories": lambda model: {
                "valid_trajectories": score.valid_trajectories(model, network, pairs, most)
            },
            "sequence compression": lambda model: {
                "sequence_compression": score.sequence_compression(
                    model, network, self._prefixes, most
                )
            },
            "identical continuations": continuations,
            "detours": detours,
            "effective latent rank": lambda model: {
                "effective_latent_rank": self.latent_rank(model)
            },
        }

    def artifacts(self, model: "ObjectiveModel") -> Mapping[str, Any]:
        """map.json: the city in the model's head, rebuilt from 1,000 rides or more that it holds
        possible (`sampled_rides`)."""
        times = -(-MAP_RIDES // len(self.pairs))
        pairs = self.pairs[np.tile(np.arange(len(self.pairs)), times)]
        rides = score.sampled_rides(model, self.network, pairs, self.config.max_moves)
        return {MAP: map_record(self.network, reconstruct(self.network, rides.sequences(pairs)))}

    def latent_rank(self, model: "ObjectiveModel") -> Score:
        """Effective rank of the states of 256 packed rows of 256 tokens."""
        config = self.config
        length = max(LATENT_TOKENS, self.max_length)
        walks = 2 * LATENT_ROWS * length // (config.min_moves + config.max_moves)
        rng = np.random.default_rng(5)
        drawn = random_walks(
            self.network, walks, min_moves=config.min_moves, max_moves=config.max_moves, rng=rng
        )
        rows = pack(*drawn, length, LATENT_ROWS)
        return latent_rank(model, rows["input_ids"], rows["position_ids"], rows["attention_mask"])
