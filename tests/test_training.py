"""Training: trajectories that do not depend on how they are cut up, a run directory that survives
whatever happens to it."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import nextlat
from nextlat.errors import NextLatError
from nextlat.tasks import TASKS
from nextlat.training import train as training
from nextlat.training.build import build_model
from nextlat.training.checkpoints import (
    checkpoints,
    last_complete_checkpoint,
    rotate_checkpoints,
)
from nextlat.training.held_out import evaluation_loss
from nextlat.training.recipe import Recipe, load_recipe
from nextlat.training.run_directory import is_finished, read_metrics, read_record, sole_writer
from nextlat.training.train import FirstRows, Interrupted, train
from nextlat.training.trainer import NextLatTrainer
from test_files import largest_file

pytestmark = pytest.mark.slow

TINY = [
    "steps=6",
    "batch_size=4",
    "task.row_length=32",
    "task.tests=5",
    "run.save_every=2",
    "run.log_every=1",
    "schedule.warmup_steps=2",
    "schedule.decay_steps=2",
    "backbone.layers=1",
    "backbone.width=16",
]


def tiny(*overrides: str, **arguments: Any) -> Recipe:
    return load_recipe("city-tiny", [*TINY, *overrides], **arguments)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        **load_file(run / "model.safetensors"),
        **load_file(run / "nextlat/objective.safetensors"),
    }


def largest_difference(a: Path, b: Path) -> float:
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    return max(float((x[name] - y[name]).abs().max()) for name in x)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_metrics(run)
    ]


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Do something when the `number`-th forward and backward pass (from 1) begins."""
    done = 0
    original = NextLatTrainer.training_step

    def step(self: NextLatTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == number:
            action()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(NextLatTrainer, "training_step", step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the tiny recipe."""
    return train(
        tiny("run.keep_checkpoints=3"), tmp_path_factory.mktemp("runs") / "whole", progress=False
    )


# ---- trajectories ----


def test_accumulating_eight_rows_equals_eight_at_once(tmp_path: Path) -> None:
    """Each loss part is divided by its own count over the step: rows with fewer valid positions
    must not weigh more."""
    shorter = (
        "steps=3",
        "schedule.warmup_steps=1",
        "schedule.decay_steps=1",
        "run.save_every=0",
        "batch_size=8",
    )
    recipes = [tiny(*shorter, f"gradient_accumulation={n}", horizon=3) for n in (1, 8)]
    runs = [train(recipe, tmp_path / str(n), progress=False) for n, recipe in enumerate(recipes)]
    assert largest_difference(*runs) < 1e-6
    for a, b in zip(*map(metrics, runs), strict=True):
        assert a.keys() == b.keys()
        assert all(b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-7) for key in a)


def test_same_seed_same_bits_other_seed_other_weights(whole: Path, tmp_path: Path) -> None:
    again = train(tiny("run.keep_checkpoints=3"), tmp_path / "again", progress=False)
    assert largest_difference(whole, again) == 0
    assert metrics(whole) == metrics(again)
    assert largest_difference(whole, train(tiny(seed=1), tmp_path / "other", progress=False)) > 1e-3


def test_rows_prepared_in_another_process_are_the_same(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("run.workers=1")
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted) as stopped:
            train(recipe, tmp_path / "run", progress=False)
    assert (stopped.value.step, stopped.value.signal) == (3, signal.SIGTERM)
    train(recipe, tmp_path / "run", progress=False)
    assert largest_difference(whole, tmp_path / "run") == 0
    assert metrics(whole) == metrics(tmp_path / "run")


def test_objectives_start_from_the_same_transformer() -> None:
    task = tiny().task.build()
    torch.manual_seed(123)  # nothing may come from the surroundings
    plain = build_model(tiny(objective="next-token"), task).lm.state_dict()
    torch.manual_seed(321)
    ours = build_model(tiny(), task)
    assert all(torch.equal(plain[name], value) for name, value in ours.lm.state_dict().items())
    dynamics = build_model(tiny(), task).objective.state_dict()
    assert all(
        torch.equal(dynamics[name], value) for name, value in ours.objective.state_dict().items()
    )
    assert not all(
        torch.equal(plain[name], v)
        for name, v in build_model(tiny(seed=1), task).lm.state_dict().items()
    )


def test_kill_anywhere_and_the_same_command_ends_with_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL at operations all over a run: steps, saves, rotation, the final export. See
    killed_runs.py."""
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, "4", "0"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for series in report["series"]:
        assert series["identical"], series
        assert series["leftovers"] == [], series
    assert {"training_step", "save", "fsync", "replace", "rmtree"} <= set(report["operations"])
    assert len({operation for series in report["series"] for operation in series["hit"]}) > 1


def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, before = tiny("run.keep_checkpoints=3"), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(
            Interrupted, match=r"stopped after step 3.*the same command goes on"
        ) as stopped:
            train(recipe, tmp_path / "run", progress=False)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]
    assert not is_finished(tmp_path / "run")
    with pytest.raises(NextLatError, match=r"differs in seed"):
        train(tiny("run.keep_checkpoints=3", seed=1), tmp_path / "run", progress=False)
    train(recipe, tmp_path / "run", progress=False)
    assert largest_difference(whole, tmp_path / "run") == 0
    assert metrics(whole) == metrics(tmp_path / "run")
    assert (read_record(tmp_path / "run") or {})["resumed_at"] == [3]


def test_settings_that_do_not_change_the_result_may_change_on_resume(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train(tiny("run.keep_checkpoints=3"), run)
    others = tiny(
        "run.save_every=1",
        "run.keep_checkpoints=2",
        "run.log_every=2",
        "run.eval_every=5",
        "run.workers=1",
        "run.threads=1",
    )
    with pytest.raises(NextLatError, match=r"differs in run.precision\b"):
        train(tiny("run.precision=bf16"), run)
    train(others, run)
    assert largest_difference(whole, run) == 0
    assert (read_record(run) or {})["recipe"] == others.to_dict()
    assert [path.name for path in checkpoints(run)] == ["checkpoint-5", "checkpoint-6"]
    assert [line["step"] for line in metrics(run) if "eval_loss" in line] == [5, 6]


def test_warm_up_of_the_lambdas_counts_optimiser_steps_through_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(
        "objectives.nextlat.warmup_steps=5", "gradient_accumulation=2", "run.keep_checkpoints=1"
    )
    uninterrupted = train(recipe, tmp_path / "uninterrupted", progress=False)
    with monkeypatch.context() as patch:
        before_step(
            patch, 6, lambda: os.kill(os.getpid(), signal.SIGINT)
        )  # the second half of the third batch
        with pytest.raises(Interrupted, match="stopped after step 3"):
            train(recipe, tmp_path / "run", progress=False)
    train(recipe, tmp_path / "run", progress=False)
    assert largest_difference(uninterrupted, tmp_path / "run") == 0
    assert metrics(uninterrupted) == metrics(tmp_path / "run")
    steps = [line for line in metrics(uninterrupted) if "loss" in line]
    for line, share in zip(steps, [0.2, 0.4, 0.6, 0.8, 1, 1], strict=True):
        assert line["loss"] == pytest.approx(
            line["next_token"] + share * (line["next_h"] + 0.1 * line["kl"]), rel=1e-5
        )
    (final,) = (line for line in metrics(uninterrupted) if "eval_loss" in line)
    full = final["eval_next_token"] + final["eval_next_h"] + 0.1 * final["eval_kl"]
    assert final["eval_loss"] == pytest.approx(full, rel=1e-5)


def test_two_processes_equal_one(whole: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from nextlat.training.recipe import load_recipe; "
        "from nextlat.training.train import train; "
        "train(load_recipe('city-tiny', sys.argv[2:]), sys.argv[1], progress=False)"
    )
    (tmp_path / "main.py").write_text(code)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            tmp_path / "main.py",
            tmp_path / "run",
            *TINY,
        ],
        check=True,
        capture_output=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert largest_difference(whole, tmp_path / "run") < 1e-6
    a, b = metrics(whole), metrics(tmp_path / "run")
    assert all(y == pytest.approx(x, rel=1e-4, abs=1e-7) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of torch's own, when it imports its compiler
def test_compiled_layers_train_the_same(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.nn.Module.compile
    compiled: list[str] = []

    def without_code_generation(self: torch.nn.Module) -> None:
        compiled.append(type(self).__name__)
        original(self, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_code_generation)
    run = train(tiny("run.compile=true"), tmp_path / "run", progress=False)
    assert compiled == ["LlamaModel"]
    assert largest_difference(whole, run) < 1e-6
    assert (
        load_file(run / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()
    )


# ---- what is logged, and the settings that reach the optimiser ----


def test_metrics_hold_every_part_at_every_step(whole: Path) -> None:
    lines = read_metrics(whole)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert line["loss"] == pytest.approx(
            line["next_token"] + line["next_h"] + 0.1 * line["kl"], rel=1e-5
        )
        assert line["grad_norm"] > 0
    # Linear warm-up over two steps, then constant, then linearly to zero over the last two.
    assert [line["learning_rate"] for line in steps] == pytest.approx(
        [0, 1.5e-3, 3e-3, 3e-3, 3e-3, 1.5e-3]
    )
    rows = tiny().task.build().train_dataset(0)
    assert steps[-1]["tokens"] == sum(int(rows[i]["attention_mask"].sum()) for i in range(6 * 4))
    assert [line["step"] for line in lines if "eval_next_token" in line] == [6]
    seconds = [line["seconds"] for line in steps]
    assert seconds == sorted(seconds)


def test_logged_losses_are_means_over_the_steps_since_the_last_line(
    whole: Path, tmp_path: Path
) -> None:
    train(
        tiny("run.log_every=3", "run.eval_every=4", "run.save_every=0"),
        tmp_path / "run",
        progress=False,
    )
    every = [line for line in read_metrics(whole) if "loss" in line]
    lines = read_metrics(tmp_path / "run")
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [3, 6]
    for name in ("loss", "next_token", "next_h", "kl"):
        means = [sum(line[name] for line in every[i : i + 3]) / 3 for i in (0, 3)]
        assert [line[name] for line in logged] == pytest.approx(means, rel=1e-5)
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 6]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (
            ["schedule.name=constant", "schedule.decay_steps=", "schedule.warmup_steps=0"],
            [1, 1, 1, 1],
        ),
        (
            ["schedule.name=constant", "schedule.decay_steps=", "schedule.warmup_steps=2"],
            [0, 0.5, 1, 1],
        ),
        (
            ["schedule.name=linear", "schedule.decay_steps=", "schedule.warmup_steps=0"],
            [1, 0.75, 0.5, 0.25],
        ),
        (
            ["schedule.name=cosine", "schedule.decay_steps=", "schedule.warmup_steps=0"],
            [1, 0.853553, 0.5, 0.146447],
        ),
        (["schedule.decay_steps=4", "schedule.warmup_steps=0"], [1, 0.75, 0.5, 0.25]),
    ],
)
def test_schedules(tmp_path: Path, schedule: list[str], rates: list[float]) -> None:
    recipe = tiny(
        "steps=4",
        "run.save_every=0",
        "optimizer.learning_rate=1e-5",
        *schedule,
        objective="next-token",
    )
    train(recipe, tmp_path / "run", progress=False)
    logged = [
        line["learning_rate"] / 1e-5 for line in read_metrics(tmp_path / "run") if "loss" in line
    ]
    assert logged == pytest.approx(rates, rel=1e-4)


def test_gradient_clipping_acts_and_is_off_by_default(tmp_path: Path) -> None:
    common = [
        "steps=2",
        "schedule.warmup_steps=0",
        "schedule.decay_steps=1",
        "run.save_every=0",
        "optimizer.weight_decay=0",
    ]
    start = {
        name: value.clone()
        for name, value in build_model(tiny(), tiny().task.build()).lm.state_dict().items()
    }
    moved = {}
    for clip in (
        0,
        1e-12,
    ):  # so small that Adam's epsilon dominates: a clipped run all but stands still
        run = train(
            tiny(*common, f"optimizer.gradient_clip={clip}"), tmp_path / str(clip), progress=False
        )
        saved = load_file(run / "model.safetensors")
        moved[clip] = max(float((saved[name] - start[name]).abs().max()) for name in saved)
    assert moved[0] > 1e-3
    assert moved[1e-12] < 1e-5


def test_evaluation_loss_does_not_depend_on_the_batch() -> None:
    recipe = tiny(horizon=3)
    task = recipe.task.build()
    model, rows = build_model(recipe, task), FirstRows(task.train_dataset(7), 5)
    together = evaluation_loss(model, rows, 5)
    assert together.keys() == {"loss", "next_token", "next_h", "kl"}
    for batch_size in (1, 2):
        assert evaluation_loss(model, rows, batch_size) == pytest.approx(together, rel=1e-5)
    assert model.training  # as it was


def test_rows_are_read_in_order_and_begin_again() -> None:
    three: Any = [{"input_ids": torch.tensor([i])} for i in range(3)]
    rows = FirstRows(three, 7)
    assert [int(rows[i]["input_ids"]) for i in range(len(rows))] == [0, 1, 2, 0, 1, 2, 0]


def test_mixed_precision_keeps_fp32_weights_and_full_precision_can_follow(
    whole: Path, tmp_path: Path
) -> None:
    run = train(tiny("run.precision=bf16"), tmp_path / "bf16", progress=False)
    assert all(value.dtype == torch.float32 for value in weights(run).values())
    assert 0 < largest_difference(whole, run) < 0.1
    assert (
        largest_difference(
            whole, train(tiny("run.keep_checkpoints=1"), tmp_path / "fp32", progress=False)
        )
        == 0
    )


# ---- the run directory ----


def test_run_directory_is_a_plain_model_without_this_package(whole: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['nextlat'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "lm = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('3 7 N E', return_tensors='pt').input_ids\n"
        "logits, end = lm(ids).logits.detach(), lm.generation_config.eos_token_id\n"
        "torch.save((ids, logits, lm.config.use_cache, end), sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, whole, tmp_path / "logits.pt"], check=True, timeout=600
    )
    ids, logits, use_cache, eos = torch.load(tmp_path / "logits.pt")
    model = nextlat.load(whole)
    with torch.no_grad():
        assert torch.equal(logits, model(ids).logits)
    assert torch.equal(
        logits, AutoModelForCausalLM.from_pretrained(whole / "checkpoint-6")(ids).logits.detach()
    )
    assert use_cache is True  # the Trainer switches it off while training
    assert AutoTokenizer.from_pretrained(whole).decode([eos]) == "end"
    assert (
        len({path.stat().st_mode for path in whole.glob("*") if path.is_file()}) == 1
    )  # all readable by the same people


def test_record_says_what_was_done(whole: Path) -> None:
    record = read_record(whole)
    assert record is not None
    assert (record["status"], record["steps"], record["seed"], record["resumed_at"]) == (
        "finished",
        6,
        0,
        [],
    )
    assert Recipe.from_dict(record["recipe"], "city-tiny") == tiny("run.keep_checkpoints=3")
    assert record["task"] == {"name": "streets", "fingerprint": tiny().task.build().fingerprint()}
    assert record["parameters"] == {
        "lm": sum(value.numel() for value in load_file(whole / "model.safetensors").values()),
        "objective": sum(
            value.numel() for value in load_file(whole / "nextlat/objective.safetensors").values()
        ),
    }
    assert record["tokens"] == read_metrics(whole)[-2]["tokens"]
    assert record["versions"]["torch"] == torch.__version__
    assert {"command", "git", "device", "threads", "seconds"} <= record.keys()


def test_finished_run_is_left_as_it_is(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in whole.rglob("*")}
    with caplog.at_level(logging.INFO, "nextlat"):
        assert train(tiny("run.keep_checkpoints=3"), whole, progress=False) == whole
    assert is_finished(whole)
    assert "is finished" in caplog.text
    assert {
        path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in whole.rglob("*")
    } == before


def test_setting_that_came_with_a_later_version_is_no_difference(
    whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    record = json.loads((run / "run.json").read_text())
    del record["recipe"]["run"]["workers"]
    for name in (
        "next_h_loss",
        "kl_loss",
        "stop_gradient_head",
        "dynamics",
        "warmup_steps",
        "separate_norms",
        "zero_init",
    ):
        del record["recipe"]["objectives"]["nextlat"][name]
    (run / "run.json").write_text(json.dumps(record))
    assert train(tiny("run.keep_checkpoints=3"), run, progress=False) == run


def test_run_of_another_recipe_or_objective_is_refused(whole: Path) -> None:
    with pytest.raises(NextLatError, match=r"differs in steps, optimizer.learning_rate"):
        train(
            tiny("run.keep_checkpoints=3", "steps=7", "optimizer.learning_rate=1"),
            whole,
            progress=False,
        )
    with pytest.raises(
        NextLatError, match="run directory of another objective, nextlat, not next-token"
    ):
        train(tiny("run.keep_checkpoints=3", objective="next-token"), whole, progress=False)


def test_finished_run_with_a_damaged_model_is_named(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    os.truncate(run / "model.safetensors", 1000)
    with pytest.raises(NextLatError, match=r"is damaged: .*model.safetensors"):
        train(tiny("run.keep_checkpoints=3"), run, progress=False)


def test_directory_that_is_no_run_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NextLatError, match=r"holds config.json but no run.json"):
        train(tiny(), tmp_path, progress=False)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(NextLatError, match=r"run.json is corrupt"):
        train(tiny(), tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "run.json"}


def test_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NextLatError, match=r"cannot write .*Not a directory; choose another place"):
        train(tiny(), tmp_path / "file" / "run", progress=False)
    with pytest.raises(NextLatError, match=r"cannot write .*File exists"):
        train(tiny(), tmp_path / "file", progress=False)


def test_two_writers_in_one_directory_are_refused(tmp_path: Path) -> None:
    with sole_writer(tmp_path), pytest.raises(NextLatError, match="another process is training"):
        train(tiny(), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_outlive_a_killed_one_do_not_keep_its_lock(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from nextlat.training.run_directory import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.close(1)\n"
        "        time.sleep(600)\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    try:
        with sole_writer(tmp_path):
            pass
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


def test_task_that_has_changed_under_a_run_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    monkeypatch.setattr(
        type(TASKS["streets"]().build()), "fingerprint", lambda self: "another city"
    )
    with pytest.raises(NextLatError, match="the data of task streets"):
        train(tiny("run.keep_checkpoints=3"), run, progress=False)


# ---- damage ----

DAMAGE: dict[str, Callable[[Path], object]] = {
    "model.safetensors is truncated": lambda c: os.truncate(c / "model.safetensors", 3000),
    "model.safetensors is missing": lambda c: (c / "model.safetensors").unlink(),
    "objective.safetensors is truncated": lambda c: os.truncate(
        c / "nextlat/objective.safetensors", 4
    ),
    "optimizer.pt is corrupt": lambda c: os.truncate(c / "optimizer.pt", 5000),
    "scheduler.pt is missing": lambda c: (c / "scheduler.pt").unlink(),
    "rng_state.pth is corrupt": lambda c: (c / "rng_state.pth").write_bytes(b""),
    "trainer_state.json is missing": lambda c: (c / "trainer_state.json").unlink(),
    "trainer_state.json is corrupt": lambda c: os.truncate(c / "trainer_state.json", 20),
    "config.json is missing": lambda c: (c / "config.json").unlink(),
    "trainer_state.json: 'global_step' is missing": lambda c: (c / "trainer_state.json").write_text(
        '{"num_input_tokens_seen": 5, "epoch": 0.5, "total_flos": 0, "max_steps": 6}'
    ),
    "trainer_state.json is of another step": lambda c: (c / "trainer_state.json").write_text(
        (c / "trainer_state.json").read_text().replace('"global_step": 6', '"global_step": 5')
    ),
    "objective.json is missing": lambda c: shutil.rmtree(c / "nextlat"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damaged_checkpoint_is_named_and_passed_over(
    whole: Path, tmp_path: Path, fault: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert last_complete_checkpoint(run) == (run / "checkpoint-6", [])
    DAMAGE[fault](run / "checkpoint-6")
    good, faults = last_complete_checkpoint(run)
    assert good == run / "checkpoint-4"
    assert len(faults) == 1
    assert re.match(rf"checkpoint-6 is damaged \((nextlat/)?{fault}", faults[0])


def unfinished(whole: Path, run: Path) -> Path:
    """A copy of a run as it stood after its last step, before the export."""
    shutil.copytree(whole, run)
    for name in ("model.safetensors", "config.json", "nextlat"):
        (shutil.rmtree if name == "nextlat" else os.remove)(run / name)  # type: ignore[operator]
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    return run


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = unfinished(whole, tmp_path / "run")
    os.truncate(run / "checkpoint-6/model.safetensors", 3000)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut off by a kill
    train(tiny("run.keep_checkpoints=3"), run, progress=False)
    assert "checkpoint-6 is damaged (model.safetensors is truncated" in caplog.text
    assert "going on from checkpoint-4" in caplog.text
    assert largest_difference(whole, run) == 0
    assert metrics(whole) == metrics(run)
    assert last_complete_checkpoint(run) == (run / "checkpoint-6", [])


def test_only_damaged_checkpoints_is_an_error_and_nothing_is_deleted(
    whole: Path, tmp_path: Path
) -> None:
    run = unfinished(whole, tmp_path / "run")
    for checkpoint in checkpoints(run):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(
        NextLatError,
        match=r"no checkpoint in .* can be used: checkpoint-6 is damaged .*checkpoint-2",
    ):
        train(tiny("run.keep_checkpoints=3"), run, progress=False)
    assert len(checkpoints(run)) == 3


def test_run_killed_before_its_first_checkpoint_starts_over(whole: Path, tmp_path: Path) -> None:
    run = unfinished(whole, tmp_path / "run")
    rotate_checkpoints(run, newest=0, keep=3)
    assert checkpoints(run) == []
    train(tiny("run.keep_checkpoints=3"), run, progress=False)
    assert largest_difference(whole, run) == 0
    assert metrics(whole) == metrics(run)


def test_rotation_keeps_the_newest_and_drops_those_beyond_the_step_reached(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    rotate_checkpoints(tmp_path, newest=12, keep=9)
    assert len(checkpoints(tmp_path)) == 4
    rotate_checkpoints(tmp_path, newest=10, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-4",
        "checkpoint-10",
        "checkpoint-notes",
    }
    rotate_checkpoints(tmp_path, newest=10, keep=0)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-notes"}


@pytest.mark.parametrize("limit", [4_000, 60_000], ids=["model", "optimizer"])
def test_full_disk_during_a_save_keeps_the_last_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    sizes = [
        (whole / "checkpoint-6" / name).stat().st_size
        for name in ("model.safetensors", "optimizer.pt")
    ]
    assert sizes[0] < 60_000 < sizes[1]  # or the two cases are not what they are called
    recipe, run = tiny("run.keep_checkpoints=3"), tmp_path / "run"
    with monkeypatch.context() as patch:
        full = largest_file(limit)
        before_step(patch, 4, full.__enter__)
        try:
            with pytest.raises(
                NextLatError, match=r"cannot write .*checkpoint-4: .*; free some space"
            ):
                train(recipe, run, progress=False)
        finally:
            full.__exit__(None, None, None)
    assert [path.name for path in run.iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]
    assert last_complete_checkpoint(run) == (run / "checkpoint-2", [])
    train(recipe, run, progress=False)
    assert largest_difference(whole, run) == 0


def test_full_disk_during_the_export_loses_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = tiny("run.keep_checkpoints=3"), unfinished(whole, tmp_path / "run")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(training, "move_into", fail)
        with pytest.raises(NextLatError, match="No space left on device"):
            train(recipe, run, progress=False)
    assert not is_finished(run)
    assert not list(run.glob(".nextlat-tmp-*"))
    train(recipe, run, progress=False)
    assert is_finished(run)
    assert largest_difference(whole, run) == 0
    assert metrics(whole) == metrics(run)


def test_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(
        NextLatError,
        match=r"the loss is nan at step 2, .* last sound at step 1: .*optimizer.learning_rate",
    ):
        train(
            tiny("optimizer.learning_rate=1e6", "schedule.warmup_steps=0"),
            tmp_path,
            progress=False,
        )
    good, faults = last_complete_checkpoint(tmp_path)
    assert faults == []
    assert good is None or all(torch.isfinite(value).all() for value in weights(good).values())


def test_a_held_out_loss_that_is_not_finite_ends_a_run_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = {"loss": float("nan"), "next_token": float("nan")}
    monkeypatch.setattr("nextlat.training.trainer.evaluation_loss", lambda *arguments: spoilt)
    with pytest.raises(NextLatError, match=r"the held-out loss is nan at step 6, .* sound at"):
        train(tiny(), tmp_path)
    assert not is_finished(tmp_path) and not (tmp_path / "config.json").exists()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4"]


# ---- pretrained backbones, checks before anything is made ----


@pytest.mark.parametrize(
    ("absurd", "told"),
    [
        (["backbone.layers=1000000", "backbone.width=1000000"], "the transformer would take .* GB"),
        (
            ["objectives.nextlat.hidden_size=1000000000000"],
            "does not fit into this machine's memory",
        ),
        (["batch_size=1000000000000"], "less than or equal to"),
        (["task.row_length=1000000000000"], "less than or equal to"),
        (["run.workers=100000"], "less than or equal to"),
        (["steps=1000000000000"], "less than or equal to"),
        (["objectives.nextlat.num_layers=1000000000000"], "less than or equal to"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made(
    absurd: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(NextLatError, match=told):
        train(tiny(*absurd), tmp_path / "run")
    assert not list(tmp_path.rglob("*.*"))


def test_pretrained_backbone_starts_from_its_weights(whole: Path, tmp_path: Path) -> None:
    sizes = [f"backbone.{name}=" for name in ("layers", "width", "heads")]
    recipe = tiny(
        *sizes,
        f"backbone.pretrained={whole}",
        "optimizer.learning_rate=1e-12",
        "optimizer.weight_decay=0",
    )
    run = train(recipe, tmp_path / "run", progress=False)
    before, after = (load_file(path / "model.safetensors") for path in (whole, run))
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)


def test_a_frozen_model_is_not_touched_while_its_dynamics_learn(
    whole: Path, tmp_path: Path
) -> None:
    sizes = [f"backbone.{name}=" for name in ("layers", "width", "heads")]
    recipe = tiny(
        *sizes,
        f"backbone.pretrained={whole}",
        "backbone.frozen=true",
        "steps=100",
        "run.save_every=100",
    )
    run = train(recipe, tmp_path / "run", progress=False)
    before, after = (load_file(path / "model.safetensors") for path in (whole, run))
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    losses = [line["next_h"] for line in read_metrics(run) if "next_h" in line]
    assert losses[-1] < 0.9 * losses[0]


def test_pretrained_backbone_that_does_not_fit_is_named(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = [f"backbone.{name}=" for name in ("layers", "width", "heads")]
    with pytest.raises(NextLatError, match=r"backbone.pretrained = .* cannot open"):
        train(tiny(*sizes, f"backbone.pretrained={tmp_path}"), tmp_path / "run", progress=False)
    larger_city = tiny(*sizes, f"backbone.pretrained={whole}", "task.rows=9", "task.columns=9")
    with pytest.raises(NextLatError, match=r"knows \d+ tokens, the task streets needs"):
        train(larger_city, tmp_path / "large", progress=False)
    longer_rides = tiny(*sizes, f"backbone.pretrained={whole}", "task.max_moves=25")
    with pytest.raises(NextLatError, match=r"gives 23 positions, the task streets needs 28"):
        train(longer_rides, tmp_path / "longer", progress=False)
    assert capfd.readouterr().err == ""  # no bar of a library
    shutil.copytree(whole, tmp_path / "part")
    tensors = load_file(whole / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "part/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NextLatError, match=r"backbone.pretrained = .*lacks model.norm.weight"):
        train(tiny(*sizes, f"backbone.pretrained={tmp_path / 'part'}"), tmp_path / "drawn")


def test_too_few_positions_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        NextLatError, match=r"backbone.max_length = 5 gives 5 positions, the task streets needs 23"
    ):
        train(tiny("backbone.max_length=5"), tmp_path / "run", progress=False)


def test_reporting_tool_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(NextLatError, match=r"asks for trackio, which is not installed"):
        train(tiny("run.report_to=['trackio']"), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_named_losses_when_asked(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(tiny("run.report_to=['tensorboard']"), tmp_path / "run", progress=False)
    (folder,) = (run / "runs").iterdir()
    accumulator = events.EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    assert {"train/next_token", "train/next_h", "train/kl", "eval/next_token"} <= set(tags)


def test_progress_is_told_after_every_step_with_the_loss_parts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, int, int]] = []
    train(tiny(), tmp_path / "run", progress=lambda *state: told.append(state))
    assert [(done, total) for _, done, total in told] == [(step, 6) for step in range(1, 7)]
    assert all(name in told[-1][0] for name in ("next_token", "next_h", "kl"))
    assert capfd.readouterr() == ("", "")  # no bar of a library


def test_the_weights_of_the_best_evaluation_are_kept_also_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A learning rate that is much too high: the loss rises again.
    settings = ("run.keep=best", "run.eval_every=1", "run.save_every=3")
    recipe = tiny(*settings, "optimizer.learning_rate=0.3", "schedule.warmup_steps=4")
    train(recipe, tmp_path / "best", progress=False)
    lines = [line for line in metrics(tmp_path / "best") if "eval_loss" in line]
    losses = {line["step"]: line["eval_next_token"] for line in lines}
    best = min(losses, key=lambda step: losses[step])
    assert best < 6 and losses[6] > losses[best] + 0.01
    assert (read_record(tmp_path / "best") or {})["kept"] == best
    rows = recipe.task.build().eval_dataset()
    found = evaluation_loss(nextlat.load(tmp_path / "best"), rows, 4)["next_token"]
    assert found == pytest.approx(losses[best], rel=1e-5)

    with monkeypatch.context() as patch:
        before_step(patch, best + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(recipe, tmp_path / "stopped", progress=False)
    with monkeypatch.context() as patch:  # in the export, after the last step
        patch.setattr("nextlat.training.train._export", full_disk)
        with pytest.raises(NextLatError, match="disk"):
            train(recipe, tmp_path / "stopped", progress=False)
    train(recipe, tmp_path / "stopped", progress=False)
    assert largest_difference(tmp_path / "best", tmp_path / "stopped") == 0
    assert (read_record(tmp_path / "stopped") or {})["kept"] == best
    last = recipe.model_copy(update={"run": recipe.run.model_copy(update={"keep": "last"})})
    with pytest.raises(NextLatError, match=r"differs in run\.keep"):
        train(last, tmp_path / "stopped", progress=False)


def full_disk(*arguments: Any, **options: Any) -> None:
    raise NextLatError("the disk is full")
