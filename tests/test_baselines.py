"""MTP, JTP and BST beyond their losses: memory, pairs, drafting."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import nextlat
from conftest import FAMILIES, tiny_lm
from nextlat.batch import Batch
from nextlat.decoding.cache import GrowingCache, RaggedCache
from nextlat.losses import add_counts, one_by_one
from nextlat.objectives import belief_state, multi_token
from nextlat.objectives.belief_state import Pairs
from nextlat.objectives.joint_multi_token import Fetch
from reference import (
    EXACT,
    REFERENCES,
    VOCAB,
    assert_same_gradients,
    assert_same_losses,
    documents,
    fetch,
    gradients,
    head_in_place,
    listed,
    objective_model,
    pack,
)
from reference import belief_state as belief_state_reference

# ---- memory: one head, or one chunk of pairs, at a time ----


class Live:
    """Elements of activations that autograd holds on to: the most at any time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, x: Tensor) -> "Held":
        return Held(self, x.detach() if not x.is_leaf else x)


class Held:
    def __init__(self, live: Live, x: Tensor) -> None:
        self.live, self.x, self.size = live, x, 0 if isinstance(x, nn.Parameter) else x.numel()
        live.now += self.size
        live.most = max(live.most, live.now)

    def __del__(self) -> None:
        self.live.now -= self.size


def naive(pieces, states, parameters):  # type: ignore[no-untyped-def]
    """What `one_by_one` gives, with all pieces in one graph."""
    parts = sum(piece(*states) for piece in pieces)
    return parts.sum(), parts.detach()


def most_held(model: nextlat.ObjectiveModel, batch: dict[str, Tensor]) -> int:
    live = Live()
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda held: held.x):
        model(**batch)
    return live.most


def test_memory_of_mtp_does_not_grow_with_the_horizon(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(VOCAB, (4, 100))
    models = [nextlat.attach(tiny_lm("llama", VOCAB), nextlat.MTPConfig(horizon=d)) for d in (1, 6)]
    one, six = (most_held(model, {"input_ids": ids, "labels": ids}) for model in models)
    assert six < 1.1 * one
    monkeypatch.setattr(multi_token, "one_by_one", naive)
    one, six = (most_held(model, {"input_ids": ids, "labels": ids}) for model in models)
    assert six > 2 * one  # and this is how that is seen


def test_memory_of_bst_does_not_grow_with_the_number_of_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(belief_state, "CHUNK", 100)
    model = nextlat.attach(tiny_lm("llama", VOCAB), nextlat.BSTConfig())
    ids = torch.randint(VOCAB, (2, 60))
    pieces = {"input_ids": ids, "labels": ids, "position_ids": (torch.arange(60) % 6).expand(2, 60)}
    short, whole = most_held(model, pieces), most_held(model, {"input_ids": ids, "labels": ids})
    assert whole < 1.1 * short
    monkeypatch.setattr(belief_state, "one_by_one", naive)
    assert most_held(model, {"input_ids": ids, "labels": ids}) > 2 * whole


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_pairs_in_chunks_equal_pairs_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = objective_model(nextlat.BSTConfig())
    docs = documents(8, [6, 4])
    batch = pack([docs], length=11)
    whole = model(**batch).loss
    expected = gradients(model, whole)
    monkeypatch.setattr(belief_state, "CHUNK", chunk)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, whole, **EXACT)
    found = gradients(model, loss)
    assert_same_gradients(found, expected, **EXACT)


def test_pieces_add_up_once_and_frozen_inputs_stay_out() -> None:
    w, frozen = (
        nn.Parameter(torch.tensor(2.0)),
        nn.Parameter(torch.tensor(5.0), requires_grad=False),
    )
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    pieces = [lambda s, k=k: k * w * frozen * s for k in (1.0, 10.0)]
    total, parts = one_by_one(pieces, [x * x], [w, frozen])
    assert total.item() == 11 * 2 * 5 * (1 + 9) and parts.tolist() == [11 * 2 * 5, 11 * 2 * 5 * 9]
    (3 * total).backward()
    assert w.grad.item() == 3 * 11 * 5 * 10 and x.grad.tolist() == [
        3 * 11 * 10 * 2 * 1,
        3 * 11 * 10 * 2 * 3,
    ]
    assert frozen.grad is None
    with torch.no_grad():
        assert one_by_one(pieces, [x * x], [w])[0].item() == total.item()
    assert one_by_one([], [x * x], [w])[0].item() == 0


# ---- BST: the pairs ----


def test_pairs_are_all_cuts_of_each_document_and_of_no_two() -> None:
    ids = torch.tensor([[10, 11, 12, 20, 21, 7]])
    labels = torch.tensor([[10, 11, -100, 20, 21, 7]])
    batch = Batch.from_inputs(
        ids, labels, torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    )
    pairs = Pairs.of(batch)
    found = {
        (p, s): tuple(t)
        for p, s, t in zip(
            *(x.tolist() for x in (pairs.prefix, pairs.suffix, pairs.targets)), strict=True
        )
    }
    assert len(found) + 1 == len(pairs.prefix)  # "nothing on either side" is there twice
    first = {  # positions last read (6 = nothing): next and previous label
        (6, 0): (10, -100), (6, 1): (10, 10), (6, 2): (10, 11), (6, 6): (10, -100),
        (0, 1): (11, 10), (0, 2): (11, 11), (0, 6): (11, -100), (1, 2): (-100, 11),
    }  # fmt: skip
    # (1, nothing) and (2, nothing) of the first document would both predict its unlabelled third
    # token or nothing at all.
    second = {
        (6, 3): (20, -100),
        (6, 4): (20, 20),
        (3, 4): (21, 20),
        (3, 6): (21, 21),
        (4, 6): (-100, 21),
    }
    shared = (6, 6)  # nothing read on either side, once for each document
    assert found.keys() - {shared} == (first.keys() | second.keys()) - {shared}
    assert all(found[key] == value for key, value in {**first, **second}.items() if key != shared)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_the_pairs_is_that_share_and_equals_its_reference(share: float) -> None:
    ids = torch.randint(VOCAB, (1, 120), generator=torch.Generator().manual_seed(0))
    batch = Batch.from_inputs(ids, ids)
    whole, part = len(Pairs.of(batch).prefix), len(Pairs.of(batch, share).prefix)
    assert part == pytest.approx(share * whole, abs=4 * (whole * share * (1 - share)) ** 0.5)
    places = torch.bincount(Pairs.of(batch, share).prefix, minlength=121).double()
    assert places[:60].sum() == pytest.approx(
        share * torch.bincount(Pairs.of(batch).prefix)[:60].sum().item(), rel=0.15
    )

    model = objective_model(nextlat.BSTConfig(pair_share=share))
    docs = documents(4, [7, 5])
    keep = set()
    for number, (tokens, _) in enumerate(docs):
        # Every token labelled, so that every kept pair shows up in at least one of its targets.
        pairs, n = Pairs.of(Batch.from_inputs(tokens[None], tokens[None]), share), len(tokens)
        for p, s in zip(pairs.prefix.tolist(), pairs.suffix.tolist(), strict=True):
            keep.add((number, 0 if p == n else p + 1, s + 1))
    expected = belief_state_reference(model, docs, keep)
    del expected["next_token"]  # which is over all positions
    assert_same_losses(model, pack([docs], length=14), expected)


def test_which_pairs_are_kept_depends_on_the_document_alone() -> None:
    docs = documents(6, [9, 12, 5])
    model = objective_model(nextlat.BSTConfig(pair_share=0.4))
    together = model.counts(**pack([docs], length=30))
    apart = add_counts([model.counts(**pack([[doc]], length=12)) for doc in docs])
    assert listed(together) == listed(apart)
    swapped = docs[0][0].clone()
    swapped[[2, 3]] = swapped[[3, 2]]
    kept = [Pairs.of(Batch.from_inputs(x[None], x[None]), 0.4) for x in (docs[0][0], swapped)]
    assert (
        kept[0].prefix.tolist() != kept[1].prefix.tolist()
        or kept[0].suffix.tolist() != kept[1].suffix.tolist()
    )


@pytest.mark.parametrize(("prefix", "suffix"), [(3, 4), (0, 4), (3, 0)])
def test_generation_towards_a_goal_reads_both_sides(prefix: int, suffix: int) -> None:
    model = objective_model(nextlat.BSTConfig(), "llama", torch.float32)
    ids, goal = torch.randint(VOCAB, (2, prefix)), torch.randint(VOCAB, (2, suffix))
    out = model.objective.generate_towards(ids, goal, max_new_tokens=6)
    objective, lm = model.objective, model.lm
    with torch.no_grad():
        for row in range(2):
            b = (
                objective.backward_encoder(goal[row].flip(0)[None])[0][0, -1]
                if suffix
                else objective.empty_suffix
            )
            tokens = ids[row]
            for made in out[row]:
                f = lm.base_model(tokens[None])[0][0, -1] if len(tokens) else objective.empty_prefix
                logits = model.backbone.head(objective.text_head(f, b)[0])
                assert made == logits.argmax()
                tokens = torch.cat([tokens, made[None]])
    if suffix and prefix:
        assert not torch.equal(
            out, objective.generate_towards(ids, goal.flip(1), max_new_tokens=6)
        )  # the goal matters
    with pytest.raises(nextlat.NextLatError, match="at least 1"):
        objective.generate_towards(ids, goal, 0)


# ---- drafting ----


@pytest.mark.parametrize(
    ("family", "ragged"),
    [*((family, False) for family in FAMILIES), ("llama", True), ("gpt2", True)],
)
def test_mtp_drafts_what_its_heads_say_with_and_without_a_cache(family: str, ragged: bool) -> None:
    model = objective_model(nextlat.MTPConfig(horizon=3), family, torch.float32)
    objective, backbone = model.objective, model.backbone
    assert objective.max_draft_length == 3
    ids = torch.randint(VOCAB, (2, 24))  # longer than the sliding window of Gemma 2
    with torch.no_grad():
        expected = []
        for i in (1, 2, 3):
            with head_in_place(model, i):
                expected.append(model.lm(input_ids=ids, use_cache=False).logits)
        state_BTS = objective.drafting_states(backbone.hidden(Batch.from_inputs(ids, ids)), ids)

        cache = (
            RaggedCache(backbone, 24, 3)
            if ragged
            else GrowingCache(backbone, {}, backbone.new_cache(3))
        )
        cached = torch.zeros_like(state_BTS)
        done = 0
        for read, rejected in [(9, 0), (4, 2), (3, 3), (1, 0), (4, 1), (3, 0), (3, 0), (3, 0)]:
            piece = ids[:, done : done + read].clone()
            piece[:, read - rejected :] = 0  # other tokens than those that follow
            h = cache.read(piece) if done else cache.prefill(list(piece))[1]
            cached[:, done : done + read] = objective.drafting_states(h, piece)
            cache.keep([read - rejected] * 2)
            done += read - rejected
        assert done == 24
        for states in (state_BTS, cached):
            state = states.flatten(0, 1)
            for i in range(3):
                state, logits = objective.draft(state, torch.zeros(len(state), dtype=torch.long))
                torch.testing.assert_close(logits, expected[i].flatten(0, 1), rtol=1e-3, atol=1e-4)


def test_mtp_heads_keep_their_keys_out_of_the_models_own_layers() -> None:
    model = objective_model(nextlat.MTPConfig(horizon=2), "llama", torch.float32)
    ids = torch.randint(VOCAB, (1, 6))
    with torch.no_grad():
        plain = DynamicCache(config=model.config)
        model.backbone.step(ids, plain)
        cache = model.backbone.new_cache(model.objective.cached_layers)
        h, _ = model.backbone.step(ids, cache)
        model.objective.drafting_states(h, ids)
    assert len(plain.layers) == 2 and len(cache.layers) == 4
    for ours, theirs in zip(cache.layers, plain.layers, strict=False):
        assert torch.equal(ours.keys, theirs.keys)
    assert all(layer.keys.shape == cache.layers[0].keys.shape for layer in cache.layers)


def test_mtp_starts_from_copies_and_leaves_the_model_alone() -> None:
    lm = tiny_lm("qwen3", VOCAB).requires_grad_(False)
    weights = {name: p.clone() for name, p in lm.named_parameters()}
    model = nextlat.attach(lm, nextlat.MTPConfig(horizon=2))
    assert (
        all(torch.equal(weights[name], p) for name, p in lm.named_parameters())
        and lm.model.layers[-1].self_attn.layer_idx == 1
    )
    for head in model.objective.heads:
        for name, p in head.layer.named_parameters():
            assert (
                torch.equal(p, weights[f"model.layers.1.{name}"]) and p.requires_grad
            )  # though the LM is frozen
    assert not any(p.requires_grad for p in lm.parameters())


def test_mtp_refuses_a_model_without_a_last_layer_to_repeat() -> None:
    lm = tiny_lm("llama")
    lm.model.norm.register_forward_hook(lambda module, args, out: 2 * out)
    nextlat.attach(lm, nextlat.MTPConfig())  # a norm with a hook is still that norm
    lm = tiny_lm("llama")
    forward = lm.model.forward

    def shifted(*args: object, **keywords: object) -> object:
        out = forward(*args, **keywords)
        out.last_hidden_state = out.last_hidden_state + 1
        return out

    lm.model.forward = shifted
    with pytest.raises(
        nextlat.NextLatError, match="does not end in one decoder layer and one norm"
    ):
        nextlat.attach(lm, nextlat.MTPConfig())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_jtp_drafts_what_fetch_learned_to_say(family: str) -> None:
    model = objective_model(nextlat.JTPConfig(horizon=3), family, torch.float32)
    objective, embedding = model.objective, model.lm.get_input_embeddings()
    ids = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        h = model.backbone.hidden(Batch.from_inputs(ids, ids))
        says = model.next_token_logits(model.hidden(Batch.from_inputs(ids, ids)))
        for t in range(5):
            state = objective.drafting_states(h, ids)[:, t]
            for i in range(4):
                expected = torch.stack(
                    [
                        model.backbone.head(
                            fetch(
                                model, h[row, t], [embedding(ids[row, t + j]) for j in range(i + 1)]
                            )
                        )
                        for row in range(2)
                    ]
                )
                if i == 0:
                    logits = says[:, t]
                else:
                    state, logits = objective.draft(state, ids[:, t + i])
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
                assert state.shape == (2, 32 + 1 + 4 * 32)  # static


@pytest.mark.parametrize(
    "config",
    [nextlat.JTPConfig(horizon=2), nextlat.BSTConfig(), nextlat.MTPConfig()],
    ids=["jtp", "bst", "mtp"],
)
def test_cached_steps_of_the_model_equal_its_whole_rows(config: object) -> None:
    model = objective_model(config, "llama", torch.float32)
    ids = torch.randint(VOCAB, (2, 11))
    whole, cache, pieces = model(input_ids=ids).logits, None, []
    for a, b in pairwise([0, 4, 5, 11]):
        states, cache = model.step(ids[:, a:b], cache)
        pieces.append(model.next_token_logits(states))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("name", ["mtp", "jtp", "bst"])
def test_decoding_gives_what_whole_forwards_give_whatever_is_drafted(
    name: str, family: str
) -> None:
    model = objective_model(REFERENCES[name][0], family, torch.float32)
    prompt, expected = torch.randint(VOCAB, (2, 5)), []
    for ids in prompt:
        tokens = ids
        for _ in range(14):
            tokens = torch.cat([tokens, model(input_ids=tokens[None]).logits[0, -1].argmax()[None]])
        expected.append(tokens)
    for draft_length in range(1 + model.objective.max_draft_length):
        out, stats = model.generate(
            prompt, max_new_tokens=14, draft_length=draft_length, return_stats=True
        )
        assert torch.equal(out, torch.stack(expected))
        assert stats.drafted == 0 if draft_length == 0 else stats.drafted > 0


@pytest.mark.parametrize("name", ["mtp", "jtp"])
def test_drafts_of_a_trained_model_are_accepted(name: str) -> None:
    """On a cycle of six tokens all drafts are right, if they start where they should."""
    lm = tiny_lm("llama", VOCAB)
    model = nextlat.attach(lm, REFERENCES[name][0]).train()
    ids = torch.tensor([4, 9, 1, 1, 7, 12]).repeat(5)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    out, stats = model.generate(ids[:, :8], max_new_tokens=20, draft_length=3, return_stats=True)
    assert torch.equal(out, ids[:, :28])
    assert stats.acceptance_rate == 1 and stats.mean_acceptance_length > 3.5


def test_published_sizes_of_the_parameters() -> None:
    """FineWeb-Edu in the paper, width 2048: GPT 1.32 B, MTP d=1 1.37 B, JTP 1.34 B, BST 2.57 B."""
    with torch.device("meta"):
        jtp, text_head = (
            sum(p.numel() for p in module.parameters())
            for module in (Fetch(2048, 4, 1), belief_state.TextHead(2048))
        )
    assert round(jtp / 1e9, 2) == 0.02
    transformer, embedding = 1.32e9 - 2 * 50257 * 2048, 50257 * 2048
    assert round((2 * (transformer + embedding) + embedding + text_head) / 1e9, 2) == 2.57
