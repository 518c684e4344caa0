"""The training loop of one rank: prepare, update, evaluate, checkpoint, until the last step.

The result does not depend on the number of workers or micro-batches: the rows of step i are the same whichever worker
has them, and every unit (token, pair or query) has weight 1 / (number of units of the step over all workers).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from rayk.data.batches import Batch, BatchSampler, collate, get_pad_id, micro_batches
from rayk.data.examples import ExampleTable
from rayk.errors import Interrupted, RaykError, RunFailed
from rayk.evaluation.evaluate import Evaluation, Evaluator
from rayk.evaluation.initial import read_initial_metrics, record_initial_evaluation
from rayk.methods import Method, OnPolicyMethod, resolve_method
from rayk.models import load_tokenizer
from rayk.models.ends import set_end_token_ids
from rayk.models.student import count_parameters, make_model, saved_dtype
from rayk.serving.weights import trainable_state_dict
from rayk.teachers import Scorer, build_scorer
from rayk.teachers.cache import open_cache
from rayk.training.best import BestEvaluation
from rayk.training.checkpoint import Checkpoint, CheckpointStore
from rayk.training.experiences import ExperienceSource, PreparedStep
from rayk.training.interruption import StopRequest
from rayk.training.job import Job, Outcome, fetch
from rayk.training.learner import Learner
from rayk.training.metrics import evaluation_metrics, policy_wait_metrics, rollout_metrics, span_metrics
from rayk.training.optimizer import learning_rate_at, steps_of_epochs
from rayk.training.policy import make_policy
from rayk.training.ranks import AllRanksStop, Ranks, worker_device
from rayk.training.recorder import Recorder
from rayk.training.rollout_samples import RolloutSamples
from rayk.training.student import LossModule, Student, save_model

_CHUNK_ROWS = 1000  # sorted by length within a chunk


class Trainer:
    """The state of one rank, and its loop."""

    def __init__(self, job: Job, ranks: Ranks):
        config = job.config
        self.config, self.settings, self.ranks = config, config.training, ranks
        self.device = worker_device()
        self.tokenizer = load_tokenizer(job.tokenizer, trust_remote_code=config.student.trust_remote_code)
        self.tokenizer.chat_template = job.chat_template or self.tokenizer.chat_template
        self._pad_id = get_pad_id(self.tokenizer)
        self.table = ExampleTable(fetch(job.train_table))
        self._resources = ExitStack()
        self.teachers = job.connect_teachers(self._resources.enter_context(open_cache(config.cache)))
        self._cached_tokens = 0
        teacher = build_scorer(config, self.teachers)
        model = make_model(config.student, self.tokenizer, config.seed, self.device)
        self._saved_dtype = saved_dtype(config.student)
        set_end_token_ids(model, self.tokenizer, job.trained_ends)
        self.policy = make_policy(job, model, self.tokenizer, publishes=ranks.rank == 0)
        self.method: Method = resolve_method(config.method)(config.method, teacher, self.policy)
        self.student = Student(
            model, self.settings.precision, self.settings.micro_batch_tokens, uses_dropout=self.method.uses_dropout
        )
        module = LossModule(self.student, self.method).to(self.device).train()
        self.learner = Learner(module, self.settings, ranks, self.device, config.method.averages_sequences)
        self.total_steps = self.settings.steps or steps_of_epochs(self.settings, len(self.table))
        self.sampler = BatchSampler(self.table.lengths, self.settings.batch_size, config.seed, self.total_steps)
        self._stop_request = StopRequest(config.output_path)
        views = fetch(job.views)
        self.experiences = ExperienceSource(
            config, self.method, self.policy, self.table, self.sampler, self._pad_id, ranks.rank, ranks.world,
            auxiliary=self._auxiliary_rows(job), views=views, stop_request=self._stop_request,
        )  # fmt: skip
        self.store = CheckpointStore(config.checkpoints)
        self._base = job.base
        self.step = 0
        self._is_evaluated = True
        """False if an evaluation is due after `step` and not done."""
        self.best = BestEvaluation(config.evaluation)
        self._restore()
        self._saved_step = self.step
        self.evaluator = self._make_evaluator(job, teacher, views)
        self.recorder = Recorder(config.output_path, self.step, config.tracking) if ranks.rank == 0 else None
        self._rollout_samples = (
            RolloutSamples(config.output_path, self.step, self.total_steps, self.tokenizer)
            if ranks.rank == 0 and config.rollouts is not None
            else None
        )

    def run(self) -> Outcome:
        """Train to the last step, or until `evaluation.patience` is over.

        Raises:
            AllRanksStop: some rank cannot continue; the last finished step is checkpointed if possible.
        """
        self._start_ranks()
        self._evaluate_initial()
        evaluation = None if self._is_evaluated else self._evaluate_late()
        prepared = self.experiences.stream(self.step, self.total_steps)
        try:
            for step in range(self.step, self.total_steps):
                if self.best.patience_is_over:
                    break
                row = self._step(step, prepared)
                self.step = step + 1
                if self.policy is not None:
                    row |= self._finish_generation(row)
                if self._is_evaluation_due():
                    evaluation = self._evaluate_step(row)
                if self.recorder:
                    self.recorder.record(row)
                if self._is_checkpoint_due():
                    self._checkpoint()
                if self.policy is not None:
                    self._run_on_all_ranks(lambda: self.experiences.advance(self.step))
        except AllRanksStop:
            if self.step > self._saved_step and not self.learner.is_mid_step:
                self._checkpoint()
            raise
        finally:
            prepared.close()
        if self.best.step not in (None, self.step):
            self._run_on_all_ranks(self._load_best)
            evaluation = None
        if self.ranks.rank == 0:
            save_model(self.student.model, self.tokenizer, self.config.output_path / "model", self._saved_dtype)
        if evaluation is None and self.evaluator:  # resumed after the last step, or another step is the best
            evaluation = self._measure(answers=True)
        size = count_parameters(self.student.model)
        return Outcome(self.step, self.total_steps, evaluation, size=size, best=self.best.summary())

    def close(self) -> None:
        self._resources.close()
        if self.recorder:
            self.recorder.close()

    def _auxiliary_rows(self, job: Job) -> tuple[ExampleTable, BatchSampler] | None:
        """Return the rows of the method's auxiliary data and their sampler; None without such data."""
        data = self.config.method.auxiliary_data
        if data is None or job.auxiliary_table is None:
            return None
        table = ExampleTable(fetch(job.auxiliary_table))
        size = data.batch_size or self.settings.batch_size
        # Another seed, so that these rows do not come in the order of the training rows.
        return table, BatchSampler(table.lengths, size, self.config.seed + 1, self.total_steps)

    def _make_evaluator(self, job: Job, teacher: Scorer | None, views: Any) -> Evaluator | None:
        if job.evaluation_table is None:
            return None
        return Evaluator(
            self.config.evaluation, ExampleTable(fetch(job.evaluation_table)), self.tokenizer,
            teacher if self.config.compares_teacher else None,
            self.settings.micro_batch_tokens, self.ranks.rank, self.ranks.world, views,
        )  # fmt: skip

    def _start_ranks(self) -> None:
        """Run the collective part of the setup. In the constructor, an error on one rank would let the other ranks wait
        in a collective."""
        steps, attempts = zip(*self.ranks.gather((self.step, uuid4().hex)), strict=True)
        if len(set(steps)) > 1:
            raise AllRanksStop(
                RunFailed(
                    f"The workers do not find the same checkpoint in '{self.store.location}'; the output directory (or "
                    "training.checkpoints) must be one that all nodes share."
                )
            )
        if not self.step:
            self._precompute()
        self.learner.wrap()
        if (policy := self.policy) is not None:
            self._run_on_all_ranks(lambda: policy.begin(attempts[0]))

    def _run_on_all_ranks(self, work: Callable[[], None]) -> None:
        """Run `work`, which may fail on one rank alone; all ranks stop if it does."""
        problem = None
        try:
            work()
        except AllRanksStop:  # `work` has called `agree` already
            raise
        except Exception as error:
            problem = error
        self.ranks.agree(problem)

    def _precompute(self) -> None:
        """Let the method compute what needs the initial weights; after a resume it is part of the method's state."""

        def gather(value: Any) -> list[Any]:
            self.ranks.agree(None)  # pairs with the `agree` of a rank on which `precompute` has failed
            return self.ranks.gather(value)

        def precompute() -> None:
            with torch.no_grad():
                self.method.precompute(self.student, self._all_rows(), gather)

        self.student.eval()
        self._run_on_all_ranks(precompute)
        self.student.train()

    def _all_rows(self) -> Iterator[Batch]:
        """Yield this rank's share of all rows that the run trains on, in batches of similar length."""
        steps = min(self.total_steps, -(-len(self.table) // self.settings.batch_size))
        used = np.unique(np.concatenate([self.sampler.rows(step) for step in range(steps)]))
        share = used[self.ranks.rank :: self.ranks.world]
        for start in range(0, len(share), _CHUNK_ROWS):
            chunk = share[start : start + _CHUNK_ROWS]
            rows = [answer for row in chunk for answer in self.table[int(row)].answers]
            for group in micro_batches([len(row) for row in rows], self.settings.micro_batch_tokens):
                yield collate([rows[row] for row in group], self._pad_id).to(self.device)

    def _step(self, step: int, prepared_steps: Iterator[PreparedStep]) -> dict[str, Any]:
        """Train one step; return its row of metrics."""
        started = time.perf_counter()
        prepared, waited = self._next_experience(prepared_steps)
        experience = prepared.experience
        if isinstance(self.method, OnPolicyMethod):
            experience = self.method.synchronize(experience, self.ranks.sums)
        batch = experience.batch
        counted, tokens, skipped, cached = self.ranks.sums(
            [batch.counted_tokens, sum(map(len, batch.sequences)), experience.skipped, self._new_cached_tokens()]
        )
        learning_rate = learning_rate_at(step, self.total_steps, self.settings)
        seed = int(np.random.SeedSequence([self.config.seed, step, self.ranks.rank]).generate_state(1)[0])
        torch.manual_seed(seed)
        updates: Any = [experience]
        if isinstance(self.method, OnPolicyMethod):
            updates = self.method.updates(experience, seed)
        means = self.learner.train_step(updates, step, learning_rate)
        self.method.on_step(step + 1)
        seconds = time.perf_counter() - started
        if self._rollout_samples is not None:
            self._rollout_samples.record(step + 1, prepared.experience.batch.sequences)
        return {
            "step": step + 1,
            "epoch": (step + 1) * self.settings.batch_size / len(self.table),
            **means,
            "learning_rate": learning_rate,
            "tokens": int(tokens),
            "counted_tokens": int(counted),
            "skipped_rows": int(skipped),
            "cached_tokens": int(cached),
            "tokens_per_second": tokens / seconds,
            "teacher_wait_seconds": waited,
            "step_seconds": seconds,
            "ended_at": time.time(),
            **span_metrics("score", prepared.scored if self.teachers else None),
            **span_metrics("generate", prepared.generated),
            **(rollout_metrics(prepared.experience, step, self.ranks) if self.config.rollouts else {}),
        }

    def _next_experience(self, prepared_steps: Iterator[PreparedStep]) -> tuple[PreparedStep, float]:
        """Wait for the next experience; return it and this rank's wait in seconds, without that for other ranks.

        Raises:
            AllRanksStop: some rank cannot prepare it, or a stop was requested.
        """
        started = time.perf_counter()
        prepared, problem = None, None
        try:
            if self._stop_request.exists():
                raise Interrupted("The run was asked to stop.")
            prepared = next(prepared_steps)
        except Exception as error:
            problem = error
        waited = time.perf_counter() - started
        self.ranks.agree(problem)
        assert prepared is not None
        return prepared, waited

    def _finish_generation(self, row: dict[str, Any]) -> dict[str, float]:
        """Wait until all rows that need the policy's current weights are generated; return the step's updated times."""
        started = time.perf_counter()
        self.experiences.finish()
        return policy_wait_metrics(row, time.perf_counter() - started, time.time())

    def _new_cached_tokens(self) -> int:
        """Return the number of counted tokens read from the cache since the last call, also those of later steps."""
        before = self._cached_tokens
        self._cached_tokens = sum(teacher.statistics.cached_tokens for teacher in self.teachers.values())
        return self._cached_tokens - before

    def _is_evaluation_due(self) -> bool:
        every = self.config.evaluation.every_steps or math.inf
        return self.evaluator is not None and (self.step == self.total_steps or self.step % every == 0)

    def _is_checkpoint_due(self) -> bool:
        is_last = self.step == self.total_steps or self.best.patience_is_over
        return is_last or self.step == self.best.step or self.step % self.settings.checkpoint_every_steps == 0

    def _evaluate_step(self, row: dict[str, Any]) -> Evaluation:
        """Evaluate after a step, and add the metrics to its row; after a failure the row is recorded without them."""
        try:
            evaluation = self._evaluate(last=self.step == self.total_steps)
        except AllRanksStop:
            self._is_evaluated = False
            if self.recorder:
                self.recorder.record(row)
            raise
        row |= evaluation_metrics(evaluation)
        return evaluation

    def _evaluate_late(self) -> Evaluation:
        """Repeat the evaluation that failed in the previous attempt, and add its metrics to the row of its step."""
        evaluation = self._evaluate(last=self.step == self.total_steps)
        self._is_evaluated = True
        if self.recorder:
            self.recorder.add_to_last(evaluation_metrics(evaluation))
        if self.config.evaluation.keep_best is not None:
            self._checkpoint()  # with the best evaluation
        return evaluation

    def _evaluate_initial(self) -> None:
        """Evaluate the student before its first update, once in a run. The method does not see the metrics, so that
        they cannot change what is learned."""
        if self.step or self.evaluator is None or not self.config.evaluation.before_training:
            return
        output = self.config.output_path
        if any(self.ranks.gather(read_initial_metrics(output) is not None)):
            return
        evaluation = self._measure(answers=True)
        self._new_cached_tokens()  # so that the first step does not count those of this evaluation
        writes = self.ranks.rank == 0
        self._run_on_all_ranks(lambda: record_initial_evaluation(output, evaluation) if writes else None)

    def _evaluate(self, last: bool) -> Evaluation:
        """Evaluate the student on all ranks, with answers if `last` or if they decide which evaluation is the best, and
        pass the metrics to the method."""
        evaluation = self._measure(answers=last or self.config.evaluation.answers_every_time)
        self._run_on_all_ranks(lambda: self.best.update(self.step, evaluation.metrics))
        self.method.on_evaluation(evaluation.metrics)
        return evaluation

    def _measure(self, answers: bool) -> Evaluation:
        """Evaluate the student on the rows of all ranks; return the merged evaluation on every rank."""
        assert self.evaluator is not None
        evaluation, problem = None, None
        self.student.eval()
        try:
            evaluation = self.evaluator.run(self.student, answers=answers)
        except Exception as error:
            problem = error
        self.student.train()
        self.ranks.agree(problem)
        return Evaluation.merge(self.ranks.gather(evaluation))

    def _checkpoint(self) -> None:
        """Gather the state of all ranks, and save a checkpoint on rank 0."""
        self._saved_step = self.step
        method_states = self.ranks.gather(self.method.state_dict())
        rollouts = [row for rows in self.ranks.gather(self.experiences.state(self.step)) for row in rows]
        problem = None
        if self.ranks.rank == 0:
            state = Checkpoint(
                self.step, trainable_state_dict(self.learner.module), self.learner.optimizer.state_dict(),
                method_states, rollouts, self._base, self._is_evaluated, self.best.state_dict(),
            )  # fmt: skip
            try:
                self.store.save(state, self.settings.keep_checkpoints, self.best.step)
            except OSError as error:
                problem = RunFailed(f"The checkpoint of step {self.step} could not be written: {error}")
        self.ranks.agree(problem)

    def _restore(self) -> None:
        """Load the latest checkpoint, if there is one."""
        checkpoint = self.store.latest()
        if checkpoint is None:
            return
        module = self.learner.module
        missing, unexpected = module.load_state_dict(checkpoint.model, strict=False)
        if unexpected or set(missing) & set(trainable_state_dict(module)):
            raise RaykError(f"The checkpoint of step {checkpoint.step} belongs to another student; use another output.")
        self.learner.optimizer.load_state_dict(checkpoint.optimizer)
        self.method.load_state_dict(checkpoint.method[self.ranks.rank % len(checkpoint.method)])
        self.experiences.load_state(checkpoint.step, checkpoint.rollouts)
        self.step, self._is_evaluated = checkpoint.step, checkpoint.measured
        self.best.load_state_dict(checkpoint.best, self.store.steps())

    def _load_best(self) -> None:
        """Load the weights of the best evaluation."""
        assert self.best.step is not None
        weights = self.store.model(self.best.step)
        if weights is None:
            raise RunFailed(
                f"The checkpoint of step {self.best.step}, the best evaluation, is missing or damaged in "
                f"'{self.store.location}'; to save the student of the last step, resume with evaluation.keep_best null."
            )
        self.learner.module.load_state_dict(weights, strict=False)
