"""Tokenizing a large file of rows: in one process, in several, and at the second start, from the kept table.

    python -m tests.benchmarks.speed.tokenizing [--rows 200000] [--chat]

Rows are made: 30 words of prompt and 60 of completion. How to read it: rows per second, higher is better; the second
start reads the file once, to see that it has not changed.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

from rayk.config import DataConfig, DataSource
from rayk.data import table_cache
from tests.benchmarks.machine import machine
from tests.tiny import SENTENCES, tiny_tokenizer

WORDS = " ".join(SENTENCES).split()


def write_rows(path: Path, rows: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            prompt, completion = (" ".join(draw.choices(WORDS, k=k)) for k in (30, 60))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--chat", action="store_true", help="render a chat template")
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RAYK_CACHE"] = str(Path(folder) / "cache")
        path, tokenizer = Path(folder) / "rows.jsonl", tiny_tokenizer()
        write_rows(path, arguments.rows)
        source = DataSource(path=str(path))
        data = DataConfig(train=source, chat_template=arguments.chat)
        cores = len(os.sched_getaffinity(0))
        settings = {"source": source, "data": data, "tokenizer": tokenizer}
        forms = {
            "one process": lambda: table_cache._tokenize(settings, 1),
            f"{cores} processes": lambda: table_cache._tokenize(settings, cores),
            "first start": lambda: table_cache.tokenize_once(source, data, tokenizer),
            "second start": lambda: table_cache.tokenize_once(source, data, tokenizer),
        }
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            seconds = time.perf_counter() - started
            print(f"{name:<16}{seconds:>8.1f} s{arguments.rows / seconds:>12,.0f} rows/s")


if __name__ == "__main__":
    main()
