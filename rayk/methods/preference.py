"""Direct preference optimisation: of two answers to a prompt the student comes to prefer the chosen one (DPO, Rafailov
et al. 2023, arXiv 2305.18290, eq. 7).

    L = −(1/N) Σ [ (1−ε)·log σ(m) + ε·log σ(−m) + (α/|y_c|)·log q(y_c) ],
    m = β·[ log q(y_c)/q_ref(y_c) − log q(y_r)/q_ref(y_r) ]

over N pairs of a chosen answer y_c and a rejected one y_r to one prompt, each log-prob the sum over the answer's tokens
and its EOS. The frozen reference q_ref is the student as the run began, or a teacher (`reference`). Of the first the
log-probs are taken once, before the first update, and kept in every checkpoint: they can never be those of weights that
have moved. ε is `label_smoothing`, the share of pairs taken to be the wrong way round.

DPO itself (α = 0) does not keep the chosen answers' own log-probs from falling, as long as the rejected ones' fall
faster, and longer answers move further: both are among the metrics. α is `chosen_weight`, of supervision on the chosen
answers beside (Pang et al. 2024, arXiv 2404.19733, eq. 1).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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

_KEY_BYTES = 16


@dataclass(frozen=True)
class Pairs(Experience):
    """An experience whose unit is the pair: rows 2i and 2i + 1 are the chosen and the rejected answer of pair i."""

    reference: Tensor = field(default_factory=lambda: torch.zeros(0))
    """What the reference gives each answer, nats [rows]."""

    @property
    def count(self) -> int:
        return self.batch.rows // 2

    @property
    def lengths(self) -> list[int]:
        rows = [len(sequence) for sequence in self.batch.sequences]
        return [2 * max(pair) for pair in zip(rows[0::2], rows[1::2], strict=True)]

    def select(self, pairs: list[int]) -> "Pairs":
        rows = [row for pair in pairs for row in (2 * pair, 2 * pair + 1)]
        part = super().select(rows)
        assert isinstance(part, Pairs)
        return replace(part, reference=self.reference[rows])

    def to(self, device: torch.device | str) -> "Pairs":
        moved = super().to(device)
        assert isinstance(moved, Pairs)
        return replace(moved, reference=self.reference.to(device))


class Preference(Method):
    """See the module's docstring; the settings are `rayk.config.PreferenceConfig`."""

    settings: PreferenceConfig
    kind = "preference"
    summary = "of two answers to a prompt the student comes to prefer the chosen one"
    paper = "Rafailov et al. 2023 (DPO)"
    needs = "no teacher: the student as it begins is the reference; or, as `reference`, logprob: 4 bytes a token"

    def __init__(self, settings: PreferenceConfig, teacher: Scorer | None, policy: Policy | None = None, **parts: Any):
        super().__init__(settings, teacher, policy, **parts)
        self._initial: dict[bytes, float] = {}
        """The initial student's log-probs of whole answers, by their content: whichever row or epoch asks."""

    def look_at_start(self, student: Student, batches: Iterable[Batch]) -> dict[bytes, float]:
        """The initial student's log-probs of the batches' answers."""
        if self.settings.reference is not None:
            return {}
        return {
            _key(row): logprob
            for batch in batches
            for row, logprob in zip(batch.sequences, _logprobs(student, batch).tolist(), strict=True)
        }

    def on_start(self, seen: Sequence[Any]) -> None:
        for part in seen:
            self._initial |= part

    async def prepare(self, batch: Batch) -> Pairs:
        answers = collate((answer for row in batch.sequences for answer in _answers(row)), batch.pad_id)
        if self.settings.reference is None:
            return Pairs(answers, reference=torch.tensor([self._of_initial(row) for row in answers.sequences]))
        assert self.teacher is not None
        try:
            signals = await self.teacher.ascore(answers, Logprob())
        except UnusableSignal as error:
            raise UnusableSignal(str(error), sorted({answer // 2 for answer in error.rows})) from error
        return Pairs(answers, reference=sequence_sum(signals.target_logprobs, signals.offsets))

    def _of_initial(self, row: TokenSequence) -> float:
        found = self._initial.get(_key(row))
        if found is None:
            raise RunFailed(
                f"{getattr(row, 'where', '')} is none of the rows the run began with, so it is not known what the "
                "initial student made of it; give the run its rows back, or start another."
            )
        return found

    def loss(self, student: Student, experience: Experience) -> Loss:
        assert isinstance(experience, Pairs)
        settings = self.settings
        logprobs, reference = _logprobs(student, experience.batch), experience.reference
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
                # A margin of exactly 0 is a coin's toss.
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
        keys = torch.frombuffer(bytearray(b"".join(self._initial)), dtype=torch.uint8).reshape(-1, _KEY_BYTES)
        return {"keys": keys, "logprobs": torch.tensor([*self._initial.values()])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            keys = (key.numpy().tobytes() for key in state["keys"])
            self._initial = dict(zip(keys, state["logprobs"].tolist(), strict=True))


def _logprobs(student: Student, batch: Batch) -> Tensor:
    """log q of each row's counted tokens together, nats [rows]."""
    return sequence_sum(-linear_cross_entropy(student.hidden(batch), student.head, batch.targets), batch.offsets)


def _answers(row: TokenSequence) -> list[Example]:
    assert isinstance(row, Example) and row.rejected is not None
    return row.answers


def _key(row: TokenSequence) -> bytes:
    """The same for the same tokens of which the same count."""
    digest = hashlib.blake2b(row.input_ids.astype("<i4").tobytes(), digest_size=_KEY_BYTES)
    digest.update(row.counted.tobytes())
    return digest.digest()
