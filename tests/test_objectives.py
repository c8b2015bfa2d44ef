"""Every objective against its slow reference, and NextLat in all its parts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import nextlat
from conftest import every_family, tiny_lm
from nextlat.batch import Batch
from nextlat.losses import (
    add_counts,
    cross_entropy,
    kl_divergence,
    row_chunks,
    same_head_kl,
    smooth_l1,
)
from nextlat.objectives.belief_state import Pairs
from nextlat.objectives.latent_dynamics import GRUDynamics, LatentDynamics
from reference import (
    REFERENCES,
    VOCAB,
    assert_same_losses,
    documents,
    gradients,
    listed,
    next_latent,
    objective_model,
    pack,
)

every_reference = pytest.mark.parametrize("name", REFERENCES)


def nextlat_model(
    family: str = "gpt2", dtype: torch.dtype | None = None, **config: object
) -> nextlat.ObjectiveModel:
    return objective_model(nextlat.NextLatConfig(**config), family, dtype)


# ---- against the references ----


@every_reference
@every_family
def test_packed_prompts_and_padding_equal_the_reference(name: str, family: str) -> None:
    config, reference = REFERENCES[name]
    model = objective_model(config, family)
    docs = documents(5, [6, 1, 9, 3], prompt=1)
    batch, expected = pack([docs[:2], docs[2:]], length=13), reference(model, docs)
    assert_same_losses(model, batch, expected)
    assert model(**batch).losses.keys() - {"pairs"} == expected.keys() - {"loss"}


@every_reference
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_padded_document_per_row_without_positions(name: str, family: str, left: bool) -> None:
    config, reference = REFERENCES[name]
    model = objective_model(config, family)
    docs = documents(3, [4, 7])
    batch = pack([[docs[0]], [docs[1]]], length=8, left=left)
    del batch["position_ids"]
    assert_same_losses(model, batch, reference(model, docs))


@pytest.mark.parametrize("horizon", range(1, 9))
def test_every_horizon_equals_the_reference(horizon: int) -> None:
    model = nextlat_model(horizon=horizon, lambda_next_h=0.7, lambda_kl=1.3)
    docs = documents(horizon, [7, 1, 5, 2, 9, 4], prompt=2)
    batch = pack([docs[:3], docs[3:]], length=16)
    assert_same_losses(model, batch, next_latent(model, docs))


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
    model = nextlat_model(family, horizon=3, lambda_next_h=0.7, lambda_kl=1.3, **config)
    docs = documents(6, [7, 1, 5, 2, 9, 4], prompt=2)
    batch = pack([docs[:3], docs[3:]], length=16)
    assert_same_losses(model, batch, next_latent(model, docs))


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
    model = nextlat_model(horizon=horizon, lambda_kl=0.1)
    docs = documents(sum(lengths), lengths, prompt)
    batch = pack([docs], length=sum(lengths) + 2, left=left)
    assert_same_losses(model, batch, next_latent(model, docs))


@every_reference
def test_nothing_to_predict_is_zero_and_finite(name: str) -> None:
    model = objective_model(REFERENCES[name][0])
    for ids, labels in [
        (torch.randint(VOCAB, (2, 4)), torch.full((2, 4), -100)),  # states, but no labels
        (torch.ones(2, 1, dtype=torch.long), torch.full((2, 1), -100)),  # not even states
    ]:
        model.zero_grad()
        out = model(input_ids=ids, labels=labels)
        out.loss.backward()
        assert out.losses["next_token"] == 0 and out.loss.isfinite()
        if name != "nextlat" or ids.shape[1] == 1:  # next_h counts prompt tokens too
            assert out.loss == 0
            assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


# ---- NextLat ----


@pytest.mark.parametrize("name", ["target", "teacher", "head"])
def test_every_stop_gradient_changes_gradients_and_nothing_else(name: str) -> None:
    batch = pack([documents(6, [9, 7])], length=16)
    stopped, moving = (
        nextlat_model(horizon=2, **{f"stop_gradient_{name}": stop}) for stop in (True, False)
    )
    assert torch.allclose(stopped(**batch).loss, moving(**batch).loss, rtol=1e-12)
    a, b = (gradients(model, model(**batch).loss) for model in (stopped, moving))
    changed = {key for key in a if not torch.allclose(a[key], b[key], rtol=1e-9)}
    assert ("lm.lm_head.weight" in changed) == (name != "target")
    assert ("lm.transformer.ln_f.weight" in changed) == (name != "head")
    assert not any("dynamics" in key for key in changed)  # what predicts learns the same either way


def test_defaults_are_bit_for_bit_the_formula_of_the_paper() -> None:
    model = nextlat_model("llama", torch.float32, horizon=3, lambda_next_h=0.7, lambda_kl=0.3)
    docs = documents(4, [9, 4, 6], prompt=1)
    inputs = pack([docs[:2], docs[2:]], length=14)
    batch, backbone, counts = Batch.from_inputs(**inputs), model.backbone, model.counts(**inputs)
    h, e = backbone.hidden(batch).flatten(0, 1), backbone.embed(batch.input_ids).flatten(0, 1)
    h_hat, sums = h, []
    for step in batch.rollout(3):
        h_hat, e_next = h_hat.index_select(0, step.kept), e.index_select(0, step.state)
        norm, f = model.objective.dynamics.norm, model.objective.dynamics.f
        h_hat = h_hat + f(norm(torch.cat([e_next, h_hat], -1)))
        next_h = smooth_l1(h_hat, h.detach()[step.state])
        predicted = h_hat.index_select(0, step.scored)
        true = h.detach()[step.state[step.scored]]
        sums.append((next_h, same_head_kl(backbone.frozen_head, predicted, true)))
    next_h, kl = (torch.stack(part) for part in zip(*sums, strict=True))
    scored = batch.scored_positions
    next_token = cross_entropy(backbone.head, h.index_select(0, scored), batch.targets[scored])
    parts = [
        next_token / counts["next_token"][0],
        0.7 * (next_h / counts["next_h"]).mean(),
        0.3 * (kl / counts["kl"]).mean(),
    ]
    loss = model(**inputs).loss
    assert torch.equal(loss, torch.stack(parts).sum())
    a, b = gradients(model, loss), gradients(model, torch.stack(parts).sum())
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_defaults_start_from_the_same_weights_as_ever() -> None:
    torch.manual_seed(7)
    ours = LatentDynamics(8, 6, hidden_size=5)
    torch.manual_seed(7)
    layers = [torch.nn.Linear(a, b, bias=False) for a, b in [(14, 5), (5, 5), (5, 8)]]
    expected = [torch.nn.init.normal_(layer.weight, std=0.02) for layer in layers]
    names = ["norm.weight", "norm.bias", "f.0.weight", "f.2.weight", "f.4.weight"]
    assert list(ours.state_dict()) == names
    assert all(torch.equal(ours.f[2 * i].weight, weight) for i, weight in enumerate(expected))


def test_warm_up_scales_both_lambdas_by_the_share_of_its_steps() -> None:
    model = nextlat_model(horizon=2, lambda_next_h=0.7, lambda_kl=1.3, warmup_steps=4).train()
    docs = documents(6, [9, 7])
    batch = pack([docs], length=16)
    parts = {name: value.item() for name, value in next_latent(model, docs).items()}
    for step, share in [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1), (5, 1), (None, 1)]:
        model.objective.step = step
        expected = parts["next_token"] + share * (0.7 * parts["next_h"] + 1.3 * parts["kl"])
        out = model(**batch)
        assert out.loss.item() == pytest.approx(expected, rel=1e-9)
        assert out.losses["next_h"].item() == pytest.approx(parts["next_h"], rel=1e-9)  # as it is
    model.objective.step = 1
    assert model.eval()(**batch).loss.item() == pytest.approx(parts["loss"], rel=1e-9)


def test_rollouts_start_at_every_position_and_stop_at_boundaries() -> None:
    model = nextlat_model(horizon=3)
    ids = torch.arange(5)[None]
    counts = model.counts(ids, ids, torch.tensor([[0, 1, 2, 0, 1]]))
    assert listed(counts) == {"next_token": [3], "next_h": [3, 1, 0], "kl": [1, 0, 0]}


def test_a_batch_finds_its_masks_once() -> None:
    batch = Batch.from_inputs(ids := torch.arange(5)[None], ids)
    assert batch.linked is batch.linked and batch.scored is batch.scored
    assert batch.rollout(2)[1] is batch.rollout(4)[1] and len(batch.rollout(4)) == 4


def test_the_frozen_head_and_the_targets_get_no_gradient() -> None:
    """With next-token prediction out of the loss, only what predicts may move: not the untied head,
    not the last state."""
    model = nextlat_model(horizon=1)
    ids = documents(0, [6])[0][0][None]
    losses = model.objective.loss(Batch.from_inputs(ids, ids))
    (losses.terms["kl"].mean() + losses.terms["next_h"].mean()).backward()
    assert model.lm.get_output_embeddings().weight.grad is None
    # E learns through the dynamics' inputs
    assert model.lm.get_input_embeddings().weight.grad.abs().sum() > 0


# ---- latent dynamics ----


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
    with torch.device("meta"):
        small, large = LatentDynamics(512, 512, 1024), LatentDynamics(2048, 2048, 6528)
    assert round(sum(p.numel() for p in small.parameters()) / 1e6, 2) == 2.62
    assert round(sum(p.numel() for p in large.parameters()) / 1e9, 2) == 0.08


# ---- memory and precision ----


class Watch(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                whole = x.untyped_storage().nbytes() // x.element_size() == x.numel()
                self.largest = max(self.largest, x.numel() if whole else 0)
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "config",
    [
        *(nextlat.NextLatConfig(horizon=d) for d in (1, 4, 8)),
        nextlat.NextLatConfig(horizon=2, **ABLATIONS["all move"]),
        nextlat.NextLatConfig(**ABLATIONS["true next token"]),
        *(REFERENCES[name][0] for name in ("mtp", "jtp", "bst")),
    ],
    ids=repr,
)
def test_no_tensor_of_positions_times_vocabulary_is_ever_made(family: str, config: object) -> None:
    vocab, T = 3000, 48
    model = nextlat.attach(tiny_lm(family, vocab), config)
    ids, positions = torch.randint(vocab, (4, T)), (torch.arange(T) % 12).expand(4, T)
    with Watch() as watch:
        model(input_ids=ids, labels=ids, position_ids=positions).loss.backward()
    pairs = len(Pairs.of(Batch.from_inputs(ids, ids, positions)).prefix)
    rows = min(pairs, 4096) if isinstance(config, nextlat.BSTConfig) else 4 * T
    assert watch.largest < rows * vocab / 2, watch.largest
    with Watch() as watch:
        model(input_ids=ids).logits.sum().backward()
    assert watch.largest >= 4 * T * vocab  # the watch does see such a tensor where one is made


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_chunked_losses_equal_naive_ones_in_value_and_gradient(rows: int, family: str) -> None:
    backbone = nextlat.attach(tiny_lm(family, VOCAB).double()).backbone
    head, frozen, weight = backbone.head, backbone.frozen_head, backbone.lm.lm_head.weight
    torch.manual_seed(rows)
    h_hat, h = (torch.randn(rows, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.randint(VOCAB, (rows,))

    def kl(teacher: Tensor, student: Tensor) -> Tensor:
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    for ours, naive, inputs in [
        (same_head_kl(frozen, h_hat, h), kl(frozen(h), frozen(h_hat)), [h_hat]),
        (kl_divergence(head, head, h, h_hat), kl(head(h), head(h_hat)), [h, h_hat, weight]),
        (
            cross_entropy(head, h_hat, y),
            F.cross_entropy(head(h_hat), y, reduction="sum"),
            [h_hat, weight],
        ),
    ]:
        torch.testing.assert_close(ours, naive)
        pairs = zip(*(torch.autograd.grad(2 * x, inputs) for x in (ours, naive)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b)


def test_a_chunk_is_a_fraction_of_the_batch() -> None:
    assert row_chunks(10) == 16 and row_chunks(400) == 100 and row_chunks(10**6) == 256
    assert row_chunks(10**6, torch.device("cuda")) == 1024


def test_counts_of_several_batches_add_up_by_name() -> None:
    a, b = {"x": torch.tensor([1, 2]), "y": torch.tensor([3])}, {"y": torch.tensor([4])}
    total = add_counts([a, b | {"x": torch.tensor([10, 20])}])
    assert listed(total) == {"x": [11, 22], "y": [7]}


@pytest.mark.parametrize(
    "config",
    [{}, *(ABLATIONS[name] for name in ("gru", "separate norms", "all move", "true next token"))],
    ids=repr,
)
def test_bfloat16_autocast_keeps_the_rollout_and_the_losses_in_fp32(
    config: dict[str, object],
) -> None:
    model = nextlat_model("llama", torch.float32, horizon=4, **config)
    batch = pack([documents(2, [12, 9])], length=24)
    exact, dynamics = model(**batch), model.objective.dynamics
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
        assert dynamics(torch.zeros(1, 32), torch.zeros(1, 32)).dtype == torch.float32
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.05, atol=0.05)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# ---- settings ----


BAD_SETTINGS: list[tuple[type, dict[str, list[object]]]] = [
    (
        nextlat.NextLatConfig,
        {
            "horizon": [0, 1.5],
            "lambda_kl": [-0.1],
            "lambda_next_h": [float("inf")],
            "num_layers": [0],
            "hidden_size": [0],
            "warmup_steps": [-1],
            "next_h_loss": ["l1"],
            "kl_loss": ["js"],
            "dynamics": ["lstm"],
            "stop_gradient_head": ["no"],
            "zero_init": [None],
        },
    ),
    (nextlat.MTPConfig, {"horizon": [0], "lambda_mtp": [0.0]}),
    (nextlat.JTPConfig, {"horizon": [-1], "lambda_mtp": [float("nan")]}),
    (nextlat.BSTConfig, {"pair_share": [0.0, 1.5]}),
]


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (config, field, value)
        for config, fields in BAD_SETTINGS
        for field, values in fields.items()
        for value in values
    ],
)
def test_bad_settings_are_named(config: type, field: str, value: object) -> None:
    with pytest.raises(
        nextlat.NextLatError, match=rf"{config.__name__}: '{field}' = .* is not valid: .*\."
    ):
        config(**{field: value})


@pytest.mark.parametrize(
    "setting",
    [{"hidden_size": 9}, {"num_layers": 2}, {"separate_norms": True}, {"zero_init": True}],
)
def test_settings_without_meaning_beside_others_are_refused(setting: dict[str, object]) -> None:
    [name] = setting
    with pytest.raises(
        nextlat.NextLatError, match=rf"NextLatConfig: {name} has no meaning with dynamics 'gru'"
    ):
        nextlat.NextLatConfig(dynamics="gru", **setting)
    with pytest.raises(nextlat.NextLatError, match=r"stop_gradient_teacher .* has no teacher"):
        nextlat.NextLatConfig(kl_loss="cross_entropy", stop_gradient_teacher=False)
