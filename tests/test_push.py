"""A model goes to the hub and comes back, through the hub's own client and a server of ours; and
its card."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nextlat
from conftest import chat_tokenizer, tiny_lm
from hub_stand_in import TOKEN, Hub, running
from nextlat.errors import NextLatError
from nextlat.model_card import OURS, card


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


def program(text: str, hub: Hub, tmp_path: Path, token: str = TOKEN) -> str:
    """What a program prints that knows the hub's address from its start, as the client does."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"} | home
    settings |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import nextlat, torch\n" + text],
        env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_pushed_and_loaded_by_name_it_is_the_same(hub: Hub, tmp_path: Path) -> None:
    model = nextlat.attach(tiny_lm("llama", 259), nextlat.NextLatConfig(horizon=2))
    model.save_pretrained(tmp_path / "mine")
    chat_tokenizer().save_pretrained(tmp_path / "mine")
    program(
        """
from transformers import AutoTokenizer, AutoModelForCausalLM
model = nextlat.load("mine")
url = model.push_to_hub("org/name", tokenizer=AutoTokenizer.from_pretrained("mine"))
assert "/org/name/commit/" in url, url
ids = torch.arange(24).view(2, 12)
with torch.no_grad():
    logits = model(ids).logits
    assert torch.equal(nextlat.load("org/name")(ids).logits, logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained("org/name")(ids).logits, logits)
AutoTokenizer.from_pretrained("org/name").apply_chat_template([{"role": "user", "content": "a"}])
""",
        hub,
        tmp_path,
    )
    files = hub.repositories["org/name"]
    sidecar = {"nextlat/objective.json", "nextlat/objective.safetensors", "nextlat/SHA256SUMS"}
    assert {"README.md", "config.json", "model.safetensors", "chat_template.jinja"} | sidecar <= {
        *files
    }
    assert "library_name" in files["README.md"].decode()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_a_run_is_pushed_without_its_checkpoints(hub: Hub, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'nextlat[peft]'")
    tiny_lm("llama").save_pretrained(tmp_path / "base")
    lm: Any = type(tiny_lm("llama")).from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"])
    model = nextlat.attach(peft.get_peft_model(lm, config), nextlat.NextLatConfig())
    run = tmp_path / "run"
    model.save_pretrained(run)
    for name in ("checkpoint-2/optimizer.pt", "optimizer.pt", ".nextlat-tmp-x", "run.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    printed = program(
        f"""
from nextlat.hub import push_directory
push_directory({str(run)!r}, "org/run")
print(nextlat.load("org/run").lm.peft_config)
try:
    push_directory({str(run)!r}, "org/run", token="hf_wrong")
except nextlat.NextLatError as error:
    print(error)
""",
        hub,
        tmp_path,
    )
    assert "LoraConfig" in printed and "the hub does not take org/run" in printed
    names = {*hub.repositories["org/run"]}
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "README.md"} <= names
    assert not any("optimizer" in name or "tmp" in name for name in names)


def test_only_a_saved_model_is_pushed(tmp_path: Path) -> None:
    from nextlat.hub import push_directory

    with pytest.raises(NextLatError, match="holds no saved model"):
        push_directory(tmp_path, "org/name")


# ---- the card ----


def test_the_card_says_what_is_there(tmp_path: Path) -> None:
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig(horizon=3))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for part in ("llama with NextLat", "horizon 3", "nextlat.load(", "AutoModelForCausalLM.from_"):
        assert part in text
    assert "## Measured" not in text and "## Training" not in text
    blocks = text.split("```python")[1:]
    assert len(blocks) == 2
    for block in blocks:
        compile(block.split("```")[0], "card", "exec")

    (tmp_path / "run.json").write_text('{"recipe_name": "r", "recipe": {"steps": 7}}')
    metric = '{"title": "Mean acceptance length", "value": 2.5, "stderr": 0.125}'
    (tmp_path / "results.json").write_text(f'{{"runs": [{{"metrics": [{metric}]}}]}}')
    assert "recipe r, optimiser steps 7" in card(tmp_path)
    assert "| Mean acceptance length | 2.5 ± 0.12 |" in card(tmp_path)

    (tmp_path / "README.md").write_text("Mine.")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."
    (tmp_path / "README.md").write_text(OURS)
    model.save_pretrained(tmp_path)
    assert "# llama" in (tmp_path / "README.md").read_text()


def test_the_card_of_a_part_does_not_offer_it_as_a_whole(tmp_path: Path) -> None:
    nextlat.attach(tiny_lm("llama"), nextlat.JTPConfig()).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "AutoModelForCausalLM" not in text and "only part of the model" in text
