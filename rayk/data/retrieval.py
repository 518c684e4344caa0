"""Which texts are nearest to others: by the words they share (BM25), or by what a model makes of them."""

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Ordered

import numpy as np
import torch

from rayk.errors import InputError

_BATCH_TEXTS = 32
_LONGEST_TOKENS = 512


def scores_by_bm25(pool: Ordered[np.ndarray], queries: Ordered[np.ndarray]) -> Iterator[np.ndarray]:
    """For each query how well each text of the pool matches, float32 [pool].

    Args:
        pool: token ids [length] of each text: a tokenizer's tokens are words in any language.
        queries: likewise.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25()
    index.index([_words(ids) for ids in pool], show_progress=False)
    for query in queries:
        yield index.get_scores(_words(query))


class Embedder:
    """Texts as the means of a transformers model's last hidden states.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(self, model: str):
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer, self._model = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
        except (OSError, ValueError) as error:
            raise InputError(
                f"method.demonstrations.encoder '{model}' cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self._tokenizer.padding_side = "right"

    def scores(self, pool: Ordered[str], queries: Ordered[str]) -> Iterator[np.ndarray]:
        """For each query its cosine with each text of the pool, float32 [pool]."""
        theirs = self.vectors(pool)
        return (theirs @ vector for vector in self.vectors(queries))

    @torch.inference_mode()
    def vectors(self, texts: Ordered[str]) -> np.ndarray:
        """Unit vectors, float32 [texts, width]; of a long text the first 512 tokens are read."""
        parts = []
        for start in range(0, len(texts), _BATCH_TEXTS):
            given = self._tokenizer(
                list(texts[start : start + _BATCH_TEXTS]), return_tensors="pt", padding=True, truncation=True,
                max_length=_LONGEST_TOKENS, return_token_type_ids=False,
            )  # fmt: skip
            mask = given["attention_mask"][:, :, None]
            states = self._model(**given).last_hidden_state.float()
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            parts.append(torch.nn.functional.normalize(mean, dim=1))
        return torch.cat(parts).numpy()


def best_of(scores: np.ndarray, count: int) -> list[int]:
    """The places of the `count` highest scores [pool], the highest first; of equals the earlier first."""
    if not count:
        return []
    lowest = np.partition(scores, -count)[-count]
    above, equal = np.flatnonzero(scores > lowest), np.flatnonzero(scores == lowest)
    chosen = np.concatenate([above, equal])[:count]
    return chosen[np.lexsort((chosen, -scores[chosen]))].tolist()


def _words(ids: np.ndarray) -> list[str]:
    return [str(each) for each in ids.tolist()]
