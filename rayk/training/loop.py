"""What one Ray Train worker does: prepare, step, measure, checkpoint, until the last step.

The result does not depend on the number of workers or on micro-batching: step i learns from the same rows whoever
takes them, and every unit (token, pair or query) weighs 1 / (the step's units over all workers).
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from rayk.config import ServedRollouts, TrainingConfig
from rayk.data.batches import Batch, BatchSampler, collate, micro_batches, pad_id_of
from rayk.data.examples import ExampleTable
from rayk.errors import RaykError, RunFailed
from rayk.evaluation.evaluate import Evaluation, Evaluator
from rayk.losses import token_mean
from rayk.methods import METHODS, Experience, Method
from rayk.models import CausalLM, load_tokenizer, pick_device
from rayk.models.student import count_parameters, make_model
from rayk.rollouts import Policy, Rollout, ServedPolicy, WorkerPolicy, summarize_rollouts, trainable_state_dict
from rayk.teachers import build_scorer
from rayk.teachers.cache import open_cache
from rayk.training.checkpoint import Checkpoint, CheckpointStore
from rayk.training.job import Job, Outcome, fetched
from rayk.training.optimizer import learning_rate_at, make_optimizer, steps_of_epochs
from rayk.training.ranks import Ranks, StopTogether, device_of_worker
from rayk.training.recorder import Recorder
from rayk.training.student import UNUSABLE, Step, Student, save_model, wrap
from rayk.training.supply import Prepared, Span, Supply

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1000  # sorted by length among themselves


def train_worker(job: Job) -> Outcome:
    """Train Worker's function: runs one rank from the latest checkpoint to the last step."""
    ranks = Ranks()
    trainer: Trainer | None = None
    problem: Exception | None = None
    _use_threads(job.config.training, ranks)
    try:
        trainer = Trainer(job, ranks)
    except Exception as error:
        problem = error
    with ExitStack() as stack:
        try:
            ranks.agree(problem)
            assert trainer is not None
            stack.callback(trainer.close)
            return trainer.run()
        except StopTogether as stop:
            # Returned, not raised: Ray Train would start the group again, and again.
            step, total = (trainer.step, trainer.total_steps) if trainer is not None else (0, 0)
            return Outcome(step, total, problem=stop.problem)


def evaluate_worker(job: Job) -> Evaluation:
    """Measure the job's student as it is, on all evaluation rows."""
    config = job.config
    tokenizer = load_tokenizer(job.tokenizer, trust_remote_code=config.student.trust_remote_code)
    model = make_model(config.student, tokenizer, config.seed, pick_device())
    examples = list(ExampleTable(fetched(job.evaluation_table)))
    with open_cache(config.cache) as cache:
        teacher = build_scorer(config, job.teachers(cache))
        evaluator = Evaluator(
            config.evaluation, examples, tokenizer, teacher, config.training.micro_batch_tokens,
            views=fetched(job.views),
        )  # fmt: skip
        return evaluator.run(Student(model.eval(), config.training.precision), answers=True)


class Trainer:
    """One rank's state and its loop."""

    def __init__(self, job: Job, ranks: Ranks):
        config = job.config
        self.config, self.settings, self.ranks = config, config.training, ranks
        self.device = device_of_worker()
        self.tokenizer = load_tokenizer(job.tokenizer, trust_remote_code=config.student.trust_remote_code)
        self.table = ExampleTable(fetched(job.train_table))
        self._closing = ExitStack()
        self.teachers = job.teachers(self._closing.enter_context(open_cache(config.cache)))
        self._cached_tokens = 0
        teacher = build_scorer(config, self.teachers)
        model = make_model(config.student, self.tokenizer, config.seed, self.device)
        self.policy = _policy(job, model, self.tokenizer, publishes=ranks.rank == 0)
        self.method: Method = METHODS[config.method.kind](config.method, teacher, self.policy)
        views = fetched(job.views)
        self.student = Student(model, self.settings.precision)
        self.module = Step(self.student, self.method).to(self.device).train()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, self.settings)
        self.total_steps = self.settings.steps or steps_of_epochs(self.settings, len(self.table))
        self.sampler = BatchSampler(self.table.lengths, self.settings.batch_size, config.seed, self.total_steps)
        pad_id = pad_id_of(self.tokenizer)
        beside = None if job.pretraining_table is None else ExampleTable(fetched(job.pretraining_table))
        self.supply = Supply(
            config, self.method, self.policy, self.table, self.sampler, pad_id, ranks.rank, ranks.world,
            pretraining=beside, views=views,
        )  # fmt: skip
        self.store = CheckpointStore(config.checkpoints)
        self._base = job.base
        self.step = 0
        self._midway = False
        """The weights are those of no whole number of steps, so not to be kept."""
        self._measured = True
        """The evaluation that was due after `step` is made."""
        self._restore()
        self._saved = self.step
        self.evaluator: Evaluator | None = None
        if job.evaluation_table is not None:
            self.evaluator = Evaluator(
                config.evaluation, ExampleTable(fetched(job.evaluation_table)), self.tokenizer,
                teacher, self.settings.micro_batch_tokens, ranks.rank, ranks.world, views,
            )  # fmt: skip
        self.recorder = Recorder(config.output_path, self.step, config.tracking) if ranks.rank == 0 else None

    def run(self) -> Outcome:
        self._start_together()
        evaluation = None if self._measured else self._measured_late()
        experiences = self.supply.stream(self.step, self.total_steps)
        try:
            for step in range(self.step, self.total_steps):
                row = self._step(step, experiences)
                self.step = step + 1
                if self.policy is not None:
                    row |= self._wait_for_policy(row)
                last = self.step == self.total_steps
                if self.evaluator and (last or self.step % (self.config.evaluation.every_steps or math.inf) == 0):
                    try:
                        evaluation = self._evaluate(last)
                    except StopTogether:
                        self._measured = False
                        if self.recorder:  # its step is done, whatever became of the evaluation
                            self.recorder.record(row)
                        raise
                    row |= _of_evaluation(evaluation)
                if self.recorder:
                    self.recorder.record(row)
                if last or self.step % self.settings.checkpoint_every_steps == 0:
                    self._checkpoint()
                self._advance()
        except StopTogether:
            if self.step > self._saved and not self._midway:
                self._checkpoint()
            raise
        finally:
            experiences.close()
        if self.ranks.rank == 0:
            save_model(self.student.model, self.tokenizer, self.config.output_path / "model")
        if evaluation is None and self.evaluator:  # resumed after the last step
            evaluation = self._evaluate(last=True)
        return Outcome(self.step, self.total_steps, evaluation, size=count_parameters(self.student.model))

    def close(self) -> None:
        self._closing.close()
        if self.recorder:
            self.recorder.close()

    def _start_together(self) -> None:
        """What ranks do in common once each of them stands; before, one that fails would leave the others waiting."""
        steps, attempts = zip(*self.ranks.gather((self.step, uuid4().hex)), strict=True)
        if len(set(steps)) > 1:
            raise StopTogether(
                RunFailed(
                    f"The workers do not find the same checkpoint in '{self.store.place}'; the output directory (or "
                    "training.checkpoints) must be one that all nodes share."
                )
            )
        if not self.step:
            self._look_at_start()
        self.wrapped: Any = wrap(self.module)
        if (policy := self.policy) is not None:
            self._together(lambda: policy.begin(attempts[0]))

    def _advance(self) -> None:
        """Have the policy write with the weights that the learner has now."""
        if self.policy is not None:
            self._together(lambda: self.supply.advance(self.step))

    def _together(self, work: Callable[[], None]) -> None:
        """Do what may fail on this rank alone, and hear whether it has on any."""
        problem = None
        try:
            work()
        except Exception as error:
            problem = error
        self.ranks.agree(problem)

    def _look_at_start(self) -> None:
        """Have the method look at the initial weights; where there is a checkpoint, its state is what it saw."""
        seen, problem = None, None
        self.student.eval()
        try:
            with torch.no_grad():
                seen = self.method.look_at_start(self.student, self._share_of_everything())
        except Exception as error:
            problem = error
        self.student.train()
        self.ranks.agree(problem)
        self.method.on_start(self.ranks.gather(seen))

    def _share_of_everything(self) -> Iterator[Batch]:
        """This rank's share of the rows that the run will learn from, by length."""
        steps = min(self.total_steps, -(-len(self.table) // self.settings.batch_size))
        taken = np.unique(np.concatenate([self.sampler.rows(step) for step in range(steps)]))
        mine = taken[self.ranks.rank :: self.ranks.world]
        for start in range(0, len(mine), _ROWS_AT_ONCE):
            chunk = mine[start : start + _ROWS_AT_ONCE]
            rows = [answer for row in chunk for answer in self.table[int(row)].answers]
            for group in micro_batches([len(row) for row in rows], self.settings.micro_batch_tokens):
                yield collate([rows[row] for row in group], pad_id_of(self.tokenizer)).to(self.device)

    def _step(self, step: int, experiences: Iterator[Prepared]) -> dict[str, Any]:
        """One optimiser step; its row of metrics."""
        began = time.perf_counter()
        prepared, problem = None, None
        try:
            prepared = next(experiences)
        except Exception as error:
            problem = error
        waited = time.perf_counter() - began
        self.ranks.agree(problem)
        assert prepared is not None
        experience = self.method.together(prepared.experience, self.ranks.sums)
        batch = experience.batch
        counted, tokens, skipped, cached = self.ranks.sums(
            [batch.counted_tokens, sum(map(len, batch.sequences)), experience.skipped, self._newly_cached()]
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.total_steps, self.settings)
        seed = int(np.random.SeedSequence([self.config.seed, step, self.ranks.rank]).generate_state(1)[0])
        torch.manual_seed(seed)
        updates = []
        for part in self.method.updates(experience, seed):
            updates.append(self._update(step, part))
            self._midway = True
        self._midway = False
        self.method.on_step(step + 1)
        seconds = time.perf_counter() - began
        return {
            "step": step + 1,
            "epoch": (step + 1) * self.settings.batch_size / len(self.table),
            **_mean_over(updates),
            "learning_rate": learning_rate_at(step, self.total_steps, self.settings),
            "tokens": int(tokens),
            "counted_tokens": int(counted),
            "skipped_rows": int(skipped),
            "cached_tokens": int(cached),
            "tokens_per_second": tokens / seconds,
            "teacher_wait_seconds": waited,
            "step_seconds": seconds,
            "ended_at": time.time(),
            **(_spanned("score", prepared.scored) if self.teachers else {}),
            **(_spanned("generate", prepared.written) if prepared.written else {}),
            **self._of_rollouts(prepared.experience, step),
        }

    def _wait_for_policy(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Let it write what it was promised the present weights for; the step's times with that wait."""
        began = time.perf_counter()
        self.supply.finish()
        waited = time.perf_counter() - began
        seconds = row["step_seconds"] + waited
        return {
            "policy_wait_seconds": waited,
            "step_seconds": seconds,
            "tokens_per_second": row["tokens"] / seconds,
            "ended_at": time.time(),
        }

    def _update(self, step: int, experience: Experience) -> tuple[float, dict[str, float]]:
        """One optimiser update; how many units it learned from, and the means over them. What stands beside them is
        averaged over its own units, and added."""
        means: dict[str, float] = {}
        parts = [part for part in (experience, experience.beside) if part is not None]
        counts = self.ranks.sums([part.count for part in parts])
        for part, count in zip(parts, counts, strict=True):
            sums = self._backward(part, count)
            names = sorted(sums)
            totals = dict(zip(names, self.ranks.sums([sums[name] for name in names]), strict=True))
            means |= {name: total / max(count, 1) + means.get(name, 0.0) for name, total in totals.items()}
        if means.get(UNUSABLE) and self.settings.unusable_rows == "stop":
            self.ranks.agree(
                RunFailed(
                    f"In step {step + 1}, tokens have become more than method.ratio_limit times likelier since they "
                    "were written; lower training.learning_rate, rollouts.max_staleness or method.inner_epochs, or set "
                    "training.unusable_rows to skip."
                )
            )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm or math.inf)
        self.ranks.agree(
            None
            if math.isfinite(float(norm))
            else RunFailed(
                f"The gradient of step {step + 1} is not finite; lower training.learning_rate, or set warmup_steps."
            )
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return counts[0], {**means, "gradient_norm": float(norm)}

    def _of_rollouts(self, experience: Experience, step: int) -> dict[str, float]:
        """Means over what the policy wrote for this step."""
        if self.config.rollouts is None:
            return {}
        rows = experience.batch.sequences
        sums = summarize_rollouts([row for row in rows if isinstance(row, Rollout)], version=step)
        count, *totals = self.ranks.sums(list(sums.values()))
        return {
            "rollouts": int(count),
            **{name: total / max(count, 1) for name, total in zip(list(sums)[1:], totals, strict=True)},
        }

    def _newly_cached(self) -> int:
        """Counted tokens that the cache has spared the teachers since the step before; they may be for later steps."""
        before = self._cached_tokens
        self._cached_tokens = sum(teacher.statistics.cached_tokens for teacher in self.teachers.values())
        return self._cached_tokens - before

    def _backward(self, experience: Experience, count: float) -> dict[str, float]:
        """Gradients of the whole step's loss; sums of the loss and its terms over this rank's units."""
        groups = micro_batches(experience.lengths, self.settings.micro_batch_tokens)
        sums: dict[str, Tensor] = {}
        for number, rows in enumerate(groups, start=1):
            part = experience.select(rows).to(self.device)
            quiet = self.wrapped.no_sync() if self.ranks.world > 1 and number < len(groups) else nullcontext()
            with quiet:
                per_token, terms = self.wrapped(part)
                # DDP averages over ranks what we want summed.
                (token_mean(per_token, count) * self.ranks.world).backward()
            for name, term in {"loss": per_token.detach(), **terms}.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + term.sum()
        return {name: float(value) for name, value in sums.items()}

    def _evaluate(self, last: bool) -> Evaluation:
        assert self.evaluator is not None
        evaluation, problem = None, None
        self.student.eval()
        try:
            evaluation = self.evaluator.run(self.student, answers=last)
        except Exception as error:
            problem = error
        self.student.train()
        self.ranks.agree(problem)
        whole = Evaluation.merge(self.ranks.gather(evaluation))
        self.method.on_evaluation(whole.metrics)
        return whole

    def _measured_late(self) -> Evaluation:
        """The evaluation that the run before had to stop at; its numbers join its step's row."""
        evaluation = self._evaluate(last=self.step == self.total_steps)
        self._measured = True
        if self.recorder:
            self.recorder.add_to_last(_of_evaluation(evaluation))
        return evaluation

    def _checkpoint(self) -> None:
        self._saved = self.step
        states = self.ranks.gather(self.method.state_dict())
        rollouts = [row for rows in self.ranks.gather(self.supply.state(self.step)) for row in rows]
        problem = None
        if self.ranks.rank == 0:
            state = Checkpoint(
                self.step, trainable_state_dict(self.module), self.optimizer.state_dict(), states, rollouts, self._base,
                self._measured,
            )  # fmt: skip
            try:
                self.store.save(state, self.settings.keep_checkpoints)
            except OSError as error:
                problem = RunFailed(f"The checkpoint of step {self.step} could not be written: {error}")
        self.ranks.agree(problem)

    def _restore(self) -> None:
        checkpoint = self.store.latest()
        if checkpoint is None:
            return
        missing, unexpected = self.module.load_state_dict(checkpoint.model, strict=False)
        if unexpected or set(missing) & set(trainable_state_dict(self.module)):
            raise RaykError(f"The checkpoint of step {checkpoint.step} belongs to another student; use another output.")
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.method.load_state_dict(checkpoint.method[self.ranks.rank % len(checkpoint.method)])
        self.supply.load_state(checkpoint.step, checkpoint.rollouts)
        self.step, self._measured = checkpoint.step, checkpoint.measured


def _policy(job: Job, model: CausalLM, tokenizer: Any, publishes: bool) -> Policy | None:
    """Who writes with the learner's weights, where the run has `rollouts`."""
    rollouts, training = job.config.rollouts, job.config.training
    if job.policy is not None:
        assert isinstance(rollouts, ServedRollouts)
        return ServedPolicy(model, rollouts, job.policy, publishes=publishes)
    if rollouts is None:
        return None
    return WorkerPolicy(
        model, tokenizer, rollouts, batch_tokens=training.micro_batch_tokens, precision=training.precision
    )


def _spanned(name: str, span: Span) -> dict[str, float]:
    return {f"{name}_started_at": span.started_at, f"{name}_seconds": span.seconds}


def _of_evaluation(evaluation: Evaluation) -> dict[str, float]:
    return {f"evaluation_{name}": value for name, value in evaluation.metrics.items()}


def _mean_over(updates: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """The mean of each number, weighted by the units of its update."""
    if len(updates) == 1:
        return updates[0][1]
    whole = max(sum(count for count, _ in updates), 1)
    return {name: sum(count * means[name] for count, means in updates) / whole for name in updates[0][1]}


def _use_threads(settings: TrainingConfig, ranks: Ranks) -> None:
    if settings.workers > 0 or settings.threads:
        torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 1) // ranks.local_world))
