"""`rayk report`: write the HTML report of one run, or a comparison of several."""

from collections.abc import Sequence
from pathlib import Path

from rayk.report.report import write_report


def report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report and return its path.

    By default a single run's report is `report.html` in its directory, and a comparison is `comparison.html` in the
    current folder, so that no run's own report is overwritten.
    """
    path = output or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    write_report(runs, path)
    return path
