"""The objective against a slow, obviously right reference: one document, one position, one step at
a time."""

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
from nextlat.batch import Batch
from nextlat.losses import cross_entropy, kl_divergence, row_chunks, same_head_kl, smooth_l1
from nextlat.objectives import OBJECTIVES, LatentDynamics
from nextlat.objectives.latent_dynamics import GRUDynamics

VOCAB = 23


# GPT-2 computes in float64 throughout; models with RMSNorm round to fp32 inside, whatever their
# dtype, and so agree only to that.
EXACT, ROUNDED = {"rtol": 1e-9, "atol": 1e-11}, {"rtol": 1e-4, "atol": 1e-5}


def model_of(
    family: str = "gpt2", dtype: torch.dtype = torch.float64, **config: object
) -> nextlat.ObjectiveModel:
    lm = tiny_lm(family, VOCAB, tie_word_embeddings=False).to(dtype)
    torch.manual_seed(1)
    model = nextlat.attach(lm, nextlat.NextLatConfig(**config))
    for p in model.objective.parameters():
        torch.nn.init.normal_(p, std=0.2)  # far from the near-identity of the initial weights
    return model


def documents(seed: int, lengths: list[int], prompt: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of documents; the first `prompt` tokens of each carry no label, nor does
    every fifth after them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        labels[prompt + 3 :: 5] = -100
        made.append((ids, labels))
    return made


def reference(
    model: nextlat.ObjectiveModel, docs: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Every clause of the method in three loops: documents, positions t, steps i."""
    lm, config = model.lm, model.objective.config
    d = config.horizon
    embedding = lm.get_input_embeddings()
    next_token, next_h, tokens = [], [[] for _ in range(d)], [[] for _ in range(d)]

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
                difference = (
                    h_hat - (h[s].detach() if config.stop_gradient_target else h[s])
                ).abs()
                huber = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5)
                next_h[i - 1].append(
                    (difference**2 if config.next_h_loss == "mse" else huber).mean()
                )
                if has_loss[s]:
                    log_q = (frozen_head if config.stop_gradient_head else model.backbone.head)(
                        h_hat
                    ).log_softmax(-1)
                    if config.kl_loss == "cross_entropy":
                        tokens[i - 1].append(-log_q[ids[s + 1]])
                    else:
                        log_p = model.backbone.head(h[s]).log_softmax(-1)
                        log_p = log_p.detach() if config.stop_gradient_teacher else log_p
                        tokens[i - 1].append((log_p.exp() * (log_p - log_q)).sum())

    def mean(terms: list[Tensor]) -> Tensor:
        return torch.stack(terms).mean() if terms else torch.zeros((), dtype=lm.dtype)

    parts = {"next_token": mean(next_token), "next_h": sum(map(mean, next_h)) / d}
    parts[config.kl_loss] = sum(map(mean, tokens)) / d
    parts["loss"] = (
        parts["next_token"]
        + config.lambda_next_h * parts["next_h"]
        + config.lambda_kl * parts[config.kl_loss]
    )
    return parts


def pack(
    rows: list[list[tuple[Tensor, Tensor]]], length: int, left: bool = False
) -> dict[str, Tensor]:
    """Rows of documents, padded to `length`; the padding carries tokens and labels that must not
    matter."""
    batch: dict[str, list[Tensor]] = {
        "input_ids": [],
        "labels": [],
        "position_ids": [],
        "attention_mask": [],
    }
    for docs in rows:
        ids, labels = (torch.cat(parts) for parts in zip(*docs, strict=True))
        positions = torch.cat([torch.arange(len(doc)) for doc, _ in docs])
        fill = length - len(ids)
        pads = (
            torch.full((fill,), 7),
            torch.full((fill,), 7),
            torch.arange(fill),
            torch.zeros(fill, dtype=torch.long),
        )
        values = (ids, labels, positions, torch.ones(len(ids), dtype=torch.long))
        for name, value, padding in zip(batch, values, pads, strict=True):
            batch[name].append(torch.cat([padding, value] if left else [value, padding]))
    return {name: torch.stack(rows) for name, rows in batch.items()}


def gradients(model: nextlat.ObjectiveModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    model: nextlat.ObjectiveModel, batch: dict[str, Tensor], docs: list[tuple[Tensor, Tensor]]
) -> None:
    expected, out = reference(model, docs), model(**batch)
    tolerance = EXACT if model.config.model_type == "gpt2" else ROUNDED
    assert out.losses.keys() | {"loss"} == expected.keys()
    for name in out.losses:
        torch.testing.assert_close(
            out.losses[name],
            expected[name].detach(),
            **tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
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
    dtype = (
        torch.float32 if family == "mixtral" else torch.float64
    )  # its grouped matrix product has no float64
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


ABLATIONS = {
    "squared difference": {"next_h_loss": "mse"},
    "true next token": {"kl_loss": "cross_entropy"},
    "true next token, head moves": {"kl_loss": "cross_entropy", "stop_gradient_head": False},
    "target moves": {"stop_gradient_target": False},
    "squared difference, target moves": {"next_h_loss": "mse", "stop_gradient_target": False},
    "teacher moves": {"stop_gradient_teacher": False},
    "head moves": {"stop_gradient_head": False},
    "teacher and head move": {"stop_gradient_teacher": False, "stop_gradient_head": False},
    "all move": {
        "stop_gradient_target": False,
        "stop_gradient_teacher": False,
        "stop_gradient_head": False,
    },
    "gru": {"dynamics": "gru"},
    "separate norms": {"separate_norms": True},
}


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("config", ABLATIONS.values(), ids=ABLATIONS)
def test_every_ablation_equals_the_reference(config: dict[str, object], family: str) -> None:
    model = model_of(family, horizon=3, lambda_next_h=0.7, lambda_kl=1.3, **config)
    docs = documents(6, [7, 1, 5, 2, 9, 4], prompt=2)
    assert_same(model, pack([docs[:3], docs[3:]], length=16), docs)


@pytest.mark.parametrize("name", ["target", "teacher", "head"])
def test_every_stop_gradient_changes_gradients_and_nothing_else(name: str) -> None:
    docs = documents(6, [9, 7])
    batch = pack([docs], length=16)
    stopped, moving = (
        model_of(horizon=2, **{f"stop_gradient_{name}": stop}) for stop in (True, False)
    )
    assert torch.allclose(stopped(**batch).loss, moving(**batch).loss, rtol=1e-12)
    a, b = (gradients(model, model(**batch).loss) for model in (stopped, moving))
    changed = {key for key in a if not torch.allclose(a[key], b[key], rtol=1e-9)}
    assert ("lm.lm_head.weight" in changed) == (name != "target")
    assert ("lm.transformer.ln_f.weight" in changed) == (name != "head")
    assert not any("dynamics" in key for key in changed)  # what predicts learns the same either way


def test_defaults_are_bit_for_bit_the_formula_of_the_paper() -> None:
    model = model_of("llama", torch.float32, horizon=3, lambda_next_h=0.7, lambda_kl=0.3)
    docs = documents(4, [9, 4, 6], prompt=1)
    inputs = pack([docs[:2], docs[2:]], length=14)
    batch = Batch.from_inputs(**inputs)
    backbone, counts = model.backbone, model.counts(**inputs)
    h, e = backbone.hidden(batch).flatten(0, 1), backbone.embed(batch.input_ids).flatten(0, 1)
    h_hat, sums = h, []
    for step in batch.rollout(3):
        h_hat, e_next = (
            torch.index_select(h_hat, 0, step.kept),
            torch.index_select(e, 0, step.state),
        )
        norm, f = model.objective.dynamics.norm, model.objective.dynamics.f
        h_hat = h_hat + f(norm(torch.cat([e_next, h_hat], -1)))
        next_h = smooth_l1(h_hat, h.detach()[step.state])
        predicted, true = (
            torch.index_select(h_hat, 0, step.scored),
            h.detach()[step.state[step.scored]],
        )
        sums.append((next_h, same_head_kl(backbone.frozen_head, predicted, true)))
    next_h, kl = (torch.stack(part) for part in zip(*sums, strict=True))
    scored = batch.scored().nonzero().squeeze(1)
    next_token = (
        cross_entropy(backbone.head, torch.index_select(h, 0, scored), batch.targets()[scored])
        / counts[0]
    )
    parts = [next_token, 0.7 * (next_h / counts[1:4]).mean(), 0.3 * (kl / counts[4:]).mean()]
    loss = model(**inputs).loss
    assert torch.equal(loss, torch.stack(parts).sum())
    a, b = gradients(model, loss), gradients(model, torch.stack(parts).sum())
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_defaults_start_from_the_same_weights_as_ever() -> None:
    torch.manual_seed(7)
    ours = LatentDynamics(8, 6, hidden_size=5)
    torch.manual_seed(7)
    layers = [
        torch.nn.Linear(14, 5, bias=False),
        torch.nn.Linear(5, 5, bias=False),
        torch.nn.Linear(5, 8, bias=False),
    ]
    expected = [torch.nn.init.normal_(layer.weight, std=0.02) for layer in layers]
    assert list(ours.state_dict()) == [
        "norm.weight",
        "norm.bias",
        "f.0.weight",
        "f.2.weight",
        "f.4.weight",
    ]
    assert all(torch.equal(ours.f[2 * i].weight, weight) for i, weight in enumerate(expected))


def test_warm_up_scales_both_lambdas_by_the_share_of_its_steps() -> None:
    model = model_of(horizon=2, lambda_next_h=0.7, lambda_kl=1.3, warmup_steps=4).train()
    docs = documents(6, [9, 7])
    batch = pack([docs], length=16)
    parts = {name: value.item() for name, value in reference(model, docs).items()}
    for step, share in [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1), (5, 1), (None, 1)]:
        model.objective.step = step
        expected = parts["next_token"] + share * (0.7 * parts["next_h"] + 1.3 * parts["kl"])
        assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-9)
        assert model(**batch).losses["next_h"].item() == pytest.approx(
            parts["next_h"], rel=1e-9
        )  # logged as it is
    model.objective.step = 1
    assert model.eval()(**batch).loss.item() == pytest.approx(parts["loss"], rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    horizon=st.integers(1, 8),
    prompt=st.integers(0, 4),
    left=st.booleans(),
)
def test_any_packing_equals_the_reference(
    lengths: list[int], horizon: int, prompt: int, left: bool
) -> None:
    model = model_of(horizon=horizon, lambda_kl=0.1)
    docs = documents(sum(lengths), lengths, prompt)
    assert_same(model, pack([docs], length=sum(lengths) + 2, left=left), docs)


def test_rollouts_start_at_every_position_and_stop_at_boundaries() -> None:
    model = model_of(horizon=3)
    ids = torch.arange(5)[None]
    counts = model.counts(ids, ids, torch.tensor([[0, 1, 2, 0, 1]]))
    assert counts.tolist() == [
        3,
        3,
        1,
        0,
        1,
        0,
        0,
    ]  # scored; next_h at steps 1 to 3; of those with a loss of their own


def test_a_batch_without_anything_to_predict_is_zero_and_finite() -> None:
    model = model_of(horizon=2)
    ids = torch.ones(2, 1, dtype=torch.long)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.loss.item() == 0 and all(
        p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters()
    )


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
    """With next-token prediction out of the loss, only what predicts may move: not the untied head,
    not the last state."""
    model = model_of(horizon=1)
    ids = documents(0, [6])[0][0][None]
    losses = model.objective.loss(nextlat.model.Batch.from_inputs(ids, ids))
    (losses.terms["kl"].mean() + losses.terms["next_h"].mean()).backward()
    assert model.lm.get_output_embeddings().weight.grad is None
    assert (
        model.lm.get_input_embeddings().weight.grad.abs().sum() > 0
    )  # E learns through the dynamics' inputs


def test_dynamics_takes_any_leading_shape_and_adds_the_unnormalised_state() -> None:
    torch.manual_seed(0)
    dynamics = LatentDynamics(8, 6, hidden_size=5)
    h, e = torch.randn(2, 3, 4, 8) * 50, torch.randn(2, 3, 4, 6)
    together = dynamics(h, e)
    for index in itertools.product(range(2), range(3), range(4)):
        torch.testing.assert_close(together[index], dynamics(h[index], e[index]))
    x = F.layer_norm(torch.cat([e, h], -1), (14,))
    torch.testing.assert_close(together - h, dynamics.f(x))


def test_separate_norms_of_embedding_and_state() -> None:
    torch.manual_seed(0)
    dynamics = LatentDynamics(8, 6, hidden_size=5, separate_norms=True)
    h, e = torch.randn(4, 8) * 50, torch.randn(4, 6)
    x = torch.cat([F.layer_norm(e, (6,)), F.layer_norm(h, (8,))], -1)
    torch.testing.assert_close(dynamics(h, e) - h, dynamics.f(x))
    dynamics.norm_e.weight.data.zero_(), dynamics.norm_h.bias.data.fill_(3)
    x = torch.cat([torch.zeros(4, 6), F.layer_norm(h, (8,)) + 3], -1)
    torch.testing.assert_close(dynamics(h, e) - h, dynamics.f(x))


def test_zero_init_starts_as_the_identity_and_learns() -> None:
    dynamics = LatentDynamics(8, 6, zero_init=True)
    h, e = torch.randn(4, 8), torch.randn(4, 6)
    assert torch.equal(dynamics(h, e), h)
    dynamics(h, e).square().sum().backward()
    assert dynamics.f[-1].weight.grad.abs().sum() > 0


def test_gru_is_the_cell_of_torch_on_any_leading_shape() -> None:
    torch.manual_seed(0)
    ours, cell = GRUDynamics(8, 6).double(), torch.nn.GRUCell(6, 8).double()
    ours.load_state_dict(cell.state_dict())
    h, e = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(h, e).flatten(0, 1), cell(e.flatten(0, 1), h.flatten(0, 1)))


def test_parameter_count_of_the_dynamics_is_the_published_one() -> None:
    """A5 in the paper: width 512, hidden width 1024, 2.62 M parameters; FineWeb-Edu: 2048 and 6528,
    1.40 B against 1.32 B."""
    assert (
        round(sum(p.numel() for p in LatentDynamics(512, 512, 1024).parameters()) / 1e6, 2) == 2.62
    )
    assert (
        round(sum(p.numel() for p in LatentDynamics(2048, 2048, 6528).parameters()) / 1e9, 2)
        == 0.08
    )


class Watch(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if (
                isinstance(x, Tensor)
                and x.untyped_storage().nbytes() // x.element_size() == x.numel()
            ):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "config",
    [
        {"horizon": 1},
        {"horizon": 4},
        {"horizon": 8},
        {"horizon": 2, **ABLATIONS["all move"]},
        ABLATIONS["true next token"],
    ],
    ids=str,
)
def test_no_tensor_of_positions_times_vocabulary_is_ever_made(
    family: str, config: dict[str, object]
) -> None:
    vocab, T = 3000, 96
    model = nextlat.attach(tiny_lm(family, vocab), nextlat.NextLatConfig(**config))
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
    torch.testing.assert_close(
        torch.autograd.grad(2 * ours, h_hat)[0], torch.autograd.grad(2 * naive, h_hat)[0]
    )

    h.requires_grad_()
    weight = backbone.lm.get_output_embeddings().weight
    log_p, log_q = backbone.head(h).log_softmax(-1), backbone.head(h_hat).log_softmax(-1)
    naive = (log_p.exp() * (log_p - log_q)).sum()
    ours = kl_divergence(backbone.head, backbone.head, h, h_hat)
    torch.testing.assert_close(ours, naive)
    for a, b in zip(
        *(torch.autograd.grad(loss, [h, h_hat, weight]) for loss in (ours, naive)), strict=True
    ):
        torch.testing.assert_close(a, b)

    y, weight = torch.randint(VOCAB, (rows,)), backbone.lm.get_output_embeddings().weight
    naive = F.cross_entropy(backbone.head(h_hat), y, reduction="sum")
    ours = cross_entropy(backbone.head, h_hat, y)
    torch.testing.assert_close(ours, naive)
    for a, b in zip(
        torch.autograd.grad(ours, [h_hat, weight]),
        torch.autograd.grad(naive, [h_hat, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_chunk_is_a_fraction_of_the_batch() -> None:
    assert row_chunks(10) == 16 and row_chunks(400) == 100 and row_chunks(10**6) == 1024


@pytest.mark.parametrize(
    "config",
    [{}, *(ABLATIONS[name] for name in ("gru", "separate norms", "all move", "true next token"))],
)
def test_bfloat16_autocast_keeps_the_rollout_and_the_losses_in_fp32(
    config: dict[str, object],
) -> None:
    model = model_of("llama", torch.float32, horizon=4, **config)
    batch = pack([documents(2, [12, 9])], length=24)
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
        assert (
            model.objective.dynamics(torch.zeros(1, 32), torch.zeros(1, 32)).dtype == torch.float32
        )
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.05, atol=0.05)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("horizon", 0), ("lambda_kl", -0.1), ("num_layers", 0), ("hidden_size", 0), ("warmup_steps", -1), ("next_h_loss", "l1"),
        ("kl_loss", "js"), ("dynamics", "lstm"), ("stop_gradient_head", "no"), ("zero_init", None),
    ],
)  # fmt: skip
def test_bad_settings_are_named(field: str, value: object) -> None:
    with pytest.raises(nextlat.NextLatError, match=rf"NextLatConfig\.{field} is .*: it must be"):
        nextlat.NextLatConfig(**{field: value})


@pytest.mark.parametrize(
    "setting",
    [{"hidden_size": 9}, {"num_layers": 2}, {"separate_norms": True}, {"zero_init": True}],
)
def test_settings_without_meaning_beside_others_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(
        nextlat.NextLatError,
        match=rf"NextLatConfig\.{next(iter(setting))} has no meaning with dynamics 'gru'",
    ):
        nextlat.NextLatConfig(dynamics="gru", **setting)
    with pytest.raises(nextlat.NextLatError, match="has no teacher"):
        nextlat.NextLatConfig(kl_loss="cross_entropy", stop_gradient_teacher=False)


def test_every_objective_is_listed_under_its_own_name() -> None:
    assert all(name == objective.name for name, (_, objective) in OBJECTIVES.items())
