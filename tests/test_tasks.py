"""What the tasks share: settings with bounds, rows, streams of chunks, redrawing, the tokenizer."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from nextlat.errors import NextLatError
from nextlat.tasks import TASKS, HMMConfig, PathStarConfig, TaskConfig, WordProblemConfig
from nextlat.tasks import rows as module
from nextlat.tasks.rows import CACHED_CHUNKS, STREAM, Rows, Stream, redraw, row_keys
from nextlat.tasks.task import word_tokenizer, world_fingerprint

NEEDED: dict[str, dict[str, Any]] = {"text": {"train": "a.txt", "vocab_size": 300}}
# Of these any number may be meant.
UNBOUNDED = {"process_seed", "city_seed", "max_tokens"}


def fields(kind: type) -> list[tuple[type[TaskConfig], str, dict[str, Any]]]:
    return [
        pytest.param(config, field, NEEDED.get(name, {}), id=f"{name}-{field}")
        for name, config in TASKS.items()
        if issubclass(config, TaskConfig)
        for field, info in config.model_fields.items()
        if info.annotation in (kind, kind | None)
    ]


def test_lists_may_stand_for_tuples_in_python() -> None:
    matrices = [[0.5, 0.5], [1.0, 0.0]]
    hmm = HMMConfig(process="given", transition=matrices, emission=matrices, multiples=[1, 2])
    assert hmm.transition == ((0.5, 0.5), (1.0, 0.0)) and hmm.multiples == (1, 2)
    with pytest.raises(NextLatError, match="should be a valid integer"):
        HMMConfig(multiples=[1, 2.5])


@pytest.mark.parametrize(("config", "field", "needed"), fields(int))
def test_absurd_sizes_are_refused_before_anything_is_made(
    config: type[TaskConfig], field: str, needed: dict[str, Any]
) -> None:
    for number in (-1, 10**18) if field in UNBOUNDED else (-1, 10**12):
        with pytest.raises(NextLatError, match=f"'{field}' = {number} is not valid"):
            config(**{**needed, field: number})


@pytest.mark.parametrize(("config", "field", "needed"), fields(float))
def test_numbers_are_finite(config: type[TaskConfig], field: str, needed: dict[str, Any]) -> None:
    for number in (math.inf, math.nan):
        with pytest.raises(NextLatError, match=f"'{field}' = "):
            config(**{**needed, field: number})


@pytest.mark.parametrize(
    "make",
    [
        lambda: WordProblemConfig(length=2**20),
        lambda: WordProblemConfig(multiples=(2**20,)),
        lambda: PathStarConfig(graphs=10**9),
        lambda: HMMConfig(tests=10**7, length=2**20),
    ],
)
def test_rows_that_no_memory_holds_are_refused(make: Any) -> None:
    with pytest.raises(NextLatError, match=r"rows of [\d,]+ tokens are too many .*take fewer"):
        make()


def test_a_new_setting_leaves_the_fingerprints_of_old_runs() -> None:
    class Config(PathStarConfig):
        new: int = 5

    data = np.arange(3)
    old = world_fingerprint(PathStarConfig(names=50), data)
    assert world_fingerprint(Config(names=50), data) == old
    assert world_fingerprint(Config(names=50, new=6), data) != old
    assert world_fingerprint(PathStarConfig(names=51), data) != old
    assert world_fingerprint(PathStarConfig(names=50), data + 1) != old


# ---- rows ----


def test_rows_are_copies_of_any_integer_type() -> None:
    tokens = np.arange(12, dtype=np.uint16).reshape(3, 4)
    data = Rows({"input_ids": tokens, "position_ids": torch.from_numpy(tokens.astype(np.int64))})
    assert len(data) == 3
    for name in ("input_ids", "position_ids", "labels"):
        assert data[1][name].tolist() == [4, 5, 6, 7] and data[1][name].dtype == torch.int64
        data[1][name].zero_()
        assert data[1][name].tolist() == [4, 5, 6, 7]
    assert Rows({"input_ids": tokens}, prompt_length=3)[2]["labels"].tolist() == [-100] * 3 + [11]
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(IndexError):
        data[-1]


def chunk(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """At the top of the module, so that it can be pickled for a worker."""
    return {"input_ids": rng.integers(1000, size=(8, 3))}


def test_a_stream_depends_on_seed_and_index_alone() -> None:
    one, other = Stream(chunk, 8, seed=1), Stream(chunk, 8, seed=2)
    assert len(one) == STREAM and len(Stream(chunk, 8, seed=1, count=20)) == 20
    rows = [one[i]["input_ids"].tolist() for i in range(8 * (CACHED_CHUNKS + 2))]
    assert len({tuple(row) for row in rows}) == len(rows)
    assert rows[0] != other[0]["input_ids"].tolist()
    elsewhere = pickle.loads(pickle.dumps(one))  # as a worker gets it
    for i in (45, 3, 44, 17):
        assert one[i]["input_ids"].tolist() == elsewhere[i]["input_ids"].tolist() == rows[i]
    assert len(one._chunks) == CACHED_CHUNKS
    with pytest.raises(IndexError, match="row 20 of 20"):
        Stream(chunk, 8, seed=1, count=20)[20]


def test_what_was_refused_is_drawn_again_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    asked: list[list[int]] = []

    def draw(rows: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        asked.append(rows.tolist())
        numbers = rng.integers(4, size=len(rows))
        width = 3 if len(asked) == 1 else 2
        return [np.stack([numbers] * width, axis=1), rows], numbers > 1

    numbers, own = redraw(50, draw, str, tries=lambda pending, attempt: 1 + attempt, fill=-1)
    assert own.tolist() == list(range(50)) and (numbers[:, 0] > 1).all()
    assert len(asked) > 2 and asked[0] == list(range(50))
    assert asked[1] == sorted([*set(asked[1])] * 2)  # two candidates each
    late = np.isin(np.arange(50), asked[1])
    assert (numbers[late, 2] == -1).all() and (numbers[~late, 2] == numbers[~late, 0]).all()


def test_the_row_that_nothing_fits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 3)
    with pytest.raises(NextLatError, match=r"^no luck with 7\.$"):
        redraw(9, lambda rows: ([rows], rows != 7), "no luck with {}.".format)


def test_keys_are_equal_exactly_where_rows_are() -> None:
    rows = np.array([[1, 2], [2, 1], [1, 2]], dtype=np.int32)
    keys = row_keys(rows[:, ::-1])  # not contiguous
    assert keys[0] == keys[2] != keys[1]


# ---- tokenizer ----


def test_words_are_split_at_white_space_alone_and_joined_by_spaces() -> None:
    tokenizer = word_tokenizer(("begin", "end", "Bend 5", "Weekend"), begin="begin", end="end")
    ids = tokenizer("begin Weekend  what\nend").input_ids
    assert ids == [2, 5, 1, 3]
    assert tokenizer.decode(ids) == "begin Weekend <unk> end"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3, 0)
    assert len(tokenizer) == 6
    assert word_tokenizer(("a",)).eos_token is None
