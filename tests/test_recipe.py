"""Recipes are strict: whatever is wrong is one sentence that names the place and the nearest valid
name."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextlat.errors import NextLatError
from nextlat.objectives import NextLatConfig, NextTokenConfig
from nextlat.training.recipe import Recipe, built_in_recipes, load_recipe
from nextlat.training.run_directory import differences

MINIMAL = """
task.name = "streets"
objective = "nextlat"
steps = 10
batch_size = 4
[backbone]
layers = 1
width = 16
heads = 2
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", built_in_recipes())
@pytest.mark.parametrize("objective", ["next-token", "nextlat"])
def test_every_built_in_recipe_round_trips_through_json(name: str, objective: str) -> None:
    more = []
    if name == "own-model":  # the model is the user's
        more = [
            "backbone.pretrained=some/model",
            "task.tokenizer=some/model",
            f"backbone.frozen={'true' if objective == 'nextlat' else 'false'}",
            *([] if objective == "nextlat" else ["backbone.cached_rows="]),
        ]
    recipe = load_recipe(name, more, objective=objective)
    content = json.loads(json.dumps(recipe.to_dict()))
    assert Recipe.from_dict(content, name) == recipe
    assert differences(content, recipe.to_dict()) == []


def test_the_manhattan_recipe_is_the_papers() -> None:
    recipe = load_recipe("manhattan")
    backbone, optimizer = recipe.backbone, recipe.optimizer
    assert (recipe.steps, backbone.layers, backbone.heads, backbone.width) == (400_000, 48, 8, 384)
    assert recipe.objective_config == NextLatConfig(
        horizon=8, lambda_next_h=1.0, lambda_kl=0.1, hidden_size=1536, num_layers=3
    )
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.gradient_clip) == (
        1e-4,
        0.01,
        0,
    )
    assert (optimizer.beta1, optimizer.beta2, recipe.schedule.name) == (0.9, 0.95, "constant")
    assert (recipe.task.max_moves, recipe.task.max_hops, recipe.task.detour_probability) == (
        97,
        50,
        0.75,
    )


def test_defaults_hold_where_a_file_is_silent(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL))
    assert (recipe.name, recipe.seed, recipe.gradient_accumulation) == ("mine", 0, 1)
    assert recipe.objective_config == NextLatConfig()
    assert recipe.run_name == "mine-nextlat-d1-s0"
    assert (
        load_recipe(written(tmp_path, MINIMAL), objective="next-token", seed=3).run_name
        == "mine-next-token-s3"
    )


def test_overrides_and_shorthands() -> None:
    recipe = load_recipe(
        "city-tiny",
        [
            "steps=2_000",
            "optimizer.learning_rate=1",
            "schedule.name=cosine",
            "schedule.decay_steps=",
            "task.place=10115",
            'run.report_to=["tensorboard", "wandb"]',
            "task.box=[1, 2.5, 3, 4]",
            "run.compile=true",
        ],
        horizon=8,
        seed=5,
    )
    assert (recipe.steps, recipe.seed, recipe.objective_config.horizon) == (2000, 5, 8)
    assert recipe.optimizer.learning_rate == 1.0
    assert (recipe.schedule.name, recipe.schedule.decay_steps) == ("cosine", 0)
    assert (recipe.task.place, recipe.task.box) == ("10115", (1, 2.5, 3, 4))
    assert (recipe.run.report_to, recipe.run.compile) == (("tensorboard", "wandb"), True)


def test_only_the_chosen_objective_counts(tmp_path: Path) -> None:
    text = MINIMAL + "[objectives.nextlat]\nhorizon = 4\n"
    assert load_recipe(written(tmp_path, text)).objective_config == NextLatConfig(horizon=4)
    plain = load_recipe(written(tmp_path, text), objective="next-token")
    assert plain.objective_config == NextTokenConfig()
    assert plain == load_recipe(written(tmp_path, MINIMAL), objective="next-token")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stepz=3", "'stepz=3': a recipe has no 'stepz': perhaps steps is meant"),
        (
            "optimizer.learning_rte=3",
            r"\[optimizer\] has no 'learning_rte': perhaps learning_rate is meant",
        ),
        (
            "objectives.nextlat.horizn=5",
            r"\[objectives.nextlat\] has no 'horizn': perhaps horizon is meant",
        ),
        ("objectives.netlat.horizon=5", r"\[objectives\] has no 'netlat': perhaps nextlat"),
        ("objective=nextlatt", "unknown objective 'nextlatt': perhaps nextlat"),
        ("task.name=street", "unknown task 'street': perhaps streets is meant"),
        ("task.row=5", r"\[task\] has no 'row': perhaps rows is meant"),
        ("optimiser.beta1=0.5", "a recipe has no 'optimiser': perhaps optimizer is meant"),
        ("steps=2.0", "'steps' = 2.0 is not valid: input should be a valid integer"),
        ("steps=ten", "'steps' = \"ten\" is not valid"),
        ("steps=0", "'steps' = 0 is not valid: input should be greater than or equal to 1"),
        ("steps=", "'steps' is missing"),
        ("seed=true", "'seed' = true is not valid"),
        ("seed=-1", "'seed' = -1 is not valid"),
        ("seed=4294967296", "less than or equal to 4294967295"),
        ("optimizer.learning_rate=0", "greater than 0"),
        ("optimizer.learning_rate=nan", "finite number"),
        ("optimizer.beta2=1", "less than 1"),
        ("optimizer=3", "'optimizer' must be a table"),
        ("steps.x=3", "'steps' is a value, not a table"),
        ("schedule.name=wds", "input should be 'constant', 'wsd', 'cosine' or 'linear'"),
        (
            "schedule.name=linear",
            'schedule.decay_steps has no meaning with schedule.name = "linear"',
        ),
        ("schedule.decay_steps=", 'schedule.name = "wsd" needs schedule.decay_steps'),
        ("schedule.warmup_steps=50", "exceed the 60 steps"),
        ("run.precision=fp8", "'fp32' or 'bf16'"),
        ("run.compile=1", "valid boolean"),
        ("run.report_to=['tensorbord']", "'tensorboard', 'wandb' or 'trackio'"),
        ("task.box=[1, 2]", r"'task.box' = \[1, 2\] is not valid: too few values"),
        (
            "backbone.pretrained=gpt2",
            "has its own sizes: remove backbone.layers, backbone.width, backbone.heads",
        ),
        ("backbone.heads=", "backbone needs layers, width and heads"),
        ("gradient_accumulation=3", "batch_size 8 is no multiple of gradient_accumulation 3"),
        (
            "objectives.nextlat.horizon=0",
            "'objectives.nextlat.horizon' = 0 is not valid: input should be greater",
        ),
        ("steps", "'steps' is not an override: write key=value"),
        ("=3", "is not an override"),
        ("a..b=3", "is not an override"),
        ("task.place=\udcff", "is not an override: write key=value in UTF-8"),
        pytest.param("steps=" + "[" * 10**5, r"'steps' = \"\[\[.*\.\.\. is not valid", id="value"),
        pytest.param("a" + ".a" * 5000 + "=1", "it is nested too deeply", id="key"),
        ("steps=1000000000000", "less than or equal to 10000000000"),
    ],
)
def test_what_is_wrong_is_one_sentence(override: str, told: str) -> None:
    with pytest.raises(NextLatError, match=told) as error:
        load_recipe("city-tiny", [override])
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert str(error.value).endswith(".")


def test_a_fault_in_the_file_names_the_file(tmp_path: Path) -> None:
    for text, told in {
        MINIMAL + "[run]\nsave_evry = 3\n": r"mine.toml: \[run\] has no 'save_evry': perhaps sa",
        MINIMAL.replace(
            "width = 16\n", ""
        ): "recipe mine.toml: backbone needs layers, width and heads",
        MINIMAL.replace("steps = 10\n", ""): "recipe mine.toml: 'steps' is missing",
        MINIMAL.replace('task.name = "streets"\n', ""): "recipe mine.toml: 'task' is missing",
        MINIMAL + "steps = \n": "recipe .*mine.toml is not valid TOML",
        MINIMAL + "a = " + "[" * 10**5: "recipe .*mine.toml is not valid TOML",
        MINIMAL + f"[{'a.' * 5000}a]\n": "recipe mine.toml: it is nested too deeply",
        MINIMAL + "[objectives.gtp]\n": r"recipe mine.toml: \[objectives\] has no 'gtp'",
        MINIMAL.replace(
            "steps = 10", "steps = '10'"
        ): "recipe mine.toml: 'steps' = \"10\" is not valid",
    }.items():
        with pytest.raises(NextLatError, match=told):
            load_recipe(written(tmp_path, text))


def test_a_recipe_of_another_systems_editor_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode().replace(b"\n", b"\r\n"))
    assert load_recipe(tmp_path / "mine.toml") == load_recipe(written(tmp_path, MINIMAL))


def test_unknown_recipes_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match="unknown recipe 'city-smal': perhaps city-small"):
        load_recipe("city-smal")
    with pytest.raises(NextLatError, match="there is no recipe file"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(NextLatError, match="cannot read recipe"):
        load_recipe(tmp_path / "binary.toml")


def test_settings_of_another_objective_are_not_silently_ignored() -> None:
    with pytest.raises(NextLatError, match="but the objective is next-token"):
        load_recipe("city-tiny", ["objectives.nextlat.horizon=3"], objective="next-token")
    with pytest.raises(NextLatError, match=r"--horizon 3: .*no 'horizon'"):
        load_recipe("city-tiny", objective="next-token", horizon=3)


def test_differences_name_the_dotted_keys() -> None:
    old = load_recipe("city-tiny").to_dict()
    new = load_recipe("city-tiny", ["task.rows=6", "steps=61", "run.log_every=7"]).to_dict()
    assert differences(old, new) == ["task.rows", "steps", "run.log_every"]
    assert "objective" in differences(
        old, load_recipe("city-tiny", objective="next-token").to_dict()
    )


@settings(max_examples=50)
@given(st.integers(1, 10**10), st.floats(1e-12, 1e3), st.integers(0, 2**31))
def test_numbers_survive_the_command_line_and_json(steps: int, rate: float, seed: int) -> None:
    overrides = [
        f"steps={steps}",
        f"optimizer.learning_rate={rate!r}",
        "schedule.name=constant",
        "schedule.decay_steps=",
    ]
    recipe = load_recipe("city-tiny", [*overrides, "schedule.warmup_steps=0"], seed=seed)
    assert (recipe.steps, recipe.optimizer.learning_rate, recipe.seed) == (steps, rate, seed)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())), "city-tiny") == recipe


@settings(max_examples=50)
@given(st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_no_unknown_key_is_ever_accepted(key: str) -> None:
    known = load_recipe("city-tiny").to_dict()
    for place, valid in {"": known, "run.": known["run"], "backbone.": known["backbone"]}.items():
        if key in valid:
            continue
        with pytest.raises(NextLatError, match=f"'{key}'"):
            load_recipe("city-tiny", [f"{place}{key}=1"])


def test_only_a_pretrained_model_is_frozen_and_only_for_the_dynamics() -> None:
    given = ["backbone.pretrained=some/model", "task.tokenizer=some/model"]
    assert load_recipe("own-model", given).backbone.frozen
    with pytest.raises(
        NextLatError, match=r"backbone.frozen .* needs backbone.pretrained, a directory"
    ):
        load_recipe("own-model")
    with pytest.raises(
        NextLatError,
        match=r"backbone.frozen .* needs backbone.pretrained, .* and the objective nextlat",
    ):
        load_recipe("own-model", given, objective="next-token")
    with pytest.raises(NextLatError, match=r"backbone.frozen .* needs backbone.pretrained"):
        load_recipe("city-tiny", ["backbone.frozen=true"])
