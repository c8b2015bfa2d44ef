"""attach, load, save: a plain Hugging Face directory, and a sidecar that everyone else ignores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import nextlat
from conftest import FAMILIES, tiny_lm

CONFIGS = [
    nextlat.NextTokenConfig(),
    nextlat.NextLatConfig(horizon=2, hidden_size=24),
    nextlat.NextLatConfig(dynamics="gru", next_h_loss="mse", kl_loss="cross_entropy"),
    nextlat.NextLatConfig(separate_norms=True, stop_gradient_teacher=False),
]
NAMES = ["next-token", "nextlat", "gru", "separate norms"]


def batch_of(vocab: int = 50) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(vocab, (2, 9))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_trainable_moves_and_the_frozen_stays(family: str, config: object) -> None:
    model = nextlat.attach(tiny_lm(family), config).train()
    frozen = next(model.lm.parameters()).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch_of()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = {name for name, p in model.named_parameters() if torch.equal(before[name], p)}
    assert still == {name for name, p in model.named_parameters() if p is frozen}


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_round_trip(family: str, config: object, tmp_path: Path) -> None:
    model = nextlat.attach(tiny_lm(family), config)
    model.save_pretrained(tmp_path)
    again = nextlat.load(
        tmp_path, attn_implementation="eager"
    )  # Gemma 2 has no other that caps its attention logits
    assert again.objective.name == model.objective.name and again.objective.config == config
    torch.testing.assert_close(
        again(**batch_of()).loss, model(**batch_of()).loss, rtol=0, atol=1e-6
    )
    assert [p.name for p in tmp_path.glob("*.safetensors")] == [
        "model.safetensors"
    ]  # serving engines read every one of these
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = batch_of()["input_ids"]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)


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


def test_load_weights_restores_both_halves_in_place(tmp_path: Path) -> None:
    first, second = (
        nextlat.attach(tiny_lm("gpt2", seed=seed), nextlat.NextLatConfig()) for seed in (0, 1)
    )
    first.save_pretrained(tmp_path)
    parameter = next(second.parameters())
    second.load_weights(tmp_path)
    assert next(second.parameters()) is parameter  # an optimiser that holds it stays valid
    torch.testing.assert_close(second(**batch_of()).loss, first(**batch_of()).loss, rtol=0, atol=0)


def test_saved_model_of_a_version_without_later_settings_opens_with_their_defaults(
    tmp_path: Path,
) -> None:
    model = nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig(horizon=2))
    model.save_pretrained(tmp_path)
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
    model.save_pretrained(tmp_path / "run")
    sidecar = tmp_path / "run" / "nextlat" / "objective.json"
    description = json.loads(sidecar.read_text())
    for change, match in [
        ({"objective": "telepathy"}, "telepathy"),
        ({"format": 99}, "format 99"),
        ({"config": {"horizn": 1}}, "horizn"),
        ({"backbone": {**description["backbone"], "width": 7}}, "put the files back together"),
    ]:
        sidecar.write_text(json.dumps({**description, **change}))
        with pytest.raises(nextlat.NextLatError, match=match):
            nextlat.load(tmp_path / "run")
    sidecar.write_text("{")
    with pytest.raises(nextlat.NextLatError, match=r"objective\.json"):
        nextlat.load(tmp_path / "run")


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
    code = "import sys, nextlat, nextlat.cli; assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute"):
        nextlat.nonsense  # noqa: B018
