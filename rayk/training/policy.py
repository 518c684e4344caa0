"""The policy of a training worker: it generates in the worker itself, or on Ray Serve."""

from typing import Any

import torch

from rayk.config import ServedRollouts, WorkerRollouts
from rayk.models import CausalLM
from rayk.rollouts import Policy, ServedPolicy, Tool, ToolPolicy, WorkerPolicy
from rayk.training.job import Job


def make_policy(job: Job, model: CausalLM, tokenizer: Any, publishes: bool) -> Policy | None:
    """Return the policy that generates with the weights of `model`; None for a run without `rollouts`.

    Args:
        publishes: whether this worker sends the weights to a served policy.
    """
    rollouts = job.config.rollouts
    policy = _make_policy(job, model, tokenizer, publishes)
    if policy is None or rollouts is None or rollouts.tool is None:
        return policy
    return ToolPolicy(policy, Tool(rollouts.tool, job.config.data, tokenizer))


def _make_policy(job: Job, model: CausalLM, tokenizer: Any, publishes: bool) -> Policy | None:
    rollouts, training = job.config.rollouts, job.config.training
    if job.policy is not None:
        assert isinstance(rollouts, ServedRollouts)
        # vLLM computes in this type; other replicas compute with the learner's own weights.
        in_bfloat16 = rollouts.engine.kind == "vllm" and "bfloat16" in (training.precision, job.config.student.dtype)
        dtype = torch.bfloat16 if in_bfloat16 else None
        return ServedPolicy(model, rollouts, job.policy, publishes=publishes, dtype=dtype)
    if rollouts is None:
        return None
    assert isinstance(rollouts, WorkerRollouts)
    return WorkerPolicy(
        model, tokenizer, rollouts, batch_tokens=training.micro_batch_tokens,
        generated_tokens=rollouts.batch_tokens, precision=training.precision,
        vocab_size=job.generated_ids, is_sharded=training.sharding != "none",
    )  # fmt: skip
