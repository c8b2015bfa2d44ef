"""A trained run of every task becomes results.json and scores.npz: what is measured is declared,
and the files hold it; what is wrong with a run or with its results is one sentence."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nextlat import evaluation
from nextlat.decoding.speed import compare_decoding
from nextlat.errors import NextLatError
from nextlat.evaluation import METRICS, NEXT_TOKEN_LOSS, evaluate, measure_decoding, open_run
from nextlat.results import RESULTS, SCORES, Metric, Result, read_results, read_scores
from nextlat.tasks import TASKS, Task
from nextlat.tasks.task import held_out_cross_entropy
from nextlat.tasks.text.tokens import END_OF_TEXT
from nextlat.training.recipe import load_recipe
from nextlat.training.run_directory import read_metrics
from nextlat.training.train import train

TINY = [
    "steps=3", "batch_size=4", "backbone.layers=1", "backbone.width=16", "backbone.heads=2",
    "schedule.warmup_steps=1", "schedule.decay_steps=1", "run.log_every=1", "run.threads=1",
]  # fmt: skip
RECIPES = {
    "word-problem": ("word-problem-small", ["sequences=500", "tests=20", "length=8", "group=S3"]),
    "path-star": ("path-star-small", ["arms=2", "names=9", "graphs=40", "tests=20"]),
    "countdown": ("countdown-small", ["problems=40", "tests=20"]),
    "hmm": ("hmm-small", ["length=12", "tests=20"]),
    "streets": ("city-tiny", ["tests=12"]),
    "text": (
        "text-small",
        ["train=stories.txt", "validation=", "vocab_size=300", "row_length=32", "held_out=10",
         "tests=8", "prompt_length=8", "probes=3", "probe_steps=3"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=RECIPES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every task, three steps with the objective nextlat and its results."""
    name, settings = RECIPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    texts = [f"The cat number {i} went home. It was {'very ' * (i % 7)}happy!" for i in range(60)]
    (folder / "stories.txt").write_text(END_OF_TEXT.join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTLAT_DATA", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(evaluation, "DECODED_PROMPTS", 2)
        recipe = load_recipe(name, [*TINY, *(f"task.{item}" for item in settings)])
        run = train(recipe, folder / "run", progress=False)
        (run / "scores.safetensors").touch()  # of a version before this one
        shown: list[tuple[str, int, int]] = []
        evaluate(run, progress=lambda *stage: shown.append(stage))
        (folder / "shown.json").write_text(json.dumps(shown))
        yield run


@pytest.fixture(scope="module")
def task(run: Path) -> Task:
    return open_run(run)[1]


@pytest.fixture(scope="module")
def result(run: Path) -> Result:
    [result] = read_results(run)
    return result


@pytest.mark.slow
def test_a_run_logs_every_step(run: Path) -> None:
    assert [line["step"] for line in read_metrics(run) if "next_h" in line] == [1, 2, 3]


def test_what_is_measured_is_what_is_declared(task: Task, result: Result) -> None:
    """All of it, in that order, where the model has latent dynamics and there is no harness."""
    decoding = METRICS[1:] if task.prompts(1) else ()
    declared = [NEXT_TOKEN_LOSS, *task.metrics, *decoding]
    assert len({metric.key for metric in declared}) == len(declared)
    assert [metric.key for metric in result.metrics] == [metric.key for metric in declared]
    for measured, metric in zip(result.metrics, declared, strict=True):
        assert measured.model_dump(include=set(Metric.model_fields)) == metric.model_dump()


def test_every_declaration_is_complete(task: Task) -> None:
    declared = {metric.key: metric for metric in (*METRICS, *task.metrics)}
    for metric in declared.values():
        assert metric.title and metric.definition.endswith(".") and metric.source
        assert re.fullmatch(r"[a-z0-9_]+", metric.name) and not re.search(r"_\d", metric.name)
        assert metric.counterpart is None or metric.counterpart in declared
        assert (metric.counterpart is None) == (metric.counterpart_name == "")
        assert (metric.reference is None) == (metric.reference_name == "")
    if task.published is not None:
        known = {metric.published for metric in declared.values()}
        about = {saying.of for saying in task.published.sayings} - {None}
        assert about <= known
        assert known & {*task.published.figures, *about}
    assert task.solved is None or task.solved.metric in declared


def test_scores_hold_what_every_item_contributed(run: Path, result: Result) -> None:
    scores = read_scores(run)
    measured = {metric.key: metric for metric in result.metrics}
    assert measured.keys() - scores.keys() <= {metric.key for metric in METRICS[1:]}
    for key, score in scores.items():
        assert measured[key].value == pytest.approx(score.value, rel=1e-6, abs=1e-12)
        assert measured[key].stderr == pytest.approx(score.stderr, rel=1e-6, abs=1e-12)
        interval = measured[key].interval
        assert interval is None or interval[0] <= score.value <= interval[1]
    assert not list(run.glob("*scores.safetensors"))


def test_the_loss_and_the_facts_of_the_run(run: Path, task: Task, result: Result) -> None:
    model = open_run(run)[2]
    assert model.training
    loss = held_out_cross_entropy(model, task.eval_dataset())
    assert model.training  # put back
    assert result.metrics[0].value == pytest.approx(loss.value, rel=1e-6)
    assert loss.value == pytest.approx(math.log(len(task.tokenizer)), abs=0.5)  # untrained
    perplexity = [metric.value for metric in result.metrics if metric.name == "perplexity"]
    assert perplexity in ([], [pytest.approx(math.exp(loss.value), rel=1e-5)])
    assert (result.task.name, result.task.title) == (task.name, task.title)
    assert result.task.published == task.published and result.task.solved == task.solved
    assert TASKS[result.task.name] is type(task.config)
    assert (result.objective.name, result.seed, result.steps) == ("nextlat", 0, 3)


def test_decoding_is_measured_where_there_is_something_to_decode(
    task: Task, result: Result
) -> None:
    assert (result.decoding is None) == (task.prompts(1) == [])
    if result.decoding is not None:
        assert result.decoding.identical and result.decoding.prompts == 2
        assert set(result.decoding.tokens_per_second) == {"transformers", "0", "4"}
        assert 1 <= len(result.decoding.acceptance_by_position) <= 4


def test_charts_and_pictures_can_be_drawn(run: Path, result: Result) -> None:
    for chart in result.charts:
        assert chart.title and chart.x and "{models}" in chart.alt
        assert all(line.values for line in chart.lines)
        assert len({line.series for line in chart.lines}) == len(chart.lines)
    for picture in result.pictures:
        assert json.loads((run / picture.file).read_text())


def test_progress_counts_every_stage(run: Path, task: Task) -> None:
    shown = json.loads((run.parent / "shown.json").read_text())
    decoding = ["decoding"] if task.prompts(1) else []
    names = ["next-token loss", *task.measures(), *decoding, "pictures"]
    assert shown == [[name, i, len(names)] for i, name in enumerate(names)]


# ---- one run is enough for the rest ----


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, settings = RECIPES["hmm"]
    recipe = load_recipe(name, [*TINY, *(f"task.{item}" for item in settings)])
    return train(recipe, tmp_path_factory.mktemp("hmm") / "run", progress=False)


def test_nothing_is_claimed_about_speed_where_drafts_changed_the_output(
    small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, task, model = open_run(small_run)
    direction = {metric.name: metric.higher_is_better for metric in METRICS[1:]}
    *metrics, chart, facts = measure_decoding(model, task)
    assert facts.identical
    assert chart.lines[0].values == facts.acceptance_by_position
    assert {metric.name: metric.higher_is_better for metric in metrics} == direction

    def changed(*args: object, **kwargs: object) -> object:
        timings = compare_decoding(*args, **kwargs)
        timings[4] = replace(timings[4], outputs=[[], *timings[4].outputs[1:]])
        return timings

    monkeypatch.setattr(evaluation, "compare_decoding", changed)
    *metrics, chart, facts = measure_decoding(model, task)
    assert not facts.identical
    speeds = {"decoding_speedup", "decoding_speedup_transformers"}
    assert {metric.name: metric.higher_is_better for metric in metrics} == {
        name: None if name in speeds else better for name, better in direction.items()
    }


def test_a_metric_that_a_task_did_not_declare_comes_last(
    small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness's groups have members that no task knows by name."""
    _, task, _ = open_run(small_run)
    monkeypatch.setattr(type(task), "metrics", task.metrics[1:])
    monkeypatch.setattr(evaluation, "DECODED_PROMPTS", 1)
    names = [metric.name for metric in evaluate(small_run).metrics]
    assert names[1:5] == [*(metric.name for metric in task.metrics), "belief_r2"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("run.json", None, "is not a run directory .*nextlat train"),
        ("run.json", {"status": "running"}, "is not finished"),
        ("run.json", {"task": {"name": "hmm", "fingerprint": "0"}}, "data of task hmm .*restore"),
        ("config.json", None, "cannot open"),
    ],
)
def test_a_run_that_cannot_be_measured_is_one_sentence(
    small_run: Path, tmp_path: Path, name: str, content: object, sentence: str
) -> None:
    for file in small_run.rglob("*"):
        if file.is_file() and file.name != RESULTS:
            copy = tmp_path / file.relative_to(small_run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    path = tmp_path / name
    changed = None if content is None else json.dumps(json.loads(path.read_text()) | content)
    path.unlink()
    if changed is not None:
        path.write_text(changed)
    with pytest.raises(NextLatError, match=sentence) as raised:
        evaluate(tmp_path)
    assert "\n" not in str(raised.value) and not (tmp_path / RESULTS).exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no results.json: run 'nextlat evaluate"),
        ("[]", "older version of nextlat .format 1.: run"),
        ('{"format": 3, "runs": []}', "newer version of nextlat .format 3.: update"),
        ('{"format": 2}', "'runs' is missing"),
        ('{"format": 2, "runs": [{"task": 5}]}', "corrupt.*runs.0.task"),
        ('{"format": 2, "runs": ', "corrupt"),
        ("null", "corrupt"),
    ],
)
def test_results_that_cannot_be_read_are_one_sentence(
    tmp_path: Path, content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / RESULTS).write_text(content)
    with pytest.raises(NextLatError, match=sentence) as raised:
        read_results(tmp_path)
    assert "\n" not in str(raised.value)


def test_scores_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    assert read_scores(tmp_path) == {}
    path = tmp_path / SCORES
    np.savez(path, metric=np.array([SimpleNamespace()], dtype=object))  # would have to be unpickled
    for _ in range(2):
        with pytest.raises(NextLatError, match=r"scores.npz is corrupt .*nextlat evaluate"):
            read_scores(tmp_path)
        path.write_bytes(b"PK")
