"""Several processes that train one model, over gloo on the CPU: DDP and FSDP2 against one process,
checkpoints between them, and configurations that cannot be."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

import nextlat
from conftest import tiny_lm
from nextlat import NextLatConfig, NextLatError, attach
from nextlat.objectives import OBJECTIVES
from nextlat.training import ranks
from nextlat.training.run_directory import read_metrics
from nextlat.training.sharding import plugin_of, units

SCRIPT = Path(__file__).with_name("processes.py")
FSDP = {"fsdp": True}
TINY = [
    *("steps=6", "batch_size=4", "task.row_length=32", "task.tests=5", "run.save_every=2"),
    *("run.log_every=1", "run.eval_every=3", "schedule.warmup_steps=2", "schedule.decay_steps=2"),
    *("backbone.layers=1", "backbone.width=16", "run.keep_checkpoints=3"),
]


def run(
    *command: Any, processes: int = 1, launcher: tuple[str, ...] = (), **settings: Any
) -> subprocess.CompletedProcess[str]:
    """A command of Python's, by torchrun or another launcher for several processes."""
    if processes > 1 and not launcher:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    source = Path(nextlat.__file__).parents[1]
    path = os.pathsep.join(map(str, (source, SCRIPT.parent)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **settings}
    words = [sys.executable, *launcher, *map(str, command)]
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def train_all(path: Path, trainings: list[dict[str, Any]], **how: Any) -> None:
    path.write_text(json.dumps(trainings))
    done = run(SCRIPT, path, **how)
    assert done.returncode == 0, done.stderr


def difference(a: Path, b: Path) -> float:
    """The largest between weights, which have the same names."""
    largest = 0.0
    for file in ("model.safetensors", "nextlat/objective.safetensors"):
        if (a / file).exists() or (b / file).exists():
            x, y = load_file(a / file), load_file(b / file)
            assert x.keys() == y.keys()
            largest = max([largest, *(float((x[k] - y[k]).abs().max()) for k in x)])
    return largest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/, ddp/ and fsdp/: every objective, rows of which some micro-batches have no label."""
    root = tmp_path_factory.mktemp("ranks")
    ways: dict[str, list[dict[str, Any]]] = {"one": [], "ddp": [], "fsdp": []}
    for way, trainings in ways.items():
        arguments = FSDP if way == "fsdp" else {}
        for name in OBJECTIVES:
            one = {"objective": name, "rows": "uneven", "arguments": arguments}
            trainings.append({"out": f"{root}/{way}/{name}", **one})
        more = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, **arguments}
        out = {"out": f"{root}/{way}/parts", "rows": "uneven", "family": "qwen3"}
        trainings.append({**out, "arguments": more})
    train_all(root / "one.json", ways["one"])
    train_all(root / "two.json", ways["ddp"] + ways["fsdp"], processes=2)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", [*OBJECTIVES, "parts"])
def test_two_processes_equal_one(trained: Path, name: str, way: str) -> None:
    one, two = trained / "one" / name, trained / way / name
    assert difference(one / "final", two / "final") < 3e-6
    a, b = (json.loads((path / "log.json").read_text()) for path in (one, two))
    timed = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        kept = {key: value for key, value in x.items() if key not in timed}
        assert {key: y[key] for key in kept} == pytest.approx(kept, rel=1e-4, abs=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(two / "final")
    again = nextlat.load(two / "checkpoint-4")
    for x, y in zip(plain.parameters(), again.lm.parameters(), strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_than_it_began(trained: Path, tmp_path: Path) -> None:
    same = {"rows": "uneven", "objective": "nextlat"}
    begun = {way: str(trained / way / "nextlat" / "checkpoint-2") for way in ("one", "fsdp", "ddp")}
    two = [
        {**same, "out": f"{tmp_path}/{way}-{start}", "resume": begun[start], "arguments": arguments}
        for way, arguments in {"fsdp": FSDP, "ddp": {}}.items()
        for start in begun
    ]
    train_all(tmp_path / "two.json", two, processes=2)
    train_all(
        tmp_path / "one.json", [{**same, "out": f"{tmp_path}/one-fsdp", "resume": begun["fsdp"]}]
    )
    whole = trained / "one" / "nextlat" / "final"
    for path in sorted(tmp_path.glob("*/final")):
        assert difference(whole, path) < 3e-6, path.parent.name
    assert len(list(tmp_path.glob("*/final"))) == 7
    for way in ("fsdp", "ddp"):  # with as many processes as before: no bit is another
        assert difference(trained / way / "nextlat" / "final", tmp_path / f"{way}-{way}/final") == 0


@pytest.mark.slow
def test_a_recipe_in_shards_is_the_same_run_and_can_be_stopped(tmp_path: Path) -> None:
    train = ("-m", "nextlat", "train", "city-tiny", *TINY, "--no-evaluate", "--out")
    done = run(*train, tmp_path / "one", "--no-progress")
    assert done.returncode == 0, done.stderr
    nextlat_run = ("-m", *train[1:])
    done = run(*nextlat_run, tmp_path / "two", "run.parallel=fsdp", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The model is in") + done.stdout.count("The model is in") <= 1
    assert difference(tmp_path / "one", tmp_path / "two") < 3e-6
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(tmp_path / way)]
        for way in ("one", "two")
    ]
    for x, y in zip(*lines, strict=True):
        assert y == pytest.approx(x, rel=1e-3, abs=1e-6)

    record = json.loads((tmp_path / "two" / "run.json").read_text())
    (tmp_path / "two" / "run.json").write_text(json.dumps({**record, "status": "running"}))
    for path in ("config.json", "model.safetensors", "checkpoint-6/optimizer.pt"):
        (tmp_path / "two" / path).unlink()
    done = run(*train, tmp_path / "two", "--no-progress")  # alone, from checkpoint-4 in shards
    assert done.returncode == 0, done.stderr
    assert "checkpoint-6" in done.stderr and difference(tmp_path / "one", tmp_path / "two") < 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_errors_are_said_once_and_a_lost_process_loses_nothing(tmp_path: Path, way: str) -> None:
    train = ("-m", "nextlat", "train", "city-tiny", *TINY, f"run.parallel={way}", "--out")
    done = run(*train, tmp_path / "odd", "batch_size=3", processes=2)
    assert done.returncode and done.stderr.count("cannot be split over 2 processes") == 1
    assert done.stderr.count("Traceback") == 1, "torchrun's own"

    stop = {"stop": [3, 1, int(signal.SIGKILL)], "rows": "uneven"}
    arguments = FSDP if way == "fsdp" else {}
    (tmp_path / "kill.json").write_text(
        json.dumps([{"out": f"{tmp_path}/killed", "arguments": arguments, **stop}])
    )
    done = run(SCRIPT, tmp_path / "kill.json", processes=2)
    assert done.returncode and (tmp_path / "killed" / "checkpoint-2").is_dir()
    resume = {"resume": f"{tmp_path}/killed/checkpoint-2", "rows": "uneven"}
    train_all(tmp_path / "on.json", [{"out": f"{tmp_path}/on", **resume}])


@pytest.mark.slow
def test_accelerate_is_a_launcher_too(trained: Path, tmp_path: Path) -> None:
    launch = ("-m", "accelerate.commands.launch", "--num_processes=2", "--use_fsdp")
    plan = (
        "--fsdp_version=2",
        "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
        "--fsdp_cpu_ram_efficient_loading=false",
    )
    out = {"out": f"{tmp_path}/run", "objective": "nextlat", "rows": "uneven"}
    train_all(tmp_path / "a.json", [out], processes=2, launcher=(*launch, *plan))
    assert (tmp_path / "run" / "checkpoint-2" / "optimizer").is_dir()
    assert difference(trained / "one" / "nextlat" / "final", tmp_path / "run" / "final") < 3e-6


def plan(**settings: Any) -> Any:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **settings
    )


def test_units_are_the_decoder_layers_and_a_plan_that_splits_the_head_is_refused() -> None:
    model = attach(tiny_lm("llama"), NextLatConfig())
    layers = list(model.lm.model.layers)
    assert units(model, plan()) == layers
    assert units(model, plan(transformer_cls_names_to_wrap=["LlamaDecoderLayer"])) == layers
    for name in ("LlamaForCausalLM", "LlamaModel", "Embedding", "Linear"):
        with pytest.raises(NextLatError, match="FSDP plan wraps"):
            units(model, plan(transformer_cls_names_to_wrap=[name]))
    with pytest.raises(NextLatError, match="GPT2Block, which is no part"):
        units(model, plan(transformer_cls_names_to_wrap=["GPT2Block"]))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alone": ({"fsdp": True}, "this one is alone"),
    "half precision": ({"fsdp": True, "world": 2, "mixed_precision": "fp16"}, "leave fp16 out"),
    "compiled": ({"fsdp": True, "world": 2, "torch_compile": True}, "uncompiled"),
    "version 1": ({"fsdp_config": {"fsdp_version": 1}}, "version"),
    "by size": ({"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}, "by their size"),
    "offload": ({"fsdp_config": {"cpu_offload": True}}, "cpu_offload"),
    "checkpointing": ({"fsdp_config": {"activation_checkpointing": True}}, "gradient_checkpoint"),
    "not asked for": ({"fsdp": False, "config": {"version": 2}}, "without fsdp=True"),
    "unknown": ({"fsdp": True, "world": 2, "config": {"wrap": "Linear"}}, "has wrap, which FSDP2"),
    "of FSDP1": ({"fsdp": True, "world": 2, "config": {"limit_all_gathers": True}}, "leave it out"),
    "each node": ({"fsdp": True, "world": 2, "each_node": True}, "one directory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_that_would_be_ignored_is_refused(case: str, tmp_path: Path) -> None:
    given, words = REFUSED[case]
    if "fsdp_config" in given:
        plugin = {"fsdp_version": 2, "cpu_ram_efficient_loading": False} | given["fsdp_config"]
        given = {"fsdp": True, "world": 2, "fsdp_plugin_args": plugin}
    args = Arguments(**given)
    with pytest.raises(NextLatError, match=words) as caught:
        plugin_of(args)
    assert "\n" not in str(caught.value)


class Arguments:
    """Those of TrainingArguments that a plan depends on, which themselves would look for the other
    processes."""

    def __init__(
        self,
        fsdp: bool,
        world: int = 1,
        mixed_precision: str = "no",
        torch_compile: bool = False,
        fsdp_plugin_args: Any = None,
        config: Any = None,
        each_node: bool = False,
    ) -> None:
        self.fsdp, self.world_size, self.mixed_precision = fsdp, world, mixed_precision
        self.torch_compile, self.fsdp_plugin_args = (
            torch_compile,
            fsdp_plugin_args or {"fsdp_version": 2},
        )
        self.fsdp_config, self.save_on_each_node = config, each_node


ENVIRONMENT = {
    "WORLD_SIZE": ("2", "start them with torchrun"),
    "LOCAL_RANK": ("0", "start them with torchrun"),
    "ACCELERATE_USE_DEEPSPEED": ("true", "configured for DeepSpeed"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "4 gradient accumulation steps"),
    "ACCELERATE_MIXED_PRECISION": ("bf16", "mixed precision bf16"),
    "ACCELERATE_DYNAMO_BACKEND": ("inductor", "compile with inductor"),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_an_environment_that_training_would_ignore_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.check_environment(accumulation=1, precision="no", compiled=False)
    value, words = ENVIRONMENT[name]
    monkeypatch.setenv(name, value)
    with pytest.raises(NextLatError, match=words):
        ranks.check_environment(accumulation=1, precision="no", compiled=False)


def test_only_training_is_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NextLatError, match="start it without torchrun"):
        ranks.refuse_several("nextlat evaluate")


def test_a_trainer_with_fsdp_but_one_process_says_so(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), fsdp=True, use_cpu=True, report_to="none")
    with pytest.raises(NextLatError, match="this one is alone"):
        nextlat.NextLatTrainer(attach(tiny_lm("llama"), NextLatConfig()), args)


ENDS_EARLY = """
import sys, time
import torch
from torch import distributed
from nextlat.training import ranks

ranks.join()
sys.setswitchinterval(100)
for _ in range(9):  # nobody but gloo holds these tensors
    distributed.all_reduce(torch.ones(9), async_op=True)
until = time.monotonic() + 0.5
while time.monotonic() < until:  # the interpreter is busy when the messages arrive, and then ends
    pass
"""


@pytest.mark.slow
def test_a_script_may_end_while_gloo_still_holds_tensors(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(ENDS_EARLY)
    done = run(tmp_path / "ends.py", processes=2)
    assert done.returncode == 0, done.stderr
