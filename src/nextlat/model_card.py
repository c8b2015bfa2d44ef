"""The model card: README.md of a saved model, as the Hugging Face hub shows it. It is made of what
lies in the directory, so that everything in it is what is there."""

import json
import re
from pathlib import Path
from typing import Any

from nextlat import adapters, sidecar
from nextlat.files import write_text
from nextlat.objectives import OBJECTIVES
from nextlat.results import RESULTS
from nextlat.weights import SIDECAR

CARD, RUN = "README.md", "run.json"
OURS = "<!-- Written anew by every save of nextlat; without this line it is yours, and kept. -->"
PAPER = "https://arxiv.org/abs/2511.05963"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(directory: Path) -> None:
    """Write the card of a saved model, unless somebody else has written one.

    Args:
        directory: of the model. The run that it belongs to is described where its record and
            results lie beside it, or beside the checkpoint that it is.
    """
    path = directory / CARD
    if not path.is_file() or OURS in path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, card(directory))


def card(directory: Path) -> str:
    """The text of the card of a saved model."""
    _, description = sidecar.read_description(directory)
    adapter = _json(directory / adapters.CONFIG)
    base = adapter.get("base_model_name_or_path") or ""
    objective = OBJECTIVES[description.objective][1]
    alone = not description.needed_at_inference
    architecture = description.backbone["model_type"]
    settings = ", ".join(f"{name} {value}" for name, value in description.config.items())
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base if HUB_ID.fullmatch(base) and not Path(base).exists() else None,
        "tags": ["nextlat", "next-latent-prediction", "speculative-decoding"],
    }
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in head.items() if value),
            "---",
            "",
            OURS,
            "",
            f"# {architecture} with {objective.title}",
            "",
            f"A causal language model ({architecture}) trained by {objective.title}"
            + (f", as an adapter of `{base}`." if adapter else "."),
            f"What the objective added lies in `{SIDECAR}/` "
            f"(settings: {settings or 'none'}); it comes from [{PAPER.rpartition('/')[2]}]({PAPER})"
            " and is read by the Python package `nextlat`.",
            "",
            "## Use",
            "",
            "```python",
            "import nextlat",
            "",
            'model = nextlat.load("ORG/NAME")  # or a directory',
            "ids = model.generate(input_ids, max_new_tokens=100)"
            + ("  # drafts its own tokens; the output stays the same" * _drafts(objective)),
            "```",
            "",
            *(_without(bool(adapter)) if alone else [f"Without `nextlat`: {sidecar.PART}"]),
            *_recipe(directory),
            *_figures(directory),
            "",
        ]
    )


def _drafts(objective: Any) -> bool:
    return objective.max_draft_length != 0


def _without(adapted: bool) -> list[str]:
    library, name = ("peft", "AutoPeft") if adapted else ("transformers", "Auto")
    return [
        "Without `nextlat` it is the same model, drafting aside:",
        "",
        "```python",
        f"from {library} import {name}ModelForCausalLM",
        "",
        f'model = {name}ModelForCausalLM.from_pretrained("ORG/NAME")',
        "```",
    ]


def _recipe(directory: Path) -> list[str]:
    """How it was trained, where a run says so."""
    record = _json(directory / RUN) or _json(directory.parent / RUN)
    recipe = record.get("recipe")
    if not isinstance(recipe, dict):
        return []
    task = recipe.get("task")
    facts = {
        "recipe": record.get("recipe_name"),
        "task": task.get("name") if isinstance(task, dict) else None,
        "optimiser steps": recipe.get("steps"),
        "rows in a batch": recipe.get("batch_size"),
        "seed": recipe.get("seed"),
    }
    known = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    return [
        *("", "## Training", "", f"With `nextlat train`: {known}. All settings:", ""),
        *("```json", json.dumps(recipe, indent=1), "```"),
    ]


def _figures(directory: Path) -> list[str]:
    """What was measured on it, where it was."""
    runs = _json(directory / RESULTS).get("runs")
    if not isinstance(runs, list) or not runs:
        return []
    rows = []
    for metric in runs[0].get("metrics", []):
        value, error = metric.get("value"), metric.get("stderr")
        if isinstance(value, int | float):
            inside = "".join(f", {k} {v}" for k, v in metric.get("parameters", {}).items())
            around = f" ± {error:.2g}" if error else ""
            rows.append(f"| {metric.get('title')}{inside} | {value:.4g}{around} |")
    return ["", "## Measured", "", "| | |", "|---|---|", *rows] if rows else []


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; nothing where there is none that can be read: a card does without."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
