"""Rows of an embedding without a token: the padding past the tokenizer's last id, and holes between its ids."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayk.errors import InputError
from rayk.models import final_hidden, get_head, max_positions

_LARGEST_MASS, _LARGEST_FACTOR = 0.01, 4
_PROBE_TOKENS = 64


def ids_without_token(tokenizer: Any, columns: int) -> np.ndarray:
    """Return the ids below `columns` to which the tokenizer gives no token, int64 [ids]."""
    return np.setdiff1d(np.arange(columns), np.fromiter(tokenizer.get_vocab().values(), np.int64))


def check_mass(model: str, logprobs: Tensor, missing: np.ndarray) -> None:
    """Check that ids without a token have no probability to speak of.

    In trained models it is far below 1e-4. It counts as part of the tail, so a larger one would be taken from real
    tokens.

    Args:
        logprobs: log-probs over all columns of the head at some positions, [positions, columns].
        missing: the ids without a token, [ids].

    Raises:
        InputError: they have more than 1 % of the probability, and more than four times their share of the columns
            (models with random weights have flat distributions).
    """
    columns = logprobs.shape[1]
    mass = float(logprobs[:, torch.from_numpy(missing).to(logprobs.device)].exp().sum(1).mean())
    if mass > max(_LARGEST_MASS, _LARGEST_FACTOR * len(missing) / columns):
        raise InputError(
            f"The embedding of {model} has {columns:,} rows but its tokenizer only {columns - len(missing):,} tokens, "
            f"and the model gives {mass:.1%} of the probability to the others; save it with the tokenizer that belongs "
            "to it, or set the rows without a token to zero."
        )


@torch.no_grad()
def check_padding(model: Any, tokenizer: Any, name: str) -> None:
    """Check a loaded model on a short sequence; see `check_mass`."""
    head = get_head(model)
    missing = ids_without_token(tokenizer, head.vocab_size)
    if not len(missing):
        return
    known = np.setdiff1d(np.arange(head.vocab_size), missing)
    ids = torch.from_numpy(np.resize(known, min(_PROBE_TOKENS, max_positions(model.config))))[None].to(model.device)
    logits = head.logits(final_hidden(model, ids, torch.ones_like(ids))[0])
    check_mass(name, logits.log_softmax(1), missing)
