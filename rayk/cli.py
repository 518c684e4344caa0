"""The `rayk` command line: parse arguments, call a command, and print its result.

Exit codes: 0 success, 1 failure while running, 2 wrong input, 130 interrupted.

Each command is implemented in a module of `rayk.commands` or `rayk.run`, which is imported when the command is called,
so that `rayk --help` needs neither torch nor ray.
"""

import importlib.metadata
import logging
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from rayk.commands.command_group import CommandGroup
from rayk.commands.console import console, print_check, print_sections, print_table, printable
from rayk.config import check_inputs_exist, load_config, load_teachers
from rayk.config.paths import is_uri
from rayk.config.secrets import hide
from rayk.environment import set_threading
from rayk.errors import InputError, Interrupted, RaykError, SettingsError

_INTERRUPTED = 130
_INTERRUPTION_MESSAGES = {
    "run": "Interrupted before the run started; nothing is lost.",
    "synthesize": "Interrupted; the completions are kept, and the same command continues from there.",
    "cache": "Interrupted; the received signals are kept, and the same command continues from there.",
}
"""Message of an interrupted command: what is kept, and how to continue."""

app = typer.Typer(
    cls=CommandGroup, help="Distill large language models into small ones on a Ray cluster.",
    invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

ConfigPath = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A run's YAML file (see `rayk init`) or run directory.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=value", help="Change one setting; may be repeated.")
]
Output = Annotated[str | None, typer.Option("--output", help="The run directory, instead of the config's.")]


def _local_path(given: str | Path) -> Path:
    """Parse an argument that must be a path on this machine; typer also passes its default."""
    if is_uri(str(given)):
        raise typer.BadParameter(f"'{hide(str(given))}' is a URI, but it must be a path on this machine.")
    return Path(given)


RunDirectory = Annotated[
    Path,
    typer.Argument(metavar="RUN_DIR", parser=_local_path, help="The output directory of a run, finished or not."),
]


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
        Path, typer.Option("--output", parser=_local_path, help="The folder of the run directories and the report.")
    ] = Path("runs/quickstart"),
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
        result = run_quickstart(output, listener())
    else:
        result = run_model_quickstart(model, output, listener(), layers=layers)
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
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", parser=_local_path, help="The YAML file to write.")
    ] = Path("run.yaml"),
) -> None:
    """Write a commented config for your models and data, ready for `rayk doctor` and `rayk run`."""
    from rayk.commands.init import init as write_config

    for note in write_config(teacher, student, data, method, output):
        console.print(note)
    console.print(f"Wrote {output}. Next: rayk doctor {output}, then rayk run {output}")


@app.command()
def run(
    config: ConfigPath, overrides: Overrides = None, output: Output = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the output directory.")] = False,
) -> None:  # fmt: skip
    """Run a config from data to trained student."""
    settings = load_config(config, overrides, output=output)
    check_inputs_exist(settings)  # before torch and Ray are imported, which takes seconds
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
def serve(
    config: ConfigPath, overrides: Overrides = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave the teachers on the cluster at RAY_ADDRESS and return.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the detached teachers of the config.")] = False,
) -> None:  # fmt: skip
    """Deploy a config's teachers for other processes until interrupted; only the section `teachers` is read."""
    teachers = load_teachers(config, overrides)
    from rayk.commands import serve as commands

    act = commands.remove if remove else commands.detach if detach else commands.serve
    act(teachers, console.print)


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
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Plan for GPUs of this type (h100, a100, …) from the models' config.json alone."),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="With --gpu: number of GPUs of the cluster.")] = 8,
    tokens: Annotated[
        float | None, typer.Option("--tokens", min=1, help="With --gpu: tokens of the training rows.")
    ] = None,
    counted: Annotated[
        float | None,
        typer.Option("--counted-share", min=1e-9, max=1, help="With --gpu: share of the tokens that enter the loss."),
    ] = None,
) -> None:  # fmt: skip
    """Compute the number of teacher replicas that keep the student busy, and the network traffic. With --gpu nothing is
    measured: rates, waiting time, cache and memory of the run on a cluster are estimated from the models' sizes."""
    settings = load_config(config, overrides)
    if gpu is not None:
        from rayk.commands.cluster_plan import plan_cluster, rows_table
        from rayk.run.devices import find_device

        print_table(rows_table(plan_cluster(settings, find_device(gpu), gpus, tokens, counted)))
        return
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
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR…", parser=_local_path, help="Run directories; several are compared."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            parser=_local_path,
            help="The HTML file; by default RUN_DIR/report.html, or comparison.html for several.",
        ),
    ] = None,
) -> None:
    """Write the HTML report of one run, or one that compares several."""
    from rayk.commands.report import report as make_report

    console.print(f"The report: {make_report(runs, output)}")


@app.command()
def status(
    run: RunDirectory,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print it again whenever the run has made progress, until it is finished.")
    ] = False,
) -> None:
    """Show a run's progress: generated rows, steps, speed, last evaluation and checkpoint."""
    from rayk.commands import status as commands

    for number, sections in enumerate(commands.follow(run) if follow else [commands.status(run)]):
        if number:
            print()
        print_sections(sections)


@app.command()
def export(
    run: RunDirectory,
    step: Annotated[
        int | None,
        typer.Option("--step", min=0, help="The checkpoint's step; by default the best evaluation's, or the newest."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="FOLDER", help="A folder or URI; by default RUN_DIR/export/step-N."),
    ] = None,
) -> None:
    """Write the model of a run's checkpoint, ready to load; needs neither Ray nor a GPU."""
    from rayk.run import export_model

    written = export_model(run, output, step)
    console.print(f"The student after {written.step:,} steps: {written.model}")


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
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]")] = None, overrides: Overrides = None,
    device_memory: Annotated[
        str | None,
        typer.Option("--device-memory", help="Memory of a worker's GPU, such as 80GB; by default this machine's."),
    ] = None,
) -> None:  # fmt: skip
    """Check this machine, and a config's settings, data, models, teachers and memory, without running anything."""
    from rayk.commands.doctor import examine

    failed = False
    for check in examine(config, overrides, device_memory):
        print_check(check.state, hide(check.text))
        failed |= check.state == "wrong"
    if failed:
        raise typer.Exit(2)
    if config is not None:
        options = "".join(f" --set {shlex.quote(override)}" for override in overrides or [])
        print_check("ok", hide(f"Ready: rayk run {config}{options}"))


def listener() -> Any:
    """Return a listener that shows progress as a bar on a terminal, elsewhere as lines."""
    from rayk.commands.progress import TerminalProgress

    return TerminalProgress()


def main() -> None:
    """Run the command line; print errors as sentences, and exit with the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_hide_secrets)
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
            message = str(getattr(error, "message", error))
            hint = "; write settings as --set a.b=value" if "--set" in sys.argv and "extra argument" in message else ""
            code = _fail(message + hint, 2)
        elif os.environ.get("RAYK_VERBOSE"):
            console.print(printable(hide(traceback.format_exc())))
            code = 1
        else:
            code = _fail(f"{type(error).__name__}: {error} (RAYK_VERBOSE=1 prints the traceback.)", 1)
    sys.exit(code)


def _hide_secrets(record: logging.LogRecord) -> bool:
    """Remove secrets and control characters from a log record; keep it."""
    record.msg, record.args = printable(hide(record.getMessage())), ()
    return True


def _fail(message: str, code: int, *, one_line: bool = True) -> int:
    """Print an error message, by default on one line, and return `code`."""
    lines = [message] if one_line else message.splitlines()
    text = hide("\n".join(" ".join(line.split()) for line in lines))
    console.print(Text.assemble(("rayk:", "red"), " ", printable(text)))
    return code


if __name__ == "__main__":
    main()
