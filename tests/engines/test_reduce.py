"""The reduction of logits that tensor-parallel processes share, compared with that of whole logits."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from rayk.config.support import Hidden, Logprob, Requested, TopK
from rayk.engines.reduce import HeadShard, reduce_logits, reduce_sharded_logits

TOKENS, COLUMNS = 50, 40


def reduce_in_parts(logits, bounds, *arguments):
    """Reduce with one thread per part of the columns, each with its own columns only; return each thread's result."""
    parts = list(pairwise(bounds))
    barrier, sent = threading.Barrier(len(parts), timeout=60), [None] * len(parts)

    def run(rank):
        def gather(tensor):
            sent[rank] = tensor
            barrier.wait()
            gathered = torch.cat(sent, dim=1)
            barrier.wait()
            return gathered

        first, end = parts[rank]
        # As in vLLM, all processes have equally many columns; those past the last token are -inf.
        width = max(after - before for before, after in parts)
        own = torch.full((len(logits), width), float("-inf"))
        own[:, : end - first] = logits[:, first:end]
        return reduce_sharded_logits(own, HeadShard(first, gather), *arguments)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


@pytest.mark.parametrize("bounds", [(0, 20, 40), (0, 16, 32, 40), (0, 40)], ids=str)
@pytest.mark.parametrize("vocab_size", [40, 30, 12])
@pytest.mark.parametrize(
    "support",
    [TopK(1), TopK(11, (1.0, 2.0, 0.5)), Requested(0), Requested(4, (2.0, 1.0)), Logprob(), Hidden()],
    ids=str,
)
def test_each_process_returns_the_signals_of_the_whole_logits(support, vocab_size, bounds):
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(TOKENS, COLUMNS, generator=random)
    targets = torch.randint(vocab_size, (TOKENS,), generator=random)
    requested = None
    if isinstance(support, Requested):
        requested = torch.randint(-1, vocab_size, (TOKENS, 6), generator=random)
        requested[0] = -1
        requested[:, -1] = requested[:, 0]
    expected = reduce_logits(logits.clone(), targets, support, vocab_size, requested)
    for columns in reduce_in_parts(logits, bounds, targets, support, vocab_size, requested):
        assert columns.keys() == expected.keys()
        for name, column in expected.items():
            torch.testing.assert_close(columns[name], column, atol=1e-5, rtol=1e-5)


def test_with_every_id_selected_nothing_is_left_for_the_tail():
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    for columns in reduce_in_parts(logits, (0, 4, 8), torch.zeros(5, dtype=torch.long), TopK(8), 8):
        assert bool(columns["log_tails"].isneginf().all())
