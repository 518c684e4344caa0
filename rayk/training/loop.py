"""The training loop of one rank: prepare, update, evaluate, checkpoint, until the last step.

The result does not depend on the number of workers or micro-batches: the rows of step i are the same whichever worker
has them, and every unit (token, pair or query) has weight 1 / (number of units of the step over all workers).
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from rayk.data.batches import BatchSampler, get_pad_id
from rayk.data.chunks import TrainingRows, open_rows
from rayk.data.examples import ExampleTable
from rayk.engines.padding import check_padding
from rayk.errors import Interrupted
from rayk.evaluation.evaluate import Evaluation, Evaluator
from rayk.methods import Method, OnPolicyMethod, resolve_method
from rayk.models import load_tokenizer
from rayk.models.compilation import compile_layers
from rayk.models.ends import set_end_token_ids
from rayk.models.student import count_parameters, make_model, make_structure, saved_dtype
from rayk.serving.metrics import RunMetrics
from rayk.teachers import Scorer, build_scorer
from rayk.teachers.cache import open_cache
from rayk.training.averaging import Averaging, Quarters, TeacherGroups
from rayk.training.best import BestEvaluation
from rayk.training.checkpoint import CheckpointStore
from rayk.training.checkpoint_timer import CheckpointTimer
from rayk.training.evaluations import Evaluations
from rayk.training.experiences import ExperienceSource, PreparedStep
from rayk.training.following import FollowingTeachers
from rayk.training.interruption import StopRequest
from rayk.training.job import Job, Outcome, fetch
from rayk.training.learner import Learner
from rayk.training.metrics import evaluation_metrics, policy_wait_metrics, rollout_metrics, span_metrics
from rayk.training.optimizer import count_steps, learning_rate_at
from rayk.training.policy import make_policy
from rayk.training.precomputation import precompute, trained_rows
from rayk.training.ranks import AllRanksStop, Ranks, worker_device
from rayk.training.recorder import Recorder
from rayk.training.rollout_samples import RolloutSamples
from rayk.training.run_checkpoints import RunCheckpoints
from rayk.training.student import LossModule, Student, save_model
from rayk.training.teacher_metrics import TeacherMetrics


class Trainer:
    """The state of one rank, and its loop."""

    def __init__(self, job: Job, ranks: Ranks):
        config = job.config
        self.config, self.settings, self.ranks = config, config.training, ranks
        self.device = worker_device()
        self.tokenizer = load_tokenizer(job.tokenizer, trust_remote_code=config.student.trust_remote_code)
        self.tokenizer.chat_template = job.chat_template or self.tokenizer.chat_template
        self._pad_id = get_pad_id(self.tokenizer)
        source = config.data.train
        self.table = open_rows(ExampleTable(fetch(job.train_table)), source, config.seed)
        self._resources = ExitStack()
        self.teachers = job.connect_teachers(self._resources.enter_context(open_cache(config.cache)))
        self._cached_tokens = 0
        teacher = build_scorer(config, self.teachers)
        model = self._make_model()
        if self.settings.compile:
            compile_layers(model)
        self._saved_dtype = saved_dtype(config.student)
        set_end_token_ids(model, self.tokenizer, job.trained_ends)
        self.policy = make_policy(job, model, self.tokenizer, publishes=ranks.rank == 0)
        self.method: Method = resolve_method(config.method)(config.method, teacher, self.policy)
        self.student = Student(
            model, self.settings.precision, self.settings.micro_batch_tokens, uses_dropout=self.method.uses_dropout
        )
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # of the method's own modules
            module = LossModule(self.student, self.method).train()
        ranks.agree(None)  # the learner of a sharded student is created by all ranks together
        groups = TeacherGroups(config.route) if config.route and config.method.queries_teacher else None
        self.learner = Learner(
            module, self.settings, ranks, self.device,
            Averaging(config.method.normalization, groups, self._recorded_groups()),
        )  # fmt: skip
        self._teacher_metrics = TeacherMetrics(self.teachers, groups, ranks)
        self.total_steps = count_steps(config, len(self.table))
        self.sampler = BatchSampler(
            self.table.lengths, self.settings.batch_size, config.seed, self.total_steps,
            samples=config.rollouts.samples if config.rollouts else 1,
            renews=source is not None and source.random_offset,
        )  # fmt: skip
        self._stop_request = StopRequest(config.output_path)
        views = fetch(job.views)
        self.following = FollowingTeachers(
            self.teachers.values(), model, publishes=ranks.rank == 0,
            max_staleness=config.rollouts.max_staleness if config.rollouts else 0,
        )  # fmt: skip
        self.experiences = ExperienceSource(
            config, self.method, self.policy, self.table, self.sampler, self._pad_id, ranks.rank, ranks.world,
            auxiliary=self._auxiliary_rows(job), views=views, stop_request=self._stop_request,
            following=self.following,
        )  # fmt: skip
        self.best = BestEvaluation(config.evaluation)
        self.checkpoints = RunCheckpoints(
            CheckpointStore(config.checkpoints), self.settings.keep_checkpoints, ranks, self.learner, self.method,
            self.experiences, self.best, job.base, config.method.kind, lambda: self.following.state,
        )  # fmt: skip
        self._checkpoint_timer = CheckpointTimer(self.settings.checkpoint_every_minutes, ranks)
        self.step, self._is_evaluated, self._is_complete = 0, True, False
        self.evaluations = Evaluations(
            config, self._make_evaluator(job, teacher, views), self.learner, self.method, ranks, self.best,
            self.total_steps,
        )  # fmt: skip
        self.recorder: Recorder | None = None
        self._rollout_samples: RolloutSamples | None = None

    def run(self) -> Outcome:
        """Train to the last step, or until `evaluation.patience` is over.

        Raises:
            AllRanksStop: some rank cannot continue; the last finished step is checkpointed if possible.
        """
        self._start_ranks()
        self._evaluate_initial()
        evaluation = None if self._is_evaluated else self._evaluate_late()
        self._gather_for_policy()
        prepared = self.experiences.stream(self.step, self.total_steps)
        try:
            for step in range(self.step, self.total_steps):
                if self.best.patience_is_over:
                    break
                row = self._step(step, prepared)
                self.step = step + 1
                if self.following:
                    self.ranks.run(lambda: self.following.update(self.step))
                if self.policy is not None:
                    row |= self._finish_generation(row)
                if self.evaluations.is_due(self.step):
                    evaluation = self._evaluate_step(row)
                if self.recorder:
                    self.recorder.record(row)
                if self._is_checkpoint_due():
                    self._checkpoint()
                if self.policy is not None:
                    self._gather_for_policy()
                    self.ranks.run(lambda: self.experiences.advance(self.step))
        except AllRanksStop:
            prepared.close()
            if self.policy is not None:
                self.policy.wait()
            try:
                if self.step > self.checkpoints.saved_step and not self.learner.is_mid_step:
                    self._checkpoint()
            finally:
                self.checkpoints.wait()
            raise
        finally:
            prepared.close()
        self.checkpoints.wait()
        if self.best.step not in (None, self.step):
            self.checkpoints.load_best()
            evaluation = None
        model = self.learner.parallel.whole_model(keep=self.ranks.rank == 0)
        self.ranks.run(lambda: self._save_model(model))
        if evaluation is None and self.evaluations.has_rows:  # resumed after the last step, or another step is the best
            evaluation = self.evaluations.measure(answers=True)
        size = count_parameters(self.student.model)
        self._is_complete = True
        return Outcome(self.step, self.total_steps, evaluation, size=size, best=self.best.summary())

    def _save_model(self, model: nn.Module | None) -> None:
        if model is not None:
            save_model(model, self.tokenizer, self.config.output_path / "model", self._saved_dtype)

    def close(self) -> None:
        self._resources.close()
        if self.recorder:
            self.recorder.close(self._is_complete)

    def _make_model(self) -> nn.Module:
        """Return the student's model; of a sharded one only rank 0 loads weights, to the CPU."""
        student, tokenizer, seed = self.config.student, self.tokenizer, self.config.seed
        is_sharded = self.settings.sharding != "none"
        if is_sharded and self.ranks.rank:
            return make_structure(student, tokenizer)
        model = make_model(student, tokenizer, seed, "cpu" if is_sharded else self.device)
        if student.model is not None and student.layers is None:
            check_padding(model, tokenizer, f"student.model '{student.model}'")
        return model

    def _recorded_groups(self) -> list[Quarters]:
        """Return the parts of the rollouts by which the distance from the teacher is recorded."""
        return [Quarters(self.method.distance)] if isinstance(self.method, OnPolicyMethod) else []

    def _auxiliary_rows(self, job: Job) -> tuple[TrainingRows, BatchSampler] | None:
        """Return the rows of the method's auxiliary data and their sampler; None without such data."""
        data = self.config.method.auxiliary_data
        if data is None or job.auxiliary_table is None:
            return None
        table = open_rows(ExampleTable(fetch(job.auxiliary_table)), data.data, self.config.seed + 1)
        size = data.batch_size or self.settings.batch_size
        # Another seed, so that these rows do not come in the order of the training rows.
        return table, BatchSampler(
            table.lengths, size, self.config.seed + 1, self.total_steps, renews=data.data.random_offset
        )

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
        self.step, self._is_evaluated = self.checkpoints.restore()
        self.ranks.run(self._open_records)
        if not self.step:
            rows = trained_rows(
                self.table, self.sampler, self.settings.micro_batch_tokens, self._pad_id, self.ranks, self.device
            )
            precompute(self.method, self.learner, rows, self.ranks)
        self.learner.parallel.start()
        if self.following:
            self.ranks.run(lambda: self.following.begin(self.checkpoints.attempt, self.step))
        if (policy := self.policy) is not None:
            self.ranks.run(lambda: policy.begin(self.checkpoints.attempt))
            self.ranks.run(lambda: policy.update(self.step))

    def _gather_for_policy(self) -> None:
        """Gather the weights on every rank, until the next experience is there, if the policy generates with them."""
        if self.policy is not None and self.policy.uses_learner and self.step < self.total_steps:
            self.learner.parallel.gather()

    def _open_records(self) -> None:
        """Open what rank 0 records, and remove the records of steps after the restored one."""
        if self.ranks.rank != 0:
            return
        output = self.config.output_path
        self.checkpoints.check_newest()  # an attempt that has been overtaken must not cut the newer one's rows
        exported = RunMetrics(self.config.name, self.checkpoints.restarts)
        self.recorder = Recorder(output, self.step, self.config.tracking, exported)
        if self.config.rollouts is not None:
            self._rollout_samples = RolloutSamples(output, self.step, self.total_steps, self.tokenizer)

    def _step(self, step: int, prepared_steps: Iterator[PreparedStep]) -> dict[str, Any]:
        """Train one step; return its row of metrics."""
        started = time.perf_counter()
        prepared, waited = self._next_experience(prepared_steps)
        experience = self.method.synchronize(prepared.experience, self.ranks, step)
        batch = experience.batch
        counts = [batch.counted_tokens, sum(map(len, batch.sequences)), experience.skipped, self._new_cached_tokens()]
        counted, tokens, skipped, cached, *flags = self.ranks.sums([*counts, *self._checkpoint_timer.flags()])
        self._checkpoint_timer.read(*flags)
        stage = self.config.method.stage(step, self.total_steps)
        learning_rate = learning_rate_at(stage.step, stage.steps, self.settings, stage.learning_rate)
        seed = int(np.random.SeedSequence([self.config.seed, step, self.ranks.rank]).generate_state(1)[0])
        torch.manual_seed(seed)
        updates: Any = [experience]
        if isinstance(self.method, OnPolicyMethod):
            updates = self.method.updates(experience, seed)
        means = self.learner.train_step(updates, step, learning_rate)
        self.method.on_step(step + 1)
        seconds = time.perf_counter() - started
        if self._rollout_samples is not None and self.recorder is not None:
            with self.recorder.noting_problems():
                self._rollout_samples.record(step + 1, prepared.experience.batch.sequences)
        return {
            "step": step + 1,
            "epoch": self.sampler.epochs(step + 1),
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
            **self._teacher_metrics.of_step(experience),
            **span_metrics("score", prepared.scored if self.teachers else None),
            **span_metrics("generate", prepared.generated),
            **(rollout_metrics(prepared.experience, step, self.ranks) if self.config.rollouts else {}),
            **self.following.metrics(step),
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
            self.checkpoints.check()
            if self.recorder:
                self.recorder.check()
            prepared = next(prepared_steps)
        except Exception as error:
            problem = error
        waited = time.perf_counter() - started
        self.ranks.agree(problem)
        if self.policy is not None and self.policy.uses_learner:
            self.learner.parallel.release()
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

    def _is_checkpoint_due(self) -> bool:
        is_last = self.step == self.total_steps or self.best.patience_is_over
        is_due = self.step % self.settings.checkpoint_every_steps == 0 or self._checkpoint_timer.is_due
        return is_last or is_due or self.step == self.best.step

    def _checkpoint(self) -> None:
        # Rows first: a run that is resumed at a checkpoint then has the rows of all steps before it.
        self.ranks.run(self.recorder.sync if self.recorder else lambda: None)
        self._checkpoint_timer.restart()
        self.checkpoints.save(self.step, is_evaluated=self._is_evaluated)

    def _evaluate_initial(self) -> None:
        """Evaluate the student before its first update, once in a run."""
        if not self.step and self.evaluations.evaluate_initial():
            self._new_cached_tokens()  # so that the first step does not count those of this evaluation

    def _evaluate_step(self, row: dict[str, Any]) -> Evaluation:
        """Evaluate after a step, and add the metrics to its row; after a failure the row is recorded without them."""
        try:
            evaluation = self.evaluations.evaluate(self.step)
        except AllRanksStop:
            self._is_evaluated = False
            if self.recorder:
                self.recorder.record(row)
            raise
        row |= evaluation_metrics(evaluation)
        return evaluation

    def _evaluate_late(self) -> Evaluation:
        """Repeat the evaluation that failed in the previous attempt, and add its metrics to the row of its step."""
        evaluation = self.evaluations.evaluate(self.step)
        self._is_evaluated = True
        if self.recorder:
            self.recorder.add_to_last(evaluation_metrics(evaluation))
        if self.config.evaluation.keep_best is not None:
            self._checkpoint()  # with the best evaluation
        return evaluation
