"""A drafter for a pretrained chat model: `python benchmarks/own_model.py MODEL --out DIR`.

The dynamics of NextLat are trained beside the frozen model (recipe own-model) on chat (its own
answers to the questions in --questions), stories and encyclopedia articles, with a draft
vocabulary and cached states. Then, on held-out texts of the three kinds: tokens a cycle for 1 to 6
drafted tokens, greedy and sampled; perplexity before and after; decoding speed against `generate`
of transformers and its prompt lookup, interleaved; the speed-up that a GPU's costs would allow; and
the acceptance by horizon and by width of the dynamics.

Every stage goes on where it stopped: the same command continues, within --minutes if given, and
writes --results after each stage with what has been measured by then.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from nextlat.decoding.stats import GenerationStats
from nextlat.model import ObjectiveModel, load
from nextlat.tasks import TASKS
from nextlat.tasks.task import TaskConfig, held_out_cross_entropy
from nextlat.tasks.text.text import Text, TextConfig
from nextlat.tasks.text.tokens import PackedDocuments, Tokens
from nextlat.training.recipe import load_recipe
from nextlat.training.run_directory import is_finished, read_metrics
from nextlat.training.train import Interrupted, train

KINDS = ("chat", "stories", "wikitext")
HELD_OUT = 16  # documents of each kind
PROMPT, NEW, LONGEST = 32, 64, 6  # tokens of a prompt (of text), of its continuation, of a draft
TEMPERATURE = 0.7
CHAT_TRAIN, CHAT_TOKENS, CHAT_BATCH = 192, 128, 16
CHAT_COPIES = 4  # of each chat in the corpus, whose other parts are much longer
# Costs in units of a plain pass: c of a draft step, v of a verification (docs/log.md).
GPU_COSTS = {
    "whole head, bf16": (0.15, 1.05),
    "draft vocabulary": (0.10, 1.05),
    "and fp8": (0.05, 1.05),
}
MAIN = {"horizon": 4}
STUDIES = [{"horizon": d} for d in (1, 2, 8)] + [
    {"horizon": 4, "hidden_size": w} for w in (576, 1152, 2304)
]


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
            Tokens(stored[f"{part}_ids"], stored[f"{part}_starts"])
            for part in ("train", "held_out")
        )


TASKS["own-text"] = OwnTextConfig


class OutOfTime(Exception):
    """--minutes are over."""


class Bench:
    """The stages, and what they have measured.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, self.out, self.results_file = args.model, args.out, args.results
        self.text, self.questions = args.text, args.questions
        self.steps, self.study_steps, self.rows = args.steps, args.study_steps, args.cached_rows
        self.vocabulary = args.draft_vocabulary
        self.until = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        stored = self.out / "results.json"
        self.results: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}

    def check_time(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfTime

    def note(self, key: str, value: Any) -> None:
        self.results[key] = value
        text = json.dumps(self.results, indent=1) + "\n"
        for path in filter(None, (self.out / "results.json", self.results_file)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def run(self) -> None:
        self.corpus()
        names = ("draft_vocabulary", "rows", "steps", "study_steps")
        settings = {
            name: getattr(self, "vocabulary" if "draft" in name else name) for name in names
        }
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        self.note("settings", {"model": Path(self.model).name, **settings, **machine})
        main = self.train("main", self.steps, MAIN)
        if is_finished(main):
            model = load(main)
            model.lm.eval()
            self.once("perplexity", lambda: self.perplexity(model))
            self.once("acceptance", lambda: self.acceptance(model))
            for batch in (1, 4):
                self.once(f"speed, batch {batch}", lambda b=batch: self.speed(model, b))
        for settings in STUDIES:
            name = "-".join(f"{key}{value}" for key, value in settings.items())
            self.train(f"study-{name}", self.study_steps, settings)

    def once(self, key: str, measure: Callable[[], Any]) -> None:
        """Measure what has not been measured for the model as trained."""
        if key not in self.results:
            self.check_time()
            self.note(key, measure())

    # ---- texts ----

    def corpus(self) -> None:
        if (self.out / "corpus.npz").exists():
            return
        chats = [*self.chats()]
        texts = {
            "stories": (self.text / "tinystories_train.txt").read_text().split("<|endoftext|>"),
            "wikitext": articles((self.text / "wikitext2_train_1MB.txt").read_text()),
        }
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
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
        tokens = {kind: sum(map(len, documents[kind])) for kind in KINDS}
        self.note("corpus", {"tokens": tokens, "begin": first})

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
        tokens = Tokens(stored["held_out_ids"], stored["held_out_starts"])
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

    # ---- training ----

    def train(self, name: str, steps: int, settings: dict[str, int]) -> Path:
        """One run; its losses and acceptances are noted as far as it has got."""
        run = self.out / name
        given = {
            "backbone.pretrained": self.model, "backbone.cached_rows": self.rows, "steps": steps,
            "objectives.nextlat.draft_vocabulary": self.vocabulary,
            "schedule.warmup_steps": steps // 20, "schedule.decay_steps": steps // 3,
            "run.states": self.out / "states", "run.save_every": 10, "run.log_every": 5,
            "run.eval_every": max(steps // 6, 1),
        }  # fmt: skip
        given |= {f"objectives.nextlat.{key}": value for key, value in settings.items()}
        overrides = [f"task.{key}=" for key in ("row_length", "held_out", "probes")]
        overrides += [
            "task.name=own-text",
            f"task.directory={self.out}",
            f"task.tokenizer={self.model}",
        ]
        recipe = load_recipe(
            "own-model", overrides + [f"{key}={value}" for key, value in given.items()]
        )

        def progress(shown: str, step: int, of: int) -> None:
            if step % 5 == 0:
                print(f"{name} {step}/{of} {shown}", flush=True)
            self.check_time()

        try:
            if not (run / "run.json").exists() or not is_finished(run):
                self.check_time()
                train(recipe, run, progress=progress)
        finally:
            self.note(name, self.curve(run, settings, steps))
        return run

    def curve(self, run: Path, settings: dict[str, int], steps: int) -> dict[str, Any]:
        lines = read_metrics(run)
        evaluations = [x for x in lines if "eval_loss" in x]
        last = next((x for x in reversed(lines) if "loss" in x), {})
        shown = ("acceptance", "next_h", "kl")
        training = {k: v for k, v in last.items() if k.startswith(shown)}
        held_out = []
        for line in evaluations:
            parts = {k.removeprefix("eval_"): v for k, v in line.items()}
            held_out.append({k: v for k, v in parts.items() if k.startswith((*shown, "step"))})
        done = max((x["step"] for x in lines), default=0)
        progress = {"steps": steps, "done": done, "seconds": last.get("seconds")}
        return {**settings, **progress, "training": training, "held_out": held_out}

    # ---- measurements ----

    def perplexity(self, model: ObjectiveModel) -> dict[str, Any]:
        """Of held-out rows, with the model as published and as it was saved after training."""
        before = AutoModelForCausalLM.from_pretrained(self.model)
        equal = all(
            torch.equal(a, b)
            for a, b in zip(
                before.state_dict().values(), model.lm.state_dict().values(), strict=True
            )
        )
        found: dict[str, Any] = {"weights equal to the bit": equal}
        for kind in KINDS:
            documents = self.held_out(kind)
            tokens = Tokens(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))
            rows = PackedDocuments(tokens, 256, seed=None, rows=8)
            after = float(np.exp(held_out_cross_entropy(model, rows, batch_size=8).mean))
            lm, model.lm = model.lm, before
            first = float(np.exp(held_out_cross_entropy(model, rows, batch_size=8).mean))
            model.lm = lm
            found[kind] = {"before": first, "after": after}
        return found

    def acceptance(self, model: ObjectiveModel) -> dict[str, Any]:
        """1 + s_1 + ... + s_k tokens a cycle, s_j = share of cycles that keep the j-th token."""
        found: dict[str, Any] = {}
        for kind in KINDS:
            for temperature in (0.0, TEMPERATURE):
                options = sampling(temperature)
                total = GenerationStats()
                for n, prompt in enumerate(self.prompts(kind, 8)):
                    generator = torch.Generator().manual_seed(n)
                    stats = model.generate(
                        prompt[None],
                        max_new_tokens=NEW,
                        draft_length=LONGEST,
                        return_stats=True,
                        generator=generator,
                        **options,
                    )[1]
                    total = total + stats
                survival = np.cumsum(total.acceptance_by_position)
                name = f"{kind}, {'greedy' if not temperature else f'T={temperature}'}"
                tau = [round(1 + float(s), 3) for s in survival]
                ceilings = {
                    costs: max((t / (v + k * c), k) for k, t in enumerate([1.0, *tau]))
                    for costs, (c, v) in GPU_COSTS.items()
                }
                found[name] = {
                    "cycles": total.cycles,
                    "tokens a cycle by k": tau,
                    "GPU ceiling": {
                        costs: {"speed-up": round(s, 2), "k": k}
                        for costs, (s, k) in ceilings.items()
                    },
                }
        return found

    def speed(self, model: ObjectiveModel, batch: int) -> dict[str, Any]:
        """Times transformers' `generate`, interleaved: median and range of three rounds."""
        prompts = [p for kind in KINDS for p in self.prompts(kind, 4 if batch > 1 else 2)]
        groups = [padded(prompts[i : i + batch]) for i in range(0, len(prompts), batch)]
        ways: dict[str, dict[str, Any]] = {
            "transformers": {},
            "plain": {"draft_length": 0},
            "k=1": {"draft_length": 1},
            "k=2": {"draft_length": 2},
            "auto": {"draft_length": "auto"},
        }
        if batch == 1:
            ways["prompt lookup"] = {"prompt_lookup_num_tokens": 3}
        found: dict[str, Any] = {}
        for temperature in (0.0, TEMPERATURE):
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(4):
                for way, own in ways.items():
                    generate = model.generate if "draft_length" in own else model.lm.generate
                    tokens, started = 0, time.perf_counter()
                    for ids, mask in groups:
                        torch.manual_seed(0)
                        out = generate(
                            ids,
                            attention_mask=mask,
                            max_new_tokens=NEW,
                            **own,
                            **sampling(temperature),
                        )
                        tokens += int(
                            (
                                out[:, ids.shape[1] :] != model.lm.generation_config.pad_token_id
                            ).sum()
                        )
                    if number:  # the first round warms up, and measures costs
                        rates[way].append(tokens / (time.perf_counter() - started))
            base = rates["transformers"]
            name = "greedy" if not temperature else f"T={temperature}"
            found[name] = {"tokens per second of transformers": statistics.median(base)}
            for way, values in rates.items():
                ratios = sorted(a / b for a, b in zip(values, base, strict=True))
                found[name][way] = {
                    "median": round(statistics.median(ratios), 3),
                    "range": [round(ratios[0], 3), round(ratios[-1], 3)],
                }
        return found


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


def sampling(temperature: float) -> dict[str, Any]:
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="directory of a chat model")
    parser.add_argument("--out", type=Path, required=True, help="directory of runs, which goes on")
    parser.add_argument("--results", type=Path, help="JSON to write besides DIR/results.json")
    parser.add_argument("--text", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--questions", type=Path, default=Path("../shared/data/eval"))
    parser.add_argument("--steps", type=int, default=600, help="of the main run")
    parser.add_argument("--study-steps", type=int, default=60, help="of each other run")
    parser.add_argument("--cached-rows", type=int, default=3000)
    parser.add_argument("--draft-vocabulary", type=int, default=8000)
    parser.add_argument("--minutes", type=float, help="stop after so many, at a checkpoint")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        Bench(args).run()
    except (OutOfTime, Interrupted) as stopped:
        print(f"stopped ({stopped or 'out of time'}): the same command goes on from here.")


if __name__ == "__main__":
    main()
