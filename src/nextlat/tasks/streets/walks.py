"""Random walks through a street network, as packed rows of tokens (Vafa et al., arXiv 2406.03689,
"random walks").

A sequence is `source destination move move ... end`: its source and destination are the two ends of the walk.  Shapes: N
intersections, W walks, M most moves of a walk, K pairs, R rows of T tokens.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from nextlat.errors import NextLatError
from nextlat.tasks.streets.network import DIRECTIONS, StreetNetwork

PAD, UNK, END, FIRST_DIRECTION, FIRST_NODE = 0, 1, 2, 3, 11
SPECIAL_TOKENS = ("<pad>", "<unk>", "end")
MAX_ROUNDS = 100  # of drawing again the walks that were refused, up to 512 times each in a round
MAX_LISTED_PAIRS = (
    2**22
)  # up to here, 2,048 intersections, all pairs are listed when some are to be held out
TOKENS_PER_CHUNK = 2**16
CACHED_CHUNKS = 4


def tokenizer(network: StreetNetwork) -> PreTrainedTokenizerFast:
    """One token per word: `<pad> <unk> end`, the eight directions, then the intersections by name,
    in node order.

    `end` is the end-of-sequence token; text is split at white space alone, and decoding joins with
    single spaces.
    """
    words = (*SPECIAL_TOKENS, *DIRECTIONS, *network.node_ids)
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="end",
        # Otherwise "end" would be cut out of names that contain it.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass(frozen=True)
class Pairs:
    """K (source, destination) pairs with the fewest moves between them; each field (K,) int64."""

    source: np.ndarray
    destination: np.ndarray
    hops: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: slice | np.ndarray) -> "Pairs":
        return Pairs(self.source[index], self.destination[index], self.hops[index])


def held_out_pairs(
    network: StreetNetwork, count: int, *, max_hops: int = 50, seed: int = 0, max_share: float = 0.1
) -> Pairs:
    """Pairs to evaluate on, which training never sees: drawn uniformly, without repetition, from
    all eligible ones.

    Args:
        count: how many; fewer are returned where `count` exceeds `max_share` of the eligible pairs,
            so that a small city keeps enough to train on.
        max_hops: a pair is eligible if its destination is another intersection, at most this many
            moves away (50 as in the paper).
        seed: the same seed gives the same pairs.
        max_share: largest share of the eligible pairs that may be held out.

    Raises:
        NextLatError: no pair is eligible.
    """
    n = len(network)
    rng = np.random.default_rng(seed)
    if n * n <= MAX_LISTED_PAIRS:
        hops = network.hops_to(np.arange(n))  # (destination, source)
        eligible = np.flatnonzero((hops > 0) & (hops <= max_hops))
        chosen = rng.permutation(eligible)[: min(count, int(max_share * len(eligible)))]
        destination, source = chosen // n, chosen % n
        found = Pairs(source, destination, hops[destination, source].astype(np.int64))
    else:
        found = _sampled_pairs(network, count, max_hops, max_share, rng)
    if len(found) == 0:
        raise NextLatError(
            f"no pair of intersections can be held out (at most {max_hops} moves apart, at most {max_share:g} of all pairs): "
            "take a larger network or a larger max_hops"
        )
    return found


def _sampled_pairs(
    network: StreetNetwork, count: int, max_hops: int, max_share: float, rng: np.random.Generator
) -> Pairs:
    """As above by rejection, for networks too large to list every pair."""
    n = len(network)
    keys: np.ndarray = np.zeros(0, dtype=np.int64)
    hops: np.ndarray = np.zeros(0, dtype=np.int64)
    drawn = 0
    for _ in range(50):
        fresh = np.unique(rng.integers(0, n * n, size=max(1024, 2 * (count - len(keys)))))
        fresh = rng.permutation(np.setdiff1d(fresh, keys, assume_unique=True))
        destinations, column = np.unique(fresh % n, return_inverse=True)
        distance = network.hops_to(destinations)[column, fresh // n].astype(np.int64)
        eligible = (distance > 0) & (distance <= max_hops)
        drawn += len(fresh)
        keys = np.concatenate([keys, fresh[eligible]])
        hops = np.concatenate([hops, distance[eligible]])
        if len(keys) >= count:
            break
    count = min(count, int(max_share * n * n * len(keys) / drawn))
    return Pairs(keys[:count] // n, keys[:count] % n, hops[:count])


def random_walks(
    network: StreetNetwork,
    count: int,
    *,
    min_moves: int,
    max_moves: int,
    rng: np.random.Generator,
    exclude: Pairs | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Walks of uniformly random legal moves from uniformly random intersections.

    The length of each walk is uniform in min_moves..max_moves.  A walk that comes to a dead end too early, ends where it
    started, or leads from the source to the destination of an excluded pair is drawn again with the same length.

    Returns:
        lengths (W,), nodes (W, M + 1) from source to destination, moves (W, M) as indices in
        DIRECTIONS: all int64, and -1 beyond the length of a walk.

    Raises:
        NextLatError: walks of some length keep failing, as in a network without loops.
    """
    if not 1 <= min_moves <= max_moves:
        raise NextLatError(
            f"walks of {min_moves} to {max_moves} moves: give 1 <= min_moves <= max_moves"
        )
    n = len(network)
    forbidden = (
        np.zeros(0, dtype=np.int64)
        if exclude is None
        else np.unique(exclude.source * n + exclude.destination)
    )
    # Longest first, so that the walkers still on their way are always the first ones; undone at the
    # end.
    drawn = rng.integers(min_moves, max_moves + 1, size=count)
    order = np.argsort(-drawn, kind="stable")
    lengths = drawn[order]
    nodes = np.full((max_moves + 1, count), -1, dtype=np.int32)
    moves = np.full((max_moves, count), -1, dtype=np.int32)
    pending = np.arange(count)
    for attempt in range(MAX_ROUNDS):
        if len(pending) == 0:
            back = np.empty(count, dtype=np.int64)
            back[order] = np.arange(count)
            return drawn, nodes.T[back].astype(np.int64), moves.T[back].astype(np.int64)
        # One candidate for each walk at first; then several, since a round costs about the same
        # however small it is.
        tries = 1 if attempt == 0 else max(4, 512 // len(pending))
        length = np.repeat(lengths[pending], tries)
        nodes_MW, moves_MW = _free_walks(network, length, rng)
        source, destination = (
            nodes_MW[0].astype(np.int64),
            nodes_MW[length, np.arange(len(length))].astype(np.int64),
        )
        good = (destination >= 0) & (destination != source)
        if len(forbidden):
            key = source * n + destination
            good &= forbidden[np.searchsorted(forbidden, key).clip(max=len(forbidden) - 1)] != key
        by_walk = good.reshape(len(pending), tries)
        found = by_walk.any(axis=1)
        chosen = (np.arange(len(pending)) * tries + by_walk.argmax(axis=1))[found]
        nodes[: len(nodes_MW), pending[found]] = nodes_MW[:, chosen]
        moves[: len(moves_MW), pending[found]] = moves_MW[:, chosen]
        pending = pending[~found]
    raise NextLatError(
        f"no walk of {lengths[pending[0]]} moves was found, often as it was tried: use a strongly connected network, "
        "shorter walks, or fewer held-out pairs"
    )


def _free_walks(
    network: StreetNetwork, lengths: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One walk per length ((W,), decreasing): nodes (M + 1, W), moves (M, W) int32; -1 from a dead
    end or the end on."""
    legal, degree, targets = network.legal_moves, network.out_degree, network.targets
    width = legal.shape[1]
    # An extra node, index -1, stands for "off the map" and leads to itself, so that the loop needs
    # no branch.
    move_table = np.concatenate([legal, np.full((1, width), -1)]).astype(np.int32).reshape(-1)
    next_table = np.where(legal >= 0, np.take_along_axis(targets, legal, axis=1), -1)
    next_table = np.concatenate([next_table, np.full((1, width), -1)]).astype(np.int32).reshape(-1)
    degree_table = np.concatenate([degree, [1]]).astype(np.float32)
    longest = int(lengths[0])
    active = np.searchsorted(-lengths, -np.arange(1, longest + 1), side="right")
    nodes = np.full((longest + 1, len(lengths)), -1, dtype=np.int32)
    moves = np.full((longest, len(lengths)), -1, dtype=np.int32)
    nodes[0] = rng.integers(0, len(network), size=len(lengths))
    for step in range(longest):
        at = nodes[step, : active[step]]
        choice = (rng.random(len(at), dtype=np.float32) * degree_table[at]).astype(np.int32)
        choice += at * width
        moves[step, : len(at)] = move_table[choice]
        nodes[step + 1, : len(at)] = next_table[choice]
    return nodes, moves


def pack(
    lengths: np.ndarray,
    nodes: np.ndarray,
    moves: np.ndarray,
    row_length: int,
    rows: int | None = None,
) -> dict[str, Tensor]:
    """Packs walks into rows of tokens, several documents to a row, none split: each goes to the
    fullest row it fits in.

    Args:
        lengths, nodes, moves: as `random_walks` gives them.
        row_length: tokens in a row (T).
        rows: how many rows (R) at most; packing stops at the first walk for which there is no room.  None: as many as it
            takes for all walks.

    Returns:
        `input_ids`, `labels` (-100 on source, destination and padding), `position_ids` (from 0 in
        every document), `attention_mask` (0 on the padded tail), each (R, T) int64.
    """
    sizes = (lengths + 3).tolist()
    row_of, start_of, used = _best_fit(sizes, row_length, rows)
    count = len(row_of)
    row_count = len(used) if rows is None else rows
    input_ids = np.full(row_count * row_length, PAD, dtype=np.int64)
    labels = np.full(row_count * row_length, -100, dtype=np.int64)
    position_ids = np.zeros(row_count * row_length, dtype=np.int64)
    attention_mask = np.zeros(row_count * row_length, dtype=np.int64)
    if count:
        lengths, nodes, moves = lengths[:count], nodes[:count], moves[:count]
        walk = np.arange(count)
        start = np.array(row_of) * row_length + np.array(start_of)
        input_ids[start] = nodes[:, 0] + FIRST_NODE
        input_ids[start + 1] = nodes[walk, lengths] + FIRST_NODE
        on_way = np.arange(moves.shape[1]) < lengths[:, None]
        spot = (start[:, None] + np.arange(2, 2 + moves.shape[1]))[on_way]
        input_ids[spot] = labels[spot] = moves[on_way] + FIRST_DIRECTION
        input_ids[start + 2 + lengths] = labels[start + 2 + lengths] = END
        # Every token's distance from the start of its document.
        size = lengths + 3
        within = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
        spot = np.repeat(start, size) + within
        position_ids[spot] = within
        attention_mask[spot] = 1
    shape = (row_count, row_length)
    return {
        "input_ids": torch.from_numpy(input_ids.reshape(shape)),
        "labels": torch.from_numpy(labels.reshape(shape)),
        "position_ids": torch.from_numpy(position_ids.reshape(shape)),
        "attention_mask": torch.from_numpy(attention_mask.reshape(shape)),
    }


def _best_fit(
    sizes: Sequence[int], capacity: int, rows: int | None
) -> tuple[list[int], list[int], list[int]]:
    """Row and offset of each document, in turn, until one does not fit; and the tokens used in each
    row."""
    row_of: list[int] = []
    start_of: list[int] = []
    used: list[int] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space
    nonempty = 0  # bit s is set if some row has s tokens free
    for size in sizes:
        fitting = nonempty >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                nonempty &= ~(1 << free)
        else:
            if size > capacity:
                raise NextLatError(
                    f"a walk of {size} tokens does not fit in a row of {capacity}: make row_length larger"
                )
            if rows is not None and len(used) == rows:
                break
            row, free = len(used), capacity
            used.append(0)
        row_of.append(row)
        start_of.append(capacity - free)
        used[row] += size
        free -= size
        open_rows[free].append(row)
        nonempty |= 1 << free
    return row_of, start_of, used


class WalkDataset(Dataset[dict[str, Tensor]]):
    """Packed rows of training walks, made when asked for: row i depends on (seed, i) and on nothing
    else.

    Rows are made in chunks of about 65,536 tokens, of which the last few are kept: read them in
    order (their order is random as it is), a shuffled order makes a chunk for nearly every row.

    Args:
        network, min_moves, max_moves, exclude: see `random_walks`.
        rows: length of the dataset.
        row_length: tokens in a row; at least max_moves + 3.
        seed: a dataset with another seed has other walks.

    Items: see `pack`, without the dimension R.
    """

    def __init__(
        self,
        network: StreetNetwork,
        *,
        rows: int,
        row_length: int,
        min_moves: int,
        max_moves: int,
        seed: int,
        exclude: Pairs | None = None,
    ) -> None:
        if not 1 <= min_moves <= max_moves:
            raise NextLatError(
                f"walks of {min_moves} to {max_moves} moves: give 1 <= min_moves <= max_moves"
            )
        if row_length < max_moves + 3:
            raise NextLatError(
                f"row_length = {row_length} is too short for a walk of {max_moves} moves: give at least {max_moves + 3}"
            )
        self.network, self.exclude = network, exclude
        self.rows, self.row_length, self.seed = rows, row_length, seed
        self.min_moves, self.max_moves = min_moves, max_moves
        self.rows_per_chunk = max(1, TOKENS_PER_CHUNK // row_length)
        self._chunks: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -self.rows <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        chunk, row = divmod(index % self.rows, self.rows_per_chunk)
        # Copies, so that a caller who writes into an item does not change what the next one sees.
        return {name: tensor[row].clone() for name, tensor in self._chunk(chunk).items()}

    def _chunk(self, number: int) -> dict[str, Tensor]:
        if number in self._chunks:
            self._chunks.move_to_end(number)
            return self._chunks[number]
        rng = np.random.default_rng((self.seed, number))
        mean_size = (self.min_moves + self.max_moves) / 2 + 3
        lengths, nodes, moves = random_walks(
            self.network,
            # A tenth more than fit on average, for none may be missing.
            int(1.1 * self.rows_per_chunk * self.row_length / mean_size) + 8,
            min_moves=self.min_moves,
            max_moves=self.max_moves,
            rng=rng,
            exclude=self.exclude,
        )
        rows = pack(lengths, nodes, moves, self.row_length, self.rows_per_chunk)
        while len(self._chunks) >= CACHED_CHUNKS:
            self._chunks.popitem(last=False)
        self._chunks[number] = rows
        return rows
