"""The texts of `own_model.py`: a chat model's own answers to questions, stories and articles."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from nextlat.tasks import TASKS
from nextlat.tasks.task import TaskConfig
from nextlat.tasks.text.shards import Sums, Tokens
from nextlat.tasks.text.text import Text, TextConfig

KINDS = ("chat", "stories", "wikitext")
HELD_OUT = 16  # documents of each kind
PROMPT, NEW = 32, 64  # tokens of a prompt (of text), of its continuation
TEMPERATURE = 0.7
CHAT_TRAIN, CHAT_TOKENS, CHAT_BATCH = 192, 128, 16
CHAT_COPIES = 4  # of each chat in the corpus, whose other parts are much longer


class Listed(Tokens):
    """Documents that are few enough for the memory.

    Args:
        ids: (N,) tokens.
        starts: (C + 1,) where documents begin, from 0 to N.
        directory: of the file that they are from.
    """

    directory = Path()
    scored = False

    def __init__(self, ids: np.ndarray, starts: np.ndarray, directory: Path) -> None:
        self._ids, self._first, self.directory = ids, starts, directory
        self.sizes = np.diff(starts).astype(np.uint32)
        self._starts, self.total = Sums(self.sizes), len(ids)
        self._open = {}

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._ids[self._first[index] : self._first[index + 1]][start:stop]

    def parts(self) -> Iterator[np.ndarray]:
        yield from (self._first, self._ids)


class OwnTextConfig(TaskConfig):
    """Tokens that this script has prepared.

    Attributes:
        directory: of corpus.npz.
        tokenizer: of the model.
    """

    directory: str
    tokenizer: str

    def build(self) -> "OwnText":
        return OwnText(self)


class OwnText(Text):
    """The corpus as a task."""

    def __init__(self, config: OwnTextConfig) -> None:
        stored = np.load(Path(config.directory) / "corpus.npz")
        self.config = TextConfig(train="corpus.npz", tokenizer=config.tokenizer, tests=24, probes=0)
        self.tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        self.max_length = 256
        self.train, self.held_out = (
            Listed(stored[f"{part}_ids"], stored[f"{part}_starts"], Path(config.directory))
            for part in ("train", "held_out")
        )


TASKS["own-text"] = OwnTextConfig


class OutOfTime(Exception):
    """--minutes are over."""


class Texts:
    """Made once and kept in a directory.

    Args:
        model: directory of the chat model.
        out: where they are kept.
        text: directory of stories and articles.
        questions: directory of piqa.jsonl.
        until: when to stop, on the monotonic clock.
    """

    def __init__(self, model: str, out: Path, text: Path, questions: Path, until: float) -> None:
        self.model, self.out, self.text, self.questions = model, out, text, questions
        self.until = until
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)

    def check_time(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfTime

    def corpus(self) -> dict[str, int] | None:
        """Tokens of each kind, where corpus.npz had to be made."""
        if (self.out / "corpus.npz").exists():
            return None
        chats = [*self.chats()]
        texts = {
            "stories": (self.text / "tinystories_train.txt").read_text().split("<|endoftext|>"),
            "wikitext": articles((self.text / "wikitext2_train_1MB.txt").read_text()),
        }
        last = self.tokenizer.eos_token_id
        documents: dict[str, list[list[int]]] = {"chat": chats}
        for kind, pieces in texts.items():
            pieces = [piece.strip() for piece in pieces if piece.strip()][:3000]
            encoded = self.tokenizer(pieces, add_special_tokens=False)["input_ids"]
            documents[kind] = [[*ids, last] for ids in encoded if len(ids) > PROMPT]
        parts = {
            "train": [
                d
                for kind in KINDS
                for d in documents[kind][HELD_OUT:]
                for _ in range(CHAT_COPIES if kind == "chat" else 1)
            ],
            "held_out": [d for kind in KINDS for d in documents[kind][:HELD_OUT]],
        }
        arrays = {}
        for part, rows in parts.items():
            arrays[f"{part}_ids"] = np.array([t for row in rows for t in row], dtype=np.uint16)
            arrays[f"{part}_starts"] = np.cumsum([0, *map(len, rows)])
        np.savez(self.out / "corpus.npz", **arrays)
        return {kind: sum(map(len, documents[kind])) for kind in KINDS}

    def chats(self) -> Iterator[list[int]]:
        """Questions with the model's own answers, sampled; kept batch by batch."""
        questions = [
            json.loads(line)["query"]
            .removeprefix("Question: ")
            .strip()
            .removesuffix("Answer:")
            .strip()
            for line in (self.questions / "piqa.jsonl").read_text().splitlines()
        ]
        questions = [q for q in questions if q.endswith("?")][: CHAT_TRAIN + HELD_OUT]
        kept = self.out / "chat.jsonl"
        done = [json.loads(x) for x in kept.read_text().splitlines()] if kept.exists() else []
        lm = (
            AutoModelForCausalLM.from_pretrained(self.model) if len(done) < len(questions) else None
        )
        while len(done) < len(questions):
            self.check_time()
            torch.manual_seed(len(done))
            prompts = [self.chat_prompt(q) for q in questions[len(done) : len(done) + CHAT_BATCH]]
            ids, mask = padded(prompts)
            options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0}
            out = lm.generate(ids, attention_mask=mask, max_new_tokens=CHAT_TOKENS, **options)
            for prompt, row in zip(prompts, out[:, ids.shape[1] :].tolist(), strict=True):
                end = self.tokenizer.eos_token_id
                row = row[: row.index(end) + 1] if end in row else row
                done.append([*prompt.tolist(), *row])
            kept.write_text("".join(json.dumps(chat) + "\n" for chat in done))
            print(f"{len(done)} of {len(questions)} chats", flush=True)
        yield from done

    def chat_prompt(self, question: str) -> Tensor:
        message = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def held_out(self, kind: str) -> list[np.ndarray]:
        stored = np.load(self.out / "corpus.npz")
        tokens = Listed(stored["held_out_ids"], stored["held_out_starts"], self.out)
        first = KINDS.index(kind) * HELD_OUT
        return [tokens.document(i).astype(np.int64) for i in range(first, first + HELD_OUT)]

    def prompts(self, kind: str, count: int) -> list[Tensor]:
        """Of a chat everything before the answer."""
        documents, start = self.held_out(kind)[:count], self.chat_prompt("?")[-3:].tolist()
        ends = [PROMPT] * count
        if kind == "chat":
            ends = [
                next(i + 3 for i in range(len(d)) if d[i : i + 3].tolist() == start and i > 3)
                for d in documents
            ]
        return [torch.from_numpy(d[:end]) for d, end in zip(documents, ends, strict=True)]


def articles(text: str) -> list[str]:
    """WikiText's articles begin with a title between single equals signs."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith(" = ") and not line.startswith(" = = "):
            found.append([])
        found[-1].append(line)
    return ["\n".join(lines) for lines in found]


def padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask, padded on the left."""
    ids = pad_sequence(prompts, batch_first=True, padding_side="left", padding_value=2)
    mask = pad_sequence(
        [torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"
    )
    return ids, mask
