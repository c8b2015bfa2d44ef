"""Tokens on the disk: rows read by index against a slow reference, and shards that survive kills, a
full disk, damage, other processes and changed sources."""

import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conftest import chat_tokenizer, conversation
from nextlat.errors import NextLatError
from nextlat.tasks.rows import epoch_order
from nextlat.tasks.text import corpus, documents, shards, text
from nextlat.tasks.text.corpus import Corpus, Pending
from nextlat.tasks.text.documents import Documents, Progress, from_dataset, from_file
from nextlat.tasks.text.packed import PackedDocuments
from nextlat.tasks.text.shards import Shard, Sums, Tokens, read_shard
from nextlat.tasks.text.text import Text, TextConfig
from nextlat.tasks.text.tokens import Encoder, trained_tokenizer
from nextlat.training.build import frequent_tokens
from nextlat.training.cost import dry_run
from nextlat.training.recipe import load_recipe
from nextlat.training.train import train

STORIES = [f"Story {i} of {'many ' * (i % 9)}words, and café {i * i}!" for i in range(80)]
SMALL: dict[str, Any] = {"vocab_size": 300, "row_length": 16, "held_out": 5, "tests": 4}
SMALL |= {"prompt_length": 4, "probes": 0}


@pytest.fixture(autouse=True)
def small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards of a few documents, in a cache of the test's own."""
    monkeypatch.setattr(corpus, "SHARD", 200)
    monkeypatch.setattr(documents, "DOCUMENTS", 4)
    monkeypatch.setattr(documents, "CHARACTERS", 256)
    monkeypatch.setenv("NEXTLAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpora"


def as_jsonl(path: Path, column: str = "text", content: Sequence[Any] = STORIES) -> Path:
    lines = (json.dumps({"id": i, column: x}) + "\n" for i, x in enumerate(content))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def as_parquet(path: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": STORIES}), path, row_group_size=17)
    return path


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return as_jsonl(tmp_path / "stories.jsonl")


def source(path: Path, column: str = "text") -> Documents:
    return from_file(str(path), "task.train", column=column, separator="\n#\n")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(trained_tokenizer(STORIES, 300))


def in_memory(encoder: Encoder) -> list[list[int]]:
    return [ids for ids, _ in encoder(STORIES)]


def read(tokens: Tokens) -> list[list[int]]:
    return [tokens.document(c).tolist() for c in range(len(tokens))]


def stored(tokens: Tokens) -> list[Path]:
    return sorted(tokens.directory.glob("*.safetensors"))


# ---- rows ----


@contextmanager
def numbered(sizes: list[int], files: int = 1) -> Iterator[Tokens]:
    """Documents in so many files, whose tokens are 0, 1, 2, ...: each tells where it stood."""
    made: Any = SimpleNamespace(dtype=np.dtype(np.uint16), assistant_only=False)
    ends = np.cumsum(sizes)
    each = -(-len(sizes) // files)
    with tempfile.TemporaryDirectory() as folder:
        listed: list[Shard] = []
        for first in range(0, len(sizes), each):
            pending = Pending(made)
            spans = zip(ends[first : first + each], sizes[first : first + each], strict=True)
            pending.add([([*range(end - size, end)], None) for end, size in spans])
            path = Path(folder, f"{first}.safetensors")
            about = json.dumps({"corpus": "", "progress": Progress(None, 0, 0, 0)})
            save_file(pending.arrays(), path, {"nextlat": about})
            listed.append(read_shard(path)[1])
        yield Tokens(listed)


def packed_slowly(
    tokens: Tokens, row_length: int, orders: list[np.ndarray]
) -> list[tuple[list[int], list[int]]]:
    """(input_ids, position_ids) of all full rows of epochs in the given orders of documents, token
    by token."""
    rows: list[tuple[list[int], list[int]]] = [([], [])]
    for order in orders:
        for c in order:
            position = 0
            for token in tokens.document(int(c)):
                if len(rows[-1][0]) == row_length:
                    rows.append(([], []))
                    position = 0  # what is continued in the next row is a segment of its own
                rows[-1][0].append(int(token))
                rows[-1][1].append(position)
                position += 1
    return rows


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(2, 20),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_packed_rows_are_those_of_a_loop_over_documents_and_tokens(
    sizes: list[int], row_length: int, seed: int, files: int
) -> None:
    with numbered(sizes, files) as tokens:
        orders = [np.random.default_rng((seed, epoch)).permutation(len(sizes)) for epoch in (0, 1)]
        dataset = PackedDocuments(tokens, row_length, seed=seed)
        expected = packed_slowly(tokens, row_length, orders)[: 2 * sum(sizes) // row_length]
        assert [
            (row["input_ids"].tolist(), row["position_ids"].tolist())
            for row in (dataset[i] for i in range(len(expected)))
        ] == expected
        assert all(
            torch.equal(dataset[i]["labels"], dataset[i]["input_ids"]) for i in range(len(expected))
        )


def test_an_epoch_has_every_token_once_and_the_next_one_another_order() -> None:
    with numbered([3, 1, 7, 12, 40, 5, 9, 2, 11, 6], 3) as tokens:  # 96 tokens: 12 rows of 8
        dataset = PackedDocuments(tokens, 8, seed=1)
        epochs = [
            torch.cat([dataset[12 * e + i]["input_ids"] for i in range(12)]).tolist()
            for e in range(3)
        ]
        assert all(sorted(epoch) == list(range(96)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        starts = {tokens.document(c)[0] for c in range(10)}
        for i in range(12):
            row = dataset[i]
            for place, (token, position) in enumerate(
                zip(row["input_ids"].tolist(), row["position_ids"].tolist(), strict=True)
            ):
                assert (position == 0) == (place == 0 or token in starts)


def test_a_row_depends_on_seed_and_index_alone() -> None:
    """A resumed run asks for rows from the middle on, in a process that has seen no earlier one."""
    with numbered([5, 8, 13, 4, 9], 2) as tokens:
        ahead, afresh, other = (PackedDocuments(tokens, 16, seed=seed) for seed in (3, 3, 4))
        rows = [ahead[i]["input_ids"] for i in range(40)]
        for i in (37, 2, 38, 5):
            assert torch.equal(afresh[i]["input_ids"], rows[i])
        assert any(not torch.equal(other[i]["input_ids"], rows[i]) for i in range(3))
        assert torch.equal(pickle.loads(pickle.dumps(ahead))[3]["input_ids"], rows[3])
        with pytest.raises(IndexError):
            ahead[-1]


def test_held_out_rows_come_once_in_order_and_only_the_last_is_padded() -> None:
    with numbered([5, 8, 4], 2) as tokens:
        rows = [row for row in PackedDocuments(tokens, 8, seed=None)]
        joined = torch.stack([row["input_ids"] for row in rows]).flatten()
        assert joined[:17].tolist() == list(range(17))
        assert rows[1]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
        assert [int(row["attention_mask"].sum()) for row in rows] == [8, 8, 1]
        assert rows[2]["labels"].tolist() == [16] + [-100] * 7
        assert len(PackedDocuments(tokens, 8, seed=None, rows=2)) == 2


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_the_order_of_an_epoch_is_that_of_earlier_versions(count: int) -> None:
    expected = np.random.default_rng((3, 4)).permutation(count)
    assert np.array_equal(epoch_order(count, 3, 4), expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 9))
def test_sums_are_those_of_all_sizes_before(sizes: list[int], seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "STEP", 3)
        order = np.random.default_rng(seed).permutation(len(sizes))
        made = Sums(np.array(sizes, np.uint32), order)
        starts = np.cumsum([0, *np.array(sizes)[order]])
        assert [made[i] for i in range(len(sizes))] == starts[:-1].tolist()
        assert made.total == starts[-1]
        for position in [*range(starts[-1]), *range(0, starts[-1], 7)]:
            place = int(np.searchsorted(starts, position, side="right")) - 1
            assert made.find(position) == (place, position - starts[place])


# ---- shards ----


def test_the_tokens_are_those_of_the_documents_in_order(
    stories: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHARACTERS", 50)  # one or two documents at a time
    monkeypatch.setattr(shards, "OPEN", 2)
    tokens = Corpus(source(stories), encoder).tokens(10**9)
    expected = in_memory(encoder)
    assert read(tokens) == expected and len(stored(tokens)) > 4
    assert tokens.document(7, 2, 5).tolist() == expected[7][2:5]
    assert tokens.document(7, 3).tolist() == expected[7][3:]
    flat = np.concatenate([np.array(ids, np.uint16) for ids in expected])
    starts = np.cumsum([0, *map(len, expected)])
    monkeypatch.setattr(shards, "PART", 7)
    assert b"".join(x.tobytes() for x in tokens.parts()) == starts.tobytes() + flat.tobytes()


def test_no_document_is_taken_after_the_token_limit_and_more_can_be_made_later(
    stories: Path, encoder: Encoder
) -> None:
    expected = in_memory(encoder)
    limit = sum(map(len, expected[:30]))
    few = Corpus(source(stories), encoder).tokens(limit)
    assert read(few) == expected[:30]  # reached exactly by the thirtieth
    before = {path: path.stat().st_mtime_ns for path in stored(few)}
    assert (
        len(before) > 1
        and read(Corpus(source(stories), encoder).tokens(limit + 1)) == (expected[:31])
    )
    more = Corpus(source(stories), encoder)
    assert not more.ended and read(more.tokens(10**9)) == expected and more.ended
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert read(few) == expected[:30]
    assert read(Corpus(source(stories), encoder).tokens(limit)) == expected[:30]


def test_labels_of_conversations_are_stored(tmp_path: Path) -> None:
    chats = [conversation(f"Tell me {i}.", f"I say {i}, gladly.") for i in range(40)]
    made = Encoder(chat_tokenizer(), assistant_only=True)
    path = as_jsonl(tmp_path / "chats.jsonl", "messages", chats)
    tokens = Corpus(source(path, "messages"), made).tokens(10**9)
    assert len(stored(tokens)) > 2 and tokens.scored
    for c, (ids, said) in enumerate(made(chats)):
        expected = [x if on else -100 for x, on in zip(ids, said or [], strict=True)]
        assert tokens.labels(c).tolist() == expected
        assert tokens.labels(c, 3, 9).tolist() == expected[3:9]
    ids, scored = [*tokens.parts()][-2 * len(stored(tokens)) :][:: len(stored(tokens))]
    assert scored.dtype == bool and len(ids) == len(scored)


def sources(tmp_path: Path) -> dict[str, Documents]:
    (tmp_path / "a.txt").write_text("\n#\n".join([*STORIES, "", " "]) + "\n#\n", encoding="utf-8")
    found = {"txt": source(tmp_path / "a.txt"), "jsonl": source(as_jsonl(tmp_path / "a.jsonl"))}
    pytest.importorskip("datasets", reason="the extra nextlat[text] is not installed")
    (tmp_path / "set").mkdir()
    for k in range(3):  # files of one split
        part = STORIES[k * 30 : k * 30 + 30]
        as_jsonl(tmp_path / f"set/train-{k}.jsonl", content=part)
    for streaming in (True, False):
        found[f"dataset {streaming}"] = from_dataset(
            str(tmp_path / "set"), None, "train", column="text", streaming=streaming
        )
    return found | {"parquet": source(as_parquet(tmp_path / "a.parquet"))}


def test_every_source_goes_on_from_any_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra nextlat[text] is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    for kind, whole in sources(tmp_path).items():
        for part, expected in zip((whole, *whole.split(13)), (0, 13, -13), strict=True):
            given_ = [*part.batches()]
            found = [document for batch, _ in given_ for document in batch]
            assert found == (STORIES[expected:] if expected >= 0 else STORIES[:13]), kind
            for number, (_, progress) in enumerate(given_, 1):
                again = part.batches(Progress(*json.loads(json.dumps(progress))))
                # (The datasets library has several ways to say where it is.)
                assert [(batch, at._replace(at=None)) for batch, at in again] == [
                    (batch, at._replace(at=None)) for batch, at in given_[number:]
                ], kind


@given(st.text("ab#\n\r", max_size=60), st.sampled_from(["#", "\n#\n", "ab", "##"]))
@settings(max_examples=60, deadline=None)
def test_a_text_is_split_as_if_it_were_read_at_once(content: str, separator: str) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHARACTERS", 3)
        path = Path(folder, "a.txt")
        path.write_text(content, encoding="utf-8", newline="")
        whole = path.read_text(encoding="utf-8")
        expected = [x.strip() for x in whole.split(separator) if x.strip()]
        made = from_file(str(path), "train", column="text", separator=separator)
        assert not expected or [*made] == expected


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "step"), [("jsonl", 1), ("streaming", 6)])
def test_a_corpus_killed_at_any_moment_is_made_as_if_it_had_not_been(
    kind: str, step: int, tmp_path: Path
) -> None:
    """Also by two processes at once, and by one that waited for another that was killed."""
    tokenizer = tmp_path / "tokenizer"
    trained_tokenizer(STORIES, 300).save_pretrained(tokenizer)
    data: dict[str, Any] = {"train": str(as_jsonl(tmp_path / "a.jsonl"))}
    if kind == "streaming":
        pytest.importorskip("datasets", reason="the extra nextlat[text] is not installed")
        (tmp_path / "set").mkdir()
        for k in range(2):
            as_jsonl(tmp_path / f"set/train-{k}.jsonl", content=STORIES[k * 40 : k * 40 + 40])
        data = {"dataset": str(tmp_path / "set")}
    given_ = SMALL | data | {"vocab_size": None, "tokenizer": str(tokenizer)}
    script = str(Path(__file__).with_name("killed_corpora.py"))
    (tmp_path / "caches").mkdir()
    done = subprocess.run(
        [sys.executable, script, json.dumps(given_), str(tmp_path / "caches"), str(step)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(name.endswith("safetensors") for name in found["files"]) > 4
    assert Counter(found["operations"])["save_file"] > 4 and all(found["same"])
    assert len(found["same"]) == -(-len(found["operations"]) // step)
    assert found["both"] and found["heir"]


# ---- what is not as it should be ----


@pytest.mark.parametrize("damage", ["short", "header", "empty", "text"])
def test_a_damaged_shard_is_made_again_with_all_after_it(
    damage: str, stories: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = Corpus(source(stories), encoder).tokens(10**9)
    expected = {path: path.read_bytes() for path in stored(tokens)}
    path = [*expected][1]
    whole = path.read_bytes()
    path.write_bytes(
        {
            "short": whole[:-2],
            "header": b"\xff" * 8 + whole[8:],
            "empty": b"",
            "text": b"not a shard",
        }[damage]
    )
    [*expected][2].unlink()
    (tokens.directory / ".nextlat-tmp-1-000001.safetensors").write_bytes(whole[:100])
    again = Corpus(source(stories), encoder).tokens(10**9)
    assert "000001.safetensors is damaged" in caplog.text
    assert {path: path.read_bytes() for path in stored(again)} == expected
    assert read(again) == in_memory(encoder)
    assert not [*tokens.directory.glob(".nextlat-tmp-*")]


def test_shards_of_another_tokenizer_are_refused(stories: Path, encoder: Encoder) -> None:
    theirs = Corpus(source(stories), Encoder(trained_tokenizer(STORIES, 290))).tokens(10**9)
    ours = Corpus(source(stories), encoder)
    assert ours.directory != theirs.directory
    theirs.directory.rename(ours.directory)
    with pytest.raises(NextLatError, match=r"another text or tokenizer: delete .*\.$"):
        ours.tokens(10**9)


def test_all_that_changes_tokens_changes_where_they_are(tmp_path: Path) -> None:
    def directory(made: Encoder, **changes: Any) -> Path:
        path = changes.pop("path", tmp_path / "a.txt")
        settings_ = {"column": "text", "separator": "#", **changes}
        return Corpus(from_file(str(path), "train", **settings_), made).directory

    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("a # b")
    tokenizer = chat_tokenizer()
    first = directory(Encoder(tokenizer))
    assert directory(Encoder(chat_tokenizer())) == first
    others = {
        first,
        directory(Encoder(tokenizer), separator="b"),
        directory(Encoder(tokenizer), path=tmp_path / "b.txt"),
        directory(Encoder(tokenizer, assistant_only=True)),
        directory(Encoder(chat_tokenizer(marked=False))),
        directory(Encoder(trained_tokenizer(STORIES, 300))),
    }
    tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"  # what a document begins with
    others.add(directory(Encoder(tokenizer)))
    (tmp_path / "a.txt").write_text("a # c")
    others.add(directory(Encoder(tokenizer)))
    assert len(others) == 8


def test_a_source_that_changes_while_it_is_read_is_noticed(
    stories: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Corpus(source(stories), encoder)
    as_jsonl(stories, content=[*STORIES, "one more"])
    with pytest.raises(NextLatError, match=r"stories.jsonl changed while it was read: start again"):
        made.tokens(10**9)
    assert not [*made.directory.glob("*.safetensors")]
    assert read(Corpus(source(stories), encoder).tokens(10**9))[:80] == in_memory(encoder)


def test_a_full_disk_leaves_whole_shards_and_says_what_is_needed(
    stories: Path, encoder: Encoder
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = Corpus(source(stories), encoder)
    few = made.tokens(500)
    kept = {path: path.read_bytes() for path in stored(few)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # a write beyond it fails
    try:
        with pytest.raises(NextLatError) as raised:
            made.tokens(10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sentence = str(raised.value)
    tokens = sum(read_shard(path)[1].tokens for path in stored(few))
    assert (
        f"; {tokens:,} tokens are kept, and up to " in sentence and "set NEXTLAT_CACHE" in sentence
    )
    assert "File too large" in sentence and "\n" not in sentence
    assert {path: path.read_bytes() for path in stored(few)} == kept
    assert not [*few.directory.glob(".nextlat-tmp-*")]
    assert read(made.tokens(10**9)) == in_memory(encoder)


def test_a_cache_that_cannot_be_written_is_one_sentence(
    stories: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEXTLAT_CACHE", str(tmp_path / "file"))
    with pytest.raises(NextLatError, match=r"cannot write .*Not a directory; .*NEXTLAT_CACHE"):
        Corpus(source(stories), encoder).tokens(10**9)


def test_shards_that_go_while_they_are_used_are_one_sentence(
    stories: Path, encoder: Encoder
) -> None:
    tokens = Corpus(source(stories), encoder).tokens(10**9)
    first, second, *_ = stored(tokens)
    documents_of_first = read_shard(first)[1].documents
    tokens.document(0)
    os.truncate(first, first.stat().st_size // 2)
    second.unlink()
    with pytest.raises(NextLatError, match=r"000000.safetensors has been cut short; start again"):
        read(tokens)
    with pytest.raises(NextLatError, match=r"cannot read .*000001.safetensors: No such file"):
        tokens.document(documents_of_first)


def test_a_document_that_cannot_be_read_leaves_the_shards_before_it(
    tmp_path: Path, encoder: Encoder
) -> None:
    path = as_jsonl(tmp_path / "a.jsonl", content=[*STORIES, 5])
    made = Corpus(source(path), encoder)
    with pytest.raises(NextLatError, match=r"column 'text' of line 81 of .*a.jsonl holds int"):
        made.tokens(10**9)
    assert [*made.directory.glob("*.safetensors")]


# ---- the hub ----


def test_a_dataset_out_of_reach_is_the_one_that_it_was(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens made where there is a network serve where there is none."""
    datasets = pytest.importorskip("datasets", reason="the extra nextlat[text] is not installed")
    as_jsonl(tmp_path / "train.jsonl")
    real = datasets.load_dataset_builder
    asked = []

    def hub(name: str, subset: str | None) -> Any:
        asked.append(name)
        if offline:
            raise ConnectionError("no route to the hub\nand more")
        return real(str(tmp_path), data_files={"train": str(tmp_path / "train.jsonl")})

    monkeypatch.setattr(datasets, "load_dataset_builder", hub)
    monkeypatch.setattr(documents, "hub_or_cache", lambda name: nullcontext())

    def corpus_of(name: str) -> Corpus:
        made = from_dataset(name, None, "train", column="text", streaming=True)
        return Corpus(made, encoder)

    offline = False
    assert len(read(corpus_of("some/stories").tokens(900))) < 80
    offline = True
    assert len(read(corpus_of("some/stories").tokens(900))) < 80
    with pytest.raises(NextLatError, match=r"some/stories cannot be read \(no route to the hub\)"):
        corpus_of("some/stories").tokens(10**9)
    with pytest.raises(NextLatError, match=r"other/stories cannot be read"):
        corpus_of("other/stories")
    assert "other/stories" in asked


# ---- the task ----


def task_of(path: Path, **changes: Any) -> Text:
    return TextConfig(**{"train": str(path), **SMALL, **changes}).build()


def test_held_out_documents_are_the_first_and_not_trained_on(stories: Path) -> None:
    task = task_of(stories)
    start = task.tokenizer.bos_token_id
    trained, held_out = (
        [task.tokenizer.decode([x for x in ids if x != start]) for ids in read(tokens)]
        for tokens in (task.train, task.held_out)
    )
    assert trained == STORIES[5:] and held_out == STORIES[:5][: len(held_out)] and held_out


def test_the_fingerprint_of_a_large_text_is_kept(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = task_of(stories).fingerprint()
    monkeypatch.setattr(text, "READ_ANEW", 0)
    assert task_of(stories).fingerprint() == found
    monkeypatch.setattr(Tokens, "parts", None)  # nothing is read any more
    assert task_of(stories).fingerprint() == found
    with pytest.raises(TypeError):
        task_of(stories, max_tokens=900).fingerprint()


def test_a_draft_vocabulary_is_of_the_most_frequent_tokens(stories: Path) -> None:
    task = task_of(stories)
    counts = Counter(token for document in read(task.train) for token in document)
    rows = task.train_dataset(0).rows  # an epoch, and a little more in the last row
    found = frequent_tokens(task, 0, 20)
    assert rows == -(-task.train.total // 16)
    rest = [counts[token] for token in range(300) if token not in found]
    assert len(found) == 20 and min(counts[token] for token in found) >= max(rest) - 16


RUN = ["task.validation=", "backbone.layers=1", "backbone.width=16", "backbone.heads=2", "steps=2"]
RUN += ["batch_size=2", "schedule.warmup_steps=0", "schedule.decay_steps=1", "run.save_every=1"]


def test_a_run_whose_text_changed_does_not_go_on(tmp_path: Path, stories: Path) -> None:
    given_ = [*RUN, f"task.train={stories}", *(f"task.{k}={v}" for k, v in SMALL.items())]
    recipe = load_recipe("text-small", given_)
    train(recipe, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps({**record, "status": "running"}))
    as_jsonl(stories, content=[*STORIES[:-1], "changed"])
    with pytest.raises(NextLatError, match=r"the data of task text is not what .* was trained on"):
        train(recipe, tmp_path / "run")


def test_a_dry_run_of_fineweb_edu_tells_the_disk_and_one_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On local files of the same schema; the model is made small, the data are not read through."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets", reason="the extra nextlat[text] is not installed")
    (tmp_path / "set").mkdir()
    table = pa.table({"text": STORIES, "id": ["x"] * 80, "dump": ["y"] * 80, "score": [3.5] * 80})
    for k in range(40):
        pq.write_table(table, tmp_path / f"set/train-{k:05}.parquet")
    trained_tokenizer(STORIES, 300).save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(text, "PREVIEW", 2000)
    small = ["layers=1", "width=16", "heads=2"]
    given_ = [f"task.dataset={tmp_path / 'set'}", f"task.tokenizer={tmp_path / 'tokenizer'}"]
    given_ += ["task.subset=", "task.lm_eval=", *(f"backbone.{x}" for x in small)]
    given_ += ["run.precision=fp32", "run.compile=false", "objectives.nextlat.hidden_size=8"]
    recipe = load_recipe("fineweb-edu", given_)
    cost = dry_run(recipe)
    assert cost.data is not None and not cost.data.exact
    assert cost.data.tokens == cost.tokens == recipe.task.max_tokens
    assert 200e9 < cost.data.bytes < 240e9  # these documents are short: 4 bytes of each
    assert sum(x.stat().st_size for x in cost.data.directory.iterdir()) < 20_000
