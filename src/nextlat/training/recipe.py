"""Recipes: one small typed file names task, backbone, objective, optimiser, schedule and seed of a
training run.

TOML in, plain frozen dataclasses out. A recipe is strict: an unknown key, a wrong type or a value
out of range is one sentence that names the place, the key and the nearest valid name; nothing is
converted behind the user's back and nothing is ignored.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from nextlat.errors import NextLatError
from nextlat.objectives import OBJECTIVES
from nextlat.strict import Reader, nearest
from nextlat.tasks import TASKS

BUILT_IN = Path(__file__).parent / "recipes"

Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as transformers' set_seed takes for numpy
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Below1 = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class BackboneSettings:
    """The transformer: from scratch (`nextlat.llama` with layers, width, heads) or `pretrained`, a
    directory or hub id.

    `max_length` None = the longest sequence of the task; `intermediate_size`, `initializer_range`
    None = as in `nextlat.llama`. `frozen`: a pretrained model stays as it is, and only NextLat's
    dynamics are trained, to draft for it.
    """

    layers: Count | None = None
    width: Count | None = None
    heads: Count | None = None
    intermediate_size: Count | None = None
    initializer_range: Positive | None = None
    max_length: Count | None = None
    pretrained: str | None = None
    frozen: bool = False


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW. The defaults are the paper's betas (arXiv 2511.05963, appendix); `gradient_clip` 0 =
    none.

    Weight decay spares biases and norm weights, as in every `transformers.Trainer` run.
    """

    learning_rate: Positive = 1e-4
    weight_decay: NotNegative = 0.01
    beta1: Below1 = 0.9
    beta2: Below1 = 0.95
    epsilon: Positive = 1e-8
    gradient_clip: NotNegative = 0.0


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate over the steps, after a linear warm-up of `warmup_steps`.

    constant; wsd (constant, then linear to 0 over the last `decay_steps`); cosine or linear (to 0
    over all after the warm-up).
    """

    name: Literal["constant", "wsd", "cosine", "linear"] = "constant"
    warmup_steps: CountOrNone = 0
    decay_steps: CountOrNone = 0


@dataclass(frozen=True)
class RunSettings:
    """How a run is kept, watched and computed; intervals are in optimiser steps.

    Attributes:
        save_every: 0 = only at the end. keep_checkpoints: the newest so many; 0 = one while
            training, none when finished.
        log_every: also the window over which losses are averaged. eval_every: 0 = only at the end.
        report_to: any of tensorboard, wandb, trackio, besides metrics.jsonl.
        precision: bf16 = autocast with fp32 weights. compile: torch.compile of the layers. threads:
            of torch on the CPU, 0 = leave.
        workers: processes that prepare rows while the device computes; rows come in order, so that
            one is as good as many.
    """

    save_every: CountOrNone = 0
    keep_checkpoints: CountOrNone = 1
    log_every: Count = 10
    eval_every: CountOrNone = 0
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    threads: CountOrNone = 0
    workers: CountOrNone = 0


@dataclass(frozen=True)
class Recipe:
    """One training run, wholly determined.

    Attributes:
        name: of the file it came from; not part of what determines the run.
        task_name: key of `tasks.TASKS`; task: its configuration.
        objective: key of `objectives.OBJECTIVES`; objective_config: its configuration.
        steps: optimiser steps. batch_size: rows per optimiser step, over all processes and
            micro-batches.
        gradient_accumulation: micro-batches that a batch is split in (on each process).
        seed: of the initial weights and of the data.
    """

    name: str = field(compare=False)
    task_name: str
    task: Any
    objective: str
    objective_config: Any
    backbone: BackboneSettings
    steps: int
    batch_size: int
    gradient_accumulation: int = 1
    seed: int = 0
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    run: RunSettings = RunSettings()

    @property
    def run_name(self) -> str:
        """The usual name of its run directory, e.g. `city-small-nextlat-d8-s0`."""
        horizon = getattr(self.objective_config, "horizon", None)
        return "-".join(
            [self.name, self.objective, *([f"d{horizon}"] if horizon else []), f"s{self.seed}"]
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready tables, every default spelt out; `from_dict` reads it back."""
        content = {
            "task": {"name": self.task_name, **asdict(self.task)},
            "objective": self.objective,
            **{key: getattr(self, key) for key in _TOP},
            **{key: asdict(getattr(self, key)) for key in _TABLES},
            "objectives": {self.objective: self.objective_config.model_dump(mode="json")},
        }
        return json.loads(json.dumps(content, default=str))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], name: str = "recipe") -> "Recipe":
        """The recipe that `to_dict` gave, e.g. `json.load(run.json)["recipe"]`.

        Raises:
            NextLatError: as for a recipe file.
        """
        return _build(_without_none(content), {}, name, f"recipe '{name}'")


@dataclass(frozen=True)
class _Top:
    """What stands above the tables of a recipe file."""

    objective: str
    steps: Count
    batch_size: Count
    gradient_accumulation: Count = 1
    seed: Seed = 0


_TOP = ("steps", "batch_size", "gradient_accumulation", "seed")
_TABLES: dict[str, type] = {
    "backbone": BackboneSettings,
    "optimizer": OptimizerSettings,
    "schedule": ScheduleSettings,
    "run": RunSettings,
}


def built_in_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    objective: str | None = None,
    horizon: int | None = None,
    seed: int | None = None,
) -> Recipe:
    """Read a recipe, change what is asked to be changed, and check all of it.

    Args:
        name_or_path: a built-in name (`city-small`) or the path of a .toml file.
        overrides: `key=value`, keys with dots (`optimizer.learning_rate=1e-3`), values as in TOML,
            quotes around plain words may be left out; `key=` with nothing behind it removes the
            key, so that its default holds.
        objective, horizon, seed: shorthands for overrides of the same meaning (the horizon is that
            of the chosen objective).

    Raises:
        NextLatError: no such recipe, not TOML, an unknown key or objective, a wrong type or range,
            settings that contradict.
    """
    path, content = _read(name_or_path)
    requests = {key: (text, f"'{item}'") for item in overrides for key, text in [_split(item)]}
    requests |= (
        {"objective": (objective, f"--objective {objective}")} if objective is not None else {}
    )
    requests |= {"seed": (str(seed), f"--seed {seed}")} if seed is not None else {}
    chosen = requests.get("objective", (content.get("objective"), ""))[0]
    if horizon is not None:
        requests[f"objectives.{chosen}.horizon"] = (str(horizon), f"--horizon {horizon}")
    for key, (_, source) in requests.items():
        kind, _, rest = key.partition(".")
        if (
            kind == "objectives"
            and rest.split(".")[0] in OBJECTIVES
            and rest.split(".")[0] != chosen
        ):
            raise NextLatError(
                f"{source} sets '{key}', but the objective is {chosen}: leave it out or choose that objective."
            )
    for key, (text, _) in requests.items():
        _place(content, key, text)
    return _build(content, requests, path.stem, f"recipe {path.name}")


def recipe_horizon(name_or_path: str | Path) -> tuple[int | None, set[str]]:
    """The horizon that a recipe's file sets, for its own objective or else for NextLat, and the
    objectives it has a table for.

    Raises:
        NextLatError: no such recipe, or not TOML.
    """
    content = _read(name_or_path)[1]
    tables = content.get("objectives", {})
    tables = tables if isinstance(tables, dict) else {}  # `load_recipe` says what is wrong with it
    for name in (content.get("objective"), "nextlat"):
        table = tables.get(name)
        if isinstance(table, dict) and isinstance(table.get("horizon"), int):
            return table["horizon"], {*tables}
    return None, {*tables}


def _read(name_or_path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe and what stands in it."""
    path = _find(str(name_or_path))
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise NextLatError(
            f"cannot read recipe {path}: {getattr(error, 'strerror', None) or error}."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise NextLatError(f"recipe {path} is not valid TOML: {error}.") from error


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" and path.is_file():
        return path
    if name_or_path in built_in_recipes():
        return BUILT_IN / f"{name_or_path}.toml"
    if path.suffix == ".toml" or path.is_dir():
        raise NextLatError(
            f"there is no recipe file {name_or_path}: give the path of a .toml file."
        )
    raise NextLatError(
        f"unknown recipe '{name_or_path}': {nearest(name_or_path, built_in_recipes())}; a path ends in .toml."
    )


def _split(item: str) -> tuple[str, str]:
    key, equals, text = item.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise NextLatError(
            f"'{item}' is not an override: write key=value, e.g. optimizer.learning_rate=1e-3."
        )
    return key.strip(), text.strip()


def _place(content: dict[str, Any], key: str, text: str) -> None:
    """Set (or with an empty text remove) one key of nested tables in place."""
    *tables, last = key.split(".")
    for name in tables:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise NextLatError(f"'{key}={text}': '{name}' is a value, not a table.")
    if text:
        content[last] = _value(text)
    else:
        content.pop(last, None)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _without_none(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _without_none(value) for key, value in content.items() if value is not None}
    return content


def _build(
    content: dict[str, Any], requests: dict[str, tuple[str, str]], name: str, where: str
) -> Recipe:
    """Type every table of a recipe. `requests` (key -> text, source) says what came from the
    command line."""
    reader = Reader(requests, where)
    tables = (
        {key: content.pop(key, {}) for key in ("task", "objectives", *_TABLES)}
        if isinstance(content, dict)
        else {}
    )
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise NextLatError(f"{reader.source(key)}: '{key}' must be a table.")
    top = reader.read(_Top, content, "", extra=("task", "objectives", *_TABLES))
    if top.objective not in OBJECTIVES:
        raise NextLatError(
            f"{reader.source('objective')}: unknown objective '{top.objective}': {nearest(top.objective, [*OBJECTIVES])}."
        )
    task = dict(tables["task"])
    task_name = task.pop("name", None)
    if task_name not in TASKS:
        told = f"unknown task '{task_name}'" if task_name is not None else "no task.name"
        raise NextLatError(
            f"{reader.source('task.name')}: {told}: {nearest(str(task_name), [*TASKS])}."
        )
    objectives = {}
    for key, table in tables["objectives"].items():
        if key not in OBJECTIVES:
            raise NextLatError(
                f"{reader.source(f'objectives.{key}')}: unknown objective '{key}': {nearest(key, [*OBJECTIVES])}."
            )
        objectives[key] = reader.read(OBJECTIVES[key][0], table, f"objectives.{key}")
    recipe = Recipe(
        name=name,
        task_name=task_name,
        task=reader.read(TASKS[task_name], task, "task", extra=("name",)),
        objective=top.objective,
        objective_config=objectives.get(top.objective)
        or reader.read(OBJECTIVES[top.objective][0], {}, "objectives"),
        **{key: reader.read(kind, tables[key], key) for key, kind in _TABLES.items()},
        **{key: getattr(top, key) for key in _TOP},
    )
    _check(recipe, where)
    return recipe


def _check(recipe: Recipe, where: str) -> None:
    """What no single field can know."""
    backbone, schedule = recipe.backbone, recipe.schedule
    own = ("pretrained", "frozen")
    sizes = [
        f.name
        for f in fields(backbone)
        if f.name not in own and getattr(backbone, f.name) is not None
    ]
    if backbone.frozen and (backbone.pretrained is None or recipe.objective != "nextlat"):
        problem = (
            "backbone.frozen trains the dynamics of NextLat alone: it needs backbone.pretrained, a directory or hub id, and the "
            "objective nextlat"
        )
    elif backbone.pretrained is not None and sizes:
        problem = (
            f"backbone.pretrained has its own sizes: remove backbone.{', backbone.'.join(sizes)}"
        )
    elif backbone.pretrained is None and {"layers", "width", "heads"} - set(sizes):
        problem = 'backbone needs layers, width and heads, or pretrained = "directory or hub id"'
    elif recipe.batch_size % recipe.gradient_accumulation:
        problem = f"batch_size {recipe.batch_size} is no multiple of gradient_accumulation {recipe.gradient_accumulation}"
    elif schedule.decay_steps and schedule.name != "wsd":
        problem = f'schedule.decay_steps has no meaning with schedule.name = "{schedule.name}": remove it or choose wsd'
    elif schedule.name == "wsd" and not schedule.decay_steps:
        problem = 'schedule.name = "wsd" needs schedule.decay_steps'
    elif schedule.warmup_steps + schedule.decay_steps > recipe.steps:
        problem = f"schedule.warmup_steps + schedule.decay_steps exceed the {recipe.steps} steps"
    else:
        return
    raise NextLatError(f"{where}: {problem}.")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    """Dotted keys in which two recipes, as `to_dict` gives them, differ."""
    keys = []
    for key in [*old, *(key for key in new if key not in old)]:
        full = f"{place}.{key}".lstrip(".")
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differences(a, b, full)
        elif a != b:
            keys.append(full)
    return keys


def with_settings(recipe: Recipe, **changes: Any) -> Recipe:
    """A copy of a recipe with some of its attributes replaced, checked again (for programs that
    sweep)."""
    changed = replace(recipe, **changes)
    _check(changed, f"recipe '{recipe.name}'")
    return changed
