"""Verify drafts (`rayk.engines.speculative`) with a teacher's model: compute log p of the drafted tokens, accept or
reject them, and sample candidates for the first rejected one.

Keys and values of earlier sequences are cached as long as they fit, so that a call computes only the drafted tokens. A
sequence is found by its seed and compared by content. If it is not in the cache (another replica computed it, or it was
evicted), it is computed from the start, with the same result.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rayk.engines.speculative import Draft, Verdict, sample_ids
from rayk.models import CausalLM, Head, final_hidden
from rayk.models.kv_cache import CachedBatch, KeyValues, can_continue


class PrefixCache:
    """Keys and values of sequences; the least recently used sequence is evicted first. Not for concurrent use."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._entries: OrderedDict[int, tuple[np.ndarray, KeyValues]] = OrderedDict()
        self.nbytes = 0

    def find(self, draft: Draft) -> KeyValues:
        """Return the keys and values of the draft's longest cached prefix, without the last token before the drafted
        ones, which must be computed to predict them."""
        if draft.seed not in self._entries:
            return KeyValues()
        ids, past = self._entries[draft.seed]
        shared = min(len(ids), draft.start - 1)
        different = np.flatnonzero(ids[:shared] != draft.input_ids[:shared])
        return past.truncate(int(different[0]) if len(different) else shared)

    def put(self, seed: int, input_ids: np.ndarray, past: KeyValues) -> None:
        """Store the keys and values of all `input_ids`."""
        self.nbytes -= self._entries.pop(seed)[1].nbytes if seed in self._entries else 0
        self._entries[seed] = (input_ids, past.clone())
        self.nbytes += past.nbytes
        while self.nbytes > self._max_bytes:
            self.nbytes -= self._entries.popitem(last=False)[1][1].nbytes


class Verifier:
    """Verifies drafts with one model. Its real tokens are the first `vocab_size` columns of the logits, and p is the
    distribution over these.

    Args:
        chunk: number of positions whose logits are in memory at the same time.
    """

    def __init__(self, model: CausalLM, head: Head, vocab_size: int, *, chunk: int, cache_bytes: int):
        self._model, self._head, self._vocab_size, self._chunk = model, head, vocab_size, chunk
        self._cache = PrefixCache(cache_bytes) if can_continue(model) else None

    @torch.inference_mode()
    def verify(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """Return one verdict per draft, in order."""
        pasts = [KeyValues() if self._cache is None else self._cache.find(draft) for draft in drafts]
        verdicts: dict[int, Verdict] = {}
        for is_cached in (True, False):  # two batches, so that drafts are not padded to whole sequences
            rows = [row for row, past in enumerate(pasts) if (len(past) > 0) == is_cached]
            if rows:
                batch_verdicts = self._verify([drafts[row] for row in rows], [pasts[row] for row in rows])
                verdicts |= zip(rows, batch_verdicts, strict=True)
        return [verdicts[row] for row in range(len(drafts))]

    def _verify(self, drafts: list[Draft], pasts: list[KeyValues]) -> list[Verdict]:
        hidden, computed = self._compute(drafts, pasts)
        counts = [draft.drafted for draft in drafts]
        drafted = torch.cat([states[:count] for states, count in zip(hidden, counts, strict=True)])
        targets = torch.from_numpy(np.concatenate([draft.input_ids[draft.start :] for draft in drafts]).astype(int))
        parts = zip(drafted.split(self._chunk), targets.to(drafted.device).split(self._chunk), strict=True)
        target_logprobs = [self._logprobs(states).gather(1, ids[:, None])[:, 0] for states, ids in parts]
        logprobs = np.split(torch.cat(target_logprobs).cpu().numpy(), np.cumsum(counts)[:-1])
        accepted = [draft.count_accepted(values) for draft, values in zip(drafts, logprobs, strict=True)]
        incomplete = [row for row, draft in enumerate(drafts) if accepted[row] < draft.drafted or not draft.drafted]
        candidates = self._candidates(
            [hidden[row][accepted[row]] for row in incomplete],
            [drafts[row].candidate_numbers(accepted[row]) for row in incomplete],
        )
        candidates_by_row = dict(zip(incomplete, candidates, strict=True))
        nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
        if self._cache is not None:
            for draft, past, count in zip(drafts, computed, accepted, strict=True):
                length = draft.start + count
                self._cache.put(draft.seed, draft.input_ids[:length], past.truncate(length))
        return [
            Verdict(count, row_logprobs[: count + 1], *candidates_by_row.get(row, nothing))
            for row, (count, row_logprobs) in enumerate(zip(accepted, logprobs, strict=True))
        ]

    def _compute(self, drafts: list[Draft], pasts: list[KeyValues]) -> tuple[list[Tensor], list[KeyValues]]:
        """Return each sequence's hidden states, starting with the one that predicts the first drafted token, and its
        keys and values."""
        device = self._model.device
        new_ids = [
            torch.from_numpy(draft.input_ids[len(past) :].astype(int))
            for draft, past in zip(drafts, pasts, strict=True)
        ]
        counts = torch.tensor(list(map(len, new_ids)), device=device)
        ids = pad_sequence(new_ids, batch_first=True).to(device)
        if self._cache is None:
            mask = torch.arange(ids.shape[1], device=device) < counts[:, None]
            states, computed = final_hidden(self._model, ids, mask.long()), pasts
        else:
            batch = CachedBatch(self._model, pasts)
            states, computed = batch.forward(ids, counts), batch.key_values()
        starts = [draft.start - 1 - len(past) for draft, past in zip(drafts, pasts, strict=True)]
        return [
            row[start : len(row_ids)] for row, start, row_ids in zip(states, starts, new_ids, strict=True)
        ], computed

    def _candidates(self, hidden: list[Tensor], numbers: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Sample ids from p at each state [width] with the uniform `numbers`; return the ids and their log p."""
        results = []
        for start in range(0, len(hidden), self._chunk):
            rows = numbers[start : start + self._chunk]
            padded = pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
            logprobs = self._logprobs(torch.stack(hidden[start : start + self._chunk]))
            ids = sample_ids(logprobs, padded.to(logprobs.device))
            values = logprobs.gather(1, ids).cpu().numpy()
            columns = zip(ids.cpu().numpy().astype(np.int32), values, rows, strict=True)
            results += [(row_ids[: len(row)], row_values[: len(row)]) for row_ids, row_values, row in columns]
        return results

    def _logprobs(self, hidden: Tensor) -> Tensor:
        """Return log p over the real tokens, float32 [states, vocab_size]."""
        return self._head.logits(hidden)[:, : self._vocab_size].log_softmax(1)
