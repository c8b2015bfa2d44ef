"""Tokens per second of the street data on one core: `python benchmarks/walks.py [DIRECTORY of
nodes.csv and edges.csv]`."""

import sys
import time
from functools import partial

import numpy as np
import torch

from nextlat.tasks.streets.packing import ride_stream
from nextlat.tasks.streets.sources import generate_city, read_csv
from nextlat.tasks.streets.walks import random_walks

ROWS, ROW_LENGTH = 16_384, 128
LENGTHS = {"min_moves": 4, "max_moves": 60}


def main() -> None:
    """Print a table: walks alone, and packed training rows read in order."""
    torch.set_num_threads(1)
    networks = {"8 x 8 city": generate_city(8, 8), "40 x 40 city": generate_city(40, 40)}
    for directory in sys.argv[1:]:
        networks[directory] = read_csv(directory).strongly_connected()
    print(f"{'network':<40} {'walks, tokens/s':>18} {'packed rows, tokens/s':>24}")
    for name, network in networks.items():
        start = time.process_time()
        walks = random_walks(network, 50_000, rng=np.random.default_rng(0), **LENGTHS)
        rate = (walks.lengths + 3).sum() / (time.process_time() - start)
        draw = partial(random_walks, network, **LENGTHS)
        data = ride_stream(draw, row_length=ROW_LENGTH, seed=0)
        start = time.process_time()
        tokens = sum(int(data[i]["attention_mask"].sum()) for i in range(ROWS))
        print(f"{name:<40} {rate:>18,.0f} {tokens / (time.process_time() - start):>24,.0f}")


if __name__ == "__main__":
    main()
