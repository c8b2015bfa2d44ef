"""A generated city: a Manhattan in miniature, of any size, from a seed.

Streets run west-east and avenues south-north on a grid of about 110 by 90 metres, turned by six degrees, with uneven
spacing and slightly displaced corners.  The outermost streets and avenues are two-way; of those inside, a share is
one-way, in alternating directions.  A diagonal avenue climbs north-east, and a lane from the south-east corner climbs
north-west until it meets it, so that all eight compass directions occur.  A park in the north-west is a rectangle of
corners left out, and a share of the blocks is closed, never one without which some corner could not be reached.
"""

import math

import numpy as np

from nextlat.errors import NextLatError

# Near the southern end of Central Park; one degree of latitude is about 111,320 m.
CENTRE = (40.765, -73.975)
METRES_PER_DEGREE = 111_320.0
BLOCK_EAST, BLOCK_NORTH = 110.0, 90.0
# Chosen so that every bearing stays inside its sector of 45 degrees: at worst a diagonal is 2
# degrees from its edge.
SPACING_JITTER, CORNER_JITTER, ROTATION = 0.10, 0.04, 6.0


def embedded_city(
    rows: int, columns: int, seed: int, one_way: float, missing: float, diagonal: bool, park: bool
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Generates a city of `rows` streets and `columns` avenues.

    Args:
        rows, columns: size of the grid, at least 4 each.
        seed: everything random follows from it.
        one_way: share of the inner streets, and of the inner avenues, that are one-way.
        missing: share of the grid's blocks (stretches between neighbouring corners) that are
            closed; fewer are closed when more would disconnect the city.
        diagonal: whether there are a diagonal avenue (NE/SW) and a diagonal lane (NW/SE).
        park: whether there is a park, with no streets inside.

    Returns:
        Names "0".."N-1" in the order of the grid (south to north, then west to east), latitude (N,), longitude (N,), and
        links (E, 2) between node indices.  The city is strongly connected.
    """
    if min(rows, columns) < 4:
        raise NextLatError(
            f"a city of {rows} x {columns} is too small: give it at least 4 rows and 4 columns"
        )
    if seed < 0:
        raise NextLatError(f"the city's seed is {seed}: give a whole number from 0 on")
    for name, share in (("one_way", one_way), ("missing", missing)):
        if not 0.0 <= share <= 1.0:
            raise NextLatError(f"{name} = {share} is no share: give a number from 0 to 1")
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(
        _spacing(rows, BLOCK_NORTH, rng), _spacing(columns, BLOCK_EAST, rng), indexing="ij"
    )
    y = y + rng.uniform(-CORNER_JITTER, CORNER_JITTER, y.shape) * BLOCK_NORTH
    x = x + rng.uniform(-CORNER_JITTER, CORNER_JITTER, x.shape) * BLOCK_EAST

    exists = np.ones((rows, columns), dtype=bool)
    if park:
        # The northern half, one column off the western edge, below the diagonal's path for any
        # size.
        exists[rows // 2 : rows // 2 + max(1, rows // 3), 1 : 1 + max(1, columns // 4)] = False
        exists[-1] = True
    index = np.where(exists, np.cumsum(exists).reshape(exists.shape) - 1, -1)

    blocks: list[list[tuple[int, int]]] = []  # each block is one or two links
    for lines, line_count in ((index, rows), (index.T, columns)):
        for line, sense in zip(lines, _senses(line_count, one_way, rng), strict=True):
            for a, b in zip(line[:-1].tolist(), line[1:].tolist(), strict=True):
                if a >= 0 and b >= 0:
                    blocks.append(
                        [
                            link
                            for link, allowed in (((a, b), sense >= 0), ((b, a), sense <= 0))
                            if allowed
                        ]
                    )
    diagonals = _diagonals(rows, columns, index) if diagonal else []

    successors: list[set[int]] = [set() for _ in range(int(exists.sum()))]
    for a, b in [link for block in blocks for link in block] + diagonals:
        successors[a].add(b)
    to_close = round(missing * len(blocks))
    for which in rng.permutation(len(blocks)).tolist():
        if to_close == 0:
            break
        for a, b in blocks[which]:
            successors[a].remove(b)
        if all(_reaches(successors, a, b) for a, b in blocks[which]):
            to_close -= 1
        else:
            for a, b in blocks[which]:
                successors[a].add(b)

    links = np.array(
        [(a, b) for a, reached in enumerate(successors) for b in sorted(reached)], dtype=np.int64
    )
    turn = math.radians(ROTATION)
    north, east = y - y.mean(), x - x.mean()
    # Clockwise, as Manhattan is; seven decimals (about a centimetre) as OpenStreetMap stores them.
    latitude = CENTRE[0] + (north * math.cos(turn) - east * math.sin(turn)) / METRES_PER_DEGREE
    longitude = CENTRE[1] + (north * math.sin(turn) + east * math.cos(turn)) / (
        METRES_PER_DEGREE * math.cos(math.radians(CENTRE[0]))
    )
    names = [str(i) for i in range(len(successors))]
    return names, latitude[exists].round(7), longitude[exists].round(7), links


def _spacing(lines: int, metres: float, rng: np.random.Generator) -> np.ndarray:
    """Positions of parallel lines with uneven gaps, (lines,) metres."""
    return np.concatenate(
        [[0.0], np.cumsum(rng.uniform(1 - SPACING_JITTER, 1 + SPACING_JITTER, lines - 1) * metres)]
    )


def _senses(lines: int, one_way: float, rng: np.random.Generator) -> list[int]:
    """Per parallel line: 0 two-way, +1 forward only, -1 backward only.  The outermost lines are
    two-way."""
    inner = 1 + rng.choice(lines - 2, round(one_way * (lines - 2)), replace=False)
    senses = [0] * lines
    sign = 1 if rng.random() < 0.5 else -1
    for line in sorted(inner.tolist()):
        senses[line], sign = sign, -sign
    return senses


def _diagonals(rows: int, columns: int, index: np.ndarray) -> list[tuple[int, int]]:
    """Links, both ways, of the avenue that ends in the north-east corner (or at the eastern edge)
    and of the lane."""
    offset = max(0, columns - rows)
    steps = [((i, i + offset), (i + 1, i + 1 + offset)) for i in range(min(rows, columns) - 1)]
    row, column = 0, columns - 1
    # The lane stops before it would cross the avenue between two corners.
    while row + 1 < rows and column - 1 - offset >= row + 1:
        steps.append(((row, column), (row + 1, column - 1)))
        row, column = row + 1, column - 1
    links = []
    for start, end in steps:
        a, b = int(index[start]), int(index[end])
        if a >= 0 and b >= 0:
            links += [(a, b), (b, a)]
    return links


def _reaches(successors: list[set[int]], start: int, goal: int) -> bool:
    """Whether a path leads from start to goal (breadth first: in a city the detour around a closed
    block is short)."""
    seen, frontier = {start}, [start]
    while frontier:
        frontier = [b for b in {b for a in frontier for b in successors[a]} if b not in seen]
        if goal in frontier:
            return True
        seen.update(frontier)
    return False
