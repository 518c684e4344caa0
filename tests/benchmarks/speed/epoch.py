"""Throughput of a second epoch that reads the signal cache, against the same run without a cache.

    python -m tests.benchmarks.speed.epoch [--rounds 3]

Two epochs of off-policy logit KD with the models and settings of `race` in float32, on random rows of 100 to 280
tokens. The cache starts empty: the first epoch requests signals and writes them, the second reads them. Batches are
prepared ahead, so the first batches of the second epoch may request signals that are not stored yet. The teacher has
random weights; its nearly flat distributions compress better than a trained teacher's. How to read it: the ratio is the
speed-up of the second epoch.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayk.config import CacheConfig
from rayk.serving.cluster import start_ray
from rayk.teachers.cache import SignalCache
from tests.benchmarks.machine import machine
from tests.benchmarks.speed.race import BATCH, VOCAB, K, save_models, tokens_per_second, train


def make_rows(file: Path, count: int) -> None:
    """Write `count` rows with prompts of 40 to 120 and completions of 60 to 160 random words."""
    random = np.random.default_rng(0)

    def words(fewest: int, most: int) -> str:
        return " ".join(f"t{number}" for number in random.integers(2, VOCAB, random.integers(fewest, most + 1)))

    rows = ({"prompt": words(40, 120), "completion": words(60, 160)} for _ in range(count))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word: t0 (padding), t1 (EOS), t2, …"""
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15, help="per epoch")
    parser.add_argument("--threads", default="1,1", help="of teacher and student")
    given = parser.parse_args()
    teacher_threads, student_threads = map(int, given.threads.split(","))
    threads = teacher_threads, student_threads
    rows, steps = given.steps * BATCH, given.steps
    print(f"{machine()}, load before {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder / "rows.jsonl", rows)
        save_models(folder, make_word_tokenizer())
        print(f"two epochs of {steps} steps of {BATCH} rows, k={K}, V={VOCAB:,}; medians of {given.rounds}", flush=True)
        speeds: dict[str, list[float]] = {"without": [], "with": []}
        for number in range(given.rounds):
            plain = train(folder, f"without-{number}", rows, 2 * steps, threads)
            speeds["without"].append(tokens_per_second(plain[steps:]))
            cache = folder / f"cache-{number}"
            cached = train(folder, f"with-{number}", rows, 2 * steps, threads, cache=cache)
            speeds["with"].append(tokens_per_second(cached[steps:]))
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        kept = SignalCache(CacheConfig(path=str(cache))).verify().entries
    slow, fast = (statistics.median(values) for values in speeds.values())
    counted = sum(step["counted_tokens"] for step in cached[steps:])
    # Hits are counted when a batch is prepared, a few steps before it is used. All of them belong to the second epoch,
    # since no row occurs twice in an epoch.
    requested = counted - sum(step["cached_tokens"] for step in cached)
    print(f"  epoch 2: {slow:,.0f} tokens/s without the cache, {fast:,.0f} with it: ratio {fast / slow:.2f}")
    print(f"  teacher tokens asked in epoch 2: {counted:,} without the cache, {requested:,} with it")
    print(
        f"  on disk, {kept} of {rows} rows: {size / counted / K:.2f} bytes an entry (id, log-prob), "
        f"{size / counted:.0f} bytes a token"
    )


if __name__ == "__main__":
    start_ray(4)
    main()
