"""Which texts are nearest to others: by the words they share (BM25), or by what a model makes of them."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.errors import InputError
from rayk.models import quiet_loading

_BATCH_TEXTS = 32
_READING = "reading.json"


def scores_by_bm25(pool: Sequence[np.ndarray], queries: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
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

    Args:
        model: a folder or hub id. A folder that `save` wrote says itself how it reads.
        reading: how another one reads.
        named: the setting that names it.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(self, model: str, reading: "Reading | None" = None, named: str = "method.demonstrations.encoder"):
        from transformers import AutoModel

        self.tokenizer, self.model = load_encoder(model, AutoModel, named)
        saved = Path(model) / _READING
        if saved.is_file():
            reading = Reading(**json.loads(saved.read_text(encoding="utf-8")))
        self.reading = reading or Reading()
        self._longest = min(self.reading.max_tokens, getattr(self.model.config, "max_position_embeddings", math.inf))

    def scores(self, pool: Sequence[str], queries: Sequence[str]) -> Iterator[np.ndarray]:
        """For each query its cosine with each text of the pool, float32 [pool]."""
        theirs = self.vectors(pool)
        return (theirs @ vector for vector in self.vectors(queries))

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [texts, width]."""
        self.model.eval()
        starts = range(0, len(texts), _BATCH_TEXTS)
        return torch.cat([self.encode(texts[start : start + _BATCH_TEXTS]) for start in starts]).cpu().numpy()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`vectors` with their gradients."""
        given = self.tokenizer(
            [self.reading.prompt + text for text in texts], return_tensors="pt", padding=True, truncation=True,
            max_length=self._longest, return_token_type_ids=False,
        ).to(self.model.device)  # fmt: skip
        mask = given["attention_mask"][:, :, None]
        states = self.model(**given).last_hidden_state.float()
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=1)

    def save(self, folder: Path) -> None:
        """Write it for `Embedder(folder)`, and for `AutoModel.from_pretrained`."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / _READING).write_text(json.dumps(asdict(self.reading)), encoding="utf-8")


@dataclass(frozen=True)
class Reading:
    """How an encoder reads."""

    max_tokens: int = 512
    """Of a longer text the first so many."""
    prompt: str = ""
    """What stands before every text."""
    outputs: bool = False
    """Whether it reads a demonstration's output behind its input."""


def check_encoder(model: str, named: str, max_tokens: int = 0) -> None:
    """See that a model's settings and tokenizer can be loaded, without its weights, and that it reads `max_tokens`.

    Raises:
        InputError: they cannot, or it does not.
    """
    from transformers import AutoConfig

    _, settings = load_encoder(model, AutoConfig, named)
    if max_tokens > (limit := getattr(settings, "max_position_embeddings", math.inf)):
        section = named.rpartition(".")[0]
        raise InputError(f"{section}.max_tokens is {max_tokens}, but {named} '{model}' takes {limit}; lower it.")


def load_encoder(model: str, kind: Any, named: str, **options: Any) -> tuple[Any, Any]:
    """The tokenizer and the model (`kind`, a transformers auto class) of a folder or hub id.

    Raises:
        InputError: it cannot be loaded; the sentence begins with the setting that names it.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_loading():
            tokenizer, loaded = AutoTokenizer.from_pretrained(model), kind.from_pretrained(model, **options)
    except Exception as error:  # of any type, as in `rayk.models`
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{named} '{model}' cannot be loaded: {reason}") from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer, loaded


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
