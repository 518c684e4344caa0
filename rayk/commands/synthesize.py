"""`rayk synthesize`: generate a run's training rows without training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from rayk.commands.console import two_columns
from rayk.config import RunConfig
from rayk.report.report import figure_text
from rayk.run import ProgressListener, next_round, with_absolute_paths
from rayk.run import synthesize as synthesize_rows
from rayk.run.synthesis_inputs import synthesized_rows_path


def synthesize(config: RunConfig, listener: ProgressListener) -> tuple[dict[str, Any], Path]:
    """Generate the training rows of `config`'s next round; return the summary and the path of the rows' file."""
    summary = synthesize_rows(config, listener=listener)
    return summary, synthesized_rows_path(next_round(with_absolute_paths(config))[0])


def synthesis_table(summary: Mapping[str, Any]) -> Table:
    """Return the numbers of kept and rejected candidates, the recipe's figures, and the usage."""
    usage = summary["usage"]
    return two_columns(
        {
            "kept": f"{summary['kept']:,} of {summary['candidates']:,}"
            + (f" for {summary['prompts']:,} prompts" if summary["prompts"] else ""),
            **{f"rejected: {reason}": f"{count:,}" for reason, count in summary["rejected"].items()},
            **{figure["name"]: figure_text(figure) for figure in summary["figures"]},
            "requests": f"{usage['requests']:,}" if "requests" in usage else "",
            "cost": f"{usage['cost']:,.4f}" if "cost" in usage else "",
        }
    )
