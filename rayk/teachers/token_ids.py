"""Whether a teacher reads the token ids of a batch as the batch's tokenizer does."""

import logging
import threading
from typing import Any

from rayk.engines.base import EngineInfo
from rayk.errors import InputError
from rayk.models import load_tokenizer, tokenizer_fingerprint
from rayk.models.vocabulary import compare_vocabularies, read_vocabulary

logger = logging.getLogger(__name__)


class TokenIdCheck:
    """Compares the tokenizers of batches (`rayk.data.Batch.tokenizer`) with a teacher's, each tokenizer once.

    `rayk run` compares all vocabularies at its start. In a training loop of the user's own, a teacher with another
    tokenizer would return signals for other tokens than the student's, without any error.
    """

    def __init__(self, name: str, info: EngineInfo, trust_remote_code: bool):
        self._name, self._info, self._trust_remote_code = name, info, trust_remote_code
        self._compared: Any = None
        self._lock = threading.Lock()

    def check(self, batch: Any) -> None:
        """Compare the batch's tokenizer, if it has one, with the teacher's.

        Raises:
            InputError: they give a token different ids.
        """
        tokenizer = getattr(batch, "tokenizer", None)
        if tokenizer is None or not self._info.tokenizer_fingerprint:
            return
        with self._lock:
            if tokenizer is not self._compared and tokenizer_fingerprint(tokenizer) != self._info.tokenizer_fingerprint:
                self._compare(tokenizer)
            self._compared = tokenizer

    def _compare(self, tokenizer: Any) -> None:
        try:
            own = load_tokenizer(self._info.model, trust_remote_code=self._trust_remote_code)
        except InputError:
            logger.warning(
                "Teacher '%s' has another tokenizer than the batches, and it cannot be compared here, because '%s' "
                "cannot be loaded.", self._name, self._info.model,
            )  # fmt: skip
            return
        try:
            compare_vocabularies(read_vocabulary(tokenizer), read_vocabulary(own, self._info.vocab_size))
        except InputError as error:
            raise InputError(
                f"Teacher '{self._name}' and the tokenizer of the batches give tokens different ids ({error}), so its "
                "signals would be for other tokens. Make the batches and the student with the teacher's tokenizer, or "
                "use `rayk run` with method.alignment."
            ) from error
