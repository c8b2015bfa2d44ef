"""What a causal LM does is found out numerically, and what cannot be reproduced is refused in one
sentence."""

from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    T5Config,
    T5ForConditionalGeneration,
)

import nextlat
from conftest import FAMILIES, tiny_lm
from nextlat.backbone import Backbone, evaluation_mode, llama
from nextlat.batch import Batch

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


def test_a_model_without_a_key_value_cache_is_refused_where_it_would_decode() -> None:
    lm = tiny_lm("llama")
    backbone = Backbone(lm)
    forward = lm.model.forward
    lm.model.forward = lambda past_key_values=None, use_cache=None, **rest: forward(
        use_cache=False, **rest
    )
    with pytest.raises(nextlat.NextLatError, match="keeps no key-value cache"):
        backbone.step(torch.randint(50, (1, 4)))


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_without_positions_only_the_causal_mask_orders_the_tokens(
    positions: Literal["rotary", "none"],
) -> None:
    lm = llama(50, layers=1, width=32, heads=2, positions=positions, seed=0).eval()
    ids, shuffled = torch.tensor([[3, 1, 4, 15, 9, 2]]), torch.tensor([[15, 9, 3, 4, 1, 2]])
    with torch.no_grad():
        last, other = (Backbone(lm).states(x)[:, -1] for x in (ids, shuffled))
    assert torch.allclose(last, other, atol=1e-6) == (positions == "none")
