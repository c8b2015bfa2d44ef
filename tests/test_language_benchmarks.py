"""Benchmarks of the LM Evaluation Harness: the same figures as the harness's own, and what is wrong
in one sentence."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import by_key, tiny_lm
from nextlat.errors import NextLatError
from nextlat.evaluation import evaluate
from nextlat.model import attach
from nextlat.objectives import JTPConfig, NextTokenConfig
from nextlat.tasks.text import lm_eval as language_benchmarks
from nextlat.tasks.text.lm_eval import benchmark_metric, language_benchmark
from nextlat.tasks.text.text import Text
from nextlat.tasks.text.tokens import END_OF_TEXT, trained_tokenizer
from nextlat.training.recipe import load_recipe
from nextlat.training.train import train

lm_eval = pytest.importorskip(
    "lm_eval", reason="the LM Evaluation Harness is not installed: pip install 'nextlat[lm-eval]'"
)
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the harness and what it imports have their own
]

TEXTS = [f"The cat number {i} went home. It was {'very ' * (i % 7)}happy!" for i in range(40)]
KINDS = {
    "choices": (
        "multiple_choice",
        "{{query}}",
        "gold",
        {"doc_to_choice": "choices"},
        ("acc", "acc_norm"),
    ),
    "words": ("loglikelihood", "{{query}}", " {{choices[gold]}}", {}, ("perplexity", "acc")),
    "pages": (
        "loglikelihood_rolling",
        "",
        "{{query}}",
        {},
        ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    ),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor the harness's index of its own thousands of benchmarks, which takes seconds to make."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("nextlat.hub._answers", lambda: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Benchmarks in the harness's own definitions (YAML takes JSON), over a local file."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    records = [
        {"query": text, "choices": ["home", "away from here", "on"], "gold": i % 3}
        for i, text in enumerate(TEXTS)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, (kind, query, target, more, metrics) in KINDS.items():
        definition = {
            "task": f"small_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": kind,
            "doc_to_text": query,
            "doc_to_target": target,
            **more,
            "metric_list": [{"metric": metric} for metric in metrics],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(definition))
    absent = {
        **definition,
        "task": "small_absent",
        "dataset_path": "nobody/nothing",
        "dataset_kwargs": {},
    }
    (folder / "absent.yaml").write_text(json.dumps(absent))
    return folder


@pytest.fixture
def tokenizer() -> Any:
    return trained_tokenizer(TEXTS, 300)


def test_figures_are_those_of_the_harness_itself_on_the_saved_model(
    files: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = attach(
        tiny_lm("llama", vocab_size=300, bos_token_id=0, eos_token_id=0), NextTokenConfig()
    )
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "saved"), "device": "cpu", "dtype": "float32"},
        tasks=[f"small_{kind}" for kind in KINDS],
        limit=30,
        bootstrap_iters=2,
        task_manager=TaskManager(include_path=str(files), include_defaults=False),
    )
    for kind, (*_, metrics) in KINDS.items():
        name = f"small_{kind}"
        found = by_key(language_benchmark(model, tokenizer, name, files=str(files), limit=30))
        assert set(found) == {benchmark_metric(name, metric).key for metric in metrics}
        own = theirs["results"][f"small_{kind}"]
        for metric in metrics:
            ours = found[benchmark_metric(name, metric).key]
            assert ours.value == pytest.approx(own[f"{metric},none"], rel=1e-5)
            assert len(ours.per_item) == 30 and ours.per_item.mean() == pytest.approx(
                ours.value, rel=1e-6
            )
            if metric.startswith("acc"):
                assert ours.stderr == pytest.approx(own[f"{metric}_stderr,none"], rel=1e-6)
    assert 0 < theirs["results"]["small_choices"]["acc,none"] < 1  # else the comparison says little


def test_a_model_that_needs_its_objective_is_measured_by_what_it_predicts(
    files: Path, tokenizer: Any
) -> None:
    torch.manual_seed(1)
    model = attach(tiny_lm("llama", vocab_size=300), JTPConfig(horizon=2)).eval()
    for parameter in model.objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert model.objective.needed_at_inference
    found = language_benchmark(model, tokenizer, "small_choices", files=str(files), limit=12)
    score = by_key(found)[benchmark_metric("small_choices", "acc").key]
    right = []
    for i, text in enumerate(TEXTS[:12]):
        likelihoods = []
        for choice in (" home", " away from here", " on"):
            prompt, whole = (
                tokenizer(words, return_tensors="pt").input_ids for words in (text, text + choice)
            )
            with torch.no_grad():
                log_p = model(whole).logits[0].log_softmax(-1)
            places = torch.arange(prompt.shape[1] - 1, whole.shape[1] - 1)
            likelihoods.append(log_p[places, whole[0, places + 1]].sum().item())
        right.append(max(range(3), key=likelihoods.__getitem__) == i % 3)
    assert score.per_item.tolist() == right
    assert len(set(right)) == 2


def test_a_run_of_the_text_task_is_measured_by_them(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stories = tmp_path / "stories.txt"
    stories.write_text(END_OF_TEXT.join(TEXTS))
    recipe = load_recipe(
        "text-small",
        [
            f"task.train={stories}",
            "task.validation=",
            "task.vocab_size=300",
            "task.row_length=64",
            "task.held_out=10",
            "task.tests=4",
            "task.prompt_length=8",
            "task.probes=0",
            "steps=2",
            "batch_size=2",
            "backbone.layers=1",
            "backbone.width=16",
            "backbone.heads=2",
            "schedule.warmup_steps=0",
            "schedule.decay_steps=1",
            "run.threads=1",
            "task.lm_eval=small_choices, small_pages",
            f"task.lm_eval_files={files}",
            "task.lm_eval_limit=8",
        ],
        objective="next-token",
    )
    train(recipe, tmp_path / "run", progress=False)
    # The directory that the record of the run names may be a stranger's: it is not even looked at.
    (files / "absent.yaml").write_text("task: !function hostile.task\n")
    (files / "hostile.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(NextLatError, match=r"task\.lm_eval_files = .*can run Python code.*--code"):
        evaluate(tmp_path / "run")
    assert not (tmp_path / "executed").exists()
    (files / "absent.yaml").unlink()
    result = evaluate(tmp_path / "run", code=str(files))  # the user's own word
    assert "can run Python code" in caplog.text
    measured = {metric.key: metric for metric in result.metrics}
    for benchmark, name in (
        ("small_choices", "acc"),
        ("small_choices", "acc_norm"),
        ("small_pages", "word_perplexity"),
        ("small_pages", "bits_per_byte"),
    ):
        assert measured[benchmark_metric(benchmark, name).key].stderr is not None


def test_they_are_declared_in_words_and_with_their_published_counterparts() -> None:
    metric = benchmark_metric("arc_easy", "acc_norm")
    assert (metric.title, metric.unit) == ("arc_easy, accuracy, normalised by length", "share")
    assert metric.noun == "accuracy on arc_easy, normalised by length" and metric.higher_is_better
    metric = benchmark_metric("wikitext", "word_perplexity")
    assert (metric.title, metric.higher_is_better) == ("wikitext, word perplexity", False)
    figures = Text.published.figures[metric.published]
    assert (figures.title, figures.by_method["GPT"]) == (metric.title, 17.93)


def test_what_is_wrong_is_one_sentence(
    files: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["task.train=a.txt", "task.validation="]
    for more, sentence in (
        (
            ["task.lm_eval=nosuch", f"task.lm_eval_files={files}"],
            "knows no benchmark 'nosuch' .*task.lm_eval_files",
        ),
        (
            ["task.lm_eval=small_words", "task.lm_eval_files=nowhere"],
            "no directory nowhere .*task.lm_eval_files",
        ),
        (["task.lm_eval=small_words", "task.lm_eval_limit=-1"], "'task.lm_eval_limit' = -1 .* 0"),
    ):
        with pytest.raises(NextLatError, match=sentence):
            load_recipe("text-small", [*settings, *more]).task.build()
    model = attach(tiny_lm("llama", vocab_size=300), NextTokenConfig())
    with pytest.raises(
        NextLatError, match=r"data of the benchmark small_absent cannot be had .*local files"
    ):
        language_benchmark(model, tokenizer, "small_absent", files=str(files))
    language_benchmarks._manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(NextLatError, match=r"not installed: pip install 'nextlat\[lm-eval\]'"):
        load_recipe("text-small", [*settings, "task.lm_eval=piqa"]).task.build()
