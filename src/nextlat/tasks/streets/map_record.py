"""map.json: a street network and the map reconstructed from a model's rides, as plain JSON that
needs no other file to be drawn."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nextlat.tasks.streets.map import ReconstructedMap
from nextlat.tasks.streets.network import StreetNetwork


def map_record(network: StreetNetwork, reconstructed: ReconstructedMap) -> dict[str, Any]:
    """What `read_map_record` reads back: the city with names and coordinates, the streets used and
    invented, the counts."""
    return {
        "network": {
            "node_ids": list(network.node_ids),
            "latitude": network.latitude.tolist(),
            "longitude": network.longitude.tolist(),
            "targets": network.targets.tolist(),
        },
        "used": reconstructed.used.tolist(),
        "invented": [[int(place) for place in street] for street in reconstructed.invented],
        "counts": reconstructed.counts(),
    }


def read_map_record(content: Mapping[str, Any]) -> tuple[StreetNetwork, ReconstructedMap]:
    """The network and the map of a record.

    Raises:
        ValueError, KeyError, TypeError: it is not one.
    """
    city, counts = content["network"], content["counts"]
    network = StreetNetwork(
        node_ids=tuple(city["node_ids"]),
        latitude=np.array(city["latitude"]),
        longitude=np.array(city["longitude"]),
        targets=np.array(city["targets"], dtype=np.int64),
    )
    reconstructed = ReconstructedMap(
        used=np.array(content["used"], dtype=np.int64).reshape(-1, 3),
        invented=[(int(a), int(direction), int(b)) for a, direction, b in content["invented"]],
        **{
            name: int(counts[name])
            for name in ("true_unused", "explained", "failed", "astray", "unclosed")
        },
    )
    return network, reconstructed
