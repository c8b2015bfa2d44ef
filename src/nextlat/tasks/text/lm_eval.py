"""Language benchmarks of the LM Evaluation Harness (Gao et al., EleutherAI), run on a model in
memory; their items become our scores.

What is measured is what `lm_eval --model hf --model_args pretrained=RUN` measures; models that need
their objective at inference (JTP, BST), which the harness cannot open, are measured too. Needs the
extra `nextlat[lm-eval]`.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nextlat.errors import NextLatError, first_line
from nextlat.hub import hub_or_cache
from nextlat.scores import Score, exp_score, mean_score, ratio_score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nextlat.model import ObjectiveModel

PREFIX = "lm_eval"  # metrics are called lm_eval_BENCHMARK_METRIC
METRICS = {  # of the harness -> whether higher is better; all others it may have are left out
    "acc": True,
    "acc_norm": True,
    "perplexity": False,
    "word_perplexity": False,
    "byte_perplexity": False,
    "bits_per_byte": False,
}
ROWS = 16  # in a batch


def check_benchmarks(names: Sequence[str], files: str | None) -> None:
    """Whether the harness is there and knows all names, before anything is trained.

    Raises:
        NextLatError: it is not, or does not.
    """
    manager = _manager(files)
    for name in names:
        if name not in manager.all_tasks:
            raise NextLatError(
                f"the LM Evaluation Harness knows no benchmark '{name}' (task.lm_eval): 'lm_eval ls tasks' lists those that it knows, "
                "task.lm_eval_files names a directory with more."
            )


def language_benchmark(
    model: "ObjectiveModel",
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    *,
    files: str | None = None,
    limit: int | None = None,
) -> dict[str, Score]:
    """One benchmark, or a group of several, as it is defined there (zero-shot, for those of arXiv
    2511.05963).

    Args:
        name: of the harness ("piqa"). files: directory of further definitions, in its own YAML.
            limit: documents of each, None = all.

    Returns:
        "lm_eval_piqa_acc" and so on -> score; the items are the documents.

    Raises:
        NextLatError: the harness is missing, does not know the name, or cannot get the data.
    """
    manager = _manager(files)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    causal_lm: Any = _WithLogits(model) if model.objective.needed_at_inference else model.lm
    with hub_or_cache(name), _failures(name):
        with _quiet(
            "lm_eval.models.huggingface"
        ):  # warns that the model is not one that it has loaded itself
            theirs = HFLM(pretrained=causal_lm, tokenizer=tokenizer, batch_size=ROWS)
        found = simple_evaluate(
            theirs,
            tasks=[name],
            limit=limit,
            bootstrap_iters=0,  # the errors are ours, from the documents
            task_manager=manager,
            # Seeds of Python, NumPy and torch are left alone; examples of few-shot prompts are
            # drawn from their own.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    assert found is not None  # only processes other than the first get nothing
    return {
        f"{PREFIX}_{benchmark}_{metric}": score(
            metric, [document[metric] for document in documents]
        )
        for benchmark, documents in found["samples"].items()
        for metric in METRICS
        if documents and all(metric in document for document in documents)
    }


def score(metric: str, items: Sequence[Any]) -> Score:
    """The harness's aggregation of what it keeps of every document, with our error.

    Args:
        items: of acc and acc_norm 0 or 1; of perplexity the log-likelihood of the answer; of the
            others (log-likelihood, words or bytes).
    """
    if metric == "perplexity":
        return exp_score(mean_score([-item for item in items]))
    if metric.startswith("acc"):
        return mean_score([float(item) for item in items])
    nats = math.log(2) if metric == "bits_per_byte" else 1.0
    rate = ratio_score(
        [-log_likelihood for log_likelihood, _ in items], [nats * units for _, units in items]
    )
    return rate if metric == "bits_per_byte" else exp_score(rate)


class _WithLogits(nn.Module):
    """A model that needs its objective to predict, as the harness expects a causal LM to be."""

    def __init__(self, model: "ObjectiveModel") -> None:
        super().__init__()
        self.model = model
        self.config, self.device, self.name_or_path = model.config, model.device, ""

    def tie_weights(self) -> None:
        """They are."""

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Any:
        return self.model(input_ids)

    def generate(self, *_: Any, **__: Any) -> Tensor:
        raise NextLatError(
            "benchmarks that generate text take only models whose objective is not needed at inference: leave them out."
        )


@cache
def _manager(files: str | None) -> Any:
    """The harness's index of benchmarks; making it takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise NextLatError(
            "task.lm_eval needs the LM Evaluation Harness, which is not installed: pip install 'nextlat[lm-eval]', or set "
            "task.lm_eval= for none."
        ) from error
    return TaskManager(include_path=files)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _failures(name: str) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:
        raise NextLatError(
            f"the data of the benchmark {name} cannot be had ({first_line(error)}): connect, once, for it to be kept in the cache; or "
            "define it over local files in a directory task.lm_eval_files; or leave it out of task.lm_eval."
        ) from error
