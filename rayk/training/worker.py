"""The functions that run in a training worker."""

import os
from contextlib import ExitStack

import torch

from rayk.config import TrainingConfig
from rayk.data.examples import ExampleTable
from rayk.evaluation.evaluate import Evaluation, Evaluator
from rayk.models import load_tokenizer, pick_device
from rayk.models.student import make_model
from rayk.teachers import build_scorer
from rayk.teachers.cache import open_cache
from rayk.training.job import Job, Outcome, fetch
from rayk.training.loop import Trainer
from rayk.training.ranks import AllRanksStop, Ranks
from rayk.training.student import Student


def train_worker(job: Job) -> Outcome:
    """Run one rank from the latest checkpoint to the last step; Ray Train calls it on every worker."""
    job.extend_import_paths()
    ranks = Ranks.read()
    trainer: Trainer | None = None
    problem: Exception | None = None
    _set_threads(job.config.training, ranks)
    try:
        trainer = Trainer(job, ranks)
    except AllRanksStop as stop:
        return Outcome(0, 0, problem=stop.problem)
    except Exception as error:
        problem = error
    with ExitStack() as stack:
        try:
            ranks.agree(problem)
            assert trainer is not None
            stack.callback(trainer.close)
            return trainer.run()
        except AllRanksStop as stop:
            # Returned and not raised, because after an exception Ray Train would restart the group, which would fail
            # again.
            step, total = (trainer.step, trainer.total_steps) if trainer is not None else (0, 0)
            return Outcome(step, total, problem=stop.problem)


def evaluate_worker(job: Job) -> Evaluation:
    """Evaluate the student that `student` in the settings describes, without training, on all evaluation rows."""
    job.extend_import_paths()
    config = job.config
    tokenizer = load_tokenizer(job.tokenizer, trust_remote_code=config.student.trust_remote_code)
    model = make_model(config.student, tokenizer, config.seed, pick_device())
    examples = list(ExampleTable(fetch(job.evaluation_table)))
    with open_cache(config.cache) as cache:
        teacher = build_scorer(config, job.connect_teachers(cache)) if config.compares_teacher else None
        evaluator = Evaluator(
            config.evaluation, examples, tokenizer, teacher, config.training.micro_batch_tokens, views=fetch(job.views)
        )
        return evaluator.run(Student(model.eval(), config.training.precision), answers=True)


def _set_threads(settings: TrainingConfig, ranks: Ranks) -> None:
    """Set the number of threads: `training.threads`, or this worker's share of the node's cores."""
    if settings.most_workers > 0 or settings.threads:
        torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 1) // ranks.local_world))
