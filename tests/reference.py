"""Slow, obviously right implementations that the fast ones are compared with, and the batches and
models on which they are: one document, one position, one step, head, pair or token at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import nextlat
from conftest import tiny_lm
from nextlat import ObjectiveModel
from nextlat.decoding.sampling import Prefixes, Sampling
from nextlat.objectives import Objective

VOCAB = 23
# GPT-2 computes in float64 throughout; models with RMSNorm round to fp32 inside, whatever their
# dtype, and so agree only to that.
EXACT, ROUNDED = {"rtol": 1e-9, "atol": 1e-11}, {"rtol": 1e-4, "atol": 1e-5}

Docs = list[tuple[Tensor, Tensor]]


# ---- batches ----


def documents(seed: int, lengths: list[int], prompt: int = 0) -> Docs:
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


def pack(rows: list[Docs], length: int, left: bool = False) -> dict[str, Tensor]:
    """Rows of documents, padded to `length`; the padding carries tokens, labels and positions that
    must not matter."""
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
        seven, zero = torch.full((fill,), 7), torch.zeros(fill, dtype=torch.long)
        pads = (seven, seven, torch.arange(fill), zero)
        values = (ids, labels, positions, torch.ones_like(ids))
        for name, value, padding in zip(batch, values, pads, strict=True):
            batch[name].append(torch.cat([padding, value] if left else [value, padding]))
    return {name: torch.stack(rows) for name, rows in batch.items()}


def listed(counts: dict[str, Tensor]) -> dict[str, list[int]]:
    """Counts in a form that can be compared."""
    return {name: count.tolist() for name, count in counts.items()}


def gradients(model: ObjectiveModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float
) -> None:
    """A parameter without a gradient has one of zero."""
    for name in ours.keys() | theirs.keys():
        a, b = (g.get(name, torch.zeros(1, dtype=torch.float64)) for g in (ours, theirs))
        a, b = torch.broadcast_tensors(a, b)
        torch.testing.assert_close(
            a, b, **tolerance, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_losses(
    model: ObjectiveModel, batch: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    """Every part of the loss, the loss, and its gradients."""
    exact = model.config.model_type == "gpt2" and model.dtype == torch.float64
    tolerance, out = EXACT if exact else ROUNDED, model(**batch)
    for name, value in expected.items():
        ours = out.loss if name == "loss" else out.losses[name]
        torch.testing.assert_close(
            ours.detach(),
            value.detach().to(ours.dtype),
            **tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    if expected["loss"].requires_grad:  # there is something to predict
        # Half of it as what is differentiated: a scale from outside (accumulation, loss scaling)
        # must reach every gradient.
        ours, theirs = gradients(model, 0.5 * out.loss), gradients(model, 0.5 * expected["loss"])
        assert_same_gradients(ours, theirs, **tolerance)


def mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean() if terms else torch.zeros(())


def nll(logits_V: Tensor, label: Tensor) -> Tensor:
    return -logits_V.log_softmax(-1)[label]


# ---- objectives ----


def next_latent(model: ObjectiveModel, docs: Docs) -> dict[str, Tensor]:
    """Every clause of the method in three loops: documents, positions t, steps i."""
    lm, config = model.lm, model.objective.config
    d, embedding, head = config.horizon, lm.get_input_embeddings(), model.backbone.head
    next_token, next_h, tokens = [], [[] for _ in range(d)], [[] for _ in range(d)]

    def frozen_head(h: Tensor) -> Tensor:
        lm.get_output_embeddings().requires_grad_(False)
        logits = head(h)
        lm.get_output_embeddings().requires_grad_(True)
        return logits

    student = frozen_head if config.stop_gradient_head else head
    for ids, labels in docs:
        out = lm(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        h, logits, length = out.hidden_states[-1][0], out.logits[0], len(ids)
        has_loss = [s + 1 < length and labels[s + 1] != -100 for s in range(length)]
        for t in range(length):
            if has_loss[t]:
                next_token.append(nll(logits[t], labels[t + 1]))
            h_hat = h[t]
            for i in range(1, d + 1):
                s = t + i
                if s >= length:
                    break
                h_hat = model.objective.dynamics(h_hat, embedding(ids[s]))
                target = h[s].detach() if config.stop_gradient_target else h[s]
                difference = (h_hat - target).abs()
                huber = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5)
                squared = config.next_h_loss == "mse"
                next_h[i - 1].append((difference**2 if squared else huber).mean())
                if has_loss[s]:
                    log_q = student(h_hat).log_softmax(-1)
                    if config.kl_loss == "cross_entropy":
                        tokens[i - 1].append(-log_q[ids[s + 1]])
                    else:
                        log_p = head(h[s]).log_softmax(-1)
                        log_p = log_p.detach() if config.stop_gradient_teacher else log_p
                        tokens[i - 1].append((log_p.exp() * (log_p - log_q)).sum())
    parts = {"next_token": mean(next_token), "next_h": sum(map(mean, next_h)) / d}
    parts[config.kl_loss] = sum(map(mean, tokens)) / d
    weighted = (config.lambda_next_h * parts["next_h"], config.lambda_kl * parts[config.kl_loss])
    return {**parts, "loss": parts["next_token"] + sum(weighted)}


@contextmanager
def head_in_place(model: ObjectiveModel, i: int) -> Iterator[None]:
    """The LM with head i of MTP in the place of its last layer and norm."""
    body = getattr(model.lm, "transformer", None) or model.lm.model
    layers, norm = (body.h, "ln_f") if hasattr(body, "h") else (body.layers, "norm")
    kept = layers[-1], getattr(body, norm)
    if i:
        layers[-1] = model.objective.heads[i - 1].layer
        setattr(body, norm, model.objective.heads[i - 1].norm)
    yield
    layers[-1] = kept[0]
    setattr(body, norm, kept[1])


def multi_token(model: ObjectiveModel, docs: Docs) -> dict[str, Tensor]:
    losses: list[Tensor] = []
    for i in range(model.objective.horizon + 1):
        terms = []
        with head_in_place(model, i):
            for ids, labels in docs:
                logits = model.lm(input_ids=ids[None], use_cache=False).logits[0]
                for t in range(len(ids)):
                    if t + 1 + i < len(ids) and labels[t + 1 + i] != -100:
                        terms.append(nll(logits[t], labels[t + 1 + i]))
        losses.append(mean(terms))
    return _joined(losses, model.objective.config.lambda_mtp)


def _joined(losses: list[Tensor], weight: float) -> dict[str, Tensor]:
    extra = sum(losses[1:]) / (len(losses) - 1)
    return {"next_token": losses[0], "multi_token": extra, "loss": losses[0] + weight * extra}


def fetch(model: ObjectiveModel, h: Tensor, embeddings: list[Tensor]) -> Tensor:
    """Fetch's last output for the window h, E(x_t), ..., E(x_{t+i}), written out over heads and
    vectors; then the norm."""
    f, i = model.objective.fetch, len(embeddings) - 1
    combine = (f.combine_norm.weight, f.combine_norm.bias)
    window = [F.layer_norm(e + f.gamma * h, h.shape, *combine) for e in embeddings]
    size, out = len(h) // f.heads, []
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


def joint_multi_token(model: ObjectiveModel, docs: Docs) -> dict[str, Tensor]:
    d, embedding, lm = model.objective.horizon, model.lm.get_input_embeddings(), model.lm
    terms: list[list[Tensor]] = [[] for _ in range(d + 1)]
    for ids, labels in docs:
        out = lm(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        h_TD = out.hidden_states[-1][0]
        for t in range(len(ids)):
            for i in range(d + 1):
                if t + 1 + i < len(ids) and labels[t + 1 + i] != -100:
                    state = fetch(model, h_TD[t], [embedding(ids[t + j]) for j in range(i + 1)])
                    terms[i].append(nll(model.backbone.head(state), labels[t + 1 + i]))
    return _joined([mean(each) for each in terms], model.objective.config.lambda_mtp)


def belief_state(
    model: ObjectiveModel, docs: Docs, keep: set[tuple[int, int, int]] | None = None
) -> dict[str, Tensor]:
    """Prefixes x_1..x_t and suffixes x_s..x_T of each document with s >= t + 1, in the paper's
    numbering from 1; all, or those (document, t, s) in `keep`."""
    objective = model.objective
    nexts, previouses, plain = [], [], []
    for number, (ids, labels) in enumerate(docs):
        T = len(ids)
        # f[t]: after x_1..x_t; b[s]: after x_T..x_s; b[T + 1]: after nothing
        f = [objective.empty_prefix, *model.lm.base_model(ids[None], use_cache=False)[0][0]]
        read = objective.backward_encoder(ids.flip(0)[None], use_cache=False)[0][0]
        b = [None, *read.flip(0), objective.empty_suffix]
        for t in range(T + 1):
            for s in range(t + 1, T + 2):
                if keep is not None and (number, t, s) not in keep:
                    continue
                x = objective.text_head.read.weight @ torch.cat([f[t], b[s]])
                states = objective.text_head.write.weight @ F.gelu(x)
                D = len(f[t])
                if t + 1 <= T and labels[t + 1 - 1] != -100:
                    nexts.append(nll(model.backbone.head(states[:D]), labels[t]))
                    if s == T + 1 and t > 0:
                        plain.append(nexts[-1].detach())
                if s - 1 >= 1 and labels[s - 1 - 1] != -100:
                    previouses.append(nll(model.backbone.head(states[D:]), labels[s - 2]))
    parts = {"pairs_next": mean(nexts), "pairs_previous": mean(previouses)}
    return {**parts, "loss": sum(parts.values()), "next_token": mean(plain)}


REFERENCES: dict[str, tuple[Any, Callable[..., dict[str, Tensor]]]] = {
    "nextlat": (
        nextlat.NextLatConfig(horizon=3, lambda_next_h=0.7, lambda_kl=1.3, hidden_size=19),
        next_latent,
    ),
    "mtp": (nextlat.MTPConfig(horizon=3, lambda_mtp=0.7), multi_token),
    "jtp": (nextlat.JTPConfig(horizon=3, lambda_mtp=0.7), joint_multi_token),
    "bst": (nextlat.BSTConfig(), belief_state),
}


def objective_model(
    config: Any, family: str = "gpt2", dtype: torch.dtype | None = None
) -> ObjectiveModel:
    """A tiny model with an untied head, and an objective far from its initial weights: no dynamics
    is the identity, no head a copy, no gain one."""
    if dtype is None:  # mixtral's grouped matrix product has no float64
        dtype = torch.float32 if family == "mixtral" else torch.float64
    lm = tiny_lm(family, VOCAB, tie_word_embeddings=False)
    torch.manual_seed(1)
    model = nextlat.attach(lm, config).to(dtype)
    for p in model.objective.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


# ---- decoding ----

VOCABULARY = 50


class Oracle(Objective):
    """Drafts the known continuation of each row, except for the positions in `wrong`.

    It finds its place by the state it is given, which must be the true state there: a cycle that
    started its draft anywhere else than after the last verified token would be caught. (In a batch,
    rows that have ended or have no room left stand anywhere.)
    """

    name = "oracle"
    max_draft_length = None

    def __init__(
        self,
        model: ObjectiveModel,
        sequences: Sequence[Tensor],
        wrong: set[int],
        strict: bool = True,
    ) -> None:
        super().__init__(None, model.backbone)
        self.sequences, self.wrong, self.strict = sequences, wrong, strict
        self.states = [model.backbone.states(sequence[None])[0].detach() for sequence in sequences]
        self.vocabulary = model.backbone.vocab_size

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        rows = [self.draft_row(h, x.item()) for h, x in zip(state, token, strict=True)]
        chosen = torch.stack([x for _, x in rows])
        return torch.stack([h for h, _ in rows]), F.one_hot(chosen, self.vocabulary).float()

    def draft_row(self, state: Tensor, token: int) -> tuple[Tensor, Tensor]:
        distances = [(states - state).norm(dim=-1).min(dim=0) for states in self.states]
        row = min(range(len(distances)), key=lambda b: distances[b].values)
        (distance, place), sequence = distances[row], self.sequences[row]
        lost = distance >= 1e-3 * state.norm() or int(place) + 2 >= len(sequence)
        here = int(place) + 1  # the position of `token`
        if lost or (here not in self.wrong and token != sequence[here]):
            assert not self.strict, (
                "the draft does not start in a state of the transformer, or reads another token "
                "than was emitted"
            )
            return state, torch.tensor(0)
        chosen = sequence[here + 1] + (here + 1 in self.wrong)
        return self.states[row][here], chosen % self.vocabulary


HYBRID: dict[str, tuple[list[str], dict[str, Any]]] = {  # layers and settings of tiny ones
    "lfm2": (
        ["conv", "full_attention", "conv"],
        {"block_multiple_of": 8, "tie_word_embeddings": False},
    ),
    "qwen3_next": (
        ["linear_attention", "full_attention"],
        {
            "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "head_dim": 8, "mlp_only_layers": [0, 1],
        },
    ),
}  # fmt: skip


def decoding_lm(family: str) -> PreTrainedModel:
    """A tiny random model, or one with convolutional or recurrent layers beside attention.

    Untied: with tied random embeddings the most likely token is mostly the last one, for ever.
    """
    if family not in HYBRID:
        return tiny_lm(family, VOCABULARY, seed=5, tie_word_embeddings=False)
    layer_types, settings = HYBRID[family]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": len(layer_types),
        "initializer_range": 0.2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "vocab_size": VOCABULARY,
    }
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = CONFIG_MAPPING[family](**sizes, **ids, layer_types=layer_types, **settings)
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def five_token_model() -> tuple[ObjectiveModel, Tensor]:
    """A model and a prompt; the drafter is so far off that some 40 % of its tokens are rejected."""
    lm = tiny_lm("llama", vocab_size=5, seed=1, num_hidden_layers=1)
    model = nextlat.attach(lm, nextlat.NextLatConfig())
    torch.manual_seed(0)
    for parameter in model.objective.dynamics.f.parameters():
        nn.init.normal_(parameter, std=0.16)
    return model, torch.tensor([[3, 1, 4, 1]])


@torch.no_grad()
def enumerated(lm: PreTrainedModel, prompt: Tensor, sampler: Sampling) -> Tensor:
    """Exact probabilities (5, 5, 5) of the three tokens after the prompt, from one uncached forward
    pass per prefix."""
    p = torch.ones(5, 5, 5, dtype=torch.float64)
    for a, b in product(range(5), repeat=2):
        logits = lm(torch.cat([prompt, torch.tensor([[a, b]])], dim=1)).logits[0, -3:]
        scores = sampler.scores(logits[None], Prefixes((), ()))[0]
        first, second, third = scores.double().softmax(dim=-1)
        p[a, b] = first[a] * second[b] * third
    return p


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Chi-square p-value of counted outcomes; cells in which few are expected are pooled."""
    counts, expected = counts.double().flatten(), probabilities.double().flatten()
    assert counts[expected == 0].sum() == 0, "a token was drawn that the settings exclude"
    expected = expected * (counts.sum() / expected.sum())
    thick = expected >= 5
    counts, expected = (torch.cat([x[thick], x[~thick].sum()[None]]) for x in (counts, expected))
    return float(chisquare(counts[expected > 0], expected[expected > 0]).pvalue)
