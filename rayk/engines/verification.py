"""What a teacher's model does with drafts (`rayk.engines.speculative`): log p of drafted tokens, which are kept, and
candidates for the place of the first that is not.

Keys and values of sequences seen before are kept as long as they fit, so that a call reads the drafted tokens alone. A
sequence is known by its seed and compared by content; where it is not found (another replica had it, others pushed it
out) it is read from the start, with the same answer.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rayk.engines.speculative import Draft, Verdict, sample_ids
from rayk.models import CausalLM, Head, final_hidden
from rayk.models.kv_cache import Batch, KeyValues, can_continue


class PrefixCache:
    """Keys and values by sequence, the least recently used dropped first. Not for concurrent use."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._kept: OrderedDict[int, tuple[np.ndarray, KeyValues]] = OrderedDict()
        self.nbytes = 0

    def find(self, draft: Draft) -> KeyValues:
        """What is kept of the draft's own beginning, up to two tokens before the first drafted one: the state of the
        last token before a draft is what predicts it."""
        if draft.seed not in self._kept:
            return KeyValues()
        ids, past = self._kept[draft.seed]
        shared = min(len(ids), draft.start - 1)
        different = np.flatnonzero(ids[:shared] != draft.input_ids[:shared])
        return past.truncate(int(different[0]) if len(different) else shared)

    def keep(self, seed: int, input_ids: np.ndarray, past: KeyValues) -> None:
        """Remember the keys and values of all `input_ids`."""
        self.nbytes -= self._kept.pop(seed)[1].nbytes if seed in self._kept else 0
        self._kept[seed] = (input_ids, past.clone())
        self.nbytes += past.nbytes
        while self.nbytes > self._max_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1][1].nbytes


class Verifier:
    """Verifies drafts with one model, whose real tokens are the first `vocab_size` columns: p is the distribution among
    those.

    Args:
        chunk: for so many positions at a time there are logits.
    """

    def __init__(self, model: CausalLM, head: Head, vocab_size: int, *, chunk: int, cache_bytes: int):
        self._model, self._head, self._vocab_size, self._chunk = model, head, vocab_size, chunk
        self._cache = PrefixCache(cache_bytes) if can_continue(model) else None

    @torch.inference_mode()
    def verify(self, drafts: Sequence[Draft]) -> list[Verdict]:
        """A verdict each, in order."""
        pasts = [KeyValues() if self._cache is None else self._cache.find(draft) for draft in drafts]
        verdicts: dict[int, Verdict] = {}
        for known in (True, False):  # apart: beside a sequence that is read whole, short ones would be padding
            rows = [row for row, past in enumerate(pasts) if (len(past) > 0) == known]
            if rows:
                answers = self._verify([drafts[row] for row in rows], [pasts[row] for row in rows])
                verdicts |= zip(rows, answers, strict=True)
        return [verdicts[row] for row in range(len(drafts))]

    def _verify(self, drafts: list[Draft], pasts: list[KeyValues]) -> list[Verdict]:
        hidden, read = self._read(drafts, pasts)
        counts = [draft.drafted for draft in drafts]
        tested = torch.cat([states[:count] for states, count in zip(hidden, counts, strict=True)])
        targets = torch.from_numpy(np.concatenate([draft.input_ids[draft.start :] for draft in drafts]).astype(int))
        parts = zip(tested.split(self._chunk), targets.to(tested.device).split(self._chunk), strict=True)
        found = [self._logprobs(states).gather(1, ids[:, None])[:, 0] for states, ids in parts]
        logprobs = np.split(torch.cat(found).cpu().numpy(), np.cumsum(counts)[:-1])
        kept = [draft.count_accepted(own) for draft, own in zip(drafts, logprobs, strict=True)]
        wanting = [row for row, draft in enumerate(drafts) if kept[row] < draft.drafted or not draft.drafted]
        candidates = self._candidates(
            [hidden[row][kept[row]] for row in wanting], [drafts[row].candidate_numbers(kept[row]) for row in wanting]
        )
        drawn = dict(zip(wanting, candidates, strict=True))
        nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
        if self._cache is not None:
            for draft, past, own in zip(drafts, read, kept, strict=True):
                length = draft.start + own
                self._cache.keep(draft.seed, draft.input_ids[:length], past.truncate(length))
        return [
            Verdict(own, row_logprobs[: own + 1], *drawn.get(row, nothing))
            for row, (own, row_logprobs) in enumerate(zip(kept, logprobs, strict=True))
        ]

    def _read(self, drafts: list[Draft], pasts: list[KeyValues]) -> tuple[list[Tensor], list[KeyValues]]:
        """Each sequence's hidden states from the one that predicts its first drafted token on, and its key-values."""
        device = self._model.device
        rest = [
            torch.from_numpy(draft.input_ids[len(past) :].astype(int))
            for draft, past in zip(drafts, pasts, strict=True)
        ]
        counts = torch.tensor(list(map(len, rest)), device=device)
        ids = pad_sequence(rest, batch_first=True).to(device)
        if self._cache is None:
            mask = torch.arange(ids.shape[1], device=device) < counts[:, None]
            states, read = final_hidden(self._model, ids, mask.long()), pasts
        else:
            batch = Batch(self._model, pasts)
            states, read = batch.read(ids, counts), batch.key_values()
        starts = [draft.start - 1 - len(past) for draft, past in zip(drafts, pasts, strict=True)]
        return [row[start : len(own)] for row, start, own in zip(states, starts, rest, strict=True)], read

    def _candidates(self, hidden: list[Tensor], numbers: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids drawn from p after each of the states [width] by its numbers, and their log p."""
        results = []
        for start in range(0, len(hidden), self._chunk):
            rows = numbers[start : start + self._chunk]
            padded = pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
            logprobs = self._logprobs(torch.stack(hidden[start : start + self._chunk]))
            ids = sample_ids(logprobs, padded.to(logprobs.device))
            values = logprobs.gather(1, ids).cpu().numpy()
            columns = zip(ids.cpu().numpy().astype(np.int32), values, rows, strict=True)
            results += [(own[: len(row)], own_values[: len(row)]) for own, own_values, row in columns]
        return results

    def _logprobs(self, hidden: Tensor) -> Tensor:
        """log p among the real tokens, float32 [states, vocab_size]."""
        return self._head.logits(hidden)[:, : self._vocab_size].log_softmax(1)
