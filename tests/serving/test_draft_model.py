"""The drafter as vLLM sees it, with stand-ins for vLLM's layers: what it drafts is what the
objective drafts, and what it cannot serve it refuses."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig

import nextlat
from conftest import tiny_lm
from nextlat import NextLatConfig, NextLatError


class Attention(nn.Module):
    """Of vLLM's layer only what a drafter copies from it."""

    num_heads, head_size, num_kv_heads, sliding_window, attn_type = 4, 8, 2, None, "decoder"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.kv_sharing_target_layer_name = options.get("kv_sharing_target_layer_name")


class LogitsProcessor(nn.Module):
    """vLLM's arithmetic: project, cap, scale."""

    def __init__(self, vocab_size: int, scale: float, soft_cap: float | None) -> None:
        super().__init__()
        self.vocab_size, self.scale, self.soft_cap = vocab_size, scale, soft_cap

    def forward(self, head: Any, h: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = F.linear(h, head.weight, bias)[..., : self.vocab_size]
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits if self.scale == 1 else logits * self.scale


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A vLLM of stand-ins; gives what was registered there."""
    registered: dict[str, str] = {}
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"ModelRegistry": SimpleNamespace(register_model=registered.__setitem__)},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: False)},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention": {"Attention": Attention},
        "vllm.model_executor.layers.logits_processor": {"LogitsProcessor": LogitsProcessor},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "nextlat.serving.vllm", raising=False)
    yield registered
    sys.modules.pop("nextlat.serving.vllm", None)  # it holds the stand-ins


def build(directory: Path, layers: dict[str, Any] | None = None) -> Any:
    """The draft model that vLLM would make of a saved run, its weights loaded."""
    target = {"model.layers.0.attn": Attention(), "model.layers.1.attn": Attention()}
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            draft_model_config=SimpleNamespace(
                model=str(directory / "nextlat"),
                hf_config=AutoConfig.from_pretrained(directory / "nextlat"),
            )
        ),
        compilation_config=SimpleNamespace(
            static_forward_context=target if layers is None else layers
        ),
        cache_config=None,
    )
    nextlat.serving.register()  # as vLLM does, through the entry point
    drafter = importlib.import_module("nextlat.serving.vllm").EagleNextLat(vllm_config=config)
    drafter.load_weights(load_file(directory / "nextlat" / "objective.safetensors").items())
    return drafter


def saved(
    directory: Path,
    config: Any,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    **lm: Any,
) -> nextlat.ObjectiveModel:
    model = nextlat.attach(tiny_lm(family, **lm).to(dtype), config)
    for parameter in model.objective.parameters():
        nn.init.normal_(parameter, std=0.3)  # as trained: norms not 1, biases not 0
    model.save_pretrained(directory)
    return model


CASES: dict[str, tuple[NextLatConfig, str, dict[str, Any]]] = {
    "mlp": (NextLatConfig(), "llama", {}),
    "mlp of another size": (NextLatConfig(hidden_size=40, num_layers=2), "qwen3", {}),
    "separate norms": (NextLatConfig(separate_norms=True, zero_init=True), "mixtral", {}),
    "gru": (NextLatConfig(dynamics="gru"), "llama", {}),
    "bf16": (NextLatConfig(), "llama", {"dtype": torch.bfloat16}),
    "draft vocabulary": (NextLatConfig(draft_vocabulary=(3, 1, 20)), "llama", {}),
    "tied": (NextLatConfig(), "llama", {"tie_word_embeddings": True}),
    "scaled embeddings, capped logits": (NextLatConfig(), "gemma2", {}),
    "the same in bf16": (NextLatConfig(), "gemma2", {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_drafter_drafts_as_the_objective_does_bit_for_bit(
    case: str, vllm: dict[str, str], tmp_path: Path
) -> None:
    config, family, options = CASES[case]
    model = saved(tmp_path, config, family, **options)
    drafter = build(tmp_path).to(model.dtype)
    drafter.model.embed_tokens = nn.Embedding.from_pretrained(
        model.lm.get_input_embeddings().weight
    )
    if case != "tied":  # vLLM's Gemma and others have no module of their own for a tied head
        drafter.lm_head = model.lm.get_output_embeddings()
    state, token = torch.randn(6, 32).to(model.dtype), torch.arange(6)
    with torch.no_grad():
        for _ in range(3):
            state_expected, logits_expected = model.objective.draft(state, token)
            logits, state = (
                drafter.compute_logits(drafter(token, torch.arange(6), state)[0]),
                drafter(input_ids=token, positions=torch.arange(6), hidden_states=state)[1],
            )
            assert torch.equal(state, state_expected)
            assert torch.equal(logits, logits_expected)
            token = logits.argmax(-1)
    assert vllm == {"EagleNextLatForCausalLM": "nextlat.serving.vllm:EagleNextLat"}


def test_a_head_in_another_form_is_read_whole_and_its_other_tokens_left_out(
    vllm: dict[str, str], tmp_path: Path
) -> None:
    model = saved(tmp_path, NextLatConfig(draft_vocabulary=(2, 7, 30)))
    drafter = build(tmp_path)
    drafter.lm_head = model.lm.get_output_embeddings()
    drafter.lm_head.quant_method = nn.Identity()  # whose weight is not what is multiplied
    state, token = torch.randn(6, 32), torch.arange(6)
    with torch.no_grad():
        state, logits = model.objective.draft(state, token)
        torch.testing.assert_close(drafter.compute_logits(state), logits)
        assert drafter._rows is None and logits.isfinite().sum(-1).tolist() == [3] * 6
        drafter.logits_processor.forward = lambda *_: None  # a rank without logits
        assert drafter.compute_logits(state) is None


@pytest.mark.parametrize("vocabulary", [None, 9])
@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_a_scaled_or_capped_head_is_read_up_to_rounding(
    family: str, vocabulary: int | None, vllm: dict[str, str], tmp_path: Path
) -> None:
    # Granite divides by 3, vLLM multiplies by 1 / 3.
    model = saved(tmp_path, NextLatConfig(draft_vocabulary=vocabulary), family)
    drafter = build(tmp_path)
    table = model.lm.get_input_embeddings()  # Gemma's scales, vLLM's does not
    drafter.model.embed_tokens = nn.Embedding.from_pretrained(table.weight)
    drafter.lm_head = model.lm.get_output_embeddings()
    state, token = torch.randn(6, 32), torch.arange(6)
    with torch.no_grad():
        expected, logits = model.objective.draft(state, token)
        assert torch.equal(drafter(token, token, state)[0], expected)
        torch.testing.assert_close(drafter.compute_logits(expected), logits)


def test_its_attention_layer_shares_the_cache_of_the_targets_last(
    vllm: dict[str, str], tmp_path: Path
) -> None:
    saved(tmp_path, NextLatConfig())
    last = Attention(kv_sharing_target_layer_name="model.layers.3.attn")
    layers = {"model.layers.3.attn": Attention(), "model.layers.4.attn": last}
    for target, shared in (
        (None, "model.layers.1.attn"),
        (layers, "model.layers.3.attn"),  # the last one shares already
    ):
        options = build(tmp_path, target).cache_of_target.options
        assert options["kv_sharing_target_layer_name"] == shared
    with pytest.raises(NextLatError, match="no attention layer"):
        build(tmp_path, {"model.layers.0.mamba": nn.Module()})


REFUSED: list[tuple[Any, str, dict[str, Any], str]] = [
    (nextlat.MTPConfig(horizon=2), "llama", {}, "objective 'mtp', which cannot draft in vLLM"),
    (nextlat.NextTokenConfig(), "llama", {}, "objective 'next-token', which cannot draft in vLLM"),
    (NextLatConfig(), "gpt2", {}, "here they are 'transformer.wte'"),
    (
        NextLatConfig(),
        "llama",
        {"config": {"draft_vocabularies": [1, 2]}},
        "has no 'draft_vocabularies'",
    ),
    (NextLatConfig(), "llama", {"format": 2}, "of a newer version of nextlat"),
    (
        NextLatConfig(),
        "llama",
        {"head": {"scale": None, "soft_cap": None}},
        "the head of this model",
    ),
    (NextLatConfig(), "llama", {"embedding": {"scale": None}}, "the embedding of this model"),
]


@pytest.mark.parametrize(("config", "family", "change", "sentence"), REFUSED)
def test_what_cannot_be_served_is_refused_in_one_sentence(
    config: Any,
    family: str,
    change: dict[str, Any],
    sentence: str,
    vllm: dict[str, str],
    tmp_path: Path,
) -> None:
    saved(tmp_path, config, family)
    path = tmp_path / "nextlat" / "config.json"
    draft = json.loads(path.read_text())
    for key, value in change.items():
        block = draft["nextlat"]
        block[key] = {**block[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(draft))
    with pytest.raises(NextLatError, match=sentence) as refused:
        build(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tensors: tensors | {"draft_tokens": torch.arange(3)},
            "holds a tensor 'draft_tokens'",
        ),
        (
            lambda tensors: tensors | {"dynamics.norm.weight": torch.ones(2)},
            "'dynamics.norm.weight'",
        ),
        (
            lambda tensors: {k: v for k, v in tensors.items() if "f.0" not in k},
            "lacks 'dynamics.f.0",
        ),
    ],
)
def test_no_tensor_is_left_over_missing_or_of_another_shape_in_silence(
    change: Callable[[dict[str, Any]], dict[str, Any]],
    sentence: str,
    vllm: dict[str, str],
    tmp_path: Path,
) -> None:
    model = saved(tmp_path, NextLatConfig())
    drafter = build(tmp_path)
    with pytest.raises(NextLatError, match=sentence):
        drafter.load_weights(change(model.objective.state_dict()).items())


def test_nothing_but_weights_ends_in_safetensors_where_vllm_looks(tmp_path: Path) -> None:
    saved(tmp_path, nextlat.JTPConfig(horizon=2))
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert [path.name for path in (tmp_path / "nextlat").glob("*.safetensors")] == [
        "objective.safetensors"
    ]
    assert json.loads((tmp_path / "nextlat" / "config.json").read_text())["nextlat"][
        "needed_at_inference"
    ]


def test_the_entry_point_is_light() -> None:
    """vLLM calls it in each of its processes, also where nothing of ours is served."""
    code = (
        "import sys, nextlat.serving; print({'torch', 'vllm', 'transformers'} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
