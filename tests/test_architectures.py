"""The sweep of architectures on a few that stand for a kind each; all of them: `python
benchmarks/architectures.py`, whose table is docs/architectures.md."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import in_quick, load_benchmark

sweep: Any = load_benchmark("architectures")
DOCS = Path(__file__).parents[1] / "docs"

KINDS = {  # name -> what becomes of it
    "bamba": "plain",  # counts positions from 0 in every call unless it is told
    "minimax": "plain",  # a cache of its own kind beside the usual one
    "mamba": "plain",  # recurrent throughout
    "deepseek_v4": "plain",  # keeps its past in a way of its own
    "doge": "plain",  # other keys are selected where several tokens are read at a time
    "phi3, longrope": "drafts",  # begins its cache anew where the rotary factors change
    "qwen3, dynamic rotary factors": "drafts",
    "qwen2, sliding window": "drafts",  # with full attention beside it
    "llama4_text": "drafts",  # attention in chunks
    "gemma4": "drafts",  # a multimodal wrapper, and layers that share keys
    "rembert": "drafts",  # layers of its own in the head
    "bert": "drafts",  # positions that do not follow the mask
    "xlm, not causal": "refused",
    "reformer": "refused",
    "prophetnet": "refused",  # a head that is no function of one state
}


QUICK = {"mamba", "rembert", "qwen2, sliding window", "xlm, not causal", "prophetnet"}


@pytest.mark.parametrize("name", in_quick(KINDS, QUICK))
def test_it_is_right_or_refused(name: str) -> None:
    found = sweep.Report(lambda entry: None)
    model_type = name.split(",")[0]
    if model_type not in sweep.TYPES:
        pytest.skip(f"this version of transformers has no {model_type}")
    with torch.random.fork_rng():
        sweep.check(sweep.tiny_model(name), found)
    assert found.entry.get("wrong", []) == []
    assert sweep.state(found.entry) == KINDS[name]


def test_no_row_of_the_table_is_wrong() -> None:
    kept = json.loads((DOCS / "architectures" / "results.json").read_text())
    entries, of = kept["entries"], kept["versions"]
    newer = of["transformers"] != sweep.versions()["transformers"]
    assert newer or entries.keys() == set(sweep.NAMES)
    assert [name for name, entry in entries.items() if sweep.state(entry) == "wrong"] == []
    assert {name: sweep.state(entries[name]) for name in KINDS} == KINDS
    table = (DOCS / "architectures.md").read_text()
    assert table == sweep.table(entries, of)
    assert len(re.findall(r"^\| [\w-]+(?:, [\w ]+)? \| \w+ \|", table, re.MULTILINE)) > 150
