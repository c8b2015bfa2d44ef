"""A drafter for a pretrained chat model: `python benchmarks/own_model.py MODEL --out DIR`.

The dynamics of NextLat are trained beside the frozen model (recipe own-model) on chat (its own
answers to the questions in --questions), stories and encyclopedia articles, with a draft
vocabulary and cached states. The same with a LoRA adapter that is trained with them, whose output
is then another model's. Then, on held-out texts of the three kinds: tokens a cycle for 1 to 6
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from nextlat.decoding.stats import GenerationStats
from nextlat.model import ObjectiveModel, attach, load
from nextlat.scores import exp_score
from nextlat.tasks.task import held_out_cross_entropy
from nextlat.tasks.text.packed import PackedDocuments
from nextlat.training.checkpoints import checkpoint_step, last_complete_checkpoint
from nextlat.training.recipe import load_recipe
from nextlat.training.run_directory import is_finished, read_metrics
from nextlat.training.train import Interrupted, train
from own_model_lora import curve as lora_curve
from own_model_lora import train_lora
from own_model_text import KINDS, NEW, TEMPERATURE, Listed, OutOfTime, Texts, padded

LONGEST = 6  # tokens of a draft
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


class Bench(Texts):
    """The stages, and what they have measured.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        until = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
        super().__init__(args.model, args.out, args.text, args.questions, until)
        self.results_file, self.measure_now = args.results, args.measure
        self.steps, self.study_steps, self.rows = args.steps, args.study_steps, args.cached_rows
        self.vocabulary, self.lora_steps = args.draft_vocabulary, args.lora_steps
        stored = self.out / "results.json"
        self.results: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}

    def note(self, key: str, value: Any) -> None:
        self.results[key] = value
        text = json.dumps(self.results, indent=1) + "\n"
        for path in filter(None, (self.out / "results.json", self.results_file)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def run(self) -> None:
        if counts := self.corpus():
            self.note("tokens", counts)
        names = ("draft_vocabulary", "rows", "steps", "study_steps")
        settings = {
            name: getattr(self, "vocabulary" if "draft" in name else name) for name in names
        }
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        self.note("settings", {"model": Path(self.model).name, **settings, **machine})
        if not self.measure_now:
            self.train("main", self.steps, MAIN)
        self.measure(self.out / "main")
        if self.lora_steps and not self.measure_now:
            self.train_lora()
        for settings in () if self.measure_now else STUDIES:
            name = "-".join(f"{key}{value}" for key, value in settings.items())
            study = self.train(f"study-{name}", self.study_steps, settings)
            self.once(f"study-{name}, acceptance", partial(self.greedily, study))

    def train_lora(self) -> None:
        """An adapter trained together with the dynamics, measured like the frozen model."""

        def progress(line: dict[str, Any]) -> None:
            print(f"lora {line}", flush=True)
            self.check_time()

        run, settings = self.out / "lora", MAIN
        train_lora(
            self.model, self.out, run, settings, steps=self.lora_steps,
            vocabulary=self.vocabulary, progress=progress,
        )  # fmt: skip
        self.note("lora", lora_curve(run, self.lora_steps, settings))
        self.measure_model(load(run), "lora, ")

    def measure(self, run: Path) -> None:
        """The trained model, or its newest checkpoint."""
        checkpoint = run if is_finished(run) else last_complete_checkpoint(run)[0]
        if checkpoint is None:
            return
        step = self.steps if checkpoint == run else checkpoint_step(checkpoint)
        if self.results.get("measured at step") != step:
            measured = {"perplexity", "acceptance", "speed, batch 1", "speed, batch 4"}
            self.results = {k: v for k, v in self.results.items() if k not in measured}
            self.note("measured at step", step)
        self.measure_model(load(checkpoint))

    def measure_model(self, model: ObjectiveModel, prefix: str = "") -> None:
        self.once(f"{prefix}perplexity", lambda: self.perplexity(model))
        self.once(f"{prefix}acceptance", lambda: self.acceptance(model))
        for batch in (1, 4):
            self.once(f"{prefix}speed, batch {batch}", lambda b=batch: self.speed(model, b))

    def once(self, key: str, measure: Callable[[], Any]) -> None:
        """Measure what has not been measured for the model as trained."""
        if key not in self.results:
            self.check_time()
            self.note(key, measure())

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
            starts = np.cumsum([0, *map(len, documents)])
            tokens = Listed(np.concatenate(documents), starts, self.out)
            rows = PackedDocuments(tokens, 256, seed=None, rows=8)
            first, after = (
                round(exp_score(held_out_cross_entropy(m, rows, batch_size=8)).value, 3)
                for m in (attach(before), model)
            )
            found[kind] = {"before": first, "after": after}
        return found

    def greedily(self, run: Path) -> dict[str, Any]:
        """`acceptance` in short."""
        return self.acceptance(load(run), (0.0,), prompts=4)

    def acceptance(
        self,
        model: ObjectiveModel,
        temperatures: Sequence[float] = (0.0, TEMPERATURE),
        prompts: int = 8,
    ) -> dict[str, Any]:
        """1 + s_1 + ... + s_k tokens a cycle, s_j = share of cycles that keep the j-th token."""
        found: dict[str, Any] = {}
        for kind in KINDS:
            for temperature in temperatures:
                options = sampling(temperature)
                total = GenerationStats()
                for n, prompt in enumerate(self.prompts(kind, prompts)):
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
    parser.add_argument("--lora-steps", type=int, default=200, help="of 4 rows; 0: without")
    parser.add_argument("--cached-rows", type=int, default=3000)
    parser.add_argument("--draft-vocabulary", type=int, default=8000)
    parser.add_argument("--measure", action="store_true", help="the newest checkpoint, and stop")
    parser.add_argument("--minutes", type=float, help="stop after so many, at a checkpoint")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        Bench(args).run()
    except (OutOfTime, Interrupted) as stopped:
        print(f"stopped ({stopped or 'out of time'}): the same command goes on from here.")


if __name__ == "__main__":
    main()
