"""The command line: train | evaluate | generate | serve | compare | report | demo.

Nothing else prints (by `terminal`). Heavy imports stay inside the commands, so that `--help`
answers at once.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from nextlat import terminal
from nextlat.errors import NextLatError, first_line
from nextlat.files import named_directory
from nextlat.training import ranks

if TYPE_CHECKING:
    from nextlat.training.sweep import Job

PLUGINS = "NEXTLAT_PLUGINS"


app = typer.Typer(
    cls=terminal.Commands,
    help="Next-latent prediction for any Hugging Face causal LM: train it, measure it, see it, "
    "decode with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


RecipeName = Annotated[
    str, Argument(help="A built-in recipe (city-small, manhattan, ...) or a .toml file.")
]
Overrides = Annotated[
    list[str] | None,
    Argument(
        metavar="[KEY=VALUE]...",
        help="Settings of the recipe to change, e.g. optimizer.learning_rate=1e-3.",
    ),
]
Runs = Annotated[list[Path], Argument(parser=named_directory, help="Finished run directories.")]
Shown = Annotated[bool, Option(help="Show a progress bar.")]


@app.callback()
def _plugins(
    context: typer.Context,
    plugin: Annotated[
        list[str] | None,
        Option(
            metavar="MODULE",
            envvar=PLUGINS,
            help="Python module to import first, which registers a task or an objective.",
        ),
    ] = None,
) -> None:
    if context.invoked_subcommand != "train":
        ranks.refuse_several(f"nextlat {context.invoked_subcommand}")
    if not plugin:
        return
    sys.path.insert(0, str(Path.cwd()))
    for name in plugin:
        try:
            import_module(name)
        except ImportError as error:
            raise NextLatError(f"--plugin {name}: {first_line(error)}.") from error
    os.environ[PLUGINS] = " ".join(plugin)  # for the processes that `compare` starts


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    objective: Annotated[
        str | None, Option(help="next-token, nextlat, mtp, jtp or bst; default: the recipe's.")
    ] = None,
    horizon: Annotated[int | None, Option(help="d, steps of the rollout.")] = None,
    seed: Annotated[int | None, Option(help="Of initial weights and data.")] = None,
    out: Annotated[
        Path | None,
        Option(
            parser=named_directory,
            help="Run directory; default: runs/<recipe>-<objective>-d<horizon>-s<seed>.",
        ),
    ] = None,
    evaluate: Annotated[bool, Option(help="Measure the model when it is trained.")] = True,
    progress: Shown = True,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Say what it would cost, and do not train.")
    ] = False,
) -> None:
    """Train a recipe; stop it anywhere, and the same command goes on where it was."""
    from nextlat.training.recipe import load_recipe
    from nextlat.training.run_directory import is_finished
    from nextlat.training.train import train as run_training

    loaded = load_recipe(recipe, overrides or [], objective=objective, horizon=horizon, seed=seed)
    if dry_run:
        ranks.refuse_several("--dry-run")
        return terminal.print_cost(loaded)
    directory = out or named_directory(f"runs/{loaded.run_name}")
    was_finished = is_finished(directory)
    with terminal.bars(progress) as update, ranks.survivors():
        run_training(loaded, directory, progress=lambda *state: update("training", *state))
    ranks.leave()
    if not ranks.is_first():
        return
    if was_finished:
        terminal.say(f"{directory} is finished: it is not trained any further.")
    if evaluate and not (directory / "results.json").exists():
        terminal.evaluate(directory, progress, loaded.task.code)
    terminal.say(f"The model is in {directory}.")


@app.command()
def evaluate(
    runs: Runs,
    progress: Shown = True,
    code: Annotated[
        str | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Definitions of benchmarks, which may run Python code (task.lm_eval_files); those "
            "that a run names itself are never used.",
        ),
    ] = None,
) -> None:
    """Measure finished runs: results.json in each of them, and a table here."""
    for directory in runs:
        terminal.evaluate(directory, progress, code)
    terminal.report(runs, None)


@app.command()
def generate(
    run: Annotated[str, Argument(help="Run directory or hub id of a model with an objective.")],
    prompt: Annotated[
        str, Argument(help="Text to continue; in a city source and destination, as in '12 57'.")
    ],
    chat: Annotated[
        bool, Option("--chat", help="The prompt is what a user says, for the assistant to answer.")
    ] = False,
    draft_length: Annotated[
        str, Option(help="Tokens drafted per cycle; 0 = plain decoding; auto = as many as pay off.")
    ] = "auto",
    max_new_tokens: Annotated[
        int | None, Option(help="Default: 256, or as many as the model has positions for.")
    ] = None,
    temperature: Annotated[
        float | None,
        Option(help="0 = greedy, the default; or 1, if one of the next three is given."),
    ] = None,
    top_k: Annotated[int | None, Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, Option(help="Sample among the likeliest tokens of this total probability.")
    ] = None,
    min_p: Annotated[
        float | None,
        Option(help="Sample among tokens of at least this share of the highest probability."),
    ] = None,
    repetition_penalty: Annotated[
        float, Option(help="Above 1: tokens that have occurred become less likely.")
    ] = 1.0,
    stop: Annotated[list[str] | None, Option(help="End after this text; can be repeated.")] = None,
    seed: Annotated[int, Option(help="Of the sampling.")] = 0,
    compile: Annotated[
        bool, Option(help="One graph for a whole cycle; takes a while at first.")
    ] = False,
    show_drafts: Annotated[
        bool, Option("--show-drafts", help="Show what became of every drafted token.")
    ] = False,
) -> None:
    """Continue a prompt as it is decoded, and say what the drafts were worth."""
    import torch

    from nextlat.hub import load_tokenizer
    from nextlat.model import load

    if draft_length != "auto" and not draft_length.removeprefix("-").isdecimal():
        raise NextLatError(f"--draft-length must be a whole number or auto, got '{draft_length}'.")
    sampling = _sampling(temperature, top_k, top_p, min_p)
    if "" in (stop or ()):
        raise NextLatError("--stop needs some text to stop at, got none.")
    terminal.no_library_bars()
    model = load(run)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = load_tokenizer(run)
    except NextLatError as error:
        raise NextLatError(
            f"the tokenizer of {run} {error}: save one there with tokenizer.save_pretrained."
        ) from error
    ids = _prompt(run, tokenizer, prompt, chat)
    if max(ids, default=0) >= (known := model.backbone.vocab_size):
        raise NextLatError(
            f"the tokenizer of {run} makes token {max(ids)} of the prompt, the model knows only "
            f"{known}: restore the tokenizer that it was trained with."
        )
    if max_new_tokens is None:
        config = model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None) or 10**6
        max_new_tokens = max(1, min(256, positions - len(ids)))
    try:
        generator = torch.Generator(model.device).manual_seed(seed)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise NextLatError(f"--seed {seed} does not fit into 64 bits: give another one.") from error
    stream = terminal.Stream(tokenizer, ids, show_drafts)
    input_ids = torch.tensor([ids], dtype=torch.long)
    with stream:
        _, stats = model.generate(
            input_ids,
            torch.ones_like(input_ids),
            draft_length=draft_length if draft_length == "auto" else int(draft_length),
            generator=generator,
            compile=compile,
            return_stats=True,
            on_pass=stream.show,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            repetition_penalty=repetition_penalty,
            stop_strings=stop or None,
            **sampling,
        )
    terminal.say_stats(stats)


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None
) -> dict[str, Any]:
    """Options of `generate`. What is not given is off, whatever a model or transformers has as a
    default."""
    truncation = {"--top-k": top_k, "--top-p": top_p, "--min-p": min_p}
    given = " and ".join(name for name, value in truncation.items() if value is not None)
    if top_p is not None and not 0 <= top_p <= 1:
        raise NextLatError(f"--top-p must be between 0 and 1, got {top_p}.")
    if temperature is None:
        temperature = 1.0 if given else 0.0
    if temperature == 0:
        if given:
            raise NextLatError(
                f"{given} cannot be used at temperature 0, which always takes the likeliest token."
            )
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k or 0,
        "top_p": 1.0 if top_p is None else top_p,
        "min_p": min_p,
    }


def _prompt(run: str, tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """The tokens of a prompt as the model saw texts in training.

    In our own runs a text begins with `document_start`, whether or not the tokenizer puts it there
    (GPT-2's does not), and special tokens in it are text; other models get what their tokenizer
    makes of it. A chat is what the template makes of it everywhere.
    """
    from nextlat.hub import document_ids

    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise NextLatError("the prompt is not valid UTF-8: write it in that.") from error
    if chat:
        from nextlat.tasks.text.chat import chat_prompt

        return chat_prompt(tokenizer, prompt)
    ours = any((directory / "run.json").is_file() for directory in (Path(run), Path(run).parent))
    ids: list[int] = document_ids(tokenizer, prompt) if ours else tokenizer(prompt).input_ids
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        words = [repr(word) for word in prompt.split() if unknown in tokenizer(word).input_ids]
        raise NextLatError(
            f"the prompt contains {', '.join(words)}, which the model's vocabulary does not know: "
            "use words that it does."
        )
    return ids


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    run: Annotated[str, Argument(help="Run directory or hub id of a saved model.")],
    draft_length: Annotated[
        int | None,
        Option(help="Tokens drafted per cycle; default: 4, or 0 where the model cannot."),
    ] = None,
) -> None:
    """Serve a run with vLLM, its latent dynamics model drafting; takes vLLM's options, too."""
    from nextlat.serving import serve

    raise typer.Exit(serve.serve(run, draft_length, context.args, terminal.say))


@app.command()
def compare(
    recipe: RecipeName,
    overrides: Overrides = None,
    objectives: Annotated[
        str, Option(help="all, or some of next-token,nextlat,mtp,jtp,bst.")
    ] = "all",
    seeds: Annotated[
        int | None, Option(help="One or several, as in --seeds 0 1 2; default: 0.")
    ] = None,
    horizon: Annotated[
        int | None, Option(help="d, of every objective that has one; default: the recipe's.")
    ] = None,
    out: Annotated[
        Path | None,
        Option(parser=named_directory, help="Where everything goes; default: compare/<recipe>."),
    ] = None,
    jobs: Annotated[
        int | None,
        Option(min=1, help="Models trained at a time; default: as many as fit the cores."),
    ] = None,
) -> None:
    """Train a recipe by several objectives and seeds, side by side, and compare what they know."""
    from nextlat.training.sweep import plan

    given = overrides or []
    # --seeds 0 1 2: all but the first end up here.
    more = [item for item in given if seeds is not None and item.isdecimal()]
    out = out or Path("compare") / Path(recipe).stem
    planned = plan(
        recipe,
        [item for item in given if item not in more],
        objectives=objectives,
        seeds=[seeds or 0, *map(int, more)],
        horizon=horizon,
        out=out,
    )
    for sentence in planned.skipped.values():
        terminal.say(sentence)
    todo = [job for job in planned.jobs if not job.done]
    total = len(planned.jobs)
    if len(todo) < total:
        terminal.say(f"{total - len(todo)} of {total} models are trained and measured already.")
    failures: dict[Job, str] = {}
    terminal.watch(todo, jobs or planned.processes, failures)
    terminal.collect([job for job in planned.jobs if job not in failures], out)
    if failures:
        raise NextLatError(" ".join(f"{reason}." for reason in failures.values()))


@app.command()
def report(
    runs: Runs,
    out: Annotated[
        Path, Option("--out", "-o", parser=named_directory, help="Where the report goes.")
    ] = Path("report"),
    markdown: Annotated[
        Path | None,
        Option(metavar="FILE", help="The report as Markdown too, with its pictures in --out."),
    ] = None,
) -> None:
    """Tables, curves and maps of runs, as PNG and in one self-contained HTML page."""
    terminal.report(runs, out, markdown)


@app.command()
def demo(
    out: Annotated[Path, Option(parser=named_directory, help="Where everything goes.")] = Path(
        "demo"
    ),
    seeds: Annotated[int, Option(help="One or several, as in --seeds 0 1 2.")] = 0,
    more_seeds: Annotated[list[int] | None, Argument(hidden=True)] = None,
    full: Annotated[
        bool, Option("--full", help="Also real streets, text, and the worlds of the first demo.")
    ] = False,
    jobs: Annotated[
        int | None, Option(min=1, help="Models trained at a time; default: one on each core.")
    ] = None,
) -> None:
    """Four claims in ten minutes: belief states, a map that goes on, planning, and speed."""
    from nextlat.training.sweep import DEMO
    from nextlat.training.sweep import demo as plan_demo

    planned, skipped = plan_demo(out, [seeds, *(more_seeds or [])], full=full)
    for sentence in skipped:
        terminal.say(sentence)
    terminal.watch([job for job in planned if not job.done], jobs)
    own = {name for name, *_ in DEMO}
    terminal.collect([job for job in planned if job.recipe in own], out)
    # Each in a report of its own, for two cities cannot be compared.
    for name in dict.fromkeys(job.recipe for job in planned if job.recipe not in own):
        terminal.collect([job for job in planned if job.recipe == name], out / name)


def main() -> None:
    """Entry point of the command `nextlat`."""
    app()
