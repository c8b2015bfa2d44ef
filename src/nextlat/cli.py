"""The command line: train | evaluate | generate | serve | compare | report | demo.

It alone prints, but for the text that is decoded (`show_drafts.Stream`) and the bars of jobs
(`jobs.watch`).

Heavy imports stay inside the commands, so that `--help` answers at once. What the user can mend
ends as one sentence and exit code 2.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from nextlat.errors import NextLatError, first_line

if TYPE_CHECKING:
    from nextlat.training.jobs import Job
    from nextlat.training.recipe import Recipe


class _Commands(typer.core.TyperGroup):
    """What the user can mend is one sentence and exit code 2; an interrupt is 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NextLatError as error:
            _say(f"error: {str(error).rstrip('.')}.")
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            _say(str(error) or "stopped.")
            raise typer.Exit(130) from None
        except Exception as error:
            say = getattr(
                error, "format_message", None
            )  # of click's errors of usage, whose classes typer has moved
            if say is None:
                raise
            path = getattr(getattr(error, "ctx", None), "command_path", ctx.command_path)
            _say(f"error: {say().rstrip('.')} (see '{path} --help').")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    help="Next-latent prediction for any Hugging Face causal LM: train it, measure it, see it, decode with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A built-in recipe (city-small, manhattan, ...) or a .toml file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the recipe to change."),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="next-token or nextlat; default: the recipe's.")
    ] = None,
    horizon: Annotated[int | None, typer.Option(help="d, steps of the rollout.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial weights and data.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory; default: runs/<recipe>-<objective>-d<horizon>-s<seed>."),
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Measure the model when it is trained.")] = True,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, and do not train.")
    ] = False,
) -> None:
    """Train a recipe; stop it anywhere, and the same command goes on where it was."""
    from nextlat.training.recipe import load_recipe
    from nextlat.training.run_directory import is_finished
    from nextlat.training.train import train as run_training

    loaded = load_recipe(recipe, overrides or [], objective=objective, horizon=horizon, seed=seed)
    if dry_run:
        _print_cost(loaded)
        return
    directory = out or Path("runs") / loaded.run_name
    was_finished = is_finished(directory)
    run_training(loaded, directory, progress=progress)
    if was_finished:
        _say(f"{directory} is finished: it is not trained any further.")
    if evaluate and not (directory / "results.json").exists():
        _evaluate(directory, progress)
    _say(f"The model is in {directory}.")


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Finished run directories.")],
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Measure finished runs: results.json in each of them, and a table here."""
    for directory in runs:
        _evaluate(directory, progress)
    _report(runs, None)


@app.command()
def generate(
    run: Annotated[
        str, typer.Argument(help="Run directory or hub id of a model with an objective.")
    ],
    prompt: Annotated[
        str,
        typer.Argument(help="Text to continue; for a city: source and destination, as in '12 57'."),
    ],
    draft_length: Annotated[
        str,
        typer.Option(
            help="Tokens drafted per cycle; 0 = plain decoding; auto = as many as are worth their time."
        ),
    ] = "auto",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Default: 256, or as many as the model has positions for.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 = greedy, the default; or 1, if one of the next three is given."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample among the k most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the most likely tokens of this total probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Sample among tokens with at least this share of the greatest probability."
        ),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that have occurred become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="STRING", help="End behind this text; can be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    compile: Annotated[
        bool, typer.Option(help="One graph for a whole cycle; takes a while at first.")
    ] = False,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Show what became of every drafted token.")
    ] = False,
) -> None:
    """Continue a prompt as it is decoded, and say what the drafts were worth."""
    import torch
    from transformers import AutoTokenizer

    from nextlat.decoding.stream import Stream
    from nextlat.hub import hub_or_cache
    from nextlat.model import load

    length = _draft_length(draft_length)
    sampling = _sampling(temperature, top_k, top_p, min_p)
    if "" in (stop or ()):
        raise NextLatError("--stop needs some text to stop at, got none.")
    _no_library_bars()
    model = load(run)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with hub_or_cache(run):
            tokenizer = AutoTokenizer.from_pretrained(run)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise NextLatError(
            f"{run} has no tokenizer that can be loaded ({first_line(error)}): save one there with tokenizer.save_pretrained."
        ) from error
    ids = _prompt(run, tokenizer, prompt)
    if max_new_tokens is None:
        positions = (
            getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            or 10**6
        )
        max_new_tokens = max(1, min(256, positions - len(ids)))
    try:
        generator = torch.Generator(model.device).manual_seed(seed)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise NextLatError(f"--seed {seed} does not fit into 64 bits: give another one.") from error
    stream = Stream(tokenizer, ids, show_drafts)
    input_ids = torch.tensor([ids], dtype=torch.long)
    with stream:
        _, stats = model.generate(
            input_ids,
            torch.ones_like(input_ids),
            draft_length=length,
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
    _say(
        f"{_count(stats.tokens, 'token')} in {_count(stats.cycles, 'cycle')}: {stats.mean_acceptance_length:.2f} tokens a cycle, "
        f"{stats.acceptance_rate:.0%} of the drafted tokens accepted, {stats.tokens_per_second:.0f} tokens a second."
    )
    measuring = (
        f"{stats.measure_seconds:.2f} timing the machine for auto, "
        if stats.measure_seconds >= 0.005
        else ""
    )
    _say(
        f"{stats.seconds:.2f} s: {measuring}{stats.prefill_seconds:.2f} reading the prompt, {stats.draft_seconds:.2f} drafting, "
        f"{stats.verify_seconds:.2f} verifying, {stats.overhead_seconds:.2f} overhead."
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _draft_length(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise NextLatError(
            f"--draft-length must be a whole number or auto, got '{text}'."
        ) from None


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None
) -> dict[str, Any]:
    """In the words of `generate`. What is not given is off, whatever a model or transformers has as
    a default."""
    truncation = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = [
        f"--{name.replace('_', '-')}" for name, value in truncation.items() if value is not None
    ]
    if top_p is not None and not 0 <= top_p <= 1:
        raise NextLatError(f"--top-p must be between 0 and 1, got {top_p}.")
    if temperature is None:
        temperature = 1.0 if given else 0.0
    if temperature == 0:
        if given:
            raise NextLatError(
                f"{' and '.join(given)} cannot be used at temperature 0, which always takes the likeliest token."
            )
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": top_k or 0,
        "top_p": 1.0 if top_p is None else top_p,
        "min_p": min_p,
    }


def _prompt(run: str, tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt as the model saw texts in training.

    In our own runs every sequence begins with the beginning-of-sequence token, where there is one,
    whether or not the tokenizer puts it there (GPT-2's does not); other models get what their
    tokenizer makes of it.
    """
    ids: list[int] = tokenizer(prompt).input_ids
    ours = any((directory / "run.json").is_file() for directory in (Path(run), Path(run).parent))
    if ours and tokenizer.bos_token_id is not None:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        if ids[:1] != [tokenizer.bos_token_id]:
            ids = [tokenizer.bos_token_id, *ids]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        unknown = [
            word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word).input_ids
        ]
        raise NextLatError(
            f"the prompt contains {', '.join(map(repr, unknown))}, which the model's vocabulary does not know: use words that it does."
        )
    return ids


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Run directory or hub id of a saved model.")],
    draft_length: Annotated[
        int | None,
        typer.Option(help="Tokens drafted per cycle; default: 4, or 0 where the model cannot."),
    ] = None,
) -> None:
    """Serve a run with vLLM, its latent dynamics model drafting; takes vLLM's options, too."""
    import signal

    from nextlat.serving.serve import serve as run_server

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    raise typer.Exit(run_server(run, draft_length, context.args, _say))


@app.command()
def compare(
    recipe: Annotated[
        str, typer.Argument(help="A built-in recipe (path-star-small, ...) or a .toml file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of the recipe to change; objectives.NAME... of that objective alone.",
        ),
    ] = None,
    objectives: Annotated[
        str, typer.Option(help="all, or some of next-token,nextlat,mtp,jtp,bst.")
    ] = "all",
    seeds: Annotated[
        int | None, typer.Option(help="One or several, as in --seeds 0 1 2; default: 0.")
    ] = None,
    horizon: Annotated[
        int | None, typer.Option(help="d, of every objective that has one; default: the recipe's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where everything goes; default: compare/<recipe>.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Models trained at a time; default: as many as the cores can take."
        ),
    ] = None,
) -> None:
    """Train a recipe by several objectives and seeds, side by side, and compare what they know."""
    from nextlat.training.jobs import collect, watch
    from nextlat.training.sweep import plan

    given = overrides or []
    more = [
        item for item in given if seeds is not None and item.isdecimal()
    ]  # --seeds 0 1 2: all but the first end up here
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
        _say(sentence)
    todo = [job for job in planned.jobs if not job.done]
    if len(todo) < len(planned.jobs):
        _say(
            f"{len(planned.jobs) - len(todo)} of {len(planned.jobs)} models are trained and measured already."
        )
    failures: dict[Job, str] = {}
    watch(todo, jobs or planned.processes, failures)
    done = [job for job in planned.jobs if job not in failures]
    if done:
        collect(done, out)
        _report([job.directory for job in done], out)
    if failures:
        raise NextLatError(" ".join(f"{reason}." for reason in failures.values()))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Evaluated run directories.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report goes.")] = Path(
        "report"
    ),
    markdown: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The report as Markdown too, with the pictures in --out by relative links.",
        ),
    ] = None,
) -> None:
    """Tables, curves and maps of runs, as PNG and in one self-contained HTML page."""
    _report(runs, out, markdown)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    seeds: Annotated[int, typer.Option(help="One or several, as in --seeds 0 1 2.")] = 0,
    more_seeds: Annotated[list[int] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Train the same transformer twice, by next-token and by next-latent prediction, and compare
    what they know."""
    from nextlat.training import demo as show
    from nextlat.training.jobs import collect, watch

    jobs = show.jobs(out, [seeds, *(more_seeds or [])])
    watch(jobs)
    collect(jobs, out)
    _report([job.directory for job in jobs], out)


def _print_cost(recipe: "Recipe") -> None:
    from nextlat.training.cost import dry_run

    cost = dry_run(recipe)
    place = cost.device + (
        f" with {cost.threads} thread{'s' if cost.threads > 1 else ''}"
        if cost.device == "CPU"
        else ""
    )
    print(f"{recipe.run_name} on this {place} in {recipe.run.precision}; nothing is trained now.")
    print(
        f"parameters  {cost.lm_parameters:,} of the transformer, {cost.objective_parameters:,} of the objective"
    )
    print(f"tokens      {cost.tokens:,} (about) in {cost.steps:,} steps of {cost.rows} rows")
    if cost.flops is None:
        print(f"FLOPs       no formula for the objective {recipe.objective}")
    else:
        total = sum(cost.flops.values())
        shares = ", ".join(f"{name} {value / total:.0%}" for name, value in cost.flops.items())
        print(f"FLOPs       {total:.2g} ({shares})")
    speed = f"{cost.flops_per_second / 1e9:,.0f} GFLOP/s"
    if cost.timed:
        how = f"from a few real steps of {_duration(cost.step_seconds)}"
    elif cost.flops is not None:
        how = f"{_duration(cost.step_seconds)} a step if all of it ran as fast as its matrix products, {speed}"
    else:
        how = f"{_duration(cost.step_seconds)} a step, from single rows"
    bound = "at least" if not cost.timed and cost.flops is not None else "about"
    print(
        f"time        {bound} {_duration(cost.seconds)} ({how}); saving and measuring come on top"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3g} s"


def _evaluate(directory: Path, progress: bool) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from nextlat.evaluation import evaluate

    _no_library_bars()
    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not (progress and console.is_terminal)
    ) as bar:
        task = bar.add_task(f"evaluating {directory}")
        evaluate(
            directory,
            progress=lambda name, done, total: bar.update(
                task, description=name, completed=done, total=total
            ),
        )


def _report(directories: list[Path], out: Path | None, markdown: Path | None = None) -> None:
    """The comparison of runs in the terminal, as a page in `out`, and as Markdown."""
    from rich.console import Console

    from nextlat.report import compare, read_runs, terminal_table, write_report

    runs = read_runs(directories)
    Console().print(terminal_table(compare(runs)))
    if out is not None:
        page = write_report(runs, out, markdown)
        _say(f"Look at {page}{f' and {markdown}' if markdown is not None else ''}.")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _no_library_bars() -> None:
    """transformers draws a bar whenever it loads weights, across ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def main() -> None:
    """Entry point of the command `nextlat`."""
    app()
