"""Direct preference optimization: the student learns to prefer the chosen of two answers to a prompt (DPO, Rafailov et
al. 2023, arXiv 2305.18290, eq. 7).

    L = −(1/N) Σ [ (1−ε)·log σ(m) + ε·log σ(−m) + (α/|y_c|)·log q(y_c) ],
    m = β·[ log q(y_c)/q_ref(y_c) − log q(y_r)/q_ref(y_r) ]

over N pairs of a chosen answer y_c and a rejected answer y_r to one prompt. The log-prob of an answer is the sum over
its tokens and EOS. The frozen reference q_ref is the initial student, or a teacher (`reference`). The initial student's
log-probs are computed once, before the first update, and stored in every checkpoint, so a resumed run has the same
reference. ε is `label_smoothing`, the assumed share of pairs with swapped labels.

Plain DPO (α = 0) lets the log-probs of chosen answers fall if those of rejected answers fall faster, and changes longer
answers more: the metrics show both. α is `chosen_weight`, the weight of a supervised loss on the chosen answers (Pang
et al. 2024, arXiv 2404.19733, eq. 1).
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from rayk.config import PreferenceConfig
from rayk.config.support import Logprob
from rayk.data.batches import Batch, collate
from rayk.data.examples import Example
from rayk.errors import RunFailed, UnusableSignal
from rayk.losses import dpo_loss, implicit_rewards, linear_cross_entropy, sequence_sum
from rayk.methods.base import Experience, Loss, Method, Student
from rayk.rollouts import Policy
from rayk.signals.sequence import TokenSequence
from rayk.teachers import Scorer

_HASH_BYTES = 16


@dataclass(frozen=True)
class Pairs(Experience):
    """An experience whose unit is the pair: rows 2i and 2i + 1 are the chosen and the rejected answer of pair i."""

    reference: Tensor = field(default_factory=lambda: torch.zeros(0))
    """The reference's log-prob of each answer, nats [rows]."""

    @property
    def count(self) -> int:
        return self.batch.rows // 2

    @property
    def lengths(self) -> list[int]:
        rows = [len(sequence) for sequence in self.batch.sequences]
        return [2 * max(pair) for pair in zip(rows[0::2], rows[1::2], strict=True)]

    def select(self, pairs: list[int]) -> Self:
        rows = [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]
        return replace(super().select(rows), reference=self.reference[rows])

    def to(self, device: torch.device | str) -> Self:
        return replace(super().to(device), reference=self.reference.to(device))


class Preference(Method):
    """DPO; see the module's docstring. Settings: `rayk.config.PreferenceConfig`."""

    settings: PreferenceConfig
    kind = "preference"
    uses_dropout = False  # the margin is 0 before the first update
    summary = "the student learns to prefer the chosen of two answers to a prompt"
    paper = "Rafailov et al. 2023 (DPO)"
    needs = "no teacher (the initial student is the reference); or, as `reference`, logprob: 4 bytes a token"

    def __init__(self, settings: PreferenceConfig, teacher: Scorer | None, policy: Policy | None = None):
        super().__init__(settings, teacher, policy)
        self._initial_logprobs: dict[bytes, float] = {}
        """The initial student's log-probs of whole answers, by a hash of their tokens."""

    def precompute(self, student: Student, batches: Iterable[Batch], gather: Callable[[Any], list[Any]]) -> None:
        """Compute the initial student's log-probs of all answers."""
        if self.settings.reference is not None:
            return
        logprobs = {
            _hash(row): logprob
            for batch in batches
            for row, logprob in zip(batch.sequences, _answer_logprobs(student, batch).tolist(), strict=True)
        }
        for part in gather(logprobs):
            self._initial_logprobs |= part

    async def prepare(self, batch: Batch) -> Pairs:
        answers = collate((answer for row in batch.sequences for answer in _answers(row)), batch.pad_id)
        if self.settings.reference is None:
            return Pairs(answers, reference=torch.tensor([self._initial_logprob(row) for row in answers.sequences]))
        assert self.teacher is not None
        try:
            signals = await self.teacher.ascore(answers, Logprob())
        except UnusableSignal as error:
            raise UnusableSignal(str(error), sorted({answer // 2 for answer in error.rows})) from error
        return Pairs(answers, reference=sequence_sum(signals.target_logprobs, signals.offsets))

    def _initial_logprob(self, row: TokenSequence) -> float:
        logprob = self._initial_logprobs.get(_hash(row))
        if logprob is None:
            raise RunFailed(
                f"{getattr(row, 'where', '')} is not one of the rows that the run started with, so its log-prob under "
                "the initial student is unknown; restore the rows, or start another run."
            )
        return logprob

    def loss(self, student: Student, experience: Experience) -> Loss:
        assert isinstance(experience, Pairs)
        settings = self.settings
        logprobs, reference = _answer_logprobs(student, experience.batch), experience.reference
        chosen, rejected = logprobs[0::2], logprobs[1::2]
        per_pair = dpo_loss(
            chosen, rejected, reference[0::2], reference[1::2], beta=settings.beta,
            label_smoothing=settings.label_smoothing,
        )  # fmt: skip
        rewards = implicit_rewards(logprobs, reference, settings.beta)
        margin = rewards[0::2] - rewards[1::2]
        tokens = experience.batch.offsets.diff().float()
        return Loss(
            per_pair - settings.chosen_weight * chosen / tokens[0::2],
            {
                "reward_margin": margin,
                # A margin of exactly 0 counts as half right.
                "reward_accuracy": 0.5 * (margin.sign() + 1),
                "chosen_reward": rewards[0::2],
                "rejected_reward": rewards[1::2],
                "chosen_logprob": chosen,
                "rejected_logprob": rejected,
                "chosen_tokens": tokens[0::2],
                "rejected_tokens": tokens[1::2],
            },
        )

    def state_dict(self) -> dict[str, Any]:
        if self.settings.reference is not None:
            return {}
        hashes = bytearray(b"".join(self._initial_logprobs))
        keys = torch.frombuffer(hashes, dtype=torch.uint8).reshape(-1, _HASH_BYTES)
        return {"keys": keys, "logprobs": torch.tensor([*self._initial_logprobs.values()])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            keys = (key.numpy().tobytes() for key in state["keys"])
            self._initial_logprobs = dict(zip(keys, state["logprobs"].tolist(), strict=True))


def _answer_logprobs(student: Student, batch: Batch) -> Tensor:
    """Return log q of each row's counted tokens, nats [rows]."""
    return sequence_sum(-linear_cross_entropy(student.hidden(batch), student.head, batch.targets), batch.offsets)


def _answers(row: TokenSequence) -> list[Example]:
    assert isinstance(row, Example) and row.rejected is not None
    return row.answers


def _hash(row: TokenSequence) -> bytes:
    """Return a hash of the row's tokens and of which of them are counted."""
    digest = hashlib.blake2b(row.input_ids.astype("<i4").tobytes(), digest_size=_HASH_BYTES)
    digest.update(row.counted.tobytes())
    return digest.digest()
