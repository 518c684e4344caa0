"""Find the texts nearest to a query: by BM25, or by the cosine of an encoder's vectors."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.errors import InputError
from rayk.models import max_positions, quiet_loading

_BATCH_TEXTS = 32
_SETTINGS_FILE = "reading.json"


def bm25_scores(pool: Sequence[np.ndarray], queries: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield each query's BM25 score with every text of the pool, float32 [pool].

    Args:
        pool: token ids [length] of each text; tokens serve as words in any language.
        queries: token ids [length] of each query.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25()
    index.index([_words(ids) for ids in pool], show_progress=False)
    for query in queries:
        yield index.get_scores(_words(query))


@dataclass(frozen=True)
class EncoderSettings:
    """Preprocessing of an encoder's inputs; saved in the folder of its weights, with the fields' names as keys."""

    max_tokens: int = 512
    """Longer texts are truncated at the end."""
    prompt: str = ""
    """Text placed before every input."""
    outputs: bool = False
    """Whether a demonstration's output is encoded together with its input."""


class Embedder:
    """Encode texts as the mean of a transformers model's last hidden states.

    Args:
        model: a folder or hub id. A folder written by `save` contains its own settings.
        settings: settings of a model without saved ones.
        setting: the config key that names the model, for error messages.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(
        self, model: str, settings: EncoderSettings | None = None, setting: str = "method.demonstrations.encoder"
    ):
        from transformers import AutoModel

        self.tokenizer, self.model = load_encoder(model, AutoModel, setting)
        saved = Path(model) / _SETTINGS_FILE
        if saved.is_file():
            settings = EncoderSettings(**json.loads(saved.read_text(encoding="utf-8")))
        self.settings = settings or EncoderSettings()
        self._max_tokens = min(self.settings.max_tokens, max_positions(self.model.config))

    def scores(self, pool: Sequence[str], queries: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield each query's cosine with every text of the pool, float32 [pool]."""
        pool_vectors = self.vectors(pool)
        return (pool_vectors @ vector for vector in self.vectors(queries))

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Compute unit vectors of the texts, float32 [texts, width], batch by batch and without gradients."""
        self.model.eval()
        starts = range(0, len(texts), _BATCH_TEXTS)
        return torch.cat([self.encode(texts[start : start + _BATCH_TEXTS]) for start in starts]).cpu().numpy()

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Compute unit vectors of one batch of texts, float32 [texts, width], with gradients."""
        inputs = self.tokenizer(
            [self.settings.prompt + text for text in texts], return_tensors="pt", padding=True, truncation=True,
            max_length=self._max_tokens, return_token_type_ids=False,
        ).to(self.model.device)  # fmt: skip
        mask = inputs["attention_mask"][:, :, None]
        states = self.model(**inputs).last_hidden_state.float()
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=1)

    def save(self, folder: Path) -> None:
        """Write the model, its tokenizer and its settings for `Embedder(folder)` and `AutoModel.from_pretrained`."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / _SETTINGS_FILE).write_text(json.dumps(asdict(self.settings)), encoding="utf-8")


def check_encoder(model: str, setting: str, max_tokens: int = 0) -> None:
    """Check a model's config and tokenizer, without loading its weights, and that it accepts `max_tokens` tokens.

    Raises:
        InputError: the model cannot be loaded or accepts fewer tokens.
    """
    from transformers import AutoConfig

    _, config = load_encoder(model, AutoConfig, setting)
    if max_tokens > (limit := max_positions(config)):
        section = setting.rpartition(".")[0]
        raise InputError(f"{section}.max_tokens is {max_tokens}, but {setting} '{model}' takes {limit}; lower it.")


def load_encoder(model: str, kind: Any, setting: str, **options: Any) -> tuple[Any, Any]:
    """Load the tokenizer and the model (`kind`, a transformers auto class) of a folder or hub id.

    Raises:
        InputError: loading fails; the message begins with the config key that names the model.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_loading():
            tokenizer, loaded = AutoTokenizer.from_pretrained(model), kind.from_pretrained(model, **options)
    except Exception as error:  # transformers raises errors of many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{setting} '{model}' cannot be loaded: {reason}") from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer, loaded


def top_indices(scores: np.ndarray, count: int) -> list[int]:
    """Return the indices of the `count` highest scores [pool], highest first; of equal scores the lower index first."""
    if not count:
        return []
    lowest = np.partition(scores, -count)[-count]
    above, equal = np.flatnonzero(scores > lowest), np.flatnonzero(scores == lowest)
    chosen = np.concatenate([above, equal])[:count]
    return chosen[np.lexsort((chosen, -scores[chosen]))].tolist()


def _words(ids: np.ndarray) -> list[str]:
    return [str(token) for token in ids.tolist()]
