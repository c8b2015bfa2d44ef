"""The benchmark of training cost: it leaves out no objective, and its memory figures are those of
tensors of known size."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conftest import load_benchmark
from nextlat.objectives import OBJECTIVES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("training")


def test_peak_memory_is_the_most_that_is_held_at_once(benchmark: ModuleType) -> None:
    def action() -> None:
        a = torch.ones(1000, 250)  # 1 MB
        b = a + 1  # 2 MB held
        del b
        c = torch.cat([a, a])  # 3 MB
        del a
        torch.cat([c, c])[:1].clone()  # 2 + 4 MB, and 1 kB

    assert benchmark.peak_memory(action, torch.device("cpu")) == pytest.approx(6_001_000, abs=500)


def test_every_objective_is_measured_at_every_horizon(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    small = [
        "--layers=1",
        "--width=16",
        "--heads=2",
        "--vocabulary=40",
        "--length=12",
        "--batch=2",
        "--turns=2",
        "--steps=1",
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        ["training.py", *small, "--horizons", "1", "3", f"--out={tmp_path / 'training.json'}"],
    )
    benchmark.main()
    content = json.loads((tmp_path / "training.json").read_text())
    expected = [
        (name, horizon)
        for name, (config_type, _) in OBJECTIVES.items()
        for horizon in ([1, 3] if "horizon" in config_type.model_fields else [0])
    ]
    assert [(way["name"], way["horizon"]) for way in content["ways"]] == expected
    ways = {(way["name"], way["horizon"]): way for way in content["ways"]}
    assert ways["next-token", 0]["speed_against_next_token"] == [1, 1]
    by_flops = {key: way["speed_by_flops"] for key, way in ways.items()}
    assert by_flops["next-token", 0] == 1
    assert (
        all(by_flops[name, 3] < by_flops[name, 1] < 1 for name, horizon in expected if horizon)
        and by_flops["bst", 0] < 1
    )
    assert all(
        len(way["speed_against_next_token"]) == 2 and way["peak_bytes"] > 0
        for way in content["ways"]
    )
    out, err = capsys.readouterr()
    header, *lines = out.splitlines()
    end = header.index("by FLOPs") + len("by FLOPs")
    assert [line[end - 8 : end].strip() for line in lines] == [
        f"{by_flops[key]:.2f}" for key in expected
    ]
    assert "x-transformers is not installed" in err
