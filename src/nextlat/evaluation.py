"""A finished run and its task become results.json: every metric with its error, and what decoding
gains.

Beside it, scores.npz keeps what each item (pair, walk, sequence) contributed, so that two models
can be compared item by item without running them again; reports read only these files.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextlat.decoding.speed import TRANSFORMERS, compare_decoding
from nextlat.errors import NextLatError
from nextlat.files import TEMPORARY, remove, write_errors, write_json
from nextlat.model import ObjectiveModel, load
from nextlat.model_card import write_card
from nextlat.results import (
    RESULTS,
    SCORES,
    Chart,
    DecodingFacts,
    Line,
    MeasuredMetric,
    Measurement,
    Metric,
    ObjectiveFacts,
    Result,
    Results,
    TaskFacts,
)
from nextlat.tasks import Task
from nextlat.tasks.task import NEXTLAT, OURS, held_out_cross_entropy, vocabulary_size
from nextlat.training.recipe import Recipe
from nextlat.training.run_directory import read_finished

DRAFT_LENGTH = 4  # small models gain little from drafts that are longer than what is accepted
DECODED_PROMPTS = 12

NEXT_TOKEN_LOSS = Metric(
    name="next_token_loss",
    title="Held-out cross-entropy",
    definition="Mean negative log-likelihood of the next token of held-out sequences, in nats per "
    "token.",
    source="the usual language-modelling loss",
    unit="nats",
    higher_is_better=False,
    items="held-out rows",
)
_against_plain = partial(Metric, reference=1.0, reference_name="plain KV-cached decoding")
MEAN_ACCEPTANCE_LENGTH = _against_plain(
    name="mean_acceptance_length",
    title="Mean acceptance length",
    definition="Tokens per forward pass of the transformer when what the objective added to it "
    "drafts (NextLat: the latent dynamics model), the transformer's own token included.",
    source="Leviathan et al., arXiv 2211.17192",
    unit="number",
)
ACCEPTED_TOKENS = Metric(
    name="accepted_tokens_per_cycle",
    title="Accepted tokens per cycle",
    noun="number of accepted tokens per cycle",
    definition="Drafted tokens accepted per forward pass, the transformer's own token not counted.",
    source=NEXTLAT,
    unit="number",
    headline=False,
    note="Accepted tokens per cycle are the NextLat paper's “accepted tokens”: the mean acceptance "
    "length minus the transformer's own token, which every cycle adds unless a drafted end closes "
    "it. Decoding is compared with plain KV-cached decoding of the same model.",
)
SPEEDUP = _against_plain(
    name="decoding_speedup",
    title="Decoding speed",
    definition="Tokens per second with drafts, divided by those of our plain KV-cached decoding of "
    "the same model, measured in turns in the same process. The output is the same.",
    source=OURS,
    unit="factor",
)
SPEEDUP_TRANSFORMERS = Metric(
    name="decoding_speedup_transformers",
    title="Decoding speed against transformers",
    noun="decoding speed",
    definition="The same, divided by the tokens per second of the generate method of transformers.",
    source=OURS,
    unit="factor",
    reference=1.0,
    reference_name="transformers' KV-cached generate",
    headline=False,
)
SPEEDS = (SPEEDUP, SPEEDUP_TRANSFORMERS)
# What every task has beside its own: the loss before them, decoding after them.
METRICS = (NEXT_TOKEN_LOSS, MEAN_ACCEPTANCE_LENGTH, ACCEPTED_TOKENS, *SPEEDS)

Progress = Callable[[str, int, int], None]  # what is measured now, how many are done, of how many


def open_run(
    directory: str | Path, *, code: str | None = None
) -> tuple[Recipe, Task, ObjectiveModel]:
    """Recipe, task and trained model of a run directory.

    Args:
        directory: of the run.
        code: see `TaskConfig.trusting`. What the run's record names is never executed.

    Raises:
        NextLatError: not a run, not finished, damaged, or its world is no longer the one it was
            trained in.
    """
    directory = Path(directory)
    train = f"train one with 'nextlat train RECIPE --out {directory}'"
    record = read_finished(directory, train, "and it goes on")
    recipe = Recipe.from_dict(record["recipe"], record.get("recipe_name", directory.name))
    task = recipe.task.trusting(code).build()
    if task.fingerprint() != record["task"]["fingerprint"]:
        raise NextLatError(
            f"the data of task {recipe.task_name} are not those that {directory} was trained on: "
            "restore them to evaluate it."
        )
    model = load(directory)
    table: Any = model.lm.get_input_embeddings()
    if model.objective.config != recipe.objective_config or (
        len(table.weight) < vocabulary_size(task.tokenizer)
    ):
        raise NextLatError(
            f"the model in {directory} is not the one that its run.json describes: put the files "
            "back together."
        )
    return recipe, task, model


def evaluate(
    directory: str | Path, *, code: str | None = None, progress: Progress | None = None
) -> Result:
    """Measure a finished run, and write results.json, scores.npz and the files of its pictures into
    it.

    Args:
        directory: of the run.
        code: see `open_run`.
        progress: called before every measurement.

    Returns:
        The entry of results.json.

    Raises:
        NextLatError: see `open_run`; or the results cannot be written.
    """
    directory = Path(directory)
    recipe, task, model = open_run(directory, code=code)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.run.threads or threads)
    try:
        found = _measure(task, model, progress)
    finally:
        torch.set_num_threads(threads)
    order = [metric.key for metric in (NEXT_TOKEN_LOSS, *task.metrics)]
    measurements = sorted(
        (x for x in found if isinstance(x, Measurement)),
        key=lambda x: order.index(x.metric.key) if x.metric.key in order else len(order),
    )
    files = [x for x in found if isinstance(x, tuple)]
    result = Result(
        task=TaskFacts.model_validate(task, from_attributes=True),
        objective=ObjectiveFacts.model_validate(model.objective, from_attributes=True),
        seed=recipe.seed,
        steps=recipe.steps,
        metrics=[
            *(measurement.record() for measurement in measurements),
            *(x for x in found if isinstance(x, MeasuredMetric)),
        ],
        charts=[x for x in found if isinstance(x, Chart)],
        pictures=[picture for picture, _ in files],
        decoding=next((x for x in found if isinstance(x, DecodingFacts)), None),
    )
    with write_errors(directory):
        temporary = directory / f"{TEMPORARY}{SCORES}"
        remove(temporary)
        with temporary.open("xb") as file:
            items: dict[str, Any] = {m.metric.key: m.score.per_item for m in measurements}
            np.savez(file, **items)
        temporary.replace(directory / SCORES)
        # Of a version before format 2. vLLM takes every *.safetensors here for weights.
        (directory / "scores.safetensors").unlink(missing_ok=True)
        for picture, content in files:
            write_json(directory / picture.file, content)
        write_json(directory / RESULTS, Results(runs=[result]).model_dump(mode="json"))
        write_card(directory)
    return result


def _measure(task: Task, model: ObjectiveModel, progress: Progress | None) -> list[Any]:
    """What all stages find: measurements, charts, `measure_decoding`, `Task.artifacts`."""

    def loss(model: ObjectiveModel) -> list[Measurement]:
        return [Measurement(NEXT_TOKEN_LOSS, held_out_cross_entropy(model, task.eval_dataset()))]

    stages: dict[str, Callable[[ObjectiveModel], Iterable[Any]]] = {
        "next-token loss": loss,
        **task.measures(),
    }
    if task.prompts(1) and model.objective.max_draft_length != 0:
        stages["decoding"] = partial(measure_decoding, task=task)
    stages["pictures"] = task.artifacts
    found: list[Any] = []
    for done, (name, measure) in enumerate(stages.items()):
        if progress:
            progress(name, done, len(stages))
        found += measure(model)
    return found


def measure_decoding(
    model: ObjectiveModel, task: Task
) -> list[MeasuredMetric | Chart | DecodingFacts]:
    """Greedy self-speculation on held-out prompts, interleaved with plain decoding by us and by
    transformers. Where drafts changed the output, nothing is claimed about the speed."""
    prompts = task.prompts(DECODED_PROMPTS)
    limit = model.objective.max_draft_length
    length = DRAFT_LENGTH if limit is None else min(DRAFT_LENGTH, limit)
    timings = compare_decoding(
        model,
        prompts,
        draft_lengths=[0, length],
        max_new_tokens=task.max_length - max(map(len, prompts)),
    )
    drafted, plain, theirs = timings[length], timings[0], timings[TRANSFORMERS]
    # transformers decodes the LM alone, which with some objectives is not the model.
    identical = drafted.outputs == plain.outputs and (
        model.objective.needed_at_inference or plain.outputs == theirs.outputs
    )
    total = drafted.total
    values = [
        (MEAN_ACCEPTANCE_LENGTH, total.mean_acceptance_length),
        (ACCEPTED_TOKENS, total.accepted_per_cycle),
        (SPEEDUP, drafted.tokens_per_second / plain.tokens_per_second),
        (SPEEDUP_TRANSFORMERS, drafted.tokens_per_second / theirs.tokens_per_second),
    ]
    found: list[MeasuredMetric | Chart | DecodingFacts] = []
    for metric, value in values:
        void = {"higher_is_better": None} if metric in SPEEDS and not identical else {}
        found.append(MeasuredMetric(**metric.model_dump() | void, value=value))
    accepted = Chart(
        name="acceptance",
        title="Drafted tokens accepted, by position in the draft",
        x="position in the draft",
        lines=[Line(values=total.acceptance_by_position, dots=True)],
        alt="Share of drafted tokens accepted by position in the draft, {models}.",
    )
    facts = DecodingFacts(
        draft_length=length,
        prompts=len(prompts),
        identical=identical,
        acceptance_by_position=total.acceptance_by_position,
        tokens_per_second={str(way): timing.tokens_per_second for way, timing in timings.items()},
    )
    return [*found, accepted, facts]
