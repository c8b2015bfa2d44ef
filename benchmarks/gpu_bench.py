"""What the stages of `gpu.py` share: their sizes, and the trained model that decodes."""

import json
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import nextlat
from nextlat.errors import NextLatError
from nextlat.tasks.task import find_data
from nextlat.tasks.text.tokens import END_OF_TEXT
from nextlat.training.recipe import load_recipe
from nextlat.training.run_directory import is_finished, read_metrics
from nextlat.training.train import train

STORIES = "text/tinystories_train.txt"  # of recipe text-small
SUBJECTS = (
    *("the sea", "bread", "a lost key", "winter", "bees", "a train", "the moon", "music"),
    *("an old house", "rain", "money", "a garden", "sleep", "a bridge", "salt", "a map"),
)
REQUESTS = (
    "Write a short story about {}.",
    "Explain {} to a child.",
    "Write a poem about {}.",
    "What should everybody know about {}?",
    "Give me five ideas for an essay on {}.",
    "Why do people care about {}?",
    "Describe {} in three sentences.",
    "Ask me questions about {}, and answer them.",
)
Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are for a GPU.

    Attributes:
        layers, width, heads, vocabulary, length: of the transformer: 138 M weights, deep enough
            that a draft step costs little beside a pass.
        characters: of text to train it on. rows, steps: of a batch, of the training.
        prompts, new_tokens, repetitions: of the speeds, for batch 1; larger batches are full.
        draft_lengths: fixed ones. draft_vocabulary: of the variant with one.
        batches: whose costs are measured.
        batch, turns: rows and timed turns of training cost. wide: vocabulary of the memory figures.
        chats: sampled for each request about each subject, of so many tokens.
        study: recipe and settings. variants: of them.
    """

    layers: int = 16
    width: int = 768
    heads: int = 12
    vocabulary: int = 16_384
    length: int = 512
    characters: int = 60_000_000
    rows: int = 32
    steps: int = 1000
    prompts: int = 4
    new_tokens: int = 96
    repetitions: int = 3
    draft_lengths: tuple[int, ...] = (1, 2, 4)
    draft_vocabulary: int = 4096
    batches: tuple[int, ...] = (1, 8, 32)
    batch: int = 16
    turns: int = 5
    wide: int = 131_072
    chats: int = 8
    chat_tokens: int = 192
    study: tuple[str, ...] = ("path-star", "run.precision=bf16")
    variants: tuple[str, ...] = ("as in the recipe", "half the initial scale")


SMOKE = Sizes(
    layers=1, width=16, heads=2, vocabulary=300, length=48, characters=60_000, rows=2, steps=3,
    prompts=1, new_tokens=6, repetitions=1, draft_lengths=(2,), draft_vocabulary=100,
    batches=(1, 2), batch=2, turns=1, wide=400, chats=1, chat_tokens=16,
    study=("city-tiny", "steps=3", "task.tests=5", "schedule.warmup_steps=1",
           "schedule.decay_steps=1"),
    variants=("as in the recipe",),
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where a stage runs.

    Attributes:
        sizes: of everything.
        work: directory of runs, which a later call finds again.
        model: directory of a chat model to draft for; None = one that is trained here.
        until: time.time() at which the call ends.
    """

    sizes: Sizes
    work: Path
    model: Path | None
    until: float

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of what decodes: bf16, but for a CPU, which need not have it."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def run(self) -> Path:
        """The trained model."""
        return self.work / ("model" if self.model is None else f"model-{self.model.name}")

    @property
    def prompts(self) -> Path:
        return self.run.with_name(f"{self.run.name}-prompts.json")

    @property
    def is_trained(self) -> bool:
        return self.prompts.exists() and (self.run / "run.json").exists() and is_finished(self.run)

    def llama(self, **changes: Any) -> Any:
        """A random transformer of the sizes, where it is measured."""
        names = ("layers", "width", "heads")
        shape = {name: getattr(self.sizes, name) for name in names} | {"seed": 0}
        shape |= {"vocab_size": self.sizes.vocabulary, "max_length": self.sizes.length} | changes
        return nextlat.llama(**shape).to(self.device)

    def tokens(self, rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.sizes.vocabulary, (rows, length), generator=generator)
        return ids.to(self.device)


def prepare(bench: Bench) -> Result:
    """Train what decodes: a language model with NextLat, or a drafter beside the given one."""
    s, started = bench.sizes, time.perf_counter()
    on_gpu = bench.device.type == "cuda"
    given: dict[str, Any] = {
        "steps": s.steps, "schedule.warmup_steps": s.steps // 20,
        "schedule.decay_steps": s.steps // 3, "run.save_every": 0, "run.eval_every": 0,
        "run.precision": "bf16" if on_gpu else "fp32", "task.tests": 64, "task.probes": 0,
    }  # fmt: skip
    if bench.model is None:
        data, name = "TinyStories", "text-small"
        if find_data(STORIES, file=True) is None or not on_gpu:
            data = "Python sources"
            given |= sources(bench)
        given |= {f"backbone.{key}": getattr(s, key) for key in ("layers", "width", "heads")}
        given |= {"batch_size": s.rows, "task.vocab_size": s.vocabulary, "optimizer.learning_rate":
                  1e-3, "task.row_length": s.length, "task.prompt_length": min(32, s.length // 2),
                  "objectives.nextlat.warmup_steps": s.steps // 3}  # fmt: skip
    else:
        data, name = "its own chats", "own-model"
        given |= chats(bench) | {
            "backbone.pretrained": bench.model, "task.tokenizer": bench.model,
            "batch_size": min(16, s.rows), "task.row_length": min(256, s.length),
            "task.prompt_length": min(32, s.length // 2),
        }  # fmt: skip
    recipe = load_recipe(name, [f"{key}={value}" for key, value in given.items()])
    train(recipe, bench.run)
    prompts = [prompt.tolist() for prompt in recipe.task.build().prompts(32)]
    bench.prompts.write_text(json.dumps(prompts))
    lines = read_metrics(bench.run)
    last = {key: value for line in lines for key, value in line.items() if key != "step"}
    parameters = sum(p.numel() for p in nextlat.load(bench.run).lm.parameters())
    seconds = time.perf_counter() - started
    summary = (
        f"{parameters / 1e6:.0f} M weights, {data}: {s.steps} steps in {seconds:.0f} s, "
        f"held-out cross-entropy {last.get('eval_next_token', float('nan')):.2f}"
    )
    return {"summary": summary, "data": data, "parameters": parameters, "last": last}


def sources(bench: Bench) -> dict[str, Any]:
    """Text that every Python environment has: the sources of its packages to train on, and those of
    this package, which are not among them, held out."""
    folders = [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "platlib")]
    if bench.device.type == "cpu":
        folders = folders[:1]
    files = sorted({path for folder in folders for path in folder.rglob("*.py")
                    if "nextlat" not in path.parts})  # fmt: skip
    random.Random(0).shuffle(files)

    def texts(paths: list[Path]) -> Iterator[str]:
        for path in paths:
            text = path.read_text(errors="ignore") if path.is_file() else ""
            if END_OF_TEXT not in text:
                yield text

    some, room = [], bench.sizes.characters
    for text in texts(files):
        some.append(text)
        room -= len(text)
        if room <= 0:
            break
    own = texts(sorted(Path(nextlat.__file__).parent.rglob("*.py")))
    held_out = (text[: 6 * bench.sizes.length] for text in own)  # the beginnings of many
    files_of = {"train": some, "validation": [*held_out]}
    for part, documents in files_of.items():
        (bench.work / f"{part}.txt").write_text(END_OF_TEXT.join(documents))
    return {f"task.{part}": bench.work / f"{part}.txt" for part in files_of}


def chats(bench: Bench) -> dict[str, Any]:
    """Answers of the chat model, sampled; those about the first subject are held out."""
    s, path = bench.sizes, bench.work / f"{bench.run.name}-chats.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(bench.model, padding_side="left")
    if tokenizer.chat_template is None:
        raise NextLatError(f"{bench.model} has no chat template: give a chat model.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    known = len(tokenizer)
    vocabulary = {"objectives.nextlat.draft_vocabulary": 8000} if known >= 30_000 else {}
    settings = {"task.train": path, "task.column": "messages", **vocabulary}
    if not path.exists():
        lm = AutoModelForCausalLM.from_pretrained(bench.model, dtype="auto").to(bench.device).eval()
        asked = [[{"role": "user", "content": request.format(subject)}]
                 for subject in SUBJECTS for request in REQUESTS]  # fmt: skip
        form = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        given = tokenizer([form(messages) for messages in asked], return_tensors="pt",
                          padding=True, add_special_tokens=False).to(bench.device)  # fmt: skip
        torch.manual_seed(0)
        out = lm.generate(
            given.input_ids, attention_mask=given.attention_mask, do_sample=True, temperature=0.7,
            top_k=0, max_new_tokens=s.chat_tokens, num_return_sequences=s.chats,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers = tokenizer.batch_decode(out[:, given.input_ids.shape[1] :], True)
        lines = [
            json.dumps({"messages": [*asked[i // s.chats],
                                     {"role": "assistant", "content": answer or "?"}]})
            for i, answer in enumerate(answers)
        ]  # fmt: skip
        path.write_text("\n".join(lines) + "\n")
    return settings | {"task.held_out": len(REQUESTS) * s.chats}
