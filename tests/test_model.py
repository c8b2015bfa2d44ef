"""attach, load, save: a plain Hugging Face directory, and a sidecar that everyone else ignores.

(What holds for every objective and backbone is in test_objective_contract.)"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import nextlat
from conftest import forget_sums, tiny_lm
from nextlat.weights import SUMS


def batch_of(vocab: int = 50) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(vocab, (2, 9))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.slow
def test_the_saved_directory_opens_without_this_package(tmp_path: Path) -> None:
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig())
    model.lm.config.use_cache = False  # what transformers' Trainer does to the models it trains
    model.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['nextlat'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"lm = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "assert lm.config.use_cache\n"
        "print(lm(torch.arange(6)[None]).logits.double().sum().item())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) == pytest.approx(
        model(torch.arange(6)[None]).logits.double().sum().item(), abs=1e-3
    )
    assert model.lm.config.use_cache is False  # and saving did not change the model


def test_saved_model_of_a_version_without_later_settings_opens_with_their_defaults(
    tmp_path: Path,
) -> None:
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig(horizon=2))
    model.save_pretrained(tmp_path)
    forget_sums(tmp_path)
    sidecar = tmp_path / "nextlat" / "objective.json"
    description = json.loads(sidecar.read_text())
    first = ("horizon", "lambda_next_h", "lambda_kl", "hidden_size", "num_layers")
    assert set(first) < description["config"].keys()
    description["config"] = {name: description["config"][name] for name in first}
    sidecar.write_text(json.dumps(description))
    again = nextlat.load(tmp_path, attn_implementation="eager")
    assert again.objective.config == model.objective.config
    assert torch.equal(again(**batch_of()).loss, model(**batch_of()).loss)


def test_another_objective_in_the_directory_is_named(tmp_path: Path) -> None:
    nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig()).save_pretrained(tmp_path)
    with pytest.raises(nextlat.NextLatError, match="nextlat"):
        nextlat.attach(tiny_lm("llama")).load_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "nextlat/objective.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_one_sentence(name: str, share: float, tmp_path: Path) -> None:
    nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig()).save_pretrained(tmp_path)
    forget_sums(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(nextlat.NextLatError, match=r"corrupt|cannot open") as error:
        nextlat.load(tmp_path)
    assert "\n" not in str(error.value)


def test_faults_of_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        nextlat.NextLatError, match=r"cannot open .*nowhere \(there is no such directory"
    ):
        nextlat.load(tmp_path / "nowhere")
    with pytest.raises(nextlat.NextLatError, match=r"cannot open .* \(it has no config\.json\)"):
        nextlat.load(tmp_path)
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig())
    model.lm.save_pretrained(tmp_path / "plain")
    with pytest.raises(nextlat.NextLatError, match=r"nextlat\.attach"):
        nextlat.load(tmp_path / "plain")


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda description: description.pop(name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"objective": "nextlatt"}, "names objective 'nextlatt': perhaps nextlat is meant"),
        ({"format": 99}, r"newer version of nextlat \(format 99\): update nextlat"),
        ({"format": "1"}, "'format' = \"1\" is not valid"),
        ({"config": {"horizn": 1}}, "has no 'horizn': perhaps horizon is meant"),
        ({"config": {"horizon": 1.5}}, r"'horizon' = 1\.5 is not valid"),
        ({"config": []}, "'config' must be a table"),
        ({"backbone": None}, "'backbone' must be a table"),
        (without("objective"), "'objective' is missing"),
        (without("config"), "'config' is missing"),
        ("{", "is corrupt"),
        ("[]", "it is not a table"),
        pytest.param("[" * 10**5, "is corrupt|nested too deeply", id="nested"),
    ],
)
def test_a_description_that_is_not_ours_is_one_sentence(
    change: Any, match: str, tmp_path: Path
) -> None:
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig())
    model.save_pretrained(tmp_path)
    forget_sums(tmp_path)
    sidecar = tmp_path / "nextlat" / "objective.json"
    description = json.loads(sidecar.read_text())
    if callable(change):
        change(description)
    changed = {**description, **change} if isinstance(change, dict) else description
    sidecar.write_text(change if isinstance(change, str) else json.dumps(changed))
    for read in (nextlat.load, model.load_weights):
        with pytest.raises(nextlat.NextLatError, match=match) as caught:
            read(tmp_path)
        assert "objective.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_objective_beside_another_model_is_named(tmp_path: Path) -> None:
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig())
    model.save_pretrained(tmp_path)
    forget_sums(tmp_path)
    tiny_lm("llama", vocab_size=51).save_pretrained(tmp_path)
    with pytest.raises(
        nextlat.NextLatError, match=r"vocab_size': 50.*vocab_size': 51.*put the files"
    ):
        nextlat.load(tmp_path)
    with pytest.raises(nextlat.NextLatError, match=r"in another shape than the model .*lm_head"):
        model.load_weights(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "nextlat/objective.json", "nextlat/objective.safetensors"],
)
@pytest.mark.parametrize("change", ["a flipped bit", "another run's", "missing"])
def test_a_file_that_is_not_as_it_was_saved_is_named(
    name: str, change: str, tmp_path: Path
) -> None:
    model, other = (
        nextlat.attach(
            tiny_lm("llama", seed=seed, rope_theta=1e4 + seed),
            nextlat.NextLatConfig(horizon=2 + seed),
        )
        for seed in (0, 1)
    )
    model.save_pretrained(tmp_path / "run")
    other.save_pretrained(tmp_path / "other")
    path = tmp_path / "run" / name
    if change == "missing":
        path.unlink()
    elif change == "another run's":
        shutil.copy(tmp_path / "other" / name, path)
    else:
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)
    for read in (nextlat.load, model.load_weights):
        with pytest.raises(nextlat.NextLatError) as caught:
            read(tmp_path / "run")
        told = "is missing" if change == "missing" else "is not the file that was saved there"
        assert f"{name} {told}" in str(caught.value) or "it has no config.json" in str(caught.value)


def test_checksums_are_those_of_sha256sum_and_name_no_file_outside(tmp_path: Path) -> None:
    nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig()).save_pretrained(tmp_path)
    sums = tmp_path / SUMS
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=tmp_path, check=True)
    line = sums.read_text().splitlines()[0]
    for damaged in (
        line.replace("config.json", "../config.json"),
        line.replace("  ", " "),
        "x",
        "\0",
    ):
        sums.write_text(f"{damaged}\n")
        with pytest.raises(nextlat.NextLatError, match="SHA256SUMS is damaged: restore it"):
            nextlat.load(tmp_path)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor], str], object], str]] = {
    "missing": (lambda weights, name: weights.pop(name), "lacks .*{name}: restore"),
    "left over": (
        lambda weights, name: weights.update({"other.weight": torch.zeros(3)}),
        "beyond the weights of the model, other.weight: restore",
    ),
    "misshapen": (
        lambda weights, name: weights.update({name: weights[name][:-1].clone()}),
        "in another shape than the model {name}: restore",
    ),
    "misread": (
        lambda weights, name: weights.update({name: weights[name].view(torch.int32)}),
        "in another dtype than the model {name}: restore",
    ),
    "rounded": (
        lambda weights, name: weights.update({name: weights[name].half()}),
        "in another dtype than the model {name}: restore",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "model.layers.1.mlp.down_proj.weight"),
        ("model.safetensors", "model.embed_tokens.weight"),  # tied to the head
        ("nextlat/objective.safetensors", "dynamics.f.2.weight"),
    ],
)
def test_every_tensor_is_checked_against_the_model(
    fault: str, file: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = nextlat.attach(tiny_lm("llama", tie_word_embeddings=True), nextlat.NextLatConfig())
    model.save_pretrained(tmp_path)
    forget_sums(tmp_path)
    weights = load_file(tmp_path / file)
    change, sentence = FAULTS[fault]
    change(weights, name)
    save_file(weights, tmp_path / file, metadata={"format": "pt"})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    capfd.readouterr()
    for read in (nextlat.load, model.load_weights):
        with pytest.raises(nextlat.NextLatError) as caught:
            read(tmp_path)
        assert re.search(sentence.format(name=re.escape(name)), str(caught.value)), caught.value
    assert "MISSING" not in capfd.readouterr().err  # the library's own report
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if fault == "rounded":  # asked for
        assert nextlat.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_an_objective_keeps_a_dtype_of_its_own(tmp_path: Path) -> None:
    model = nextlat.attach(tiny_lm("llama").to(torch.bfloat16), nextlat.NextLatConfig())
    model.objective.float()
    model.save_pretrained(tmp_path)
    again = nextlat.load(tmp_path)
    assert again.lm.dtype == torch.bfloat16
    for name, value in model.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[name])


def test_a_model_in_several_files_is_read_as_one(tmp_path: Path) -> None:
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig())
    model.save_pretrained(tmp_path)
    forget_sums(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.lm.save_pretrained(tmp_path, max_shard_size="20KB")
    other = nextlat.attach(tiny_lm("llama", seed=1), nextlat.NextLatConfig())
    other.load_weights(tmp_path)
    for read in (other, nextlat.load(tmp_path)):
        assert all(
            torch.equal(a, b)
            for a, b in zip(model.state_dict().values(), read.state_dict().values(), strict=True)
        )
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.unlink()
    for read in (nextlat.load, other.load_weights):
        with pytest.raises(nextlat.NextLatError, match=shard.name):
            read(tmp_path)


def test_llama_is_the_papers_backbone() -> None:
    lm = nextlat.llama(40, layers=2, width=64, heads=4, seed=5)
    assert not lm.config.tie_word_embeddings
    assert not any(name.endswith("bias") for name, _ in lm.named_parameters())
    weights = torch.cat([p.flatten() for name, p in lm.named_parameters() if "norm" not in name])
    assert (
        weights.std().item() == pytest.approx(0.02, rel=0.02) and abs(weights.mean().item()) < 1e-3
    )
    state = torch.get_rng_state()
    again = nextlat.llama(40, layers=2, width=64, heads=4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), again.parameters(), strict=True))
    wider = nextlat.llama(40, layers=2, width=64, heads=4, initializer_range=0.1, seed=5)
    assert wider.lm_head.weight.std().item() == pytest.approx(0.1, rel=0.05)
    with pytest.raises(nextlat.NextLatError, match="heads"):
        nextlat.llama(40, width=30, heads=4)


def test_without_labels_forward_gives_logits() -> None:
    model = nextlat.attach(tiny_lm("qwen3"), nextlat.NextLatConfig())
    ids = batch_of()["input_ids"]
    out = model(ids)
    assert out.loss is None
    torch.testing.assert_close(out.logits, model.lm(ids).logits)


def test_bad_arguments_are_one_sentence() -> None:
    with pytest.raises(nextlat.NextLatError, match="NextLatConfig"):
        nextlat.attach(tiny_lm("llama"), {"horizon": 2})
    model = nextlat.attach(tiny_lm("llama"))
    with pytest.raises(nextlat.NextLatError, match="attention_mask has shape"):
        model(**batch_of(), attention_mask=torch.ones(2, 3))


def test_importing_the_package_does_not_import_torch() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib'}"
    code = f"import sys, nextlat, nextlat.cli; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute"):
        nextlat.nonsense  # noqa: B018
