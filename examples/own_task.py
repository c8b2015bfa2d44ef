"""A task of one's own, with the whole command line: reverse a number of three digits.

python examples/own_task.py train examples/reverse.toml --out runs/reverse
"""

import numpy as np
import torch

from nextlat.cli import main
from nextlat.results import Measurement, Metric
from nextlat.scores import mean_score
from nextlat.tasks import TASKS
from nextlat.tasks.answers import generate_answers
from nextlat.tasks.rows import Rows
from nextlat.tasks.task import FIRST_WORD, Task, TaskConfig, word_tokenizer

EXACT = Metric(name="exact", title="Exact", definition="Share of unseen numbers reversed exactly.")
DIGITS = np.random.default_rng(0).permutation(1000)[:, None] // [100, 10, 1] % 10
ROWS = FIRST_WORD + np.hstack([DIGITS, np.full((1000, 1), 10), DIGITS[:, ::-1]])  # 1 2 3 = 3 2 1
TEST, TRAIN = ROWS[:100], ROWS[100:]


class ReverseConfig(TaskConfig):
    def build(self) -> "Reverse":
        return Reverse()


class Reverse(Task):
    name, title, metrics = "reverse", "Reversed numbers", (EXACT,)
    tokenizer, max_length = word_tokenizer([*"0123456789", "="]), 7

    def train_dataset(self, seed):
        return Rows({"input_ids": TRAIN}, seed=seed, prompt_length=4)

    def eval_dataset(self):
        return Rows({"input_ids": TEST}, prompt_length=4)

    def prompts(self, count):
        return list(torch.from_numpy(TEST[:count, :4]))

    def fingerprint(self):
        return "reversed numbers of three digits"

    def measures(self):
        return {"exact": self.exact}

    def exact(self, model):
        correct = generate_answers(model, TEST[:, :4], 3) == TEST[:, 4:]
        yield Measurement(EXACT, mean_score(correct.all(axis=1)))


TASKS["reverse"] = ReverseConfig
main()
