"""A hub that cannot be reached is asked once, and every way to load something from it then fails at
once, in one sentence."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from huggingface_hub import close_session, constants

import nextlat
from nextlat.errors import NextLatError
from nextlat.hub import hub_or_cache
from nextlat.tasks.text.text import TextConfig
from nextlat.tasks.text.tokens import existing_tokenizer
from nextlat.training.recipe import load_recipe
from nextlat.training.train import build_model

NAME = "some/name"


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Every look-up of a host, each of which fails."""
    asked: list[Any] = []

    def fail(host: Any, *_: Any, **__: Any) -> NoReturn:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for proxy in (
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "ALL_PROXY",
        "https_proxy",
        "http_proxy",
        "all_proxy",
    ):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    monkeypatch.chdir(tmp_path)
    return asked


def a_dataset() -> None:
    pytest.importorskip("datasets")
    TextConfig(dataset=NAME, vocab_size=300).build()


def a_backbone() -> None:
    sizes = [f"backbone.{name}=" for name in ("layers", "width", "heads")]
    recipe = load_recipe("city-tiny", [*sizes, f"backbone.pretrained={NAME}"])
    build_model(recipe, recipe.task.build())


@pytest.mark.parametrize(
    "load", [a_dataset, a_backbone, lambda: existing_tokenizer(NAME), lambda: nextlat.load(NAME)]
)
def test_a_hub_out_of_reach_is_asked_once(
    load: Callable[[], object],
    lookups: list[Any],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(NextLatError, match=NAME) as raised:
        load()
    assert len(lookups) == 1, lookups
    assert "\n" not in str(raised.value) and not caplog.records and capfd.readouterr().err == ""
    assert not constants.is_offline_mode()


def test_nothing_is_asked_for_what_is_here(lookups: list[Any], tmp_path: Path) -> None:
    with hub_or_cache(tmp_path):
        assert not constants.is_offline_mode()
    assert lookups == []
