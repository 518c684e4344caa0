"""Write a few rollouts of some steps to `rollouts.jsonl`, as samples of what the student generates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayk.report.run_directory import read_lines
from rayk.rollouts import Rollout
from rayk.signals.sequence import TokenSequence
from rayk.storage.atomic import write_whole

_RECORDED_STEPS = 10
_PER_STEP = 2


class RolloutSamples:
    """Append the first rollouts of about ten steps of the run, including the first and the last step.

    When opened at step n, it removes the rows of later steps, like `Recorder`.
    """

    def __init__(self, folder: Path, step: int, total_steps: int, tokenizer: Any):
        self._path, self._tokenizer, self._total_steps = folder / "rollouts.jsonl", tokenizer, total_steps
        self._every = max(1, total_steps // _RECORDED_STEPS)
        if self._path.exists():
            kept = [json.dumps(row) + "\n" for row in read_lines(self._path) if row["step"] <= step]
            write_whole(self._path, "".join(kept).encode())

    def record(self, step: int, sequences: Sequence[TokenSequence]) -> None:
        """Record some rollouts of `step`, counted from 1, if it is one of the recorded steps."""
        if step not in (1, self._total_steps) and step % self._every:
            return
        rollouts = [row for row in sequences if isinstance(row, Rollout)][:_PER_STEP]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(self._row(step, rollout)) + "\n" for rollout in rollouts)

    def _row(self, step: int, rollout: Rollout) -> dict[str, Any]:
        return {
            "step": step,
            "where": rollout.where,
            "prompt": self._tokenizer.decode(rollout.prompt_ids),
            # With several turns, the special tokens show who speaks.
            "completion": self._tokenizer.decode(rollout.completion_ids, skip_special_tokens=rollout.turns == 1),
            "tokens": len(rollout.completion_ids),
            "finish_reason": rollout.finish_reason,
        }
