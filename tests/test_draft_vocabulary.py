"""Drafts from some tokens of the vocabulary alone: the output stays the model's own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import nextlat
from conftest import forget_sums, sampling, tiny_lm
from nextlat import NextLatConfig, NextLatError
from nextlat.batch import Batch
from nextlat.decoding import Pass, Request, Stopping, decode
from nextlat.losses import rollout_kl, same_head_kl
from nextlat.training.build import build_model
from nextlat.training.recipe import load_recipe
from reference import enumerated, five_token_model, p_value

IDS = (3, 11, 12, 30, 47)


def vocabulary_model(family: str = "llama", ids: object = IDS) -> nextlat.ObjectiveModel:
    return nextlat.attach(tiny_lm(family), NextLatConfig(draft_vocabulary=ids, horizon=2))


# ---- training ----


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_the_kl_compares_distributions_over_the_draft_vocabulary(family: str) -> None:
    model = nextlat.attach(tiny_lm(family).double(), NextLatConfig(draft_vocabulary=IDS, horizon=2))
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    h, e = model.backbone.states(ids).detach(), model.backbone.embed(ids)
    sums, h_hat = [], h[:, :-1]
    for i in (1, 2):
        h_hat = model.objective.dynamics(h_hat[:, : 9 - i], e[:, i:])
        true, predicted = h[:, i:-1], h_hat[:, :-1]  # the last state predicts nothing
        p, q = (model.backbone.head(x)[..., IDS].log_softmax(-1) for x in (true, predicted))
        sums.append((p.exp() * (p - q)).sum(-1).mean())
    expected = torch.stack(sums).mean()
    kl = model.objective.loss(batch(ids)).terms["kl"].mean()
    torch.testing.assert_close(kl, expected)
    parameters = [*model.objective.parameters()]
    ours, theirs = (torch.autograd.grad(x, parameters) for x in (kl, expected))
    torch.testing.assert_close(ours, theirs)


def batch(ids: Tensor) -> Batch:
    return Batch.from_inputs(ids, ids)


@pytest.mark.parametrize("rows", [1, 40, 600])
def test_steps_that_share_a_teacher_are_those_that_have_one_each(rows: int) -> None:
    head = nextlat.attach(tiny_lm("llama")).backbone.frozen_head
    torch.manual_seed(rows)
    h = torch.randn(rows, 32)
    steps = [torch.arange(rows), torch.arange(1, rows, 2), torch.arange(0), torch.arange(rows)[:1]]
    predicted = [torch.randn(len(at), 32, requires_grad=True) for at in steps]
    together = rollout_kl(head, [*zip(predicted, steps, strict=True)], h)
    alone = torch.stack(
        [same_head_kl(head, x, h[at]) for x, at in zip(predicted, steps, strict=True)]
    )
    torch.testing.assert_close(together, alone)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ours, theirs = (
        torch.autograd.grad((weights * sums).sum(), predicted) for sums in (together, alone)
    )
    torch.testing.assert_close(ours, theirs)


def test_a_number_of_tokens_stands_for_the_most_frequent_ones_in_a_recipe() -> None:
    recipe = load_recipe("city-tiny", ["objectives.nextlat.draft_vocabulary=7"])
    task = recipe.task.build()
    counts = torch.zeros(100)
    for row in range(4000):
        labels = task.train_dataset(0)[row]["labels"] if row < 300 else None
        if labels is None:
            break
        counts += torch.bincount(labels[labels != -100], minlength=100)
    ids = build_model(recipe, task).objective.draft_ids
    rest = [token for token in range(100) if token not in ids.tolist()]
    assert len(ids) == 7 and counts[ids].min() >= 0.8 * counts[rest].max()
    given = load_recipe("city-tiny", ["objectives.nextlat.draft_vocabulary=[5, 2, 9]"])
    assert build_model(given, task).objective.draft_ids.tolist() == [2, 5, 9]


# ---- decoding ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
@pytest.mark.parametrize("draft_length", [1, 3, "auto"])
def test_greedy_output_is_the_models_and_drafts_are_of_the_vocabulary(
    family: str, draft_length: int | str
) -> None:
    model = vocabulary_model(family)
    prompts = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4], [0, 9, 8, 7]])
    mask = (prompts != 0).long()
    drafted: set[int] = set()

    def watch(done: Pass) -> None:
        for cycle in filter(None, done.cycles):
            drafted.update(cycle.drafted)

    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.lm.generate(prompts, **options)
    found = model.generate(prompts, draft_length=draft_length, on_pass=watch, **options)
    assert torch.equal(found, expected)
    assert drafted <= {*IDS} and (drafted or draft_length == "auto")


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_p": 0.7}], ids=str)
@pytest.mark.parametrize("ids", [(0, 2), (1, 3, 4)], ids=str)
def test_sampled_tokens_follow_the_enumerated_distribution(
    settings: dict[str, float], ids: tuple[int, ...]
) -> None:
    """Tokens that are never drafted are drawn as often as ever."""
    whole, prompt = five_token_model()
    model = nextlat.attach(whole.lm, NextLatConfig(draft_vocabulary=ids))
    model.objective.dynamics.load_state_dict(whole.objective.dynamics.state_dict())
    sampler, rows = sampling(**settings, seed=5), 500
    counts = torch.zeros(5, 5, 5, dtype=torch.float64)
    drafted = accepted = 0
    for draft_length in (1, 2, 3, 4):
        tokens: list[list[int]] = [[] for _ in range(rows)]
        request = Request([prompt[0]] * rows, sampler, Stopping(6), draft_length, together=True)
        for done in decode(model.objective, request):
            for row, cycle in zip(tokens, done.cycles, strict=True):
                if cycle is not None:
                    row += cycle.tokens
                    assert {*cycle.drafted} <= {*ids}
                    drafted, accepted = drafted + len(cycle.drafted), accepted + cycle.accepted
        for row in tokens:
            counts[tuple(row[:3])] += 1
    assert 0.05 < accepted / drafted < 0.95
    assert p_value(counts, enumerated(model.lm, prompt, sampler)) > 1e-4


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("draft_length", [2, "auto"])
def test_a_constraint_that_leaves_no_token_to_draft_is_kept(
    do_sample: bool, draft_length: int | str
) -> None:
    model, prompt = vocabulary_model(), torch.tensor([[1, 2, 4]])
    allowed = [7, 8, 9]  # none of the draft vocabulary
    ids = model.generate(
        prompt,
        max_new_tokens=9,
        do_sample=do_sample,
        draft_length=draft_length,
        prefix_allowed_tokens_fn=lambda batch, ids: allowed,
    )
    assert {*ids[0, 3:].tolist()} <= {*allowed}


def test_the_head_is_read_as_it_is_now() -> None:
    model, prompt = vocabulary_model(), torch.tensor([[1, 2, 4]])
    model.generate(prompt, max_new_tokens=4, draft_length=2)
    with torch.no_grad():
        model.lm.get_output_embeddings().weight[11] = 1e3
    model.generate(prompt, max_new_tokens=2, draft_length=1)
    state = torch.randn(1, 32).abs()
    expected = model.backbone.head(
        model.objective.dynamics(state, model.backbone.embed(prompt[:, 0]))
    )
    logits = model.objective.draft(state, prompt[:, 0])[1]
    torch.testing.assert_close(logits[:, IDS], expected[:, IDS])
    assert logits.isfinite().sum() == len(IDS)


# ---- sidecar ----


def test_it_lies_in_the_sidecar(tmp_path: Path) -> None:
    model = vocabulary_model(ids=(47, 3, 12))
    model.save_pretrained(tmp_path)
    loaded = nextlat.load(tmp_path)
    assert loaded.objective.draft_ids.tolist() == [3, 12, 47]
    assert loaded.objective.config == model.objective.config
    state, token = torch.randn(2, 32), torch.tensor([1, 2])
    for ours, theirs in zip(
        loaded.objective.draft(state, token), model.objective.draft(state, token), strict=True
    ):
        assert torch.equal(ours, theirs)
    whole = nextlat.attach(tiny_lm("llama"), NextLatConfig())
    assert "draft_ids" not in whole.objective.state_dict()  # sidecars without one stay as they are


@pytest.mark.parametrize(("ids", "words"), [([3, 12, 50], "token 50"), ([3, 12, 12], "twice")])
def test_a_draft_vocabulary_of_another_tokenizer_is_refused(
    ids: list[int], words: str, tmp_path: Path
) -> None:
    with pytest.raises(NextLatError, match=rf"{words}.* a draft vocabulary of another tokenizer"):
        vocabulary_model(ids=tuple(ids))
    vocabulary_model(ids=3).save_pretrained(tmp_path)
    path = tmp_path / "nextlat/objective.safetensors"
    save_file({**load_file(path), "draft_ids": torch.tensor(ids)}, path, {"format": "pt"})
    forget_sums(tmp_path)
    with pytest.raises(NextLatError, match=rf"{words}.* a draft vocabulary of another tokenizer"):
        nextlat.load(tmp_path)


def test_settings_that_contradict_are_refused() -> None:
    for setting in ({"kl_loss": "cross_entropy"}, {"stop_gradient_head": False}):
        with pytest.raises(NextLatError, match="draft_vocabulary has no meaning with an ablation"):
            NextLatConfig(draft_vocabulary=5, **setting)
    for value in (0, (), (-1,), 1.5):
        with pytest.raises(NextLatError, match="draft_vocabulary"):
            NextLatConfig(draft_vocabulary=value)
    model = vocabulary_model(ids=3)
    with pytest.raises(NextLatError, match="2 tokens are given, and draft_vocabulary is 3"):
        model.objective.set_draft_vocabulary([1, 2])
