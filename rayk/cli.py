"""The `rayk` command: parse, call, print. Exit 0 done, 1 failed while running, 2 the input is wrong, 130 interrupted.

Heavy imports stand inside the commands, so that `rayk --help` needs neither torch nor ray.
"""

import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayk.config import load_config
from rayk.environment import set_threading
from rayk.errors import InputError, RaykError

if TYPE_CHECKING:
    from rayk.commands.cache import CacheFill
    from rayk.commands.plan import Plan
    from rayk.run import ProgressListener

app = typer.Typer(
    help="Distil large language models into small ones on a Ray cluster.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
# What users wrote is shown as it is: nothing in it is markup, and lines are folded by the terminal alone.
console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

_INTERRUPTED = 130
_GOES_ON = {
    "run": "what was checkpointed can be continued with --resume",
    "synthesize": "what was written is kept, and the same command goes on from there",
    "cache": "the signals that came are kept, and the same command goes on from there",
}
"""What is left of a command that was interrupted."""

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A run's YAML file; see jobs/.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=value", help="Change one setting; may be repeated.")
]
Output = Annotated[str | None, typer.Option("--output", help="The run directory, instead of the config's.")]


@app.command()
def quickstart(
    output: Annotated[
        str, typer.Option("--output", help="Where the run directories and the report go.")
    ] = "runs/quickstart",
) -> None:
    """Watch a small model learn from a bigger one that Ray Serve hosts; needs nothing but this machine."""
    from rayk.commands.quickstart import run_quickstart

    result = run_quickstart(Path(output), listener())
    _print(comparison(result.summaries))
    console.print(f"\nThe report: {result.report}")


@app.command()
def run(
    config: ConfigPath, overrides: Overrides = None, output: Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output directory.")] = False,
) -> None:  # fmt: skip
    """Run a config from data to trained student."""
    settings = load_config(config, overrides, output=output)
    from rayk.run import distill

    result = distill(settings, resume=resume, listener=listener())
    _print(comparison([result.summary]))
    console.print(f"\nThe student: {result.model}\nThe report:  {result.output / 'report.html'}")


@app.command()
def synthesize(config: ConfigPath, overrides: Overrides = None, output: Output = None) -> None:
    """Have a config's teacher write its training rows, and nothing more; goes on where it was stopped."""
    settings = load_config(config, overrides, output=output)
    from rayk.run import next_round, with_absolute_paths
    from rayk.run import synthesize as write
    from rayk.run.inputs import synthesized_rows_path

    summary = write(settings, listener=listener())
    _print(synthesised(summary))
    console.print(f"\nThe rows: {synthesized_rows_path(next_round(with_absolute_paths(settings))[0])}")


@app.command()
def serve(config: ConfigPath, overrides: Overrides = None) -> None:
    """Bring up a config's teachers as Serve applications and keep them up until interrupted."""
    settings = load_config(config, overrides)
    from rayk.run import required_cpus, with_absolute_paths
    from rayk.serving.cluster import start_ray
    from rayk.teachers import serve_teacher

    settings = with_absolute_paths(settings)
    if not settings.teachers:
        raise InputError(f"{config} has no teachers to serve; add one under 'teachers'.")
    start_ray(required_cpus(settings))
    with contextlib.ExitStack() as stack:
        for teacher in settings.teachers:
            console.print(f"Bringing up {teacher.name} ({teacher.model}) …")
            served = stack.enter_context(serve_teacher(teacher))
            console.print(
                f"Teacher {served.name} is up: vocabulary {served.info.vocab_size:,}, {served.info.dtype} on "
                f"{served.info.device}. Attach with `attach: true`, or rayk.connect_teacher('{served.name}')."
            )
        console.print("Ctrl-C takes them down.")
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            while True:
                # Short, for the kernel may hand the signal to another thread, which does not end this thread's sleep.
                time.sleep(0.5)


@app.command()
def cache(
    config: ConfigPath, overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the cache instead; delete what is damaged (exit 1 if any was).")
    ] = False,
) -> None:  # fmt: skip
    """Ask a config's teachers for all the signals its run needs, ahead of it."""
    settings = load_config(config, overrides)
    from rayk.commands.cache import fill_cache, verify_cache

    if not verify:
        _print(filling(fill_cache(settings, listener())))
        return
    found = verify_cache(settings)
    console.print(f"{found.segments:,} segments hold {found.entries:,} signals in {found.bytes:,} bytes.")
    if found.damaged:
        raise RaykError(f"Damaged and deleted: {', '.join(found.damaged)}; their rows will be asked for again.")


@app.command()
def plan(
    config: ConfigPath, overrides: Overrides = None,
    student: Annotated[
        float | None,
        typer.Option("--student-tokens-per-second", min=1e-9, help="Else from the run in the output directory."),
    ] = None,
    teacher: Annotated[
        float | None,
        typer.Option("--teacher-tokens-per-second", min=1e-9, help="Of one replica; else measured on one."),
    ] = None,
) -> None:  # fmt: skip
    """Say how many teacher replicas keep the student fed, and what crosses the network."""
    settings = load_config(config, overrides)
    from rayk.commands.plan import plan as make_plan

    _print(planning(make_plan(settings, student, teacher)))


@app.command()
def evaluate(
    config: ConfigPath, overrides: Overrides = None,
    model: Annotated[str | None, typer.Option("--model", help="The model to measure; else the run's student.")] = None,
) -> None:  # fmt: skip
    """Measure a trained student (or any model) on the config's evaluation rows."""
    settings = load_config(config, overrides)
    from rayk.run import evaluate_model

    summary = evaluate_model(settings, model, listener())
    _print(comparison([summary]))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR…", help="Run directories; several are compared.")],
    output: Annotated[Path | None, typer.Option("--output", help="The HTML file; by default in the first run.")] = None,
) -> None:
    """Write the HTML report of one run, or one that compares several."""
    from rayk.report.report import write_report

    path = output or runs[0] / "report.html"
    write_report(runs, path)
    console.print(f"The report: {path}")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The output directory of a run, finished or not.")],
) -> None:
    """Say how far a run is: rows written, steps, speed, last evaluation and checkpoint."""
    from rayk.commands.status import status as status_of

    for number, part in enumerate(status_of(run)):
        if number:
            print()
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, text in part.items():
            if text:
                table.add_row(name, Text(text))
        _print(table)


@app.command()
def methods() -> None:
    """List the ways of learning: what each needs from a teacher and what that costs."""
    from rayk.methods import METHODS

    table = Table("method.kind", "what it does", "paper", "needs from a teacher", box=None, pad_edge=False)
    for kind, method in METHODS.items():
        table.add_row(kind, method.summary, method.paper, method.needs)
    _print(table)


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]")] = None, overrides: Overrides = None
) -> None:
    """Check this machine, and a config's settings, data, models and teachers, without running anything."""
    from rayk.commands.doctor import examine

    failed = False
    for check in examine(config, overrides):
        mark = {"ok": ("✓", "green"), "note": ("•", "yellow"), "wrong": ("✗", "red")}[check.state]
        console.print(Text.assemble(mark, " ", check.text))
        failed |= check.state == "wrong"
    if failed:
        raise typer.Exit(2)


_COMPARED = {
    "accuracy": ("accuracy", "{:.1%}"),
    "loss": ("loss", "{:.3f}"),
    "forward KL": ("forward_kl", "{:.4f}"),
    "reverse KL": ("reverse_kl", "{:.4f}"),
    "agreement": ("agreement", "{:.1%}"),
    "prefers right": ("preference_accuracy", "{:.1%}"),
    "by nats": ("preference_margin", "{:.2f}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "teacher wait": ("teacher_wait_share", "{:.1%}"),
}
"""The final table's columns: what each shows, and how."""


def comparison(summaries: list[dict[str, Any]]) -> Table:
    """The final table: the teacher and each student, a row each; of what was measured."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = [("teacher", summaries[0]["teacher"])] if summaries and summaries[0]["teacher"] else []
    for summary in summaries:
        speed = {name: summary[name] for name in ("tokens_per_second", "teacher_wait_share") if name in summary}
        rows.append((summary["name"], summary["student"] | speed))
    columns = {heading: how for heading, how in _COMPARED.items() if any(how[0] in values for _, values in rows)}
    table.add_column("")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, values in rows:
        table.add_row(Text(name), *(_cell(values, *how) for how in columns.values()))
    return table


def synthesised(summary: dict[str, Any]) -> Table:
    """What a teacher's writing came to."""
    from rayk.report.report import figure_text

    table = Table(box=None, pad_edge=False, show_header=False)
    usage = summary["usage"]
    rows = {
        "kept": f"{summary['kept']:,} of {summary['candidates']:,}"
        + (f" for {summary['prompts']:,} prompts" if summary["prompts"] else ""),
        **{f"rejected: {by}": f"{count:,}" for by, count in summary["rejected"].items()},
        **{each["name"]: figure_text(each) for each in summary["figures"]},
        "requests": f"{usage['requests']:,}" if "requests" in usage else "",
        "cost": f"{usage['cost']:,.4f}" if "cost" in usage else "",
    }
    for name, text in rows.items():
        if text:
            table.add_row(Text(name), text)
    return table


def filling(filled: "list[Filled]") -> Table:
    """What a cache holds for a run: a row for each kind of rows and support."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "support", "rows", "tokens", "there before", "bytes", "bytes an entry"):
        table.add_column(heading, justify="left" if heading in ("", "support") else "right")
    for each in filled:
        numbers = (each.rows, each.tokens, each.cached_tokens, each.bytes)
        an_entry = "–" if each.bytes_an_entry is None else f"{each.bytes_an_entry:.2f}"
        table.add_row(each.what, each.support.kind, *(f"{number:,}" for number in numbers), an_entry)
    return table


def planning(plan: "Plan") -> Table:
    """What `rayk plan` has found."""
    table = Table(box=None, pad_edge=False, show_header=False)
    fewer = sorted({1, max(1, plan.replicas // 2), max(1, plan.replicas - 1)} - {plan.replicas})
    waits = ", ".join(f"with {count}: {plan.waiting_share(count):.0%}" for count in fewer)
    for name, text in {
        "the student trains": str(plan.size),
        "student, never waiting": f"{plan.student_rate:,.0f} tokens/s",
        "one replica": f"{plan.teacher_rate:,.0f} tokens/s",
        "replicas": f"{plan.replicas}, with a fifth to spare",
        "the student would wait": waits,
        "a counted token": f"about {plan.bytes_a_token:,.0f} bytes; {plan.counted_share:.0%} of the tokens count",
        "network": f"{plan.bytes_a_second / 1e6:,.2f} MB/s, {plan.bytes_a_second * plan.seconds / 1e9:,.2f} GB in all",
        "training": f"{plan.total_tokens / 1e6:,.2f} million tokens, about {plan.seconds / 60:,.1f} minutes",
    }.items():
        if text:
            table.add_row(name, text)
    return table


def _cell(values: dict[str, Any], name: str, form: str) -> str:
    return form.format(values[name]) if name in values else "–"


def _print(table: Table) -> None:
    """To standard output, and not folded where that is a file."""
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)


def listener() -> "ProgressListener":
    """Progress on a terminal as a bar, elsewhere as a line now and then."""
    from rayk.commands.terminal import TerminalProgress

    return TerminalProgress(console)


def main() -> None:
    """The console script: commands, with errors as sentences and exit codes."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    set_threading()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would run into ours
    # SIGTERM (`ray job stop`, Kubernetes) unwinds like Ctrl-C, so that teachers come down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(signal.SIGTERM))
    try:
        code = app(standalone_mode=False) or 0
        if code == _INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
    except InputError as error:
        code = _fail(str(error), 2)
    except RaykError as error:
        code = _fail(str(error), 1)
    except (KeyboardInterrupt, SystemExit):
        command = next((each for each in sys.argv[1:] if not each.startswith("-")), "")
        code = _fail("; ".join(["Interrupted", *filter(None, [_GOES_ON.get(command)])]) + ".", _INTERRUPTED)
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            code = _fail(str(getattr(error, "message", error)), 2)
        elif os.environ.get("RAYK_VERBOSE"):
            raise
        else:
            code = _fail(f"{type(error).__name__}: {error} (RAYK_VERBOSE=1 shows where.)", 1)
    sys.exit(code)


def _fail(sentence: str, code: int) -> int:
    """Say it on one line, whatever the message came from."""
    console.print(Text.assemble(("rayk:", "red"), " ", " ".join(sentence.split())))
    return code


if __name__ == "__main__":
    main()
