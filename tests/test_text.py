"""Language modelling: documents from anywhere, one tokenizer, packed rows against a slow reference,
and what is measured."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from conftest import by_key, tiny_lm
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model import attach
from nextlat.objectives import NextTokenConfig
from nextlat.tasks.task import vocabulary_size
from nextlat.tasks.text.packed import PackedDocuments
from nextlat.tasks.text.probes import future_tokens, probe_cross_entropy
from nextlat.tasks.text.text import Text, TextConfig
from nextlat.tasks.text.tokens import END_OF_TEXT, Encoder, existing_tokenizer, trained_tokenizer
from nextlat.training.build import build_model
from nextlat.training.recipe import load_recipe

ANIMALS = ("cat", "dog", "fish", "bird")
STORIES = [
    f"The {ANIMALS[i % 4]} number {i} went home. It was {'very ' * (i % 7)}happy!"
    for i in range(60)
]
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "row_length": 32,
    "held_out": 10,
    "tests": 8,
    "prompt_length": 8,
    "probes": 3,
    "probe_steps": 5,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what an earlier one kept."""
    monkeypatch.setenv("NEXTLAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{END_OF_TEXT}\n".join(STORIES), encoding="utf-8")
    return path


# ---- tokenizer ----


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = round_trip_tokenizer()
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert END_OF_TEXT in text or tokenizer.decode(ids, skip_special_tokens=True) == text


_TOKENIZERS: list[Any] = []


def round_trip_tokenizer() -> Any:
    if not _TOKENIZERS:
        _TOKENIZERS.append(trained_tokenizer(STORIES, 400))
    return _TOKENIZERS[0]


def test_the_tokenizer_is_the_same_with_an_empty_a_full_and_a_damaged_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learned() -> str:
        return trained_tokenizer(STORIES, 300).backend_tokenizer.to_str()

    first = learned()
    (kept,) = (tmp_path / "cache").rglob("*.json")
    with monkeypatch.context() as patch:
        patch.setattr(
            "nextlat.tasks.text.tokens.trainers.BpeTrainer", None
        )  # nothing is learned any more
        assert learned() == first
    kept.write_text(kept.read_text()[:1000])
    assert learned() == first
    monkeypatch.setenv("NEXTLAT_CACHE", str(tmp_path / "elsewhere"))
    assert learned() == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEXTLAT_CACHE", str(tmp_path / "file"))  # which is no error here
    assert learned() == first
    assert trained_tokenizer(STORIES[:30], 300).backend_tokenizer.to_str() != first
    assert len(trained_tokenizer(STORIES, 300)) == 300


def test_documents_begin_and_end_with_the_end_of_text_and_spell_it_as_text_inside() -> None:
    tokenizer = trained_tokenizer(STORIES, 300)
    texts = ["The cat", f"a {END_OF_TEXT} b", "x"]
    encoder = Encoder(tokenizer)
    assert encoder.dtype == np.uint16
    for text, (document, labelled) in zip(texts, encoder(texts), strict=True):
        assert document[0] == document[-1] == 0 and min(document[1:-1]) > 0 and labelled is None
        assert tokenizer.decode(document[1:-1]) == text


def test_gpt2s_tokenizer_gets_the_end_of_text_that_its_bare_files_do_not_name(
    data_dir: Path,
) -> None:
    tokenizer = existing_tokenizer(str(data_dir / "tokenizer"))
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id) == (50257, 50256, 50256)
    assert [*Encoder(tokenizer)(["Hello world"])] == [([50256, 15496, 995, 50256], None)]


WORDS = {"<unk>": 0, END_OF_TEXT: 1, "cat": 2, "dog": 3, "sat": 4, "ran": 90}  # ids with gaps


def save_words(
    directory: Path,
    words: dict[str, int] = WORDS,
    *,
    added: Sequence[str] = (),
    **special: str,
) -> str:
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    special = {"unk_token": "<unk>", "eos_token": END_OF_TEXT, **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.add_tokens([*added])
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("special", "added", "size"),
    [({}, [], 91), ({"pad_token": END_OF_TEXT}, [], 91), ({}, [str(i) for i in range(99)], 105)],
    ids=["gaps", "pad is end", "added"],
)
def test_a_vocabulary_reaches_to_its_largest_id(
    special: dict[str, str], added: list[str], size: int, tmp_path: Path
) -> None:
    text = tmp_path / "a.txt"
    text.write_text(END_OF_TEXT.join(["cat sat dog ran 98", "dog ran cat sat"] * 40))
    tokenizer = save_words(tmp_path / "words", added=added, **special)
    task = [f"task.train={text}", "task.validation=", "task.vocab_size=", "task.held_out=10"]
    more = [f"task.tokenizer={tokenizer}", "backbone.layers=1", "backbone.width=16"]
    recipe = load_recipe("text-small", [*task, *more, "backbone.heads=2"])
    built = recipe.task.build()
    assert vocabulary_size(built.tokenizer) == size
    model = build_model(recipe, built)
    table = model.lm.get_input_embeddings()
    assert len(table.weight) == size and table.weight[1].norm() > 0  # the end of text is trained
    row = built.train_dataset(0)[0]
    model(**{name: x[None] for name, x in row.items()}).loss.backward()
    assert table.weight.grad[1].norm() > 0


def test_a_special_token_that_would_share_an_id_is_refused(tmp_path: Path) -> None:
    directory = save_words(tmp_path, {**WORDS, "ran": 6}, bos_token="<s>")
    with pytest.raises(NextLatError, match=r"has one id, 6, for '<s>' and 'ran': set"):
        existing_tokenizer(directory)


# ---- documents ----


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content", "documents", "mended"),
    [
        ("a.txt", BOM + b"one\r\ntwo\r\n###\r\nthree\rfour", ["one\ntwo", "three\nfour"], 0),
        (
            "a.jsonl",
            BOM + b'{"text": "one\\r\\ntwo"}\r\n{"text": "thr\xe2\x80\xa8ee"}\r\n',
            ["one\r\ntwo", "thr\u2028ee"],
            0,
        ),
        (
            "a.jsonl",
            b'{"text": "half \\ud83d"}\n{"text": "whole \\ud83d\\ude00 \\udc00"}',
            ["half \ufffd", "whole \N{GRINNING FACE} \ufffd"],
            2,
        ),
    ],
    ids=["txt", "jsonl", "surrogates"],
)
def test_marks_line_ends_and_half_pairs_of_any_system(
    name: str, content: bytes, documents: list[str], mended: int, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    config = TextConfig(
        train=str(tmp_path / name), validation=str(tmp_path / name), separator="###\n", **SMALL
    )
    source, _ = config.sources()
    *_, (_, progress) = source.batches()
    assert [*source] == documents and progress.mended == mended
    [*Encoder(trained_tokenizer(source, 300))(documents)]


def documents_of(config: TextConfig) -> tuple[list[str], list[str]]:
    train_source, held_out = config.sources()
    return list(train_source), list(held_out)


def as_jsonl(path: Path, column: str = "text", documents: list[str] = STORIES) -> Path:
    path.write_text(
        "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(documents)),
        encoding="utf-8",
    )
    return path


def as_parquet(path: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": list(range(len(STORIES))), "text": STORIES}), path)
    return path


def test_the_same_documents_from_every_kind_of_file(stories: Path, tmp_path: Path) -> None:
    expected = (STORIES[10:], STORIES[:10])
    assert documents_of(TextConfig(train=str(stories), **SMALL)) == expected
    assert (
        documents_of(
            TextConfig(train=str(as_jsonl(tmp_path / "a.jsonl", "story")), column="story", **SMALL)
        )
        == expected
    )
    assert (
        documents_of(TextConfig(train=str(as_parquet(tmp_path / "a.parquet")), **SMALL)) == expected
    )


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_dataset_of_the_library_gives_the_same_documents(
    kind: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that reads the hub, on a local directory of the same layout: no hub can be reached
    from a test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        path = tmp_path / "data" / f"{split}.{kind}"
        if kind == "jsonl":
            as_jsonl(path)
        else:
            as_parquet(path)
    config = TextConfig(
        dataset=str(tmp_path / "data"), validation_split="validation", streaming=streaming, **SMALL
    )
    assert documents_of(config) == (STORIES, STORIES)
    held_out = TextConfig(dataset=str(tmp_path / "data"), streaming=streaming, **SMALL)
    assert documents_of(held_out) == (STORIES[10:], STORIES[:10])
    with pytest.raises(NextLatError, match="no column 'story' but id, text"):
        documents_of(
            TextConfig(dataset=str(tmp_path / "data"), column="story", streaming=streaming, **SMALL)
        )
    with pytest.raises(NextLatError, match=r"cannot be read .*nosuch.*task.train"):
        documents_of(
            TextConfig(dataset=str(tmp_path / "data"), split="nosuch", streaming=streaming, **SMALL)
        )


def test_empty_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "a.jsonl", documents=["", "one", "  \n", "two", "\t"])
    source, _ = TextConfig(train=str(path), validation=str(path), **SMALL).sources()
    for _ in range(2):  # counted anew each time
        [(batch, progress)] = source.batches()
        assert batch == ["one", "two"] and progress.dropped == 3
    path.write_text(json.dumps({"text": None}) + "\n\n" + json.dumps({"text": "three"}) + "\n")
    [(batch, progress)] = source.batches()
    assert batch == ["three"] and progress.dropped == 1


def test_files_are_found_below_the_data_directory(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXTLAT_DATA", str(stories.parent))
    assert documents_of(TextConfig(train="stories.txt", **SMALL)) == (STORIES[10:], STORIES[:10])


def bad(tmp_path: Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("settings_of", "sentence"),
    [
        (lambda p: {"train": str(p / "none.txt")}, "there is no file .*none.txt .*set task.train"),
        (
            lambda p: {"train": bad(p, "a.csv", "x")},
            "a.csv' is not a .txt, .jsonl or .parquet file",
        ),
        (
            lambda p: {"train": bad(p, "a.txt", "a"), "validation": bad(p, "b.md", "x")},
            "task.validation = .*b.md",
        ),
        (lambda p: {"train": bad(p, "a.txt", "")}, "a.txt holds no document"),
        (lambda p: {"train": bad(p, "a.txt", f" \n{END_OF_TEXT}\n")}, "a.txt holds no document"),
        (
            lambda p: {"train": bad(p, "a.txt", b"one\ntwo\nth\xffee")},
            r"a.txt cannot be read: line 3 is not UTF-8 \(invalid start byte at byte 3\)",
        ),
        (
            lambda p: {"train": bad(p, "a.txt", "one" + END_OF_TEXT + "two")},
            "no more documents than the 10 .*task.held_out",
        ),
        (
            lambda p: {"train": bad(p, "a.jsonl", '{"body": "x", "id": 1}\n')},
            "a.jsonl has no column 'text' but body, id",
        ),
        (
            lambda p: {"train": bad(p, "a.jsonl", '{"text": 5}\n')},
            "column 'text' .* holds int values",
        ),
        (
            lambda p: {"train": bad(p, "a.jsonl", '{"text": "x"}\n[1]\n')},
            "line 2 of .* not a JSON object",
        ),
        (
            lambda p: {"train": bad(p, "a.jsonl", '{"text": "x"}\n{"text": "x"')},
            "line 2 of .*a.jsonl is not JSON",
        ),
        (
            lambda p: {"train": bad(p, "a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}')},
            "a.jsonl cannot be read: line 2 is not UTF-8",
        ),
        (lambda p: {"train": bad(p, "a.parquet", "not one")}, "a.parquet cannot be read"),
        (
            lambda p: {"train": str(as_parquet(p / "a.parquet")), "column": "story"},
            "no column 'story' but id, text",
        ),
        (lambda p: {}, "needs task.train .* or task.dataset"),
        (lambda p: {"train": "a.txt", "dataset": "x/y"}, "one of the two"),
        (lambda p: {"train": "a.txt", "tokenizer": "gpt2"}, "task.tokenizer .* or task.vocab_size"),
        (lambda p: {"train": "a.txt", "vocab_size": None}, "task.tokenizer .* or task.vocab_size"),
        (lambda p: {"train": "a.txt", "split": "test"}, "task.split has no meaning"),
        (lambda p: {"train": "a.txt", "streaming": False}, "task.streaming has no meaning"),
        (
            lambda p: {"dataset": "x/y", "validation": "a.txt", "validation_split": "test"},
            "remove one",
        ),
        (
            lambda p: {
                "train": bad(p, "a.txt", "text"),
                "validation": str(p / "a.txt"),
                "vocab_size": 256,
            },
            "at least 257",
        ),
        (lambda p: {"train": "a.txt", "row_length": 1}, "'row_length' = 1 .* 2"),
        (lambda p: {"train": "a.txt", "max_length": 31}, "task.max_length is 31"),
        (lambda p: {"train": "a.txt", "prompt_length": 32}, "no room"),
        (lambda p: {"train": "a.txt", "separator": ""}, "'separator' = .* at least 1 character"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    settings_of: Callable[[Path], dict[str, Any]],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NextLatError, match=sentence) as raised:
        TextConfig(**{**SMALL, **settings_of(tmp_path)}).build()
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_a_dataset_out_of_reach_names_the_local_way(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'some/stories' on the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(
        NextLatError, match=r"some/stories.*Couldn't reach.*set task.train .* local .*parquet"
    ) as raised:
        TextConfig(dataset="some/stories", **SMALL).build()
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        NextLatError,
        match=r"needs the datasets library: pip install 'nextlat\[text\]', or set task.train",
    ):
        TextConfig(dataset="some/stories", **SMALL).build()


def test_a_tokenizer_that_cannot_be_had_is_one_sentence(tmp_path: Path, stories: Path) -> None:
    settings = {**SMALL, "vocab_size": None, "tokenizer": str(tmp_path)}
    with pytest.raises(
        NextLatError, match=r"task.tokenizer = .* cannot be loaded .*task.vocab_size"
    ):
        TextConfig(train=str(stories), **settings).build()


# ---- the task ----


@pytest.fixture
def task(stories: Path) -> Text:
    return TextConfig(train=str(stories), **SMALL).build()


def test_prompts_are_the_beginnings_of_held_out_documents(task: Text) -> None:
    prompts = task.prompts(4)
    assert len(prompts) == 4 and all(prompt.shape == (8,) and prompt[0] == 0 for prompt in prompts)
    texts = [task.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    assert all(story.startswith(text) for text, story in zip(texts, STORIES, strict=False))
    assert len(task.prompts(100)) <= 10


def test_the_fingerprint_is_of_text_and_tokenizer_not_of_the_file(
    stories: Path, tmp_path: Path, task: Text
) -> None:
    def fingerprint(**changes: Any) -> str:
        return TextConfig(**{"train": str(stories), **SMALL, **changes}).build().fingerprint()

    print_ = task.fingerprint()
    assert fingerprint(train=str(as_jsonl(tmp_path / "a.jsonl"))) == print_
    assert fingerprint(vocab_size=301) != print_
    assert fingerprint(held_out=11) != print_
    stories.write_text(stories.read_text().replace("number 59", "number 58"))
    assert fingerprint() != print_


def test_perplexity_is_that_of_every_segment_by_itself(task: Text) -> None:
    model = attach(tiny_lm("llama", vocab_size=300), NextTokenConfig())
    rows = [row for row in task.eval_dataset()]
    sums, counts = [], []
    for row in rows:
        losses = []
        real = int(row["attention_mask"].sum())
        starts = [i for i in range(real) if row["position_ids"][i] == 0]
        for first, end in zip(starts, [*starts[1:], real], strict=True):
            ids = row["input_ids"][first:end]
            with torch.no_grad():
                log_p = model.lm(input_ids=ids[None]).logits[0].log_softmax(-1)
            losses += [-log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
        sums.append(sum(losses))
        counts.append(len(losses))
    [score] = by_key(task.perplexity(model)).values()
    assert score.value == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-5)
    assert len(score.per_item) == len(rows) == 6
    assert score.per_item.mean() == pytest.approx(score.value, rel=1e-6)
    assert model.training  # put back


def test_the_curve_of_probes_ends_where_no_document_reaches(stories: Path) -> None:
    task = TextConfig(train=str(stories), **{**SMALL, "probes": 40, "probe_steps": 2}).build()
    model = attach(tiny_lm("llama", vocab_size=300), NextTokenConfig())
    [chart] = task.probe_chart(model)
    longest = max(int(row["position_ids"].max()) for row in task.eval_dataset())
    assert len(chart.lines[0].values) == longest < 40


def test_tinystories_packs_into_rows(data_dir: Path) -> None:
    validation = str(data_dir / "text/tinystories_valid.txt")
    held_out = (
        TextConfig(train=validation, validation=validation, vocab_size=1000, tests=10_000)
        .build()
        .held_out
    )
    assert len(held_out) == 450 and held_out.total > 50_000
    rows = PackedDocuments(held_out, 256, seed=0)
    for i in range(20):
        linked = Batch.from_inputs(**{k: x[None] for k, x in rows[i].items()}).linked
        inside = (rows[i]["input_ids"][:-1] == 0) & (rows[i]["input_ids"][1:] == 0)
        assert not linked[:-1][inside].any()  # end of one story, beginning of the next


@pytest.mark.parametrize("name", ["tinystories", "fineweb-edu"])
def test_the_papers_recipes(name: str) -> None:
    recipe = load_recipe(name)
    backbone, objective, optimizer = recipe.backbone, recipe.objective_config, recipe.optimizer
    shape = (
        backbone.layers,
        backbone.heads,
        backbone.width,
        objective.hidden_size,
        objective.num_layers,
    )
    rates = (
        optimizer.learning_rate,
        optimizer.weight_decay,
        optimizer.beta1,
        optimizer.beta2,
        optimizer.gradient_clip,
    )
    assert (objective.lambda_next_h, objective.lambda_kl) == (1, 1)
    if name == "tinystories":
        assert shape == (8, 8, 768, 2048, 3) and rates == (3e-4, 0.1, 0.9, 0.95, 1)
        assert (
            recipe.steps,
            recipe.batch_size,
            recipe.task.row_length,
            recipe.task.vocab_size,
        ) == (100_000, 256, 256, 1000)
        assert (recipe.schedule.name, recipe.task.probes) == ("constant", 20)
    else:
        assert shape == (22, 16, 2048, 6528, 3) and rates == (4e-4, 0.1, 0.9, 0.95, 1)
        tokens = recipe.batch_size * recipe.task.row_length
        assert tokens == 512 * 1024 and recipe.steps * tokens == pytest.approx(100e9, rel=1e-4)
        assert recipe.schedule.name == "wsd"
        assert recipe.schedule.warmup_steps * tokens == pytest.approx(1e9, rel=1e-3)
        assert recipe.schedule.decay_steps * tokens == pytest.approx(10e9, rel=1e-3)


# ---- probes ----


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 4), st.integers(1, 9))
def test_tokens_ahead_are_those_of_the_same_document(
    sizes: list[int], padding: int, offsets: int
) -> None:
    positions = [i for size in sizes for i in range(size)]
    T = len(positions) + padding
    ids = torch.arange(100, 100 + 2 * T).view(2, T)
    mask = torch.tensor([[1] * len(positions) + [0] * padding] * 2)
    batch = Batch.from_inputs(ids, ids, torch.tensor([positions + [0] * padding] * 2), mask)
    document = [c for c, size in enumerate(sizes) for _ in range(size)] + [-1] * padding
    expected = [
        [
            int(ids[row, t + i]) if t + i < T and document[t] == document[t + i] >= 0 else -100
            for i in range(1, offsets + 1)
        ]
        for row in range(2)
        for t in range(T)
    ]  # fmt: skip
    assert future_tokens(batch, offsets).tolist() == expected


def test_probes_read_what_a_state_holds_and_nothing_else() -> None:
    """States that are the one-hot code of the token two steps ahead, of any size: that one is read
    off, the others are chance."""
    V, rng = 8, torch.Generator().manual_seed(0)
    ids = torch.randint(V, (60, 50), generator=rng)
    batch = Batch.from_inputs(ids, ids, torch.arange(50).expand(60, 50))
    targets = future_tokens(batch, 4)
    known = targets[:, 1] >= 0
    h = torch.nn.functional.one_hot(targets[known, 1], V) * 0.01 + 5.0
    curve = probe_cross_entropy(
        h[:2000],
        targets[known][:2000],
        h[2000:],
        targets[known][2000:],
        vocab_size=V,
        steps=300,
        batch_size=100,
        learning_rate=2e-2,
    )
    assert curve[1] < 0.1
    assert all(curve[i] == pytest.approx(math.log(V), abs=0.1) for i in (0, 2, 3))


def test_a_probe_of_an_offset_that_no_document_reaches_is_nan() -> None:
    h, targets = torch.randn(20, 3), torch.full((20, 2), -100)
    targets[:, 0] = 1
    curve = probe_cross_entropy(h, targets, h, targets, vocab_size=2, steps=20)
    assert curve[0] < math.log(2) and math.isnan(curve[1])
