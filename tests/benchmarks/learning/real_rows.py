"""Rows of Dolly and GSM8K for `real_models`: short ones, so that a run takes minutes on two cores."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tests.benchmarks.learning.words import write_rows

TASKS = ("dolly", "gsm8k")
LONGEST = {"dolly": 72, "gsm8k": 112}
"""Longest row in tokens, without the chat template's."""
LONGEST_PROMPT = 56
"""Longest prompt in tokens of the recovery's rows, which are cut at 88 tokens."""
POOL, HELD_OUT, RECOVERY, RECOVERY_HELD_OUT = 300, 32, 220, 24
"""Rows of a task to draw training rows from, held-out rows, and the rows of both kinds for the recovery."""


def read_task(folder: Path, task: str, split: str) -> list[dict[str, str]]:
    """Return a task's rows with `prompt` and `completion`, in the order of the file FOLDER/TASK/SPLIT.jsonl."""
    with (folder / task / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [_ROWS[task](json.loads(line)) for line in file]


def _dolly_row(row: Mapping[str, str]) -> dict[str, str]:
    question = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
    return {"prompt": f"{question}\nAnswer in one short sentence.", "completion": row["output"]}


def _gsm8k_row(row: Mapping[str, str]) -> dict[str, str]:
    return {"prompt": row["question"], "completion": row["answer"]}


_ROWS = {"dolly": _dolly_row, "gsm8k": _gsm8k_row}


def split_by_length(
    rows: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows of at most `longest` tokens, and the others."""
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for row in rows:
        parts[len(tokenizer(row["prompt"] + row["completion"]).input_ids) > longest].append(row)
    return parts


def prepare_rows(data: Path, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write the pool and the held-out rows of each task, and the rows of the recovery, which are in no pool.

    The recovery's rows are the longer ones, of both tasks in turn; its held-out rows are those of both tasks.
    """
    recovery: list[Any] = []
    for task in TASKS:
        short, long = split_by_length(read_task(data, task, "train"), tokenizer, LONGEST[task])
        held_out, _ = split_by_length(read_task(data, task, "test"), tokenizer, LONGEST[task])
        write_rows(output / f"{task}-pool.jsonl", short[:POOL])
        write_rows(output / f"{task}-held-out.jsonl", held_out[:HELD_OUT])
        long = [row for row in long if len(tokenizer(row["prompt"]).input_ids) <= LONGEST_PROMPT]
        recovery.append((long[:RECOVERY], held_out[:RECOVERY_HELD_OUT]))
    for place, name in enumerate(("recovery", "recovery-held-out")):
        write_rows(
            output / f"{name}.jsonl",
            [row for pair in zip(*(part[place] for part in recovery), strict=True) for row in pair],
        )
