"""What the README shows works, word for word."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import tiny_lm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def local_gpt2(tmp_path: Path) -> Path:
    """A tiny GPT-2 with a byte-level tokenizer, saved as a hub repository would be."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel()
    core.train_from_iterator([README], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "gpt2")
    tiny_lm("gpt2", vocab_size=core.get_vocab_size()).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 2 and any("attach" in block for block in BLOCKS)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples_run(
    number: int,
    local_gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(
        compile(
            BLOCKS[number].replace("openai-community/gpt2", str(local_gpt2)),
            f"README, example {number}",
            "exec",
        ),
        {},
    )
    if "print" in BLOCKS[number]:
        assert capsys.readouterr().out


def test_every_file_that_the_readme_names_exists() -> None:
    tree = re.search(r"```\n(src/nextlat/.*?)```", README, re.DOTALL)
    assert tree is not None
    names: list[str] = []
    folder = ""
    for line in tree[1].splitlines():
        path, indent = line.split()[0] if line.split() else "", len(line) - len(line.lstrip())
        if not re.fullmatch(r"[\w./-]+", path):
            continue
        if indent == 0:
            folder = path if path.endswith("/") else ""
            names.append(path)
        elif indent == 2 and folder:
            names.append(folder + path)
    assert len(names) > 15
    assert [name for name in names if not (ROOT / name).exists()] == []
    for name in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / name).exists(), name
