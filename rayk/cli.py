"""The `rayk` command line: parse arguments, call a command, and print its result.

Exit codes: 0 success, 1 failure while running, 2 wrong input, 130 interrupted.

Each command is implemented in a module of `rayk.commands`, which is imported when the command is called, so that
`rayk --help` needs neither torch nor ray.
"""

import difflib
import importlib.metadata
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from rayk.commands.console import console, print_check, print_sections, print_table
from rayk.config import load_config, load_teachers
from rayk.environment import set_threading
from rayk.errors import InputError, Interrupted, RaykError, SettingsError

_INTERRUPTED = 130
_INTERRUPTION_MESSAGES = {
    "run": "Interrupted before the run started; nothing is lost.",
    "synthesize": "Interrupted; the completions are kept, and the same command continues from there.",
    "cache": "Interrupted; the received signals are kept, and the same command continues from there.",
}
"""Message of an interrupted command: what is kept, and how to continue."""
_SYNONYMS = {
    "train": "run", "distill": "run", "distil": "run", "start": "run", "resume": "run", "eval": "evaluate",
    "test": "evaluate", "measure": "evaluate", "generate": "synthesize", "synthesise": "synthesize", "new": "init",
    "create": "init", "check": "doctor", "validate": "doctor", "compare": "report", "list": "methods",
    "deploy": "serve", "demo": "quickstart",
}  # fmt: skip


class CommandGroup(TyperGroup):
    """The commands. The error for an unknown name suggests the closest command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            close = difflib.get_close_matches(name, [*self.commands, *_SYNONYMS], n=1)
            if close:
                raise InputError(f"There is no command '{name}'; did you mean '{_SYNONYMS.get(close[0], close[0])}'?")
            raise InputError(f"There is no command '{name}'; the commands are {', '.join(self.commands)}.")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=CommandGroup, help="Distill large language models into small ones on a Ray cluster.",
    invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A run's YAML file; `rayk init` writes one.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=value", help="Change one setting; may be repeated.")
]
Output = Annotated[str | None, typer.Option("--output", help="The run directory, instead of the config's.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rayk {importlib.metadata.version('rayk')}")
        raise typer.Exit


@app.callback()
def main_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def quickstart(
    output: Annotated[
        str, typer.Option("--output", help="The folder of the run directories and the report.")
    ] = "runs/quickstart",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="A chat model's name or folder: it teaches a copy with fewer layers."
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="With --model: layers of the copy; by default a third.")
    ] = None,
) -> None:
    """Watch a small model learn from a larger one on Ray Serve; needs nothing but this machine."""
    from rayk.commands.quickstart import run_quickstart
    from rayk.commands.quickstart_model import run_model_quickstart
    from rayk.commands.results import results_table

    if model is None and layers is not None:
        raise InputError("--layers needs --model; the built-in task has students of its own.")
    if model is None:
        result = run_quickstart(Path(output), listener())
    else:
        result = run_model_quickstart(model, Path(output), listener(), layers=layers)
    print_table(results_table(result.summaries))
    console.print(f"\nThe report: {result.report}")


@app.command()
def init(
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="A model's name or folder, or an endpoint's URL.")
    ] = None,
    student: Annotated[str | None, typer.Option("--student", metavar="MODEL", help="The model to train.")] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="PATH", help="The training rows.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="KIND", help="One of `rayk methods`; by default one that fits.")
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The YAML file to write.")] = "run.yaml",
) -> None:
    """Write a commented config for your models and data, ready for `rayk doctor` and `rayk run`."""
    from rayk.commands.init import init as write_config

    for note in write_config(teacher, student, data, method, Path(output)):
        console.print(note)
    console.print(f"Wrote {output}. Next: rayk doctor {output}, then rayk run {output}")


@app.command()
def run(
    config: ConfigPath, overrides: Overrides = None, output: Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output directory.")] = False,
) -> None:  # fmt: skip
    """Run a config from data to trained student."""
    settings = load_config(config, overrides, output=output)
    from rayk.commands.results import results_table
    from rayk.commands.run import run as run_config

    result = run_config(settings, resume=resume, listener=listener())
    print_table(results_table([result.summary]))
    console.print(f"\nThe student: {result.model}\nThe report:  {result.output / 'report.html'}")


@app.command()
def synthesize(config: ConfigPath, overrides: Overrides = None, output: Output = None) -> None:
    """Generate a config's training rows with its teacher, without training; continues where it was stopped."""
    settings = load_config(config, overrides, output=output)
    from rayk.commands.synthesize import synthesis_table
    from rayk.commands.synthesize import synthesize as synthesize_config

    summary, rows = synthesize_config(settings, listener())
    print_table(synthesis_table(summary))
    console.print(f"\nThe rows: {rows}")


@app.command()
def serve(config: ConfigPath, overrides: Overrides = None) -> None:
    """Deploy a config's teachers for other processes until interrupted; only the section `teachers` is read."""
    teachers = load_teachers(config, overrides)
    from rayk.commands.serve import serve as serve_teachers

    serve_teachers(teachers, console.print)


@app.command()
def cache(
    config: ConfigPath, overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the cache and delete damaged segments (exit 1 if there were any).")
    ] = False,
) -> None:  # fmt: skip
    """Request all signals that a config's run needs from its teachers, before the run."""
    settings = load_config(config, overrides)
    from rayk.commands.cache import cache_table, fill_cache, verify_cache

    if not verify:
        print_table(cache_table(fill_cache(settings, listener())))
        return
    found = verify_cache(settings)
    console.print(f"{found.segments:,} segments contain {found.entries:,} signals in {found.bytes:,} bytes.")
    if found.damaged:
        raise RaykError(f"Damaged and deleted: {', '.join(found.damaged)}; their rows will be requested again.")


@app.command()
def plan(
    config: ConfigPath, overrides: Overrides = None,
    student: Annotated[
        float | None,
        typer.Option(
            "--student-tokens-per-second", min=1e-9, help="By default measured from the run in the output directory."
        ),
    ] = None,
    teacher: Annotated[
        float | None,
        typer.Option("--teacher-tokens-per-second", min=1e-9, help="Speed of one replica; by default measured."),
    ] = None,
) -> None:  # fmt: skip
    """Compute the number of teacher replicas that keep the student busy, and the network traffic."""
    settings = load_config(config, overrides)
    from rayk.commands.plan import plan as make_plan
    from rayk.commands.plan import plan_table

    print_table(plan_table(make_plan(settings, student, teacher)))


@app.command()
def evaluate(
    config: ConfigPath, overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The model to measure; by default the run's student.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Measure a trained student (or any model) on the config's evaluation rows."""
    from rayk.commands.evaluate import check_overrides, to_json
    from rayk.commands.evaluate import evaluate as evaluate_config
    from rayk.commands.results import results_table

    if model is None:
        check_overrides(overrides or [])
    summary, path = evaluate_config(load_config(config, overrides), model, listener())
    if as_json:
        print(to_json(summary))
    else:
        print_table(results_table([summary]))
    if path is not None:
        console.print(f"\nThe result: {path}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR…", help="Run directories; several are compared.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="The HTML file; by default RUN_DIR/report.html, or comparison.html for several."),
    ] = None,
) -> None:
    """Write the HTML report of one run, or one that compares several."""
    from rayk.commands.report import report as make_report

    console.print(f"The report: {make_report(runs, output)}")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The output directory of a run, finished or not.")],
) -> None:
    """Show a run's progress: generated rows, steps, speed, last evaluation and checkpoint."""
    from rayk.commands.status import status as read_status

    print_sections(read_status(run))


@app.command()
def methods() -> None:
    """List the methods: what each does, what it needs from a teacher, and its paper."""
    from rayk.commands.methods import describe_methods

    print(describe_methods())


@app.command()
def settings(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="Such as data, data.train or method.on_policy.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all settings as a page in Markdown.")] = False,
) -> None:
    """List the settings of a config: each key with its type, default and description."""
    from rayk.commands.settings import format_settings, settings_markdown

    print(settings_markdown() if markdown else format_settings(section, min(console.width, 100)))


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]")] = None, overrides: Overrides = None
) -> None:
    """Check this machine, and a config's settings, data, models and teachers, without running anything."""
    from rayk.commands.doctor import examine

    failed = False
    for check in examine(config, overrides):
        print_check(check.state, check.text)
        failed |= check.state == "wrong"
    if failed:
        raise typer.Exit(2)


def listener() -> Any:
    """Return a listener that shows progress as a bar on a terminal, elsewhere as lines."""
    from rayk.commands.progress import TerminalProgress

    return TerminalProgress()


def main() -> None:
    """Run the command line; print errors as sentences, and exit with the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    set_threading()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # its bars would mix with the lines of progress
    # SIGTERM (`ray job stop`, Kubernetes) raises an exception as Ctrl-C does, so that deployed teachers are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(signal.SIGTERM))
    try:
        code = app(standalone_mode=False) or 0
        if code == _INTERRUPTED:  # typer's result for a KeyboardInterrupt
            raise KeyboardInterrupt
    except SettingsError as error:
        code = _fail(str(error), 2, one_line=False)
    except InputError as error:
        code = _fail(str(error), 2)
    except Interrupted as stop:
        code = _fail(str(stop), _INTERRUPTED)
    except RaykError as error:
        code = _fail(str(error), 1)
    except (KeyboardInterrupt, SystemExit):
        command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
        code = _fail(_INTERRUPTION_MESSAGES.get(command, "Interrupted."), _INTERRUPTED)
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            code = _fail(str(getattr(error, "message", error)), 2)
        elif os.environ.get("RAYK_VERBOSE"):
            raise
        else:
            code = _fail(f"{type(error).__name__}: {error} (RAYK_VERBOSE=1 prints the traceback.)", 1)
    sys.exit(code)


def _fail(message: str, code: int, *, one_line: bool = True) -> int:
    """Print an error message, by default on one line, and return `code`."""
    lines = [message] if one_line else message.splitlines()
    text = "\n".join(" ".join(line.split()) for line in lines)
    console.print(Text.assemble(("rayk:", "red"), " ", text))
    return code


if __name__ == "__main__":
    main()
