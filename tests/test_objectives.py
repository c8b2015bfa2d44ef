"""The objective against a slow, obviously right reference: one document, one position, one step at a time."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import nextlat
from conftest import FAMILIES, tiny_lm
from nextlat.losses import cross_entropy, row_chunks, same_head_kl
from nextlat.objectives import OBJECTIVES, LatentDynamics

VOCAB = 23


# GPT-2 computes in float64 throughout; models with RMSNorm round to fp32 inside, whatever their dtype, and so agree only to that.
EXACT, ROUNDED = {"rtol": 1e-9, "atol": 1e-11}, {"rtol": 1e-4, "atol": 1e-5}


def model_of(family: str = "gpt2", dtype: torch.dtype = torch.float64, **config: object) -> nextlat.ObjectiveModel:
    lm = tiny_lm(family, VOCAB, tie_word_embeddings=False).to(dtype)
    torch.manual_seed(1)
    model = nextlat.attach(lm, nextlat.NextLatConfig(**config))
    for p in model.objective.parameters():
        torch.nn.init.normal_(p, std=0.2)  # far from the near-identity of the initial weights
    return model


def documents(seed: int, lengths: list[int], prompt: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of documents; the first `prompt` tokens of each carry no label, nor does every fifth after them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        labels[prompt + 3 :: 5] = -100
        made.append((ids, labels))
    return made


def reference(model: nextlat.ObjectiveModel, docs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Every clause of the method in three loops: documents, positions t, steps i."""
    lm, config = model.lm, model.objective.config
    d = config.horizon
    embedding = lm.get_input_embeddings()
    next_token, next_h, kl = [], [[] for _ in range(d)], [[] for _ in range(d)]

    def frozen_head(h: Tensor) -> Tensor:
        for p in lm.get_output_embeddings().parameters():
            p.requires_grad_(False)
        logits = model.backbone.head(h)
        for p in lm.get_output_embeddings().parameters():
            p.requires_grad_(True)
        return logits

    for ids, labels in docs:
        out = lm(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        h, logits, length = out.hidden_states[-1][0], out.logits[0], len(ids)
        has_loss = [s + 1 < length and labels[s + 1] != -100 for s in range(length)]
        for t in range(length):
            if has_loss[t]:
                next_token.append(-logits[t].log_softmax(-1)[labels[t + 1]])
            h_hat = h[t]
            for i in range(1, d + 1):
                s = t + i
                if s >= length:
                    break
                h_hat = model.objective.dynamics(h_hat, embedding(ids[s]))
                difference = (h_hat - h[s].detach()).abs()
                next_h[i - 1].append(torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean())
                if has_loss[s]:
                    log_p = frozen_head(h[s].detach()).log_softmax(-1).detach()
                    kl[i - 1].append((log_p.exp() * (log_p - frozen_head(h_hat).log_softmax(-1))).sum())

    def mean(terms: list[Tensor]) -> Tensor:
        return torch.stack(terms).mean() if terms else torch.zeros((), dtype=lm.dtype)

    parts = {"next_token": mean(next_token), "next_h": sum(map(mean, next_h)) / d, "kl": sum(map(mean, kl)) / d}
    parts["loss"] = parts["next_token"] + config.lambda_next_h * parts["next_h"] + config.lambda_kl * parts["kl"]
    return parts


def pack(rows: list[list[tuple[Tensor, Tensor]]], length: int, left: bool = False) -> dict[str, Tensor]:
    """Rows of documents, padded to `length`; the padding carries tokens and labels that must not matter."""
    batch: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": [], "attention_mask": []}
    for docs in rows:
        ids, labels = (torch.cat(parts) for parts in zip(*docs, strict=True))
        positions = torch.cat([torch.arange(len(doc)) for doc, _ in docs])
        fill = length - len(ids)
        pads = (torch.full((fill,), 7), torch.full((fill,), 7), torch.arange(fill), torch.zeros(fill, dtype=torch.long))
        values = (ids, labels, positions, torch.ones(len(ids), dtype=torch.long))
        for name, value, padding in zip(batch, values, pads, strict=True):
            batch[name].append(torch.cat([padding, value] if left else [value, padding]))
    return {name: torch.stack(rows) for name, rows in batch.items()}


def gradients(model: nextlat.ObjectiveModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nextlat.ObjectiveModel, batch: dict[str, Tensor], docs: list[tuple[Tensor, Tensor]]) -> None:
    expected, out = reference(model, docs), model(**batch)
    tolerance = EXACT if model.config.model_type == "gpt2" else ROUNDED
    for name in ("next_token", "next_h", "kl"):
        torch.testing.assert_close(out.losses[name], expected[name].detach(), **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(out.loss, expected["loss"], **tolerance)
    if not expected["loss"].requires_grad:  # nothing to predict anywhere
        return
    ours, theirs = gradients(model, model(**batch).loss), gradients(model, expected["loss"])
    for name in ours.keys() | theirs.keys():
        a, b = (g.get(name, torch.zeros(1, dtype=model.dtype)) for g in (ours, theirs))
        a, b = torch.broadcast_tensors(a, b)
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("horizon", range(1, 9))
def test_packed_prompts_and_padding_equal_the_reference(horizon: int) -> None:
    model = model_of(horizon=horizon, lambda_next_h=0.7, lambda_kl=1.3, hidden_size=19)
    docs = documents(horizon, [7, 1, 5, 2, 9, 4], prompt=2)
    assert_same(model, pack([docs[:3], docs[3:]], length=16), docs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_reference(family: str) -> None:
    dtype = torch.float32 if family == "mixtral" else torch.float64  # its grouped matrix product has no float64
    model = model_of(family, dtype, horizon=3)
    docs = documents(5, [6, 11, 3], prompt=1)
    assert_same(model, pack([docs[:2], docs[2:]], length=18), docs)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_padded_document_per_row_without_positions(family: str, left: bool) -> None:
    model = model_of(family, horizon=2)
    docs = documents(3, [6, 9])
    batch = pack([[docs[0]], [docs[1]]], length=10, left=left)
    del batch["position_ids"]
    assert_same(model, batch, docs)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    horizon=st.integers(1, 8),
    prompt=st.integers(0, 4),
    left=st.booleans(),
)
def test_any_packing_equals_the_reference(lengths: list[int], horizon: int, prompt: int, left: bool) -> None:
    model = model_of(horizon=horizon, lambda_kl=0.1)
    docs = documents(sum(lengths), lengths, prompt)
    assert_same(model, pack([docs], length=sum(lengths) + 2, left=left), docs)


def test_rollouts_start_at_every_position_and_stop_at_boundaries() -> None:
    model = model_of(horizon=3)
    ids = torch.arange(5)[None]
    counts = model.counts(ids, ids, torch.tensor([[0, 1, 2, 0, 1]]))
    assert counts.tolist() == [3, 3, 1, 0, 1, 0, 0]  # scored; next_h at steps 1 to 3; of those with a loss of their own


def test_a_batch_without_anything_to_predict_is_zero_and_finite() -> None:
    model = model_of(horizon=2)
    ids = torch.ones(2, 1, dtype=torch.long)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.loss.item() == 0 and all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


def test_micro_batch_losses_with_common_counts_add_up() -> None:
    model = model_of(horizon=4)
    docs = documents(11, [8, 3, 12, 5], prompt=1)
    halves = [pack([docs[:2]], length=20), pack([docs[2:]], length=20)]
    whole = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    counts = sum(model.counts(**half) for half in halves)
    assert torch.equal(counts, model.counts(**whole))
    parts = sum(model(**half, counts=counts).loss for half in halves)
    torch.testing.assert_close(parts, model(**whole).loss, rtol=1e-12, atol=0)


def test_the_frozen_head_and_the_targets_get_no_gradient() -> None:
    """With next-token prediction out of the loss, only what predicts may move: not the untied head, not the last state."""
    model = model_of(horizon=1)
    ids = documents(0, [6])[0][0][None]
    losses = model.objective.loss(nextlat.model.Batch.from_inputs(ids, ids))
    (losses.terms["kl"].mean() + losses.terms["next_h"].mean()).backward()
    assert model.lm.get_output_embeddings().weight.grad is None
    assert model.lm.get_input_embeddings().weight.grad.abs().sum() > 0  # E learns through the dynamics' inputs


def test_dynamics_takes_any_leading_shape_and_adds_the_unnormalised_state() -> None:
    torch.manual_seed(0)
    dynamics = LatentDynamics(8, 6, hidden_size=5)
    h, e = torch.randn(2, 3, 4, 8) * 50, torch.randn(2, 3, 4, 6)
    together = dynamics(h, e)
    for index in itertools.product(range(2), range(3), range(4)):
        torch.testing.assert_close(together[index], dynamics(h[index], e[index]))
    x = F.layer_norm(torch.cat([e, h], -1), (14,))
    torch.testing.assert_close(together - h, dynamics.f(x))


def test_parameter_count_of_the_dynamics_is_the_published_one() -> None:
    """A5 in the paper: width 512, hidden width 1024, 2.62 M parameters; FineWeb-Edu: 2048 and 6528, 1.40 B against 1.32 B."""
    assert round(sum(p.numel() for p in LatentDynamics(512, 512, 1024).parameters()) / 1e6, 2) == 2.62
    assert round(sum(p.numel() for p in LatentDynamics(2048, 2048, 6528).parameters()) / 1e9, 2) == 0.08


class Watch(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() // x.element_size() == x.numel():
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("horizon", [1, 4, 8])
def test_no_tensor_of_positions_times_vocabulary_is_ever_made(family: str, horizon: int) -> None:
    vocab, T = 3000, 96
    model = nextlat.attach(tiny_lm(family, vocab), nextlat.NextLatConfig(horizon=horizon))
    ids = torch.randint(vocab, (4, T))
    with Watch() as watch:
        model(input_ids=ids, labels=ids).loss.backward()
    assert watch.largest < 4 * T * vocab / 2, watch.largest
    with Watch() as watch:
        model(input_ids=ids).logits.sum().backward()
    assert watch.largest >= 4 * T * vocab  # the watch does see such a tensor where one is made


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_chunked_losses_equal_naive_ones_in_value_and_gradient(rows: int, family: str) -> None:
    backbone = nextlat.attach(tiny_lm(family, VOCAB).double()).backbone
    torch.manual_seed(rows)
    h_hat, h = (torch.randn(rows, 32, dtype=torch.float64) for _ in range(2))
    h_hat.requires_grad_()
    p, log_q = backbone.frozen_head(h).softmax(-1), backbone.frozen_head(h_hat).log_softmax(-1)
    naive = (p * (p.log() - log_q)).sum()
    ours = same_head_kl(backbone.frozen_head, h_hat, h)
    torch.testing.assert_close(ours, naive)
    torch.testing.assert_close(torch.autograd.grad(2 * ours, h_hat)[0], torch.autograd.grad(2 * naive, h_hat)[0])

    y, weight = torch.randint(VOCAB, (rows,)), backbone.lm.get_output_embeddings().weight
    naive = F.cross_entropy(backbone.head(h_hat), y, reduction="sum")
    ours = cross_entropy(backbone.head, h_hat, y)
    torch.testing.assert_close(ours, naive)
    for a, b in zip(torch.autograd.grad(ours, [h_hat, weight]), torch.autograd.grad(naive, [h_hat, weight]), strict=True):
        torch.testing.assert_close(a, b)


def test_a_chunk_is_a_fraction_of_the_batch() -> None:
    assert row_chunks(10) == 16 and row_chunks(400) == 100 and row_chunks(10**6) == 1024


def test_bfloat16_autocast_keeps_the_rollout_and_the_losses_in_fp32() -> None:
    model = model_of("llama", torch.float32, horizon=4)
    batch = pack([documents(2, [12, 9])], length=24)
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.05, atol=0.05)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("field", "value"), [("horizon", 0), ("lambda_kl", -0.1), ("num_layers", 0), ("hidden_size", 0)])
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(nextlat.NextLatError, match=field):
        nextlat.NextLatConfig(**{field: value})


def test_every_objective_is_listed_under_its_own_name() -> None:
    assert all(name == objective.name for name, (_, objective) in OBJECTIVES.items())
