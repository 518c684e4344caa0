"""The evaluations of the student during a run, on all ranks together."""

import math

from rayk.config import RunConfig
from rayk.evaluation.evaluate import Evaluation, Evaluator
from rayk.evaluation.initial import read_initial_metrics, record_initial_evaluation
from rayk.methods import Method
from rayk.training.best import BestEvaluation
from rayk.training.learner import Learner
from rayk.training.ranks import Ranks


class Evaluations:
    """Evaluate the student on the rows of all ranks, and pass the metrics to the method.

    Args:
        evaluator: evaluates this rank's share of the rows; None for a run without evaluation rows.
    """

    def __init__(
        self, config: RunConfig, evaluator: Evaluator | None, learner: Learner, method: Method, ranks: Ranks,
        best: BestEvaluation, total_steps: int,
    ):  # fmt: skip
        self._settings, self._output = config.evaluation, config.output_path
        self._evaluator, self._method = evaluator, method
        self._student, self._parallel = learner.module.student, learner.parallel
        self._ranks, self._best, self._total_steps = ranks, best, total_steps

    @property
    def has_rows(self) -> bool:
        return self._evaluator is not None

    def is_due(self, step: int) -> bool:
        """Return whether the student is evaluated after `step` steps."""
        return self.has_rows and (step == self._total_steps or step % (self._settings.every_steps or math.inf) == 0)

    def evaluate_initial(self) -> bool:
        """Evaluate the student before its first update, once in a run; return whether that was done now.

        The method does not see the metrics, so that they cannot change what is learned.
        """
        if not self.has_rows or not self._settings.before_training:
            return False
        if any(self._ranks.gather(read_initial_metrics(self._output) is not None)):
            return False
        evaluation = self.measure(answers=True)
        writes = self._ranks.rank == 0
        self._ranks.run(lambda: record_initial_evaluation(self._output, evaluation) if writes else None)
        return True

    def evaluate(self, step: int) -> Evaluation:
        """Evaluate the student after `step` steps, with answers if it is the last step or if they decide which
        evaluation is the best, and pass the metrics to the method."""
        evaluation = self.measure(answers=step == self._total_steps or self._settings.answers_every_time)
        self._ranks.run(lambda: self._best.update(step, evaluation.metrics))
        self._method.on_evaluation(evaluation.metrics)
        return evaluation

    def measure(self, answers: bool) -> Evaluation:
        """Evaluate the student on the rows of all ranks; return the merged evaluation on every rank."""
        assert self._evaluator is not None
        evaluation, problem = None, None
        self._student.eval()
        with self._parallel.whole_weights():
            try:
                evaluation = self._evaluator.run(self._student, answers=answers)
            except Exception as error:
                problem = error
        self._student.train()
        self._ranks.agree(problem)
        return Evaluation.merge(self._ranks.gather(evaluation))
