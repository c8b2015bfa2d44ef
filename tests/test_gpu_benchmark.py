"""The benchmark of everything that needs a GPU, at toy sizes: it is stopped, goes on with what is
missing, and a stage that fails is told and keeps no other from its turn."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import chat_tokenizer, tiny_lm

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The script with all that it writes in this folder."""
    options = ["--smoke", "--results", "gpu.json", "--work", "work", *words]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": str(ROOT / "src"),
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, dict[str, list[str]]]:
    """Its exit code and its table: stage -> the other cells."""
    out, err = process.communicate(timeout=300)
    assert "| stage | result | s | on |\n|---|---|---|---|\n" in out, err
    rows = [line.strip("| ").split(" | ") for line in out.splitlines()[2:]]
    return process.returncode, {name: cells for name, *cells in rows}


def outcomes(folder: Path) -> dict[str, Any]:
    path = folder / "gpu.json"
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def wait_for(process: subprocess.Popen[str], condition: Any) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("it never came so far")


def test_stopped_and_killed_it_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    process = started(tmp_path)
    wait_for(process, lambda: outcomes(tmp_path))
    process.send_signal(signal.SIGTERM)
    code, table = ended(process)
    first = outcomes(tmp_path)
    assert code == 130 and len(first) < len(table)
    assert all(cells[0] == "not run yet" for name, cells in table.items() if name not in first)

    process = started(tmp_path)
    wait_for(process, lambda: len(outcomes(tmp_path)) >= 3)
    process.kill()
    process.communicate()
    killed_at = outcomes(tmp_path)
    assert killed_at.items() >= first.items()

    obstacle = tmp_path / "work" / "tests.xml"
    obstacle.mkdir()
    code, table = ended(started(tmp_path))
    failed = outcomes(tmp_path)
    assert code == 1 and table.keys() == failed.keys()
    assert [name for name in failed if "error" in failed[name]] == ["tests/test_gpu.py"]
    assert table["tests/test_gpu.py"][0].startswith("FAILED: IsADirectoryError")
    obstacle.rmdir()

    code, table = ended(started(tmp_path))
    found = outcomes(tmp_path)
    for before in (killed_at, failed):
        kept = {name: outcome for name, outcome in before.items() if "result" in outcome}
        assert found.items() >= kept.items(), "what was measured is not measured again"
    assert code == 0 and table.keys() == found.keys()
    for name, (said, seconds, _) in table.items():
        assert said == found[name]["result"]["summary"].replace("|", "/")
        assert float(seconds) == round(found[name]["seconds"])

    result = {name: outcome["result"] for name, outcome in found.items()}
    equal = result["equality with a CPU"]["equal_rows"]["float32"]
    assert equal == {"0": 8, "1": 8, "4": 8, "auto": 8}
    for batch in (1, 8):
        for kind in ("compiled", "eager"):
            speed = result[f"{kind} decoding, batch {batch}"]
            assert speed["identical"] and speed["prompts"] == batch
            assert speed["ways"]["2"]["against"]["transformers, static cache"]
    assert result["tests/test_gpu.py"]["skipped"] > 30
    assert result["costs of drafts"]["draft vocabulary"]["2"]["v"][0] == 1
    assert {way["name"] for way in result["training"]["ways"]} >= {"nextlat", "bst"}
    assert set(result["memory of the losses"]["peak_bytes"]) >= {"next-token d=0", "nextlat d=4"}
    losses = result["torchrun"]["losses"]
    assert len(losses["DDP"]) == 4 and losses["DDP"] == pytest.approx(losses["alone"], rel=1e-4)
    assert result["study"]["finished"]

    code, again = ended(started(tmp_path, "--minutes", "0"))
    assert (code, again) == (0, table)


def test_a_drafter_for_a_chat_model(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    for name in ("chat", "silent"):
        lm = tiny_lm("llama", len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        lm.save_pretrained(tmp_path / name)
        if name == "silent":
            tokenizer.chat_template = None
        tokenizer.save_pretrained(tmp_path / name)
    code, table = ended(started(tmp_path, "chat"))
    found = outcomes(tmp_path)
    assert code == 0, found
    assert len(table) == 6 and "its own chats" in table["the model that decodes"][0]
    assert found["eager decoding, batch 1"]["result"]["identical"]

    _, err = started(tmp_path, "silent").communicate()
    assert "results of another model" in err
    (tmp_path / "gpu.json").unlink()
    code, table = ended(started(tmp_path, "silent"))
    assert code == 1
    said = {name: cells[0] for name, cells in table.items()}
    assert "no chat template" in said.pop("the model that decodes")
    assert set(said.values()) == {"not run yet"}
