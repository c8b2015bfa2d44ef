"""Whatever a model is, several processes train it as one does, in shards (FSDP2) or not, and go on
from each other's checkpoints, whenever they were stopped or killed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nextlat
import processes
from conftest import forget_sums
from nextlat.errors import NextLatError
from nextlat.training.checkpoints import last_complete_checkpoint
from nextlat.training.recipe import load_recipe
from nextlat.training.run_directory import read_metrics
from nextlat.training.train import train

ACCUMULATED = {"gradient_accumulation_steps": 2}
# Some biases of GPT-2 have a gradient of mere rounding, of which Adam makes whole steps.
SGD = {
    "optim": "sgd",
    "learning_rate": 0.1,
}
TRAININGS: dict[str, dict[str, Any]] = {
    "nextlat": {},
    "uneven": {"rows": "uneven", "arguments": ACCUMULATED},
    "tied": {"family": "gpt2", "arguments": SGD},
    "frozen": {"frozen": True},
    "lora": {"base": ""},
    "checkpointing": {"arguments": {"gradient_checkpointing": True}},
    "bf16": {"arguments": {"bf16": True}},
}
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
num_processes: 2
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: false
"""
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
RECIPE = shlex.split("""
    steps=6 batch_size=4 task.row_length=32 task.tests=5 run.save_every=2 run.log_every=1
    run.keep_checkpoints=3 schedule.warmup_steps=2 schedule.decay_steps=2 backbone.layers=2
    backbone.width=16
""")
NEXTLAT = ("-m", "nextlat", "train", "city-tiny", *RECIPE, "--no-evaluate", "--no-progress")


def start(*command: object) -> subprocess.Popen[str]:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(Path(nextlat.__file__).parents[1])])
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )


def finish(process: subprocess.Popen[str], *, fails: bool = False) -> str:
    said, _ = process.communicate(timeout=600)
    assert (process.returncode != 0) == fails, said
    return said


def run(
    plan: list[dict[str, Any]], file: Path, launcher: tuple[object, ...] = TORCHRUN, **ends: bool
) -> str:
    """Trainings one after the other in two processes."""
    for training in plan:
        Path(training["out"]).mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plan))
    return finish(start(*launcher, Path(__file__).with_name("processes.py"), file), **ends)


def planned(out: Path, name: str, **changes: Any) -> dict[str, Any]:
    training = {**TRAININGS[name], "out": str(out / name), **changes}
    if "base" in training:
        training["base"] = str(out.parent / "base")
    return training


def sharded(training: dict[str, Any]) -> dict[str, Any]:
    return {**training, "arguments": {**training.get("arguments", {}), "fsdp": True}}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Of every file of weights of a saved model."""
    files = [*directory.glob("*.safetensors"), *directory.glob("nextlat/*.safetensors")]
    return {f"{f.name}/{name}": x for f in files for name, x in load_file(f).items()}


def difference(a: Path, b: Path) -> float:
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    return max(float((x[name].float() - y[name].float()).abs().max()) for name in x)


def logged(out: Path) -> list[dict[str, float]]:
    lines = json.loads((out / "log.json").read_text())
    return [{k: v for k, v in line.items() if not k.startswith("train_")} for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    nextlat.llama(50, layers=2, width=32).save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """Every training in one process."""
    for name in TRAININGS:
        processes.train(planned(folder / "one", name))
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """Every training in two processes, with the whole model each and in shards."""
    plan = [planned(folder / "ddp", name) for name in TRAININGS]
    plan += [sharded(planned(folder / "fsdp", name)) for name in TRAININGS]
    run(plan, folder / "two.json")
    return folder


# ---- two processes are one ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_as_one(name: str, kind: str, one: Path, two: Path) -> None:
    limit = 5e-3 if name == "bf16" else 1e-5
    assert difference(one / name / "final", two / kind / name / "final") < limit
    relative = 5e-3 if name == "bf16" else 1e-4
    for a, b in zip(logged(one / name), logged(two / kind / name), strict=True):
        assert b == pytest.approx(a, rel=relative, abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_shards_are_saved_as_a_plain_model_and_an_optimiser_in_shards(two: Path) -> None:
    done = two / "fsdp" / "nextlat"
    plain = AutoModelForCausalLM.from_pretrained(done / "final")
    ids = torch.arange(6)[None]
    ours = nextlat.load(done / "checkpoint-4")
    assert torch.equal(plain(ids).logits, ours(ids).logits)
    shards = [load_file(path) for path in sorted((done / "checkpoint-4/optimizer").iterdir())]
    assert len(shards) == 2
    sizes = [sum(x.numel() for x in shard.values()) for shard in shards]
    assert max(sizes) < 0.6 * sum(sizes)  # each process has written what it has


# ---- checkpoints go on in any number of processes ----


@pytest.fixture(scope="module")
def resumed(folder: Path, one: Path, two: Path) -> Path:
    """Trainings that go on from the second step: out of those in <before>, as <before>-<after>."""
    plan = []
    for name in ("nextlat", "tied", "uneven", "frozen", "lora"):
        for before, after in (("one", "fsdp"), ("fsdp", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")):
            training = planned(folder / f"{before}-{after}", name)
            training["resume"] = str(folder / before / name / "checkpoint-2")
            plan.append(sharded(training) if after == "fsdp" else training)
        alone = planned(folder / "fsdp-one", name)
        processes.train({**alone, "resume": str(folder / "fsdp" / name / "checkpoint-2")})
    run(plan, folder / "resumed.json")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("way", ["one-fsdp", "fsdp-one", "fsdp-fsdp", "fsdp-ddp", "ddp-fsdp"])
@pytest.mark.parametrize("name", ["nextlat", "tied", "uneven", "frozen", "lora"])
def test_a_checkpoint_goes_on_in_another_number_of_processes(
    name: str, way: str, resumed: Path
) -> None:
    before = way.partition("-")[0]
    whole = difference(resumed / before / name / "final", resumed / way / name / "final")
    assert whole == 0 if way == "fsdp-fsdp" else whole < 1e-6
    start = resumed / before / name / "checkpoint-2"
    assert difference(start, resumed / way / name / "final") > 1e-5  # it has gone on


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_a_damaged_shard_is_found(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "fsdp" / "nextlat", tmp_path / "run")
    newest = tmp_path / "run/checkpoint-4"
    lost = sorted((newest / "optimizer").iterdir())[1]
    lost.unlink()
    found, faults = last_complete_checkpoint(tmp_path / "run")
    assert found is not None and found.name == "checkpoint-2"
    assert faults == [
        f"checkpoint-4 is damaged (optimizer/{lost.name} is missing (see nextlat/SHA256SUMS))"
    ]
    forget_sums(newest)
    longer = planned(tmp_path, "nextlat", arguments={"max_steps": 6}, resume=str(newest))
    with pytest.raises(NextLatError, match="is not of this run"):
        processes.train(longer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_while_it_saves_loses_nothing_already_written(
    rank: int, two: Path, tmp_path: Path
) -> None:
    training = sharded(planned(tmp_path, "nextlat"))
    run([{**training, "stop": [4, rank, 0]}], tmp_path / "plan.json", fails=True)
    found, faults = last_complete_checkpoint(tmp_path / "nextlat")
    assert found is not None and found.name == "checkpoint-2" and not faults
    run([{**training, "resume": str(found)}], tmp_path / "plan.json")
    assert difference(two / "fsdp/nextlat/final", tmp_path / "nextlat/final") == 0


# ---- recipes, launchers ----


@pytest.fixture(scope="module")
def recipe_run(folder: Path) -> Path:
    return train(load_recipe("city-tiny", RECIPE), folder / "recipe")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_recipe_in_shards_is_stopped_and_goes_on(
    launcher: str, recipe_run: Path, tmp_path: Path
) -> None:
    config = tmp_path / "fsdp.yaml"
    config.write_text(FSDP)
    accelerate = ("accelerate.commands.launch", "--config_file", config)
    start_with = TORCHRUN if launcher == "torchrun" else accelerate
    command = (*start_with, *NEXTLAT, "run.parallel=fsdp", "--out", tmp_path / "run")
    stopped = start(*command)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run/checkpoint-2").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate(timeout=300)[0]
    if stopped.returncode:  # it may have been done by then
        assert said.count("the same command goes on from there") == 1
    said = finish(start(*command))
    assert said.count("The model is in") == 1
    assert difference(recipe_run, tmp_path / "run") < 1e-6
    both = [read_metrics(run) for run in (recipe_run, tmp_path / "run")]
    for a, b in zip(*both, strict=True):
        a, b = ({k: v for k, v in line.items() if k != "seconds"} for line in (a, b))
        assert b == pytest.approx(a, rel=1e-4, abs=1e-7)
