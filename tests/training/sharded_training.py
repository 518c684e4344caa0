"""Training steps of one rank, for tests that compare sharded, replicated and single-worker training."""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from rayk.config import StudentConfig, SupervisedConfig, TrainingConfig
from rayk.config.rollouts import WorkerRollouts
from rayk.data.examples import Example
from rayk.engines.base import SamplingParameters
from rayk.losses import linear_cross_entropy
from rayk.methods import Experience, Loss, Method, Supervised
from rayk.models import load_tokenizer
from rayk.models.compilation import compile_layers
from rayk.models.shards import whole_tensor
from rayk.models.student import make_model, make_structure
from rayk.rollouts import WorkerPolicy
from rayk.serving.weights import pack_weights, trainable_state_dict
from rayk.training.learner import Learner
from rayk.training.ranks import Ranks
from rayk.training.student import LossModule, Student


@dataclass
class Case:
    """A training problem: a student, a method, and the experiences of each step, of all ranks together.

    Attributes:
        compiler: the backend of `torch.compile` for the student's layers.
    """

    student: dict[str, Any]
    method: Method
    experiences: list[Experience]
    training: dict[str, Any] = field(default_factory=dict)
    compiler: str | None = None


def train(ranks: Ranks, case: Case, training: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train each experience for one step, every rank on its share; return the metrics of each step, the whole weights
    at the end, the bytes that this rank keeps of parameters, gradients and optimizer state, and the number of compiled
    graphs."""
    config = StudentConfig(**case.student)
    settings = TrainingConfig(
        **{"learning_rate": 5e-3, "batch_size": 64, "workers": ranks.world} | case.training | (training or {})
    )
    tokenizer = load_tokenizer(str(config.tokenizer or config.model))
    is_empty = settings.sharding != "none" and ranks.rank > 0  # as in the loop
    model = make_structure(config, tokenizer) if is_empty else make_model(config, tokenizer, 0)
    counter = CompileCounterWithBackend(case.compiler or "eager")
    if case.compiler:
        compile_layers(model, counter)
    student = Student(model, settings.precision, settings.micro_batch_tokens, uses_dropout=case.method.uses_dropout)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the method's own modules
        module = LossModule(student, case.method).train()
    learner = Learner(module, settings, ranks, "cpu")
    learner.parallel.start()
    steps = []
    for number, experience in enumerate(case.experiences):
        share = share_of(ranks, experience)
        if experience.auxiliary is not None:
            share = replace(share, auxiliary=share_of(ranks, experience.auxiliary))
        steps.append(learner.train_step([share], number, settings.learning_rate))
        case.method.on_step(number + 1)
    weights = {name: whole_tensor(weight.detach()) for name, weight in trainable_state_dict(learner.module).items()}
    return {"steps": steps, "weights": weights, "bytes": kept_bytes(learner), "compiled": counter.frame_count}


class LocalTeacher:
    """A teacher that computes in this process, with an engine."""

    def __init__(self, engine: Any):
        self._engine, self.info = engine, engine.info

    async def ascore(self, batch, support):
        signals = await self._engine.score(batch.sequences, support)
        return signals if signals.hidden is None else replace(signals, head=self._engine.head())


def assert_equal(results: list[dict[str, Any]], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Compare the metrics of all steps and the final weights of each rank with those of another training."""
    for result in results:
        for ours, theirs in zip(result["steps"], expected["steps"], strict=True):
            for name in theirs:
                np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, atol=1e-6, err_msg=name)
        assert result["weights"].keys() == expected["weights"].keys()
        for name, value in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], value, rtol=0, atol=10 * tolerance)


def share_of(ranks: Ranks, experience: Experience) -> Experience:
    return experience.select(list(range(len(experience.lengths)))[ranks.rank :: ranks.world])


class Projected(Method):
    """A method with a module of its own, a map of the hidden states before the head."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self._projection = nn.Linear(16, 16)

    async def prepare(self, batch):
        return Experience(batch)

    def modules(self):
        return self._projection

    def loss(self, student, experience):
        hidden = student.hidden(experience.batch)
        return Loss(linear_cross_entropy(hidden + self._projection(hidden), student.head, experience.batch.targets))


def kept_bytes(learner: Learner) -> dict[str, int]:
    """Return the bytes of parameters, of the gradients of the trained ones, and of the optimizer's state."""
    parameters = list(learner.module.parameters())
    states = [value for state in learner.optimizer.state.values() for value in state.values()]
    return {
        "parameters": sum(map(local_bytes, parameters)),
        "gradients": sum(local_bytes(parameter) for parameter in parameters if parameter.requires_grad),
        "optimizer": sum(map(local_bytes, states)),
    }


def local_bytes(tensor: Any) -> int:
    """Return the bytes of a tensor, or of this rank's part of it."""
    local = getattr(tensor, "to_local", lambda: tensor)()
    return local.nbytes if isinstance(local, torch.Tensor) else 0


def generate_and_train(
    ranks: Ranks, folder: str, experience: Experience, training: dict[str, Any], staleness: int, prompts: list[Example]
) -> dict[str, Any]:
    """Generate, train a step, and generate again with the new weights; return both generations' token ids and the
    packed weights. Each rank generates a prompt more than the rank before it, to another length."""
    settings = TrainingConfig(**{"learning_rate": 5e-2, "batch_size": 64, "workers": ranks.world} | training)
    tokenizer, is_sharded = load_tokenizer(folder), settings.sharding != "none"
    config = StudentConfig(model=folder)
    model = make_structure(config, tokenizer) if is_sharded and ranks.rank else make_model(config, tokenizer, 0)
    policy = WorkerPolicy(
        model, tokenizer, WorkerRollouts(max_staleness=staleness), batch_tokens=1000, is_sharded=is_sharded
    )
    method = Supervised(SupervisedConfig(), None)
    learner = Learner(LossModule(Student(model), method).train(), settings, ranks, "cpu")
    learner.parallel.start()
    generations = []
    for version in range(2):
        policy.update(version)
        if policy.uses_learner:
            learner.parallel.gather()
        mine = []
        for rank in range(2) if ranks.world == 1 else [ranks.rank]:
            parameters = SamplingParameters(4 + 5 * rank, 1.0)
            mine.append(asyncio.run(policy.generate(prompts[: 1 + rank], parameters, list(range(1 + rank)))))
        if policy.uses_learner:
            learner.parallel.release()
        generations.append([[row.completion_ids.tolist() for row in rows] for rows in mine])
        learner.train_step([share_of(ranks, experience)], version, settings.learning_rate)
    packed = pack_weights(model, keep=ranks.rank == 0)
    return {"generations": generations, "packed": {name: tensor.data for name, tensor in packed.items()}}
