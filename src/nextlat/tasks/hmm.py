"""Hidden Markov models: does the state of the transformer hold the exact belief state? (ours)

The theorem of arXiv 2511.05963 says that a transformer which predicts its own next latent state
exactly carries a belief state, a sufficient statistic of the past. Here that state is known: the
posterior over hidden states, by forward filtering. A row is `begin x_1 ... x_L`; the state at
`begin` stands for the stationary distribution.

Shapes: P sequences, L tokens of a sequence, S hidden states, M symbols, D width, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from nextlat.backbone import evaluation_mode
from nextlat.errors import NextLatError
from nextlat.model import ObjectiveModel
from nextlat.results import Chart, Line, Mark, Measurement, Metric, Picture
from nextlat.scores import Score, mean_score, ratio_score
from nextlat.tasks.dynamics_alone import ALONE_NOTE, DRIVERS, DYNAMICS, Driver, driver
from nextlat.tasks.hmm_process import HiddenMarkov
from nextlat.tasks.rows import Rows, Stream, redraw, row_keys
from nextlat.tasks.task import (
    FIRST_WORD,
    NEXTLAT,
    OURS,
    Length,
    Measure,
    Seed,
    SequenceModel,
    Task,
    TaskConfig,
    TestCount,
    check_size,
    word_tokenizer,
    world_fingerprint,
)

BEGIN, FIRST_SYMBOL = FIRST_WORD, FIRST_WORD + 1
ROWS_PER_CHUNK = 1024
POINTS = 2000  # beliefs in the picture
BATCH = 128  # sequences measured at a time

_declare = partial(Metric, source=OURS, items="sequences")
BELIEF_R2 = _declare(
    name="belief_r2",
    title="Belief state, R\N{SUPERSCRIPT TWO}",
    noun="share of the belief's variance that a linear probe reads off the state",
    definition="How much of the variance of the exact belief (the probabilities of the hidden "
    "states given all symbols so far) a linear probe of the transformer's state explains, fitted "
    "on half of the held-out sequences and read on the others; 1 = all.",
    unit="number",
)


def next_token_kl(who: Driver = "transformer", length: int | None = None) -> Metric:
    """Divergence from the exact next-token distribution.

    Args:
        who: predicts.
        length: of longer sequences, over whose last part it is taken; None = the training length.
    """
    where = f", {length} tokens" if length else ""
    parameters = {"length": length} if length else {}
    definition = (
        "KL divergence of the next-token distribution from the exact one, which is known here; "
        "nats, mean over positions"
    ) + (f", of sequences of {length} tokens over the last training length." if length else ".")
    declare = partial(
        _declare, name="next_token_kl", unit="nats", higher_is_better=False, headline=False
    )
    if who == "transformer":
        return declare(
            title=f"KL from the exact distribution{where}",
            noun=f"divergence from the exact next-token distribution{where}",
            definition=definition,
            parameters=parameters,
            headline=not length,
        )
    return declare(
        title=f"KL of the dynamics alone{where}",
        noun=f"divergence of the {DYNAMICS} from the exact next-token distribution{where}",
        definition=f"The same of the {DYNAMICS}, as a filter, from the transformer's first state: "
        f"{definition}",
        parameters={**parameters, "driver": who},
        counterpart=next_token_kl("transformer", length).key,
        counterpart_name="the transformer of",
        note=ALONE_NOTE,
    )


NEXT_TOKEN_KL = next_token_kl()
ENTROPY_FLOOR = _declare(
    name="entropy_floor",
    title="Entropy of the process",
    definition="Mean entropy of the exact next-token distribution at the same positions, below "
    "which no cross-entropy can lie; of the data, not of a model.",
    unit="nats",
    higher_is_better=None,
    headline=False,
)
TRANSITION_ERROR = _declare(
    name="transition_consistency_error",
    title="Transition consistency error",
    definition="How far the latent dynamics model misses the next state, divided by how far the "
    "state moves: sums of ||p(h, x) \N{MINUS SIGN} h'|| and of ||h' \N{MINUS SIGN} h|| over all "
    "held-out sequences; 0 = exact. Without such a model there is none.",
    source=f"{OURS}, after the theorem of {NEXTLAT}",
    unit="number",
    higher_is_better=False,
)
PICTURE = Picture(
    kind="simplex",
    file="beliefs.json",
    title="Beliefs in the model's state",
    text="Read off the state by a linear probe, on held-out sequences.",
)


class HMMConfig(TaskConfig):
    """Settings of the task.

    Attributes:
        process: mess3 (alpha, x), rrxor, random (states, symbols, concentration, process_seed), or
            given (transition, emission).
        alpha: see `HiddenMarkov.mess3`; the default is that of Shai et al., arXiv 2405.15943.
        x: likewise.
        states: S, see `HiddenMarkov.random`.
        symbols: M.
        concentration: of the Dirichlet distribution; below 0.01 its rows are zeros and ones only.
        process_seed: of the random matrices.
        transition: rows of probabilities, P(next state | state).
        emission: rows of probabilities, P(symbol | state).
        length: tokens of a sequence, besides `begin`.
        tests: held-out sequences, which never occur in training.
        multiples: of length, at which the next-token distribution is measured, besides 1.
    """

    process: Literal["mess3", "rrxor", "random", "given"] = "mess3"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.85
    x: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    states: Annotated[int, Field(ge=2, le=1000)] = 4
    symbols: Annotated[int, Field(ge=2, le=100_000)] = 4
    concentration: Annotated[float, Field(ge=0.01, le=1e6)] = 0.5
    process_seed: Seed = 0
    transition: tuple[tuple[float, ...], ...] | None = None
    emission: tuple[tuple[float, ...], ...] | None = None
    length: Annotated[Length, Field(ge=2)] = 32
    tests: Annotated[TestCount, Field(ge=4)] = 1000
    multiples: Annotated[tuple[Length, ...], Field(max_length=8)] = (1,)

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        belongs_to = {
            "alpha": "mess3", "x": "mess3", "states": "random", "symbols": "random",
            "concentration": "random", "process_seed": "random",
        }  # fmt: skip
        process = f'task.process = "{self.process}"'
        matrices = [self.transition is not None, self.emission is not None]
        if self.process == "given" and not all(matrices):
            raise ValueError(f"{process} needs both task.transition and task.emission")
        if self.process != "given" and any(matrices):
            raise ValueError(f'{process} has its own matrices: remove them, or set it to "given"')
        for name, owner in belongs_to.items():
            default = type(self).model_fields[name].default
            if owner != self.process and getattr(self, name) != default:
                raise ValueError(f"task.{name} has no meaning with {process}: remove it")
        states = len(self.transition) if self.transition is not None else self.states
        check_size(self.tests, self.length * max(1, *self.multiples) * states)
        return self

    def build(self) -> "HMM":
        return HMM(self)

    def hidden_markov(self) -> HiddenMarkov:
        """The process that the settings name.

        Raises:
            NextLatError: see `HiddenMarkov.of`.
        """
        if self.process == "mess3":
            return HiddenMarkov.mess3(self.alpha, self.x)
        if self.process == "rrxor":
            return HiddenMarkov.rrxor()
        if self.transition is None or self.emission is None:
            return HiddenMarkov.random(
                self.states, self.symbols, self.concentration, self.process_seed
            )
        return HiddenMarkov.of(self.transition, self.emission)


class HMM(Task):
    """See the module. Held-out sequences are a function of the settings alone, those of training of
    the seed too."""

    name = "hmm"
    title = "Hidden Markov model"

    def __init__(self, config: HMMConfig) -> None:
        self.config = config
        self.process = config.hidden_markov()
        self._multiples = sorted({1, *config.multiples})
        self.max_length = self._multiples[-1] * config.length + 1
        symbols = map(str, range(self.process.emission.shape[1]))
        self.tokenizer = word_tokenizer(("begin", *symbols), begin="begin")
        self._held_out = self.process.sample(config.tests, config.length, np.random.default_rng(0))
        if np.ptp(self.beliefs, axis=(0, 1)).max() < 1e-9:
            raise NextLatError(
                "the symbols of this HMM tell nothing about its states: there is no belief to be "
                "found."
            )

    def rows(self, symbols: np.ndarray) -> Tensor:
        """(P, L) symbols -> (P, L + 1) token ids."""
        ids = torch.from_numpy(symbols.astype(np.int64)) + FIRST_SYMBOL
        return torch.nn.functional.pad(ids, (1, 0), value=BEGIN)

    def train_dataset(self, seed: int) -> Stream:
        """Sequences of which none is held out.

        Raises:
            NextLatError: hardly any sequence is left that is not held out.
        """
        stream = Stream(self._chunk, ROWS_PER_CHUNK, seed)
        stream[0]  # a world too small to train in is refused at once
        return stream

    def _chunk(self, rng: np.random.Generator) -> dict[str, Tensor]:
        refused = row_keys(self._held_out)

        def draw(rows: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
            symbols = self.process.sample(len(rows), self.config.length, rng)
            return [symbols], ~np.isin(row_keys(symbols), refused)

        [symbols] = redraw(
            ROWS_PER_CHUNK,
            draw,
            lambda _: (
                "nearly all sequences of this HMM are held out: set task.length higher or "
                "task.tests lower."
            ),
        )
        ids = self.rows(symbols)
        return {"input_ids": ids, "labels": ids}

    def eval_dataset(self) -> Rows:
        ids = self.rows(self._held_out)
        return Rows({"input_ids": ids}, prompt_length=1)  # every token but `begin` is predicted

    def fingerprint(self) -> str:
        process = self.process
        return world_fingerprint(self.config, process.transition, process.emission, self._held_out)

    def prompts(self, count: int) -> list[Tensor]:
        """The first halves of held-out sequences."""
        return list(self.rows(self._held_out[:count, : self.config.length // 2]))

    @property
    def metrics(self) -> Sequence[Metric]:
        lengths = [None, *(n * self.config.length for n in self._multiples[1:])]
        kls = [next_token_kl(who, length) for length in lengths for who in DRIVERS]
        return [BELIEF_R2, kls[0], ENTROPY_FLOOR, *kls[1:], TRANSITION_ERROR]

    def measures(self) -> Mapping[str, Measure]:
        return {
            "belief state": lambda model: [Measurement(BELIEF_R2, self.belief_probe(model)[0])],
            "next-token distributions": self.distributions,
            "transition consistency": self.transition_consistency,
        }

    @cached_property
    def beliefs(self) -> np.ndarray:
        """(P, L + 1, S) exact beliefs of the held-out sequences."""
        return self.process.beliefs(self._held_out)

    def states(self, model: ObjectiveModel) -> Tensor:
        """(P, L + 1, D) states of the transformer on the held-out sequences, from `begin` on, in
        fp32 on the CPU."""
        rows = self.rows(self._held_out).split(BATCH)
        with evaluation_mode(model):
            return torch.cat(
                [model.backbone.step(ids.to(model.device))[0].float().cpu() for ids in rows]
            )

    def belief_probe(self, model: ObjectiveModel) -> tuple[Score, np.ndarray]:
        """Affine least-squares probe from h_t to the belief after x_1 .. x_t, t >= 1: fitted on the
        first half of the held-out sequences, read on the others, which are the items.

        Returns:
            1 - SSE / SST over all positions and coordinates, and the decoded beliefs (P / 2, L, S).
        """
        half = self.config.tests // 2
        h, true = self.states(model)[:, 1:].double().numpy(), self.beliefs[:, 1:]
        h = np.concatenate([h, np.ones((*h.shape[:2], 1))], axis=2)
        fit_h, fit_true = h[:half].reshape(-1, h.shape[2]), true[:half].reshape(-1, true.shape[2])
        decoded = h[half:] @ np.linalg.lstsq(fit_h, fit_true, rcond=None)[0]
        true = true[half:]
        variation = ((true - true.mean(axis=(0, 1))) ** 2).sum(axis=(1, 2))
        error = ((true - decoded) ** 2).sum(axis=(1, 2))
        return ratio_score(variation - error, variation), decoded

    def _symbols(self, multiple: int) -> np.ndarray:
        """(P, L) held-out sequences of a multiple of the training length."""
        if multiple == 1:
            return self._held_out
        length = multiple * self.config.length
        return self.process.sample(self.config.tests, length, np.random.default_rng(multiple))

    def distributions(self, model: ObjectiveModel) -> list[Measurement | Chart]:
        """KL(exact || model) of the next token in nats, where the model's distribution is that over
        its whole vocabulary, and the mean entropy of the exact distribution; of the transformer and
        of the dynamics run alone as a filter, and by position on the longest sequences. The items
        are the sequences."""
        length, found, lines = self.config.length, list[Measurement | Chart](), list[Line]()
        for multiple in self._multiples:
            symbols = self._symbols(multiple)
            p = self.process.next_symbol(self.process.beliefs(symbols)[:, :-1])
            log_p = np.log(np.maximum(p, np.finfo(np.float64).tiny))
            beyond = None if multiple == 1 else multiple * length
            for who in DRIVERS:
                if (reader := driver(model, who, begun=1)) is None:
                    continue
                kl = (p * (log_p - self._log_q(reader, symbols))).sum(axis=-1)
                score = mean_score(kl[:, -length:].mean(axis=1))
                found.append(Measurement(next_token_kl(who, beyond), score))
                if multiple == self._multiples[-1]:
                    series = DYNAMICS if who == "dynamics" else who
                    lines.append(Line(values=kl.mean(axis=0).tolist(), series=series, first=0))
            if multiple == 1:
                entropy = mean_score(-(p * log_p).sum(axis=-1).mean(axis=1))
                found.append(Measurement(ENTROPY_FLOOR, entropy))
        chart = Chart(
            name="filter",
            title="KL from the exact next-token distribution, by position",
            x="symbols read",
            unit="nats",
            lines=lines,
            alt="Divergence of {models} from the exact next-token distribution by position.",
            marks=[Mark(text="trained up to here", x=length)] * (multiple > 1),
        )
        return [*found, chart]

    def _log_q(self, reader: SequenceModel, symbols: np.ndarray) -> np.ndarray:
        """(P, L, M) log-probabilities of the next symbol before each one."""
        wanted = slice(FIRST_SYMBOL, FIRST_SYMBOL + self.process.emission.shape[1])
        log_q = []
        with evaluation_mode(reader):
            for ids in self.rows(symbols)[:, :-1].split(BATCH):
                logits = reader.next_token_logits(reader.step(ids.to(reader.device))[0])
                log_q.append(logits.double().cpu().log_softmax(-1)[..., wanted].numpy())
        return np.concatenate(log_q)

    def transition_consistency(self, model: ObjectiveModel) -> list[Measurement]:
        """How far the latent dynamics model misses, against how far the state moves; 0 = exact.
        Empty where there is no such model.

        sum_t ||p_psi(h_t, x_{t+1}) - h_{t+1}|| / sum_t ||h_{t+1} - h_t|| over all held-out
        sequences, which are the items. (A mean of the ratios would hang on the few positions where
        the state hardly moves.)
        """
        dynamics = getattr(model.objective, "dynamics", None)
        if dynamics is None:
            return []
        missed, moved = [], []
        rows, states = self.rows(self._held_out).split(BATCH), self.states(model).split(BATCH)
        with evaluation_mode(model):
            for ids, h in zip(rows, states, strict=True):
                e = model.backbone.embed(ids[:, 1:].to(model.device))
                predicted = dynamics(h[:, :-1].to(model.device), e).float().cpu()
                missed.append((predicted - h[:, 1:]).norm(dim=-1).sum(dim=1))
                moved.append((h[:, 1:] - h[:, :-1]).norm(dim=-1).sum(dim=1))
        score = ratio_score(torch.cat(missed).numpy(), torch.cat(moved).numpy())
        return [Measurement(TRANSITION_ERROR, score)]

    def artifacts(self, model: ObjectiveModel) -> Iterable[tuple[Picture, Any]]:
        """beliefs.json: true and decoded beliefs at 2,000 positions, with the symbol read last, to
        draw the simplex from."""
        r2, decoded = self.belief_probe(model)
        half = self.config.tests // 2
        true, symbols = self.beliefs[half:, 1:], self._held_out[half:]
        chosen = np.linspace(0, symbols.size - 1, min(POINTS, symbols.size)).astype(np.int64)
        record = {
            "r2": r2.value,
            "symbol": symbols.reshape(-1)[chosen].tolist(),
            "true": true.reshape(-1, true.shape[-1])[chosen].round(5).tolist(),
            "decoded": decoded.reshape(-1, true.shape[-1])[chosen].round(5).tolist(),
        }
        return [(PICTURE, record)]
