"""A hub that cannot be reached is asked once, and every way to load something from it then fails at
once, in one sentence."""

import ast
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from huggingface_hub import close_session, constants

import nextlat
from conftest import forget_sums, tiny_lm
from nextlat.errors import NextLatError
from nextlat.hub import hub_or_cache, load_tokenizer
from nextlat.tasks.task import word_tokenizer
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


# ---- code of a stranger's ----


def calls_that_load() -> list[tuple[str, ast.Call]]:
    found = []
    for path in sorted(Path(nextlat.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = getattr(node, "func", None)
            name = getattr(function, "attr", "")
            owner = getattr(getattr(function, "value", None), "id", "")
            if owner == "PeftConfig":  # plain JSON, of which PEFT runs nothing
                continue
            if name in ("from_pretrained", "from_config") and isinstance(node, ast.Call):
                found.append((f"{path.name}:{node.lineno}", node))
    return found


def test_every_call_that_loads_says_that_no_code_is_trusted() -> None:
    calls = calls_that_load()
    assert len(calls) > 3
    for where, call in calls:
        names = [keyword.arg for keyword in call.keywords]
        # `load_lm` hands its arguments over as **arguments, in which it is.
        assert "trust_remote_code" in names or (None in names and "weights.py" in where), where


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("own_type", [True, False])
def test_classes_of_a_directory_are_not_run_and_nobody_is_asked(
    name: str, own_type: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig())
    model.save_pretrained(tmp_path)
    word_tokenizer(["cat"]).save_pretrained(tmp_path)
    forget_sums(tmp_path)
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    classes = {key: "hostile.Hostile" for key in ("AutoConfig", "AutoModelForCausalLM")}
    change: dict[str, Any] = {"auto_map": classes}
    if name == "tokenizer_config.json":
        change = {"auto_map": {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}}
    if own_type:
        change |= {"model_type": "hostile", "tokenizer_class": "Hostile"}
    content = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(content | change))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(*question) or "y")
    for read in (nextlat.load, load_tokenizer):
        with suppress(NextLatError):  # or the library's own class is taken
            read(tmp_path)
    assert not (tmp_path / "executed").exists() and asked == []
