"""Let a method compute what needs the initial student, on every row that the run trains on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rayk.data.batches import Batch, BatchSampler, collate, micro_batches
from rayk.data.chunks import TrainingRows
from rayk.methods import Method
from rayk.training.learner import Learner
from rayk.training.ranks import Ranks

_CHUNK_ROWS = 1000  # sorted by length within a chunk


def precompute(method: Method, learner: Learner, batches: Iterator[Batch], ranks: Ranks) -> None:
    """Call `Method.precompute` on all ranks. After a resume its results are part of the method's state."""

    def gather(value: Any) -> list[Any]:
        ranks.agree(None)  # pairs with the `agree` of a rank on which `precompute` has failed
        return ranks.gather(value)

    def compute() -> None:
        with torch.no_grad():
            method.precompute(student, batches, gather)

    student = learner.module.student
    student.eval()
    with learner.parallel.whole_weights():
        ranks.run(compute)
    student.train()


def trained_rows(
    table: TrainingRows, sampler: BatchSampler, batch_tokens: int, pad_id: int, ranks: Ranks, device: str
) -> Iterator[Batch]:
    """Yield this rank's share of all rows that the run trains on, in batches of similar length."""
    steps = min(sampler.steps, -(-len(table) // sampler.batch_size))
    used = np.unique(np.concatenate([sampler.rows(step) for step in range(steps)]))
    share = used[ranks.rank :: ranks.world]
    for start in range(0, len(share), _CHUNK_ROWS):
        chunk = share[start : start + _CHUNK_ROWS]
        rows = [answer for row in chunk for answer in table[int(row)].answers]
        for group in micro_batches([len(row) for row in rows], batch_tokens):
            yield collate([rows[row] for row in group], pad_id).to(device)
