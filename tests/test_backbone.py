"""What a causal LM does is found out numerically, and what cannot be reproduced is refused in one
sentence."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    DynamicCache,
    T5Config,
    T5ForConditionalGeneration,
)

import nextlat
from conftest import FAMILIES, tiny_lm
from nextlat.backbone import CACHE, Backbone, evaluation_mode
from nextlat.batch import Batch
from nextlat.decoding.cache import drafting_obstacle
from nextlat.paper_lm import llama

SHIMMED = {"gemma2", "granite"}  # soft-capping; division of the logits by a constant


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_the_hidden_state_is_the_logits(family: str) -> None:
    lm = tiny_lm(family)
    backbone = Backbone(lm)
    ids = torch.randint(50, (3, 7))
    h = backbone.hidden(Batch.from_inputs(ids, ids))
    for head in (backbone.head, backbone.frozen_head):
        torch.testing.assert_close(head(h), lm(ids).logits)
        torch.testing.assert_close(head(h[1, 2]), lm(ids).logits[1, 2])  # any leading shape
    assert (backbone.head.weight is None) == (family in SHIMMED)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_nearly_invisible_soft_cap_is_still_found(family: str) -> None:
    """Fresh models have logits so small that a cap of 30 changes nothing on them: only magnified
    states show it."""
    lm = tiny_lm(
        family,
        **({"final_logit_softcapping": 30.0} if family == "gemma2" else {}),
        initializer_range=0.02,
    )
    backbone = Backbone(lm)
    assert (backbone.head.weight is None) == (family in SHIMMED)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_pass_the_frozen_head_and_leave_it_alone(family: str) -> None:
    lm = tiny_lm(family)
    backbone = Backbone(lm)
    h = torch.randn(4, 32, requires_grad=True)
    backbone.frozen_head(h).square().sum().backward()
    frozen = h.grad.clone()
    assert all(p.grad is None for p in lm.parameters())
    h.grad = None
    backbone.head(h).square().sum().backward()
    torch.testing.assert_close(h.grad, frozen)
    assert lm.get_output_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    """transformers infers packing only without a mask and without a cache, and loses it silently
    otherwise."""
    lm = tiny_lm(family)
    lm.config.use_cache = True
    backbone = Backbone(lm)
    assert backbone.packs
    ids = torch.randint(50, (2, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 0, 1]])
    h = backbone.hidden(Batch.from_inputs(ids, ids, positions, torch.ones_like(ids)))
    for row, starts in enumerate([[0, 4, 9], [0, 1, 7, 9]]):
        for a, b in pairwise(starts):
            alone = ids[row : row + 1, a:b]
            torch.testing.assert_close(
                h[row, a:b],
                backbone.hidden(Batch.from_inputs(alone, alone))[0],
                rtol=1e-4,
                atol=1e-5,
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_steps_equal_one_forward(family: str) -> None:
    backbone = Backbone(tiny_lm(family))
    ids = torch.randint(50, (2, 12))
    whole = backbone.hidden(Batch.from_inputs(ids, ids))
    first, cache = backbone.step(ids[:, :5])
    second, _ = backbone.step(ids[:, 5:], cache)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-5)


def test_flash_attention_on_packed_rows_is_refused() -> None:
    lm = tiny_lm("llama")
    backbone = Backbone(lm)
    lm.config._attn_implementation_internal = "flash_attention_2"
    ids = torch.randint(50, (2, 4))
    with pytest.raises(nextlat.NextLatError, match="sdpa"):
        backbone.hidden(Batch.from_inputs(ids, ids, torch.tensor([[0, 1, 0, 1]]).expand(2, 4)))


def test_a_model_that_ignores_positions_is_caught_before_it_trains() -> None:
    lm = tiny_lm("llama")
    forward = lm.model.forward
    lm.model.forward = lambda input_ids, position_ids=None, **rest: forward(
        input_ids=input_ids, **rest
    )
    backbone = Backbone(lm)
    assert not backbone.packs
    ids = torch.randint(50, (1, 4))
    with pytest.raises(nextlat.NextLatError, match="one document per row"):
        backbone.hidden(Batch.from_inputs(ids, ids, torch.tensor([[0, 1, 0, 1]])))
    backbone.hidden(
        Batch.from_inputs(ids, ids, None, torch.tensor([[1, 1, 1, 0]]))
    )  # padding alone is fine


def test_what_is_no_decoder_only_causal_lm_is_refused() -> None:
    small = {
        "d_model": 16,
        "d_ff": 16,
        "d_kv": 8,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 20,
        "decoder_start_token_id": 0,
    }
    with pytest.raises(nextlat.NextLatError, match="encoder-decoder"):
        Backbone(T5ForConditionalGeneration(T5Config(**small)))
    with pytest.raises(nextlat.NextLatError, match="no output head"):
        Backbone(AutoModel.from_config(tiny_lm("llama").config))
    with pytest.raises(nextlat.NextLatError, match="not a transformers model"):
        Backbone(nn.Linear(2, 2))


def test_logits_that_do_not_come_from_the_hidden_state_are_refused() -> None:
    lm = tiny_lm("llama")
    lm.lm_head.register_forward_hook(lambda module, args, out: out + torch.randn(out.shape))
    with pytest.raises(nextlat.NextLatError, match="not supported"):
        Backbone(lm)


def test_probing_leaves_the_model_as_it_was() -> None:
    lm = tiny_lm("gpt2").train()
    lm.transformer.h[0].eval()
    random_state, flags = torch.get_rng_state(), [m.training for m in lm.modules()]
    Backbone(lm)
    assert [m.training for m in lm.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in lm.parameters())


def test_evaluation_mode_puts_every_flag_back_even_after_an_error() -> None:
    lm = tiny_lm("gpt2", resid_pdrop=0.5).train()
    lm.transformer.h[0].eval()
    flags, ids = [m.training for m in lm.modules()], torch.arange(5)[None]

    def measure() -> None:
        with evaluation_mode(lm, "an exact model"):
            assert torch.equal(lm(ids).logits, lm(ids).logits)
            assert not lm(ids).logits.requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        measure()
    assert [m.training for m in lm.modules()] == flags and torch.is_grad_enabled()


def test_a_thread_that_ends_does_not_switch_the_dropout_of_another_on() -> None:
    lm = tiny_lm("gpt2").train()
    first, second = evaluation_mode(lm), evaluation_mode(lm)
    with torch.enable_grad():
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not any(module.training for module in lm.modules())
        second.__exit__(None, None, None)
    assert all(module.training for module in lm.modules())


def test_a_model_without_a_key_value_cache_is_refused_where_it_would_decode() -> None:
    lm = tiny_lm("llama")
    backbone = Backbone(lm)
    forward = lm.model.forward
    lm.model.forward = lambda use_cache=None, **rest: forward(
        use_cache=False, **{name: x for name, x in rest.items() if name != CACHE}
    )
    with pytest.raises(nextlat.NextLatError, match="keeps no key-value cache"):
        backbone.step(torch.randint(50, (1, 4)))


def test_a_model_that_keeps_another_cache_than_it_is_given_is_refused() -> None:
    """As all did whose argument a newer transformers had renamed: what a draft left behind stayed
    in the cache that was really read."""
    lm = tiny_lm("llama")
    backbone = Backbone(lm)
    backbone.step(torch.randint(50, (1, 4)), backbone.new_cache())
    forward = lm.model.forward
    lm.model.forward = lambda **given: forward(**given | {CACHE: DynamicCache()})
    with pytest.raises(nextlat.NextLatError, match=f"as '{CACHE}'"):
        backbone.step(torch.randint(50, (1, 4)), backbone.new_cache())
    assert "cache" in drafting_obstacle(backbone, 0)


# ---- models that change ----


class Adapter(nn.Module):
    """A low-rank addition to a linear map, as adapters are: the map's own weight is not all."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> nn.Parameter:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Int8(nn.Module):
    """Weight-only quantisation: no floating-point parameter, and no `weight` to multiply by."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = base.weight.shape
        scale = base.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("code", (base.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.code * self.scale).T.to(x.dtype)


def put_around(lm: nn.Module, kind: type[nn.Module], *ends: str) -> list[nn.Module]:
    found = [(n, m) for n, m in lm.named_modules() if type(m) is nn.Linear and n.endswith(ends)]
    for name, module in found:
        parent, _, own = name.rpartition(".")
        setattr(lm.get_submodule(parent), own, kind(module))
    return [lm.get_submodule(name) for name, _ in found]


def assert_as_it_is_now(model: nextlat.ObjectiveModel, tolerance: float = 1e-5) -> None:
    """Logits, greedy and sampled decoding are those of the model as it is now."""
    lm, ids = model.lm, torch.randint(50, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, lm(ids).logits, rtol=0, atol=tolerance)
    expected = lm.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    for draft_length in (0, 2):
        options = {"max_new_tokens": 8, "draft_length": draft_length}
        assert model.generate(ids, do_sample=False, **options).tolist() == expected
        assert model.generate(ids, do_sample=True, **options).shape == (2, 14)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("where", ["lm_head", "up_proj", "q_proj"])
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_adapters_count_wherever_and_whenever_they_come(
    family: str, where: str, before: bool, tmp_path: Path
) -> None:
    lm = tiny_lm(family, tie_word_embeddings=False)
    model = None if before else nextlat.attach(lm, nextlat.NextLatConfig())
    adapters = put_around(lm, Adapter, where)
    model = model or nextlat.attach(lm, nextlat.NextLatConfig())
    assert_as_it_is_now(model)
    lm.requires_grad_(False)
    for adapter in adapters:
        adapter.up.requires_grad_(True)
    ids = torch.randint(50, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(bool(adapter.up.weight.grad.any()) for adapter in adapters)
    with pytest.raises(nextlat.NextLatError, match=f"comes back: .*{where} is not what"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_frozen_head_is_frozen_with_an_adapter_too() -> None:
    lm = tiny_lm("llama", tie_word_embeddings=False)
    backbone = Backbone(lm)
    put_around(lm, Adapter, "lm_head")
    h = torch.randn(3, 32, requires_grad=True)
    torch.testing.assert_close(backbone.frozen_head(h), lm.lm_head(h))
    backbone.frozen_head(h).square().sum().backward()
    assert bool(h.grad.any()) and all(p.grad is None for p in lm.parameters())


def test_quantised_layers_are_called_not_read() -> None:
    lm = tiny_lm("llama", tie_word_embeddings=False)
    model = nextlat.attach(lm, nextlat.NextLatConfig())
    put_around(lm, Int8, "_proj", "lm_head")
    assert_as_it_is_now(model)
    ids = torch.randint(50, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.objective.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config", [nextlat.NextLatConfig(), nextlat.MTPConfig()], ids=["nextlat", "mtp"]
)
def test_tokens_added_after_attach_are_tokens(config: Any, tied: bool, tmp_path: Path) -> None:
    lm = tiny_lm("llama", tie_word_embeddings=tied)
    model = nextlat.attach(lm, config)
    lm.resize_token_embeddings(57)
    with torch.no_grad():
        lm.lm_head.weight[50:] *= 30  # so that they are said
    assert model.backbone.vocab_size == 57
    draft_length = {"draft_length": 1 if model.objective.max_draft_length else 2}
    ids = torch.randint(57, (2, 6))
    expected = lm.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    assert model.generate(ids, max_new_tokens=8, **draft_length).tolist() == expected
    model.generate(ids, max_new_tokens=8, do_sample=True, **draft_length)
    model.save_pretrained(tmp_path)
    again = nextlat.load(tmp_path)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert again.generate(ids, max_new_tokens=8, **draft_length).tolist() == expected


def test_another_dtype_and_several_of_them(tmp_path: Path) -> None:
    lm = tiny_lm("llama", tie_word_embeddings=False)
    model = nextlat.attach(lm, nextlat.NextLatConfig())
    model.to(torch.bfloat16)
    assert_as_it_is_now(model, 1e-2)
    lm.model.norm.float()
    lm.lm_head.float()
    assert_as_it_is_now(model, 1e-2)
    model.save_pretrained(tmp_path)
    again = nextlat.load(tmp_path)
    for (name, a), (_, b) in zip(lm.named_parameters(), again.lm.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize(
    "config", [nextlat.NextLatConfig(), nextlat.MTPConfig()], ids=["nextlat", "mtp"]
)
def test_what_is_found_out_does_not_depend_on_where_attach_is_called(config: Any) -> None:
    lm, ids = tiny_lm("llama", tie_word_embeddings=False), torch.randint(50, (3, 6))
    plain = nextlat.attach(lm, config)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        with context:
            model = nextlat.attach(lm, config)
            model.generate(ids, max_new_tokens=4, draft_length=1)
        assert model.objective.max_draft_length == plain.objective.max_draft_length
        assert (model.backbone.packs, model.backbone.pads_left) == (True, True)
        _, stats = model.generate(ids, max_new_tokens=9, draft_length=1, return_stats=True)
        assert stats.passes < stats.cycles  # rows share them
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.objective.parameters())


@pytest.mark.parametrize("place", ["Backbone.states", "Head.__call__"])
def test_a_failing_allocation_says_nothing_about_the_model(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, kind = tiny_lm("llama"), getattr(nextlat.backbone, place.split(".")[0])
    name, calls = place.split(".")[1], [0]
    original = getattr(kind, name)
    for failing in range(1, 5):
        calls[0] = 0

        def allocate(self: Any, *args: Any, n: int = failing, **options: Any) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == n:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(kind, name, allocate)
            with pytest.raises(torch.OutOfMemoryError):
                nextlat.attach(lm, nextlat.NextLatConfig())


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_without_positions_only_the_causal_mask_orders_the_tokens(
    positions: Literal["rotary", "none"],
) -> None:
    lm = llama(50, layers=1, width=32, heads=2, positions=positions, seed=0).eval()
    ids, shuffled = torch.tensor([[3, 1, 4, 15, 9, 2]]), torch.tensor([[15, 9, 3, 4, 1, 2]])
    with torch.no_grad():
        last, other = (Backbone(lm).states(x)[:, -1] for x in (ids, shuffled))
    assert torch.allclose(last, other, atol=1e-6) == (positions == "none")
