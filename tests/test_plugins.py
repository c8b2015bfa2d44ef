"""A sixth objective and a seventh task, one file and one line each, through every command."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nextlat.cli import PLUGINS, app
from nextlat.objectives import OBJECTIVES
from nextlat.results import read_results
from nextlat.tasks import TASKS
from nextlat.training.run_directory import read_metrics

pytestmark = pytest.mark.slow

OBJECTIVE = '''
from nextlat.losses import Losses, Term
from nextlat.objectives import OBJECTIVES
from nextlat.objectives.next_token import NextToken
from nextlat.validation import NotNegative, Settings


class CalmConfig(Settings):
    weight: NotNegative = 0.1


class Calm(NextToken):
    """Next-token prediction by small states."""

    name = "calm"
    title = published_as = "Calm"
    parts = {"size": "Size of the states"}

    def counts(self, batch):
        counts = super().counts(batch)
        return counts | {"size": counts["next_token"]}

    def loss(self, batch, counts=None):
        counts = self.counts(batch) if counts is None else counts
        h_ND = self.backbone.hidden(batch).flatten(0, 1)
        size = h_ND[batch.scored_positions].pow(2).mean(-1).sum().view(1)
        return Losses({
            "next_token": self.next_token_term(h_ND, batch, counts),
            "size": Term(size, counts["size"], self.config.weight),
        })


OBJECTIVES["calm"] = (CalmConfig, Calm)
'''

TASK = '''
import numpy as np
import torch

from nextlat.results import Measurement, Metric
from nextlat.scores import mean_score
from nextlat.tasks import TASKS
from nextlat.tasks.rows import Rows
from nextlat.tasks.task import FIRST_WORD, Task, TaskConfig, word_tokenizer
from nextlat.validation import Count

AGAIN = Metric(name="said_again", title="Said again", definition="Share of words said again.")


class EchoConfig(TaskConfig):
    words: Count = 8

    def build(self):
        return Echo(self)


class Echo(Task):
    """Every word is said twice."""

    name, title, metrics, max_length = "echo", "Echoes", (AGAIN,), 8

    def __init__(self, config):
        self.tokenizer = word_tokenizer([f"w{i}" for i in range(config.words)])
        words = np.random.default_rng(0).integers(config.words, size=(200, 4))
        self.rows = FIRST_WORD + np.repeat(words, 2, axis=1)

    def train_dataset(self, seed):
        return Rows({"input_ids": self.rows[20:]}, seed=seed)

    def eval_dataset(self):
        return Rows({"input_ids": self.rows[:20]})

    def prompts(self, count):
        return list(torch.from_numpy(self.rows[:count, :3]))

    def fingerprint(self):
        return f"{len(self.tokenizer)} words, twice each"

    def measures(self):
        return {"echoes": self.echoes}

    def echoes(self, model):
        ids = torch.from_numpy(self.rows[:20])
        said = model(ids).logits.argmax(-1)[:, ::2].numpy()
        yield Measurement(AGAIN, mean_score((said == self.rows[:20, 1::2]).mean(axis=1)))


TASKS["echo"] = EchoConfig
'''

RECIPE = """
objective = "calm"
steps = 12
batch_size = 16
[task]
name = "echo"
[backbone]
layers = 1
width = 16
heads = 2
[optimizer]
learning_rate = 1e-2
[run]
log_every = 4
threads = 1
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with both modules and a recipe, in which commands are given."""
    (tmp_path / "calm.py").write_text(OBJECTIVE)
    (tmp_path / "echo.py").write_text(TASK)
    (tmp_path / "echo.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    os.environ.pop(PLUGINS, None)
    OBJECTIVES.pop("calm", None)
    TASKS.pop("echo", None)
    for name in ("calm", "echo"):
        sys.modules.pop(name, None)


def run(*arguments: str, plugins: tuple[str, ...] = ("calm", "echo")) -> tuple[int, str, str]:
    options = [word for name in plugins for word in ("--plugin", name)]
    result = CliRunner().invoke(app, [*options, *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_train_evaluate_compare_and_report_take_what_is_registered(home: Path) -> None:
    code, _, err = run("train", "echo.toml", "task.words=5", "--out", "one", "--no-progress")
    assert code == 0, err
    record = json.loads((home / "one" / "run.json").read_text())
    assert record["recipe"]["task"] == {"name": "echo", "words": 5}
    assert record["recipe"]["objectives"] == {"calm": {"weight": 0.1}}
    assert {"next_token", "size"} <= read_metrics(home / "one")[0].keys()
    code, out, err = run("evaluate", "one", "--no-progress")
    assert code == 0 and "Said again" in out, err

    code, out, err = run("compare", "echo.toml", "--objectives", "next-token,calm", "--jobs", "2")
    assert code == 0 and "Said again" in out, err
    results = read_results(home / "compare" / "echo")
    assert [(one.task.title, one.objective.title) for one in results] == [
        ("Echoes", "Calm"),
        ("Echoes", "next-token"),
    ]
    runs = [str(path) for path in (home / "compare" / "echo" / "runs").iterdir() if path.is_dir()]
    # A report needs nothing but the files of the runs.
    code, _, err = run("report", *runs, "--out", "report", plugins=())
    page = (home / "report" / "report.html").read_text()
    assert code == 0 and "Said again" in page and "Echoes" in page and "Calm" in page


def test_what_is_not_registered_is_refused(home: Path) -> None:
    code, _, err = run("train", "echo.toml", plugins=())
    assert code == 2 and "unknown task 'echo'" in err
    code, _, err = run("train", "echo.toml", plugins=("ecco",))
    assert code == 2 and "--plugin ecco: No module named 'ecco'" in err
    code, _, err = run("train", "echo.toml", "objectives.calm.weihgt=1")
    assert code == 2 and "[objectives.calm] has no 'weihgt': perhaps weight is meant" in err
