"""Tokens per second of the street data on one core: `python benchmarks/walks.py [DIRECTORY of
nodes.csv and edges.csv]`."""

import sys
import time

import numpy as np
import torch

from nextlat.tasks.streets.network import StreetNetwork
from nextlat.tasks.streets.walks import WalkDataset, random_walks

ROWS, ROW_LENGTH, MOVES = 16_384, 128, (4, 60)


def main() -> None:
    """Print a table: walks alone, and packed training rows read in order."""
    torch.set_num_threads(1)
    networks = {
        "8 x 8 city": StreetNetwork.embedded(8, 8),
        "40 x 40 city": StreetNetwork.embedded(40, 40),
    }
    if len(sys.argv) > 1:
        networks[sys.argv[1]] = StreetNetwork.from_csv(sys.argv[1]).strongly_connected()
    print(f"{'network':<40} {'walks, tokens/s':>18} {'packed rows, tokens/s':>24}")
    for name, network in networks.items():
        start = time.process_time()
        lengths, _, _ = random_walks(
            network, 50_000, min_moves=MOVES[0], max_moves=MOVES[1], rng=np.random.default_rng(0)
        )
        walks = (lengths + 3).sum() / (time.process_time() - start)
        data = WalkDataset(
            network,
            rows=ROWS,
            row_length=ROW_LENGTH,
            min_moves=MOVES[0],
            max_moves=MOVES[1],
            seed=0,
        )
        start = time.process_time()
        tokens = sum(int(data[i]["attention_mask"].sum()) for i in range(ROWS))
        print(f"{name:<40} {walks:>18,.0f} {tokens / (time.process_time() - start):>24,.0f}")


if __name__ == "__main__":
    main()
