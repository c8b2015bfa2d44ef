"""The programs of examples/ do what they say, each in a few seconds and without a network."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import nextlat
from conftest import tiny_lm
from nextlat.tasks import TASKS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: object) -> None:
    """As `python examples/NAME.py ARGUMENTS`, in this process."""
    path = str(ROOT / "examples" / f"{name}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *map(str, arguments)])
        runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len([line for line in path.read_text().splitlines() if line.strip()]) < 40


def test_from_scratch_and_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("from_scratch", tmp_path)
    losses = [float(line.split("'next_token': ")[1].split(",")[0]) for line in printed(capsys)]
    assert losses[-1] < losses[0] / 2
    AutoModelForCausalLM.from_pretrained(tmp_path)

    run("decode", tmp_path)  # asserts that the output is that of transformers' own generate
    rate = next(line for line in printed(capsys) if "tokens per forward pass" in line)
    assert float(rate.split()[0]) > 1.5


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_pretrained(tmp_path: Path) -> None:
    text = ROOT / "README.md"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel()
    core.train([str(text)], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "model")
    before = tiny_lm("gpt2", vocab_size=core.get_vocab_size())
    before.save_pretrained(tmp_path / "model")

    run("pretrained", tmp_path / "model", text, tmp_path / "out")
    after = nextlat.load(tmp_path / "out")
    assert after.objective.name == "nextlat"
    assert not before.lm_head.weight.equal(after.lm.lm_head.weight)


def test_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "reverse", None)  # the example registers it; gone after the test
    recipe = ROOT / "examples" / "reverse.toml"
    with pytest.raises(SystemExit) as ended:
        run("own_task", "train", recipe, "--out", tmp_path / "run", "--no-progress")
    assert ended.value.code in (0, None)
    (entry,) = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    assert entry["task"]["title"] == "Reversed numbers"
    exact = next(metric for metric in entry["metrics"] if metric["name"] == "exact")
    assert exact["value"] > 0.9


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line]
