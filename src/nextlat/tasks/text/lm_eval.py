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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from nextlat.errors import NextLatError, first_line
from nextlat.hub import hub_or_cache
from nextlat.model import ObjectiveModel
from nextlat.results import Measurement, Metric
from nextlat.scores import Score, exp_score, mean_score, ratio_score
from nextlat.tasks.task import find_data

logger = logging.getLogger(__name__)

METRICS = {  # of the harness -> in words; all others it may have are left out
    "acc": "accuracy",
    "acc_norm": "accuracy, normalised by length",
    "perplexity": "perplexity",
    "word_perplexity": "word perplexity",
    "byte_perplexity": "byte perplexity",
    "bits_per_byte": "bits per byte",
}
ROWS = 16  # in a batch


def benchmark_metric(benchmark: str, name: str) -> Metric:
    """One of `METRICS` on one benchmark."""
    words, is_accuracy = METRICS[name], name.startswith("acc")
    what, comma, how = words.partition(",")
    return Metric(
        name=f"lm_eval_{name}",
        title=f"{benchmark}, {words}",
        noun=f"{what} on {benchmark}{comma}{how}",
        definition=f"{words[0].upper()}{words[1:]} on {benchmark}, as the harness defines it.",
        source="LM Evaluation Harness, Gao et al., EleutherAI",
        unit="share" if is_accuracy else "number",
        higher_is_better=is_accuracy,
        items="documents",
        parameters={"benchmark": benchmark},
        published=f"{name} on {benchmark}",
    )


def check_benchmarks(names: Sequence[str], files: str | None) -> None:
    """Whether the harness is there and knows all names, before anything is trained.

    Raises:
        NextLatError: it is not, or does not.
    """
    manager = _manager(files)
    for name in names:
        if name not in manager.all_tasks:
            raise NextLatError(
                f"the LM Evaluation Harness knows no benchmark '{name}' (task.lm_eval): 'lm_eval "
                "ls tasks' lists the known ones, task.lm_eval_files names a directory with more."
            )


def language_benchmark(
    model: ObjectiveModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    files: str | None = None,
    limit: int | None = None,
) -> list[Measurement]:
    """One benchmark, or a group of several, as it is defined there (zero-shot, for those of arXiv
    2511.05963); the items are the documents.

    Args:
        tokenizer: of the model.
        name: of the harness ("piqa").
        files: directory of further definitions, in its own YAML; relative to the working directory
            or to $NEXTLAT_DATA.
        limit: documents of each, None = all.

    Raises:
        NextLatError: the harness is missing, does not know the name, or cannot get the data.
    """
    manager = _manager(files)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    causal_lm: Any = _WithLogits(model) if model.objective.needed_at_inference else model.lm
    try:
        with hub_or_cache(name):
            # It warns that the model is not one that it has loaded itself.
            with _quiet("lm_eval.models.huggingface"):
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
    except (ConnectionError, FileNotFoundError) as error:
        raise NextLatError(
            f"the data of the benchmark {name} cannot be had ({first_line(error)}): connect, once, "
            "for it to be kept in the cache; or define it over local files in a directory "
            "task.lm_eval_files; or leave it out of task.lm_eval."
        ) from error
    assert found is not None  # only processes other than the first get nothing
    return [
        Measurement(
            benchmark_metric(benchmark, metric),
            score(metric, [document[metric] for document in documents]),
        )
        for benchmark, documents in found["samples"].items()
        for metric in METRICS
        if documents and all(metric in document for document in documents)
    ]


def score(metric: str, items: Sequence[Any]) -> Score:
    """The harness's aggregation of what it keeps of every document, with our error.

    Args:
        metric: one of `METRICS`.
        items: of acc and acc_norm 0 or 1; of perplexity the log-likelihood of the answer; of the
            others (log-likelihood, words or bytes).
    """
    if metric == "perplexity":
        return exp_score(mean_score([-item for item in items]))
    if metric.startswith("acc"):
        return mean_score(items)
    log_likelihoods, units = np.array(items, dtype=np.float64).T
    in_bits = metric == "bits_per_byte"
    rate = ratio_score(-log_likelihoods, (math.log(2) if in_bits else 1.0) * units)
    return rate if in_bits else exp_score(rate)


class _WithLogits(nn.Module):
    """A model that needs its objective to predict, as the harness expects a causal LM to be."""

    def __init__(self, model: ObjectiveModel) -> None:
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
            "benchmarks that generate text take only models whose objective is not needed at "
            "inference: leave them out."
        )


@cache
def _manager(files: str | None) -> Any:
    """The harness's index of benchmarks; making it takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise NextLatError(
            "task.lm_eval needs the LM Evaluation Harness, which is not installed: pip install "
            "'nextlat[lm-eval]', or set task.lm_eval= for none."
        ) from error
    if files is None:
        return TaskManager()
    if (directory := find_data(files)) is None:
        raise NextLatError(
            f"there is no directory {files} (nor in $NEXTLAT_DATA): correct task.lm_eval_files."
        )
    logger.warning("the benchmarks in %s can run Python code of theirs.", directory)
    return TaskManager(include_path=str(directory))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
