"""MTP, JTP and BST against slow, obviously right references: one document, one position, one head
or pair at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

import nextlat
from conftest import FAMILIES, tiny_lm
from nextlat.batch import Batch
from nextlat.decoding.cache import GrowingCache, RaggedCache
from nextlat.losses import one_by_one
from nextlat.objectives import belief_state, multi_token
from nextlat.objectives.belief_state import Pairs
from test_objectives import EXACT, ROUNDED, VOCAB, Watch, documents, gradients, pack

Docs = list[tuple[Tensor, Tensor]]


def model_of(
    config: object, family: str = "gpt2", dtype: torch.dtype = torch.float64
) -> nextlat.ObjectiveModel:
    lm = tiny_lm(family, VOCAB, tie_word_embeddings=False)
    torch.manual_seed(1)
    model = nextlat.attach(lm, config).to(dtype)
    for p in model.objective.parameters():
        nn.init.normal_(p, std=0.2)  # no head is a copy, no gain is one
    return model.eval()


def cross_entropy(logits_V: Tensor, label: Tensor) -> Tensor:
    return -logits_V.log_softmax(-1)[label]


def mean(terms: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(terms).mean() if terms else like.sum() * 0


# ---- references ----


@contextmanager
def head_in_place(model: nextlat.ObjectiveModel, i: int) -> Iterator[None]:
    """The LM with head i in the place of its last layer and norm."""
    body = getattr(model.lm, "transformer", None) or model.lm.model
    layers, norm = (body.h, "ln_f") if hasattr(body, "h") else (body.layers, "norm")
    kept = layers[-1], getattr(body, norm)
    if i:
        layers[-1] = model.objective.heads[i - 1].layer
        setattr(body, norm, model.objective.heads[i - 1].norm)
    yield
    layers[-1] = kept[0]
    setattr(body, norm, kept[1])


def mtp_reference(model: nextlat.ObjectiveModel, docs: Docs) -> dict[str, Tensor]:
    d, weight = model.objective.horizon, model.objective.config.lambda_mtp
    losses: list[Tensor] = []
    for i in range(d + 1):
        terms = []
        with head_in_place(model, i):
            for ids, labels in docs:
                logits = model.lm(input_ids=ids[None], use_cache=False).logits[0]
                for t in range(len(ids)):
                    if t + 1 + i < len(ids) and labels[t + 1 + i] != -100:
                        terms.append(cross_entropy(logits[t], labels[t + 1 + i]))
        losses.append(mean(terms, logits))
    return joined(losses, weight)


def joined(losses: list[Tensor], weight: float) -> dict[str, Tensor]:
    extra = sum(losses[1:]) / (len(losses) - 1)
    return {"next_token": losses[0], "multi_token": extra, "loss": losses[0] + weight * extra}


def fetch(model: nextlat.ObjectiveModel, h: Tensor, embeddings: list[Tensor]) -> Tensor:
    """Fetch's last output for the window h, E(x_t), ..., E(x_{t+i}), written out over heads and
    vectors; then the norm."""
    f, i = model.objective.fetch, len(embeddings) - 1
    window = [
        F.layer_norm(e + f.gamma * h, h.shape, f.combine_norm.weight, f.combine_norm.bias)
        for e in embeddings
    ]
    size = len(h) // f.heads
    out = []
    for head in range(f.heads):
        part = slice(head * size, (head + 1) * size)
        query = f.query.weight[part] @ window[i]
        scores = [
            query @ (f.key.weight[part] @ c) / size**0.5 + f.bias_HW[head, i - j]
            for j, c in enumerate(window)
        ]
        values = [f.value.weight[part] @ c for c in window]
        out.append(sum(p * v for p, v in zip(torch.stack(scores).softmax(0), values, strict=True)))
    y = f.output.weight @ torch.cat(out)
    return F.layer_norm(y + h if i else y, h.shape, f.norm.weight, f.norm.bias)


def jtp_reference(model: nextlat.ObjectiveModel, docs: Docs) -> dict[str, Tensor]:
    d, embedding = model.objective.horizon, model.lm.get_input_embeddings()
    terms: list[list[Tensor]] = [[] for _ in range(d + 1)]
    for ids, labels in docs:
        h_TD = model.lm(
            input_ids=ids[None], use_cache=False, output_hidden_states=True
        ).hidden_states[-1][0]
        for t in range(len(ids)):
            for i in range(d + 1):
                if t + 1 + i < len(ids) and labels[t + 1 + i] != -100:
                    state = fetch(model, h_TD[t], [embedding(ids[t + j]) for j in range(i + 1)])
                    terms[i].append(cross_entropy(model.backbone.head(state), labels[t + 1 + i]))
    return joined([mean(each, h_TD) for each in terms], model.objective.config.lambda_mtp)


def bst_reference(
    model: nextlat.ObjectiveModel, docs: Docs, keep: set[tuple[int, int, int]] | None = None
) -> dict[str, Tensor]:
    """Prefixes x_1..x_t and suffixes x_s..x_T of each document with s >= t + 1, in the paper's
    numbering from 1."""
    objective = model.objective
    nexts, previouses, plain = [], [], []
    for number, (ids, labels) in enumerate(docs):
        T = len(ids)
        f = [
            objective.empty_prefix,
            *model.lm.base_model(ids[None], use_cache=False)[0][0],
        ]  # f[t]: after x_1..x_t
        read = objective.backward_encoder(ids.flip(0)[None], use_cache=False)[0][0]
        b = [
            None,
            *read.flip(0),
            objective.empty_suffix,
        ]  # b[s]: after x_T..x_s; b[T + 1]: after nothing
        for t in range(T + 1):
            for s in range(t + 1, T + 2):
                if keep is not None and (number, t, s) not in keep:
                    continue
                x = torch.cat([f[t], b[s]])
                states = objective.text_head.write.weight @ F.gelu(
                    objective.text_head.read.weight @ x
                )
                if t + 1 <= T and labels[t + 1 - 1] != -100:
                    nexts.append(cross_entropy(model.backbone.head(states[: len(f[t])]), labels[t]))
                    if s == T + 1 and t > 0:
                        plain.append(nexts[-1].detach())
                if s - 1 >= 1 and labels[s - 1 - 1] != -100:
                    previouses.append(
                        cross_entropy(model.backbone.head(states[len(f[t]) :]), labels[s - 2])
                    )
    loss = mean(nexts, read) + mean(previouses, read)
    return {
        "loss": loss,
        "pairs_next": mean(nexts, read),
        "pairs_previous": mean(previouses, read),
        "next_token": mean(plain, read),
    }


def assert_same(
    model: nextlat.ObjectiveModel, batch: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    tolerance = (
        EXACT if model.config.model_type == "gpt2" and model.dtype == torch.float64 else ROUNDED
    )
    out = model(**batch)
    for name, value in expected.items():
        ours = out.loss if name == "loss" else out.losses[name]
        torch.testing.assert_close(
            ours,
            value.detach() if name != "loss" else value,
            **tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    # Half of it as what is differentiated: a scale from outside (accumulation, loss scaling) must
    # reach every gradient.
    ours, theirs = gradients(model, 0.5 * out.loss), gradients(model, 0.5 * expected["loss"])
    for name in ours.keys() | theirs.keys():
        a, b = (g.get(name, torch.zeros(1, dtype=model.dtype)) for g in (ours, theirs))
        a, b = torch.broadcast_tensors(a, b)
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


REFERENCES = {
    "mtp": (nextlat.MTPConfig(horizon=3, lambda_mtp=0.7), mtp_reference),
    "jtp": (nextlat.JTPConfig(horizon=3, lambda_mtp=0.7), jtp_reference),
    "bst": (nextlat.BSTConfig(), bst_reference),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", REFERENCES)
def test_packed_prompts_and_padding_equal_the_reference(name: str, family: str) -> None:
    config, reference = REFERENCES[name]
    model = model_of(config, family, torch.float32 if family == "mixtral" else torch.float64)
    docs = documents(5, [6, 1, 9, 3], prompt=1)
    assert_same(model, pack([docs[:2], docs[2:]], length=13), reference(model, docs))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
def test_one_padded_document_per_row_without_positions(name: str, left: bool) -> None:
    config, reference = REFERENCES[name]
    model = model_of(config)
    docs = documents(3, [4, 7])
    batch = pack([[docs[0]], [docs[1]]], length=8, left=left)
    del batch["position_ids"]
    assert_same(model, batch, reference(model, docs))


@pytest.mark.parametrize("name", REFERENCES)
def test_nothing_to_predict_is_zero_and_finite(name: str) -> None:
    model = model_of(REFERENCES[name][0])
    ids = torch.randint(VOCAB, (2, 4))
    out = model(input_ids=ids, labels=torch.full_like(ids, -100))
    out.loss.backward()
    assert out.loss.item() == 0 and all(
        p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters()
    )


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_tensor_of_positions_times_vocabulary_is_ever_made(name: str, family: str) -> None:
    vocab, T = 3000, 48
    model = nextlat.attach(tiny_lm(family, vocab), REFERENCES[name][0])
    ids = torch.randint(vocab, (4, T))
    with Watch() as watch:
        model(
            input_ids=ids, labels=ids, position_ids=(torch.arange(T) % 12).expand(4, T)
        ).loss.backward()
    pairs = len(Pairs.of(Batch.from_inputs(ids, ids, (torch.arange(T) % 12).expand(4, T))).prefix)
    assert watch.largest < (min(pairs, 4096) if name == "bst" else 4 * T) * vocab / 2, watch.largest


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
    model = model_of(nextlat.BSTConfig())
    docs = documents(8, [6, 4])
    batch = pack([docs], length=11)
    whole = model(**batch).loss
    expected = gradients(model, whole)
    monkeypatch.setattr(belief_state, "CHUNK", chunk)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, whole, **EXACT)
    found = gradients(model, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **EXACT)


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
        (6, 0): (10, -100), (6, 1): (10, 10), (6, 2): (10, 11), (6, 6): (10, -100), (0, 1): (11, 10), (0, 2): (11, 11),
        (0, 6): (11, -100), (1, 2): (-100, 11),
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

    model = model_of(nextlat.BSTConfig(pair_share=share))
    docs = documents(4, [7, 5])
    keep = set()
    for number, (tokens, _) in enumerate(docs):
        # Every token labelled, so that every kept pair shows up in at least one of its targets.
        pairs, n = Pairs.of(Batch.from_inputs(tokens[None], tokens[None]), share), len(tokens)
        for p, s in zip(pairs.prefix.tolist(), pairs.suffix.tolist(), strict=True):
            keep.add((number, 0 if p == n else p + 1, s + 1))
    expected = bst_reference(model, docs, keep)
    del expected["next_token"]  # which is over all positions
    assert_same(model, pack([docs], length=14), expected)


def test_which_pairs_are_kept_depends_on_the_document_alone() -> None:
    docs = documents(6, [9, 12, 5])
    model = model_of(nextlat.BSTConfig(pair_share=0.4))
    together = model.counts(**pack([docs], length=30))
    apart = sum(model.counts(**pack([[doc]], length=12)) for doc in docs)
    assert torch.equal(together, apart)
    swapped = docs[0][0].clone()
    swapped[[2, 3]] = swapped[[3, 2]]
    kept = [Pairs.of(Batch.from_inputs(x[None], x[None]), 0.4) for x in (docs[0][0], swapped)]
    assert (
        kept[0].prefix.tolist() != kept[1].prefix.tolist()
        or kept[0].suffix.tolist() != kept[1].suffix.tolist()
    )


@pytest.mark.parametrize(("prefix", "suffix"), [(3, 4), (0, 4), (3, 0)])
def test_generation_towards_a_goal_reads_both_sides(prefix: int, suffix: int) -> None:
    model = model_of(nextlat.BSTConfig(), "llama", torch.float32)
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
    model = model_of(nextlat.MTPConfig(horizon=3), family, torch.float32)
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
            RaggedCache(backbone, objective.cache_config, 24)
            if ragged
            else GrowingCache(backbone, objective.cache_config, forgets=True)
        )
        cached = torch.zeros_like(state_BTS)
        done = 0
        for read, rejected in [(9, 0), (4, 2), (3, 3), (1, 0), (4, 1), (3, 0), (3, 0), (3, 0)]:
            piece = ids[:, done : done + read].clone()
            piece[:, read - rejected :] = 0  # other tokens than those that follow
            h = cache.prefill(list(piece))[1] if ragged and not done else cache.read(piece)
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
    model = model_of(nextlat.MTPConfig(horizon=2), "llama", torch.float32)
    ids = torch.randint(VOCAB, (1, 6))
    with torch.no_grad():
        plain = DynamicCache(config=model.config)
        model.backbone.step(ids, plain)
        cache = DynamicCache(config=model.objective.cache_config)
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
    model = model_of(nextlat.JTPConfig(horizon=3), family, torch.float32)
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
    model = model_of(config, "llama", torch.float32)
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
    model = model_of(REFERENCES[name][0], family, torch.float32)
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


# ---- settings ----


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (nextlat.MTPConfig, "horizon", 0),
        (nextlat.MTPConfig, "lambda_mtp", 0.0),
        (nextlat.JTPConfig, "horizon", -1),
        (nextlat.JTPConfig, "lambda_mtp", float("nan")),
        (nextlat.BSTConfig, "pair_share", 0.0),
        (nextlat.BSTConfig, "pair_share", 1.5),
    ],
)
def test_bad_settings_are_named(config: type, field: str, value: float) -> None:
    with pytest.raises(nextlat.NextLatError, match=field):
        config(**{field: value})


def test_published_sizes_of_the_parameters() -> None:
    """FineWeb-Edu in the paper, width 2048: GPT 1.32 B, MTP d=1 1.37 B, JTP 1.34 B, BST 2.57 B."""
    jtp = joint_parameters(2048)
    assert round(jtp / 1e9, 2) == 0.02
    text_head = sum(p.numel() for p in belief_state.TextHead(2048).parameters())
    transformer, embedding = 1.32e9 - 2 * 50257 * 2048, 50257 * 2048
    assert round((2 * (transformer + embedding) + embedding + text_head) / 1e9, 2) == 2.57


def joint_parameters(width: int) -> int:
    from nextlat.objectives.joint_multi_token import Fetch

    return sum(p.numel() for p in Fetch(width, 4, 1).parameters())
