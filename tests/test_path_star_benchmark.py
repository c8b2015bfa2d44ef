"""The study of what decides Path-Star: every variant is a setting that its recipe takes and that changes something."""

from types import ModuleType

import pytest

from conftest import load_benchmark
from nextlat.recipe import load_recipe
from nextlat.training import build_model


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("path_star")


@pytest.mark.parametrize("name", ["path-star-small", "path-star"])
def test_every_variant_is_another_run(benchmark: ModuleType, name: str) -> None:
    plain = load_recipe(name)
    found = benchmark.variants(name)
    assert len(found) >= 11
    for variant, settings in found.items():
        recipe = load_recipe(name, settings)
        assert (recipe.to_dict() == plain.to_dict()) == (not settings), variant


def test_initial_scale_reaches_the_transformer() -> None:
    plain, wide = (
        load_recipe("path-star-small", ["task.graphs=50", "task.tests=10", *more])
        for more in ([], ["backbone.initializer_range=0.04"])
    )
    scales = [build_model(recipe, recipe.task.build()).lm.lm_head.weight.std().item() for recipe in (plain, wide)]
    assert scales == pytest.approx([0.02, 0.04], rel=0.05)
