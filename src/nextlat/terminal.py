"""What the command line shows: sentences and bars on standard error, what a run would cost."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

import typer
import typer.core

from nextlat.errors import NextLatError
from nextlat.signals import StopSignal
from nextlat.training import ranks

if TYPE_CHECKING:
    from nextlat.decoding.stats import GenerationStats, Pass
    from nextlat.training.recipe import Recipe
    from nextlat.training.sweep import Job

Update = Callable[[str, str, int, int], None]


def say(sentence: str) -> None:
    """On standard error, in one line whatever it quotes."""
    print(re.sub(r"[\x00-\x1f\x7f]", lambda c: repr(c[0])[1:-1], sentence), file=sys.stderr)


def no_library_bars() -> None:
    """transformers draws a bar whenever it loads weights, across ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


class Commands(typer.core.TyperGroup):
    """What the user can mend is one sentence and exit code 2; an interrupt is 130. Of several
    processes that train together, one says it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with StopSignal():
                return super().invoke(ctx)
        except NextLatError as error:
            return _end(f"error: {str(error).rstrip('.')}.", 2)
        except KeyboardInterrupt as error:
            return _end(str(error) or "stopped.", 130)
        except Exception as error:
            # Of click's errors of usage, whose classes typer has moved.
            tell = getattr(error, "format_message", None)
            if tell is None:
                raise
            path = getattr(getattr(error, "ctx", None), "command_path", ctx.command_path)
            return _end(f"error: {tell().rstrip('.')} (see '{path} --help').", 2)


def _end(sentence: str, code: int) -> None:
    with ranks.one_voice() as speaks:
        if speaks:
            say(sentence)
    raise typer.Exit(code) from None


@contextmanager
def bars(shown: bool = True) -> Iterator[Update]:
    """Bars on standard error, each made by its first `update(name, state, done, total)`.

    Where that is no terminal, only how they end is written.
    """
    from rich import progress as rich
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column

    def text(field: str, **options: Any) -> rich.TextColumn:
        column = Column(no_wrap=True, overflow="ellipsis", **options)
        return rich.TextColumn(f"{{task.{field}}}", table_column=column)

    progress = rich.Progress(
        text("description", max_width=32),
        rich.BarColumn(bar_width=16),
        rich.MofNCompleteColumn(table_column=Column(no_wrap=True, justify="right")),
        text("fields[rate]", justify="right"),
        rich.TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        text("fields[state]", ratio=1),
        console=Console(stderr=True),
        expand=True,
        disable=not shown,
    )
    rows: dict[str, rich.TaskID] = {}

    def update(name: str, state: str, done: int, total: int) -> None:
        if name not in rows:
            progress.start()  # not before: an error that comes first is told without bars
            rows[name] = progress.add_task(escape(name), rate="", state="", completed=done)
        speed = progress.tasks[progress.task_ids.index(rows[name])].speed
        rate = f"{speed:.3g}/s" if speed else ""
        progress.update(rows[name], completed=done, total=total, rate=rate, state=escape(state))

    try:
        yield update
    finally:
        if rows:
            progress.stop()


def watch(
    todo: "list[Job]", processes: int | None = None, failures: "dict[Job, str] | None" = None
) -> None:
    """`training.sweep.run`, with how far each job is on standard error."""
    from nextlat.training.sweep import run

    seconds = {job: job.seconds or job.steps for job in todo}
    done = dict.fromkeys(todo, 0.0)
    running: list[str] = []
    finished = 0

    with bars() as update:

        def show_all() -> None:
            """Above the others, for those may be more than a screen holds."""
            state = ", ".join([f"{finished} of {len(todo)} models", *running])
            update("all", state, round(sum(done.values())), sum(seconds.values()))

        if len(todo) > 1:
            show_all()
        for job in todo:
            update(job.name, "waiting", 0, job.steps)
        for job, step, state in run(todo, processes, failures):
            update(job.name, state, step, job.steps)
            if job.name not in running:
                running.append(job.name)
            done[job] = 0.9 * seconds[job] * step / job.steps  # measuring comes on top
            if state in ("done", "failed"):
                running.remove(job.name)
                done[job], finished = seconds[job], finished + 1
            if len(todo) > 1:
                show_all()


def collect(jobs: "list[Job]", out: Path) -> None:
    """One results.json of all jobs, and their report."""
    from nextlat.training.sweep import collect as gather

    if jobs:
        gather(jobs, out)
        report([job.directory for job in jobs], out)


def evaluate(directory: Path, progress: bool, code: str | None = None) -> None:
    """Measure a finished run; see `evaluation.evaluate`."""
    from nextlat.evaluation import evaluate as measure

    no_library_bars()
    with bars(progress) as update:
        measure(directory, code=code, progress=partial(update, f"evaluating {directory}"))


def report(directories: list[Path], out: Path | None, markdown: Path | None = None) -> None:
    """The comparison of runs in the terminal, as a page in `out`, and as Markdown."""
    from rich.console import Console

    from nextlat.report import compare, read_runs, terminal_table, write_report

    runs = read_runs(directories)
    Console().print(terminal_table(compare(runs)))
    if out is not None:
        page = write_report(runs, out, markdown)
        say(f"Look at {page}{f' and {markdown}' if markdown is not None else ''}.")


class Stream:
    """Standard output while a text is decoded: the prompt, then every cycle as it happens; left
    clean however it ends. Drafts are shown by marks where it is no terminal, or with NO_COLOR."""

    def __init__(self, tokenizer: Any, ids: list[int], drafts: bool) -> None:
        from rich.console import Console

        from nextlat.decoding import stream

        self._stream, self._text = stream, stream.TokenText(tokenizer.decode)
        self._ids, self._drafts, self._begun = ids, drafts, False
        self._colours, self._coloured_legend = (
            drafts and console.is_terminal and bool(console.color_system) and not console.no_color
            for console in (Console(), Console(stderr=True))
        )
        self._stop, self._until_here = StopSignal(), ExitStack()

    def show(self, done: "Pass") -> None:
        """One pass of the one prompt."""
        stream = self._stream
        if not self._begun:  # not before: whatever is wrong with a request has been said by now
            if self._drafts:
                legend = stream.legend(colours=self._colours, styled=self._coloured_legend)
                print(legend, file=sys.stderr)
            self._write(self._text.add(self._ids))
        if self._stop.received:
            raise KeyboardInterrupt
        [cycle] = done.cycles
        if cycle is not None and self._drafts:
            picture = stream.coloured if self._colours else stream.marked
            self._write(picture(stream.draw(cycle, self._text)))
        elif cycle is not None:
            self._write(self._text.add(cycle.tokens))

    def __enter__(self) -> None:
        # The pass under way is finished first: an exception at any moment can be lost in a
        # destructor.
        self._until_here.enter_context(self._stop)
        self._until_here.enter_context(self._stop.deferred())

    def __exit__(self, *_: Any) -> None:
        self._until_here.close()
        if self._begun:
            self._write(self._text.rest() + (self._stream.RESET if self._colours else "") + "\n")

    def _write(self, text: str) -> None:
        self._begun = True
        sys.stdout.write(text)
        sys.stdout.flush()


def say_stats(stats: "GenerationStats") -> None:
    """What the drafts of one text were worth."""
    say(
        f"{count(stats.tokens, 'token')} in {count(stats.cycles, 'cycle')}: "
        f"{stats.mean_acceptance_length:.2f} tokens a cycle, {stats.acceptance_rate:.0%} of the "
        f"drafted tokens accepted, {stats.tokens_per_second:.0f} tokens a second."
    )
    measured = stats.measure_seconds >= 0.005
    measuring = f"{stats.measure_seconds:.2f} timing the machine for auto, " if measured else ""
    say(
        f"{stats.seconds:.2f} s: {measuring}{stats.prefill_seconds:.2f} reading the prompt, "
        f"{stats.draft_seconds:.2f} drafting, {stats.verify_seconds:.2f} verifying, "
        f"{stats.overhead_seconds:.2f} overhead."
    )


def print_cost(recipe: "Recipe") -> None:
    """What training a recipe would cost, on standard output."""
    from nextlat.training.cost import dry_run

    cost = dry_run(recipe)
    threads = f" with {count(cost.threads, 'thread')}" if cost.device == "CPU" else ""
    flops = f"no formula for the objective {recipe.objective}"
    if cost.flops is not None:
        total = sum(cost.flops.values())
        shares = ", ".join(f"{name} {value / total:.0%}" for name, value in cost.flops.items())
        flops = f"{total:.2g} ({shares})"
    step, bound = duration(cost.step_seconds), "about"
    if cost.timed:
        how = f"from a few real steps of {step}"
    elif cost.flops is None:
        how = f"{step} a step, from single rows"
    else:
        speed, bound = f"{cost.flops_per_second / 1e9:,.0f} GFLOP/s", "at least"
        how = f"{step} a step if all of it ran as fast as its matrix products, {speed}"
    print(
        f"{recipe.run_name} on this {cost.device}{threads} in {recipe.run.precision}; nothing is "
        "trained now."
    )
    rows = {
        "parameters": f"{cost.lm_parameters:,} of the transformer, "
        f"{cost.objective_parameters:,} of the objective",
        "tokens": f"{cost.tokens:,} (about) in {cost.steps:,} steps of {cost.rows} rows",
        "FLOPs": flops,
        "time": f"{bound} {duration(cost.seconds)} ({how}); saving and measuring come on top",
    }
    if data := cost.data:
        most, least = ("", "") if data.exact else ("at most ", "at least ")
        rows["data"] = (
            f"{most}{data.tokens:,} tokens, {least}{cost.tokens / data.tokens:.2f} epochs; {most}"
            f"{data.bytes / 1e9:.2g} GB on the disk in {data.directory}, where "
            f"{disk_usage(data.directory).free / 1e9:,.0f} GB are free"
        )
    for name, text in rows.items():
        print(f"{name:12}{text}")


def duration(seconds: float) -> str:
    """In a unit that suits it."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3g} s"


def count(number: int, thing: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
