"""Requests for tests of served models, and access to their replicas."""

import contextlib
from dataclasses import replace

import numpy as np
import psutil
import torch

from rayk.config import TeacherConfig
from rayk.config.support import Hidden
from rayk.engines.transformers import TransformersEngine
from rayk.signals.sequence import TokenSequence
from tests.runs import actor_processes, wait_until


def random_sequences(count, seed=0, shortest=4, longest=40):
    random = np.random.default_rng(seed)
    sequences = []
    for length in random.integers(shortest, longest + 1, count):
        counted = random.random(length) < 0.6
        counted[:2] = False, True
        sequences.append(TokenSequence(random.integers(4, 300, length).astype(np.int32), counted))
    return sequences


def teacher_config(name, model, **settings):
    return TeacherConfig(**({"name": name, "model": model, "resources": {"num_cpus": 0.25}} | settings))


def assert_signals_close(signals, expected):
    """Compare up to float16 in the wire format and another batch (almost equal tokens may swap places)."""
    assert signals.support == expected.support
    assert torch.equal(signals.offsets, expected.offsets)
    torch.testing.assert_close(signals.target_logprobs, expected.target_logprobs, atol=1e-4, rtol=0)
    if expected.ids is not None:
        torch.testing.assert_close(signals.logprobs, expected.logprobs, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(signals.log_tails, expected.log_tails, atol=1e-4, rtol=0)
        assert (signals.ids == expected.ids).float().mean() > 0.99


def replica_processes(name):
    """Return the processes of an application's replicas that this test session started, oldest first."""
    return sorted(actor_processes(f"ServeReplica:{name}:"), key=lambda process: process.create_time())


def vllm_processes(name, *titles):
    """Wait for an application's only replica to run vLLM's processes `titles`; return the replica's and theirs."""

    def found():
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            [replica] = replica_processes(name)
            titled = {process.name(): process for process in replica.children(recursive=True)}
            return [replica, *(titled[title] for title in titles)] if titled.keys() >= set(titles) else None
        return None

    return wait_until(found, f"a replica of {name} with {' and '.join(titles)}", seconds=240)


class EngineScorer:
    """An engine as a scorer, without Ray Serve."""

    def __init__(self, model):
        self.engine = TransformersEngine(model)
        self.vocab_size = self.engine.info.vocab_size
        self.head = self.engine.head()

    async def ascore(self, batch, support=None):
        signals = await self.engine.score(batch, support)
        return replace(signals, head=self.head) if isinstance(support, Hidden) else signals
