"""Sharded training (FSDP2) against copies (DDP): tokens per second, and bytes per rank.

Two gloo ranks on this machine train the same supervised steps, first with all weights on each rank, then sharded with
`reshard: last` and with `always`. Printed are the median tokens per second of a rank's steps, its share of DDP's, and
the bytes that a rank keeps between steps. Run on idle cores; on a GPU machine the numbers are others.

    python -m tests.benchmarks.speed.sharding [--rows 32] [--hidden 256] [--layers 6] [--steps 8] [--ranks 2]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayk.config import StudentConfig, SupervisedConfig, TrainingConfig
from rayk.data.batches import collate
from rayk.methods import Experience, Supervised
from rayk.models import load_tokenizer
from rayk.models.student import make_model, make_structure
from rayk.signals.sequence import TokenSequence
from rayk.training.learner import Learner
from rayk.training.ranks import Ranks
from rayk.training.student import LossModule, Student
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.rank_group import RankGroup
from tests.training.sharded_training import kept_bytes

LENGTH = 128
MODES = {
    "none": {"sharding": "none"},
    "fsdp, reshard: last": {"sharding": "fsdp", "reshard": "last"},
    "fsdp, reshard: always": {"sharding": "fsdp", "reshard": "always"},
}


def measure(
    ranks: Ranks, folder: str, rows: int, steps: int, chosen: dict[str, Any]
) -> tuple[list[float], dict[str, int]]:
    """Return the tokens per second of each step after the first, and the bytes that this rank keeps."""
    settings = TrainingConfig(learning_rate=1e-4, workers=ranks.world, micro_batch_tokens=rows * LENGTH // 2, **chosen)
    config = StudentConfig(model=folder)
    is_empty = settings.sharding != "none" and ranks.rank > 0
    tokenizer = load_tokenizer(folder)
    model = make_structure(config, tokenizer) if is_empty else make_model(config, tokenizer, 0)
    student = Student(model, settings.precision, settings.micro_batch_tokens)
    learner = Learner(LossModule(student, Supervised(SupervisedConfig(), None)).train(), settings, ranks, "cpu")
    learner.parallel.start()
    random = np.random.default_rng(ranks.rank)
    rates = []
    for step in range(steps + 1):
        ids = random.integers(3, 300, (rows, LENGTH)).astype(np.int32)
        sequences = [TokenSequence(row, np.arange(LENGTH) > 0) for row in ids]
        torch.distributed.barrier()
        started = time.perf_counter()
        learner.train_step([Experience(collate(sequences, 0))], step, 1e-4)
        rates.append(ranks.world * rows * LENGTH / (time.perf_counter() - started))
    return rates[1:], kept_bytes(learner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32, help=f"of each rank and step, {LENGTH} tokens each")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(folder / "student", hidden=options.hidden, layers=options.layers, tokenizer=tiny_tokenizer())
        group = RankGroup(options.ranks, folder)
        try:
            results = {
                mode: group.run(measure, str(folder / "student"), options.rows, options.steps, chosen)
                for mode, chosen in MODES.items()
            }
        finally:
            group.close()
    base = statistics.median(results["none"][0][0])
    whole = sum(results["none"][0][1].values())
    print(f"{'sharding':24}{'tokens/s':>12}{'of none':>10}{'MB a rank':>12}{'of none':>10}")
    for mode, ranks in results.items():
        rate = statistics.median(ranks[0][0])
        kept = max(sum(kinds.values()) for _, kinds in ranks)
        print(f"{mode:24}{rate:12,.0f}{rate / base:10.2f}{kept / 1e6:12.1f}{kept / whole:10.2f}")


if __name__ == "__main__":
    main()
