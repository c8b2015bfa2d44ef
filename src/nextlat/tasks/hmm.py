"""Hidden Markov models: does the hidden state of the transformer hold the exact belief state?
(ours)

The theorem of arXiv 2511.05963 says that a transformer which predicts its own next latent state
exactly carries a belief state, a sufficient statistic of the past. Here that state is known: the
posterior over hidden states, by forward filtering. A row is `begin x_1 ... x_L`; the state at
`begin` stands for the stationary distribution.

Shapes: P sequences, L tokens a sequence, S hidden states, M symbols, D width, V vocabulary.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from nextlat.errors import NextLatError
from nextlat.scores import Score, mean_score, ratio_score
from nextlat.tasks.answers import AnswerRows
from nextlat.tasks.hidden_markov import HiddenMarkov
from nextlat.tasks.rows import STREAM, row_keys
from nextlat.tasks.task import Metric, Task, inference

if TYPE_CHECKING:
    from nextlat.model import ObjectiveModel

BEGIN, FIRST_SYMBOL = 2, 3
SPECIAL_TOKENS = ("<pad>", "<unk>", "begin")
ROWS_PER_CHUNK, CACHED_CHUNKS = 1024, 4
ROUNDS = 1000  # of drawing again the sequences that are held out
BELIEFS, POINTS = "beliefs.json", 2000
BATCH = 128  # sequences measured at a time


@dataclass(frozen=True)
class HMMConfig:
    """Settings of the task.

    Attributes:
        process: mess3 (alpha, x), random (states, symbols, concentration, process_seed), or given
            (transition, emission).
        alpha, x: see `HiddenMarkov.mess3`; the defaults are those of Shai et al., arXiv 2405.15943.
        states, symbols, concentration, process_seed: see `HiddenMarkov.random`.
        transition, emission: rows of probabilities, P(next state | state) and P(symbol | state).
        length: tokens of a sequence, besides `begin`. tests: held-out sequences, which never occur
            in training.
    """

    process: Literal["mess3", "random", "given"] = "mess3"
    alpha: float = 0.85
    x: float = 0.05
    states: int = 4
    symbols: int = 4
    concentration: float = 0.5
    process_seed: int = 0
    transition: tuple[tuple[float, ...], ...] | None = None
    emission: tuple[tuple[float, ...], ...] | None = None
    length: int = 32
    tests: int = 1000

    def build(self) -> "HMM":
        return HMM(self)

    def hidden_markov(self) -> HiddenMarkov:
        """The process that the settings name.

        Raises:
            NextLatError: see `HiddenMarkov`; or matrices that are missing, or would be ignored.
        """
        given = self.transition is not None or self.emission is not None
        if self.process != "given":
            if given:
                raise NextLatError(
                    f'task.process = "{self.process}" has its own matrices: remove them, or set it to "given".'
                )
            if self.process == "mess3":
                return HiddenMarkov.mess3(self.alpha, self.x)
            return HiddenMarkov.random(
                self.states, self.symbols, self.concentration, self.process_seed
            )
        if self.transition is None or self.emission is None:
            raise NextLatError(
                'task.process = "given" needs both task.transition and task.emission.'
            )
        return HiddenMarkov.of(self.transition, self.emission)


class HMM(Task):
    """See the module. Held-out sequences are a function of the configuration alone, those of
    training of the seed too."""

    name = "hmm"
    higher_is_better: Mapping[str, bool] = {
        "belief_r2": True,
        "next_token_kl": False,
        "transition_consistency_error": False,
    }

    def __init__(self, config: HMMConfig) -> None:
        if config.length < 2 or config.tests < 4:
            raise NextLatError("the HMM task needs length >= 2 and tests >= 4.")
        self.config = config
        self.process = config.hidden_markov()
        self.max_length = config.length + 1
        words = (*SPECIAL_TOKENS, *map(str, range(self.process.emission.shape[1])))
        core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="begin",
            model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
        )  # fmt: skip
        self._held_out = self.process.sample(config.tests, config.length, np.random.default_rng(0))
        if np.ptp(self.beliefs, axis=(0, 1)).max() < 1e-9:
            raise NextLatError(
                "the symbols of this HMM tell nothing about its states: there is no belief to be found."
            )

    def rows(self, symbols: np.ndarray) -> Tensor:
        """(P, L) symbols -> (P, L + 1) token ids."""
        return torch.nn.functional.pad(
            torch.from_numpy(symbols.astype(np.int64)) + FIRST_SYMBOL, (1, 0), value=BEGIN
        )

    def train_dataset(self, seed: int) -> Dataset[dict[str, Tensor]]:
        return SampledRows(self, seed)

    def eval_dataset(self) -> Dataset[dict[str, Tensor]]:
        return AnswerRows(
            self.rows(self._held_out).numpy(), prompt_length=1
        )  # every token but `begin` is predicted

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.config).encode())
        for x in (self.process.transition, self.process.emission, self._held_out):
            digest.update(x.tobytes())
        return digest.hexdigest()[:16]

    def prompts(self, count: int) -> list[Tensor]:
        """The first halves of held-out sequences."""
        return list(self.rows(self._held_out[:count, : self.config.length // 2]))

    def metrics(self) -> Mapping[str, Metric]:
        return {
            "belief state": lambda model: {"belief_r2": self.belief_probe(model).r2},
            "next-token distribution": self.distributions,
            "transition consistency": self.transition_consistency,
        }

    @cached_property
    def beliefs(self) -> np.ndarray:
        """(P, L + 1, S) exact beliefs of the held-out sequences."""
        return self.process.beliefs(self._held_out)

    def states(self, model: "ObjectiveModel") -> Tensor:
        """(P, L + 1, D) states of the transformer on the held-out sequences, from `begin` on, in
        fp32 on the CPU."""
        rows = self.rows(self._held_out).split(BATCH)
        with inference(model):
            return torch.cat(
                [model.backbone.step(ids.to(model.device))[0].float().cpu() for ids in rows]
            )

    def belief_probe(self, model: "ObjectiveModel") -> "Probe":
        """Affine least-squares probe from h_t to the belief after x_1 .. x_t, t >= 1: fitted on
        half of the sequences, read on the rest."""
        half = self.config.tests // 2
        h, true = self.states(model)[:, 1:].double().numpy(), self.beliefs[:, 1:]
        h = np.concatenate([h, np.ones((*h.shape[:2], 1))], axis=2)
        fit_h, fit_true = h[:half].reshape(-1, h.shape[2]), true[:half].reshape(-1, true.shape[2])
        weights = np.linalg.lstsq(fit_h, fit_true, rcond=None)[0]
        return Probe(self._held_out[half:], true[half:], h[half:] @ weights)

    def distributions(self, model: "ObjectiveModel") -> dict[str, Score]:
        """`next_token_kl`: KL(exact || model) of the next token in nats, mean over t = 0 .. L - 1;
        the items are the sequences.

        The model's distribution is that over its whole vocabulary. `entropy_floor`: mean entropy of
        the exact distribution at the same places, below which no model's cross-entropy can lie.
        """
        p = self.process.next_symbol(self.beliefs[:, :-1])
        log_p = np.log(np.maximum(p, np.finfo(np.float64).tiny))
        log_q = []
        with inference(model):
            for ids in self.rows(self._held_out)[:, :-1].split(BATCH):
                h_BTD, _ = model.step(ids.to(model.device))
                logits = model.next_token_logits(h_BTD).double().cpu()
                log_q.append(
                    logits.log_softmax(-1)[..., FIRST_SYMBOL : FIRST_SYMBOL + p.shape[-1]].numpy()
                )
        kl = (p * (log_p - np.concatenate(log_q))).sum(axis=-1)
        return {
            "next_token_kl": mean_score(kl.mean(axis=1)),
            "entropy_floor": mean_score(-(p * log_p).sum(axis=-1).mean(axis=1)),
        }

    def transition_consistency(self, model: "ObjectiveModel") -> dict[str, Score]:
        """How far the latent dynamics model misses, against how far the state moves; 0 = exact.
        Empty where there is no such model.

        sum_t ||p_psi(h_t, x_{t+1}) - h_{t+1}|| / sum_t ||h_{t+1} - h_t|| over all held-out
        sequences, which are the items. (A mean of the ratios would hang on the few places where the
        state hardly moves.)
        """
        dynamics = getattr(model.objective, "dynamics", None)
        if dynamics is None:
            return {}
        missed, moved = [], []
        with inference(model):
            for ids, h in zip(
                self.rows(self._held_out).split(BATCH), self.states(model).split(BATCH), strict=True
            ):
                e = model.backbone.embed(ids[:, 1:].to(model.device))
                predicted = dynamics(h[:, :-1].to(model.device), e).float().cpu()
                missed.append((predicted - h[:, 1:]).norm(dim=-1).sum(dim=1))
                moved.append((h[:, 1:] - h[:, :-1]).norm(dim=-1).sum(dim=1))
        return {
            "transition_consistency_error": ratio_score(
                torch.cat(missed).numpy(), torch.cat(moved).numpy()
            )
        }

    def artifacts(self, model: "ObjectiveModel") -> Mapping[str, Any]:
        """beliefs.json: true and decoded beliefs at 2,000 places, with the symbol read last, to
        draw the simplex from."""
        probe = self.belief_probe(model)
        states = probe.true.shape[-1]
        places = np.linspace(0, probe.symbols.size - 1, min(POINTS, probe.symbols.size)).astype(
            np.int64
        )
        return {
            BELIEFS: {
                "process": self.config.process,
                "transition": self.process.transition.tolist(),
                "emission": self.process.emission.tolist(),
                "r2": probe.r2.value,
                "symbol": probe.symbols.reshape(-1)[places].tolist(),
                "true": probe.true.reshape(-1, states)[places].round(5).tolist(),
                "decoded": probe.decoded.reshape(-1, states)[places].round(5).tolist(),
            }
        }


@dataclass(frozen=True, eq=False)
class Probe:
    """What a linear probe reads on sequences that it was not fitted on: symbols (P, L), true and
    decoded beliefs (P, L, S)."""

    symbols: np.ndarray
    true: np.ndarray
    decoded: np.ndarray

    @property
    def r2(self) -> Score:
        """1 - SSE / SST over all places and coordinates; the items are the sequences."""
        variation = ((self.true - self.true.mean(axis=(0, 1))) ** 2).sum(axis=(1, 2))
        error = ((self.true - self.decoded) ** 2).sum(axis=(1, 2))
        return ratio_score(variation - error, variation)


class SampledRows(Dataset[dict[str, Tensor]]):
    """An endless stream of sequences, none of them a held-out one, made in chunks when asked for.

    Raises:
        NextLatError: hardly any sequence is left that is not held out.
    """

    def __init__(self, task: HMM, seed: int) -> None:
        self.task, self.seed = task, seed
        self._refused = row_keys(task._held_out)
        self._chunks: OrderedDict[int, Tensor] = OrderedDict()
        self._chunk(0)  # a world too small to train in is refused at once

    def __len__(self) -> int:
        return STREAM

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        chunk, row = divmod(index, ROWS_PER_CHUNK)
        input_ids = self._chunk(chunk)[row]
        return {"input_ids": input_ids.clone(), "labels": input_ids.clone()}

    def _chunk(self, number: int) -> Tensor:
        if number not in self._chunks:
            process, length = self.task.process, self.task.config.length
            rng = np.random.default_rng((self.seed, number))
            symbols = process.sample(ROWS_PER_CHUNK, length, rng)
            for _ in range(ROUNDS):
                again = np.flatnonzero(np.isin(row_keys(symbols), self._refused))
                if len(again) == 0:
                    break
                symbols[again] = process.sample(len(again), length, rng)
            else:
                raise NextLatError(
                    "nearly all sequences of this HMM are held out: set task.length higher or task.tests lower."
                )
            while len(self._chunks) >= CACHED_CHUNKS:
                self._chunks.popitem(last=False)
            self._chunks[number] = self.task.rows(symbols)
        return self._chunks[number]
