"""The final table of a run: the teacher and each student, with the metrics that were measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

_COLUMNS = {
    "accuracy": ("accuracy", "{:.1%}"),
    "ROUGE-L": ("rouge_l", "{:.3f}"),
    "exact match": ("exact_match", "{:.1%}"),
    "F1": ("f1", "{:.3f}"),
    "loss": ("loss", "{:.3f}"),
    "forward KL": ("forward_kl", "{:.4f}"),
    "reverse KL": ("reverse_kl", "{:.4f}"),
    "agreement": ("agreement", "{:.1%}"),
    "pref. accuracy": ("preference_accuracy", "{:.1%}"),
    "pref. margin": ("preference_margin", "{:.2f}"),
    "tokens/s": ("tokens_per_second", "{:,.0f}"),
    "teacher wait": ("teacher_wait_share", "{:.1%}"),
    "rollout wait": ("rollout_wait_share", "{:.1%}"),
}
"""For each heading, the entry of the summary and its format."""
_SPEED = ("tokens_per_second", "teacher_wait_share", "rollout_wait_share")


def results_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for the teacher, and for each student before (if measured) and after training."""
    rows = [("teacher", summaries[0]["teacher"])] if summaries and summaries[0]["teacher"] else []
    for summary in summaries:
        if summary.get("student_before"):
            rows.append((f"{summary['name']}, before training", summary["student_before"]))
        speed = {name: summary[name] for name in _SPEED if name in summary}
        rows.append((summary["name"], summary["student"] | speed))
    columns = {heading: column for heading, column in _COLUMNS.items() if any(column[0] in row for _, row in rows)}
    table = Table("", box=None, pad_edge=False, header_style="bold")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, values in rows:
        table.add_row(Text(name), *(_cell(values, *column) for column in columns.values()))
    return table


def _cell(values: Mapping[str, Any], name: str, form: str) -> str:
    return form.format(values[name]) if name in values else "–"
