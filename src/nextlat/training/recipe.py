"""Recipes: one small typed file names task, backbone, objective, optimiser, schedule and seed of a
training run.

A recipe is strict: an unknown key, a wrong type or a value out of range is one sentence that names
the file or override, the key and the nearest valid name; nothing is converted behind the user's
back and nothing is ignored.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from nextlat.errors import NextLatError
from nextlat.objectives import OBJECTIVES
from nextlat.tasks import TASKS
from nextlat.validation import Lookup, Settings, clip, locate, nearest

OF_PRETRAINED, NEXT = {"pretrained", "frozen", "cached_rows"}, ", backbone."
BUILT_IN = Path(__file__).parent / "recipes"

Steps = Annotated[int, Field(ge=1, le=10**10)]
StepsOrZero = Annotated[int, Field(ge=0, le=10**12)]
Size = Annotated[int, Field(ge=1, le=2**20)]  # beyond what any machine trains
Small = Annotated[int, Field(ge=0, le=2**12)]  # of processes, threads and the like
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as transformers' set_seed takes for numpy
Factor = Annotated[float, Field(gt=0, le=1e6)]
FactorOrZero = Annotated[float, Field(ge=0, le=1e6)]
Below1 = Annotated[float, Field(ge=0, lt=1)]


class BackboneSettings(Settings):
    """The transformer: from scratch (`nextlat.llama`), or a pretrained one.

    Attributes:
        layers: from scratch.
        width: from scratch.
        heads: from scratch.
        intermediate_size: from scratch; None = as in `nextlat.llama`.
        initializer_range: from scratch; None = as in `nextlat.llama`.
        max_length: positions, from scratch; None = the longest sequence of the task.
        positions: from scratch; rotary, or none, with which no position is new beyond the training
            length (random offsets would change nothing: rotary positions are relative).
        pretrained: a directory or hub id.
        frozen: a pretrained model stays as it is: only NextLat's dynamics learn, to draft for it.
        cached_rows: of a frozen one; so many training rows, of which the hidden states are kept on
            the disk, are trained on again and again (see `cached_states`); 0 = all, and none kept.
    """

    layers: Size | None = None
    width: Size | None = None
    heads: Size | None = None
    intermediate_size: Size | None = None
    initializer_range: Factor | None = None
    max_length: Size | None = None
    positions: Literal["rotary", "none"] = "rotary"
    pretrained: str | None = None
    frozen: bool = False
    cached_rows: Annotated[int, Field(ge=0, le=10**9)] = 0


class OptimizerSettings(Settings):
    """AdamW. Weight decay spares biases and norm weights, as in every `transformers.Trainer` run.

    Attributes:
        learning_rate: at its highest, see `ScheduleSettings`.
        weight_decay: per step, times the learning rate.
        beta1: the paper's (arXiv 2511.05963, appendix), as beta2 is.
        beta2: see beta1.
        epsilon: of Adam.
        gradient_clip: largest norm of the gradient; 0 = it is not clipped.
    """

    learning_rate: Factor = 1e-4
    weight_decay: FactorOrZero = 0.01
    beta1: Below1 = 0.9
    beta2: Below1 = 0.95
    epsilon: Factor = 1e-8
    gradient_clip: FactorOrZero = 0.0


class ScheduleSettings(Settings):
    """The learning rate over the steps, after a linear warm-up.

    Attributes:
        name: constant; wsd (constant, then linearly to 0); cosine or linear (to 0 over all steps
            after the warm-up).
        warmup_steps: of the linear warm-up.
        decay_steps: the last steps, over which wsd goes to 0.
    """

    name: Literal["constant", "wsd", "cosine", "linear"] = "constant"
    warmup_steps: StepsOrZero = 0
    decay_steps: StepsOrZero = 0


class RunSettings(Settings):
    """How a run is computed, saved and watched; intervals are in optimiser steps.

    All but `precision` and `compile` may change when a run is resumed.

    Attributes:
        save_every: 0 = only at the end.
        keep_checkpoints: the newest so many; 0 = one while training, none when finished.
        keep: the weights after the last step, or of the best evaluation: of all, at each of which
            is then saved, the one with the lowest next-token loss (frozen: loss).
        log_every: also the window over which losses are averaged.
        eval_every: 0 = only at the end.
        report_to: any of tensorboard, wandb, trackio, besides metrics.jsonl.
        precision: bf16 = autocast with fp32 weights.
        parallel: of several processes, each has the whole model (ddp) or a share of it (fsdp).
        compile: torch.compile of the layers.
        threads: of torch on the CPU; 0 = as many as torch chooses.
        workers: processes that prepare rows, in order, while the device computes; one will do.
        states: directory for `backbone.cached_rows`, which runs can share; None = the run's own.
    """

    save_every: StepsOrZero = 0
    keep_checkpoints: StepsOrZero = 1
    keep: Literal["last", "best"] = "last"
    log_every: Steps = 10
    eval_every: StepsOrZero = 0
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    threads: Small = 0
    workers: Small = 0
    states: str | None = None


def _known_objective(name: str) -> str:
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective '{name}': {nearest(name, [*OBJECTIVES])}")
    return name


def _task_settings(table: Any) -> tuple[Any, Any]:
    """The class of a `[task]` table by its name, and its settings."""
    if not isinstance(table, Mapping):
        raise ValueError("must be a table")
    name = table.get("name")
    if not isinstance(name, str) or name not in TASKS:
        told = "there is no name" if name is None else f"unknown task '{name}'"
        raise ValueError(f"{told}: {nearest(str(name), [*TASKS])}")
    return TASKS[name], {key: value for key, value in table.items() if key != "name"}


def _objective_settings(table: Any) -> tuple[Any, Any]:
    """The class of the table of `[objectives.NAME]` tables: each belongs to one objective."""
    fields: Any = {name: (kind | None, None) for name, (kind, _) in OBJECTIVES.items()}
    return create_model("Objectives", __base__=Settings, **fields), table


class Recipe(Settings):
    """One training run, wholly determined.

    Attributes:
        task: settings of one of `tasks.TASKS`.
        objective: key of `objectives.OBJECTIVES`.
        objectives: of the chosen objective alone: its name -> its settings.
        backbone: see there, as for the next three.
        optimizer: AdamW.
        schedule: of the learning rate.
        run: how it is computed, saved and watched.
        steps: optimiser steps.
        batch_size: rows per optimiser step, over all processes and micro-batches.
        gradient_accumulation: micro-batches that a batch is split in (on each process).
        seed: of the initial weights and of the data.
    """

    model_config = ConfigDict(title="a recipe")

    task: Annotated[Any, Lookup(_task_settings)]
    objective: Annotated[str, AfterValidator(_known_objective)]
    steps: Steps
    batch_size: Size
    gradient_accumulation: Size = 1
    seed: Seed = 0
    backbone: BackboneSettings = BackboneSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    run: RunSettings = RunSettings()
    objectives: Annotated[dict[str, Any], Lookup(_objective_settings)] = {}
    _name: str = "recipe"

    @property
    def name(self) -> str:
        """Of the file it came from."""
        return self._name

    @property
    def task_name(self) -> str:
        """Key of `tasks.TASKS`."""
        return next(name for name, kind in TASKS.items() if kind is type(self.task))

    @property
    def objective_config(self) -> Any:
        """Settings of the objective."""
        return self.objectives[self.objective]

    @property
    def run_name(self) -> str:
        """The usual name of its run directory, e.g. `city-small-nextlat-d8-s0`."""
        d = getattr(self.objective_config, "horizon", None)
        return "-".join([self.name, self.objective, *[f"d{d}"] * bool(d), f"s{self.seed}"])

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready tables, every default spelt out; `from_dict` reads it back."""
        content = self.model_dump(mode="json")
        return {**content, "task": {"name": self.task_name, **content["task"]}}

    @classmethod
    def from_dict(cls, content: Any, name: str = "recipe") -> Self:
        """The recipe that `to_dict` gave, e.g. `json.load(run.json)["recipe"]`.

        Raises:
            NextLatError: as for a recipe file.
        """
        recipe = cls.from_json(content, f"recipe '{name}'")
        recipe._name = name
        return recipe

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if problem := self._contradiction():
            raise ValueError(problem)
        chosen = dict(self.objectives).get(self.objective) or OBJECTIVES[self.objective][0]()
        object.__setattr__(self, "objectives", {self.objective: chosen})
        return self

    def _contradiction(self) -> str | None:
        """What no single field can know, or None."""
        backbone, schedule = self.backbone, self.schedule
        sizes = [k for k, v in backbone if k not in OF_PRETRAINED and v not in (None, "rotary")]
        if backbone.frozen and (backbone.pretrained is None or self.objective != "nextlat"):
            return (
                "backbone.frozen trains the dynamics of NextLat alone: it needs "
                "backbone.pretrained, a directory or hub id, and the objective nextlat"
            )
        if backbone.cached_rows and not backbone.frozen:
            return "backbone.cached_rows is for a frozen transformer: set it to 0"
        if self.run.parallel == "fsdp" and (backbone.cached_rows or self.run.compile):
            return 'run.parallel = "fsdp" trains without backbone.cached_rows and run.compile'
        if backbone.pretrained is not None and sizes:
            return f"backbone.pretrained has its own sizes: remove backbone.{NEXT.join(sizes)}"
        if backbone.pretrained is None and {"layers", "width", "heads"} - set(sizes):
            return 'backbone needs layers, width and heads, or pretrained = "directory or hub id"'
        if self.batch_size % self.gradient_accumulation:
            return (
                f"batch_size {self.batch_size} is no multiple of gradient_accumulation "
                f"{self.gradient_accumulation}"
            )
        if schedule.decay_steps and schedule.name != "wsd":
            named = f'schedule.name = "{schedule.name}"'
            return f"schedule.decay_steps has no meaning with {named}: remove it or choose wsd"
        if schedule.name == "wsd" and not schedule.decay_steps:
            return 'schedule.name = "wsd" needs schedule.decay_steps'
        if schedule.warmup_steps + schedule.decay_steps > self.steps:
            return f"schedule.warmup_steps + schedule.decay_steps exceed the {self.steps} steps"
        return None


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
            quotes around plain words may be left out; `key=` removes the key, so that its default
            holds.
        objective: shorthand for the override of the same name.
        horizon: d of the chosen objective, shorthand for the override.
        seed: shorthand for the override of the same name.

    Raises:
        NextLatError: no such recipe, not TOML, an unknown key or objective, a wrong type or range,
            settings that contradict.
    """
    path, content = read_recipe_file(name_or_path)
    given = {key: (text, f"'{clip(item)}'") for item in overrides for key, text in [_split(item)]}
    if objective is not None:
        given["objective"] = (objective, f"--objective {objective}")
    if seed is not None:
        given["seed"] = (str(seed), f"--seed {seed}")
    chosen = given["objective"][0] if "objective" in given else content.get("objective")
    if horizon is not None:
        given[f"objectives.{chosen}.horizon"] = (str(horizon), f"--horizon {horizon}")
    for key, (text, source) in given.items():
        table, _, rest = key.partition(".")
        named = rest.partition(".")[0]
        if table == "objectives" and named in OBJECTIVES and named != chosen:
            raise NextLatError(
                f"{source} sets '{key}', but the objective is {chosen}: leave it out or choose "
                "that objective."
            )
        _set(content, key, _value(text) if text else None)

    def source_of(key: str) -> str:
        found = (s for k, (_, s) in given.items() if k == key or k.startswith(f"{key}."))
        return next(found, f"recipe {path.name}")

    try:
        recipe = Recipe.model_validate_json(json.dumps(content, default=str))
    except RecursionError as error:
        raise NextLatError(f"recipe {path.name}: it is nested too deeply.") from error
    except ValidationError as error:
        # `task.place=10115` is a place too: where words are wanted, the override is taken as words.
        problems = [p["loc"] for p in error.errors() if p["type"].startswith("string")]
        for key in [".".join(locate(location, Recipe, content)[0]) for location in problems]:
            if key in given and given[key][0]:
                _set(content, key, given[key][0])
        recipe = Recipe.from_json(content, source_of)
    recipe._name = path.stem
    return recipe


def read_recipe_file(name_or_path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe and its content, unchecked.

    Raises:
        NextLatError: no such recipe, or not TOML.
    """
    text, path = str(name_or_path), Path(name_or_path)
    if path.suffix != ".toml" or not path.is_file():
        if text in built_in_recipes():
            path = BUILT_IN / f"{text}.toml"
        elif path.suffix == ".toml" or path.is_dir():
            raise NextLatError(f"there is no recipe file {text}: give the path of a .toml file.")
        else:
            guess = nearest(text, built_in_recipes())
            raise NextLatError(f"unknown recipe '{text}': {guess}; a path ends in .toml.")
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise NextLatError(f"recipe {path} is not valid TOML: {error}.") from error
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise NextLatError(f"cannot read recipe {path}: {told}.") from error


def _split(item: str) -> tuple[str, str]:
    key, equals, text = item.partition("=")
    is_text = item.encode(errors="replace").decode() == item
    if not (is_text and equals and all(key.strip().split("."))):
        raise NextLatError(
            f"'{clip(item)}' is not an override: write key=value in UTF-8, e.g. steps=100."
        )
    return key.strip(), text.strip()


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    """Set one key of nested tables in place; None removes it."""
    *tables, last = key.split(".")
    for name in tables:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise NextLatError(f"'{key}' cannot be set: '{name}' is a value, not a table.")
    if value is None:
        content.pop(last, None)
    else:
        content[last] = value


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError, RecursionError):
        return text
