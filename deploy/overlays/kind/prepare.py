"""Make a teacher with random weights, its tokenizer and 500 rows of the quickstart's task, without any download.

python prepare.py FOLDER
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayk.data import quickstart_task


def prepare(folder: Path) -> None:
    """Write FOLDER/train.jsonl and FOLDER/teacher; nothing if they exist, so that every attempt has the same rows."""
    rows, teacher = folder / "train.jsonl", folder / "teacher"
    if rows.exists():
        return
    teacher.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**quickstart_task.TEACHER_MODEL)).save_pretrained(teacher)
    quickstart_task.task_tokenizer().save_pretrained(teacher)
    quickstart_task.write_rows(folder / "part.jsonl", 500, seed=0)
    (folder / "part.jsonl").replace(rows)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
