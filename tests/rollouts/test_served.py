"""A served policy generates the same rollouts as the policy in the worker, with exactly the requested weights."""

import asyncio
import copy
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from ray import serve

from rayk.config import parse_config
from rayk.engines.base import SamplingParameters
from rayk.errors import InputError, PolicyUnavailable, RaykError
from rayk.models import load_model
from rayk.models.ends import set_end_token_ids
from rayk.rollouts import ServedPolicy, WorkerPolicy, serve_policy
from rayk.serving.weight_store import NAMESPACE, PublishedWeights, WeightVersion
from rayk.serving.weights import checksum, pack_weights
from tests.rollouts.test_policy import prompts
from tests.runs import settings, wait_until
from tests.teachers.helpers import replica_processes
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.cluster

APPLICATION = "_policy-tests"
PARAMETERS = SamplingParameters(max_new_tokens=8)
ENDS = range(10, 30)
"""Ends that training teaches; the student's own end is 1."""


def run_config(folder, student, **rollouts):
    values = settings(folder, student, "on_policy")
    values["rollouts"] |= {"kind": "served", "replicas": 2, "resources": {"num_cpus": 0.25}, **rollouts}
    return parse_config(values)


@pytest.fixture(scope="module")
def address(ray_cluster, tiny_student, tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("run"), tiny_student, deadline_seconds=120)
    with serve_policy(config, APPLICATION, tiny_student, trained_ends=ENDS) as address:
        yield address


@pytest.fixture
def started(address, tiny_student, request):
    """A learner, its policy in a new attempt, and a function that makes policies of other workers."""
    learner = load_model(tiny_student).train()
    set_end_token_ids(learner, tiny_tokenizer(), ENDS)
    config = run_config_of(tiny_student)

    def policy(publishes=False):
        found = ServedPolicy(learner, config.rollouts, address, publishes=publishes)
        found.begin(request.node.name)
        return found

    first = policy(publishes=True)
    first.update(0)
    return learner, first, policy


def run_config_of(student):
    values = {"kind": "served", "deadline_seconds": 120}
    return parse_config(
        {
            "teachers": [{"name": "none", "attach": True}], "student": {"model": student},
            "data": {"train": {"path": "rows.jsonl"}}, "method": {"kind": "on_policy"}, "rollouts": values,
        }
    )  # fmt: skip


def worker_policy(learner):
    config = run_config_of("student").rollouts
    return WorkerPolicy(copy.deepcopy(learner), tiny_tokenizer(), config, batch_tokens=10_000)


def moved(learner):
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.2 * torch.ones_like(parameter).cumsum(0).sin())


def generate(policy, rows=None, parameters=PARAMETERS):
    rows = prompts() if rows is None else rows
    return asyncio.run(policy.generate(rows, parameters, range(len(rows))))


def assert_same(rollouts, expected, version):
    assert [each.input_ids.tolist() for each in rollouts] == [each.input_ids.tolist() for each in expected]
    for one, other in zip(rollouts, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert (one.finish_reason, one.where, one.fields) == (other.finish_reason, other.where, other.fields)
        assert (one.prompt_tokens, one.version) == (other.prompt_tokens, version)


def test_served_policy_equals_the_worker_policy_at_each_version(started):
    learner, policy, _ = started
    seen = []
    for version in range(3):
        there = worker_policy(learner)
        rollouts, expected = generate(policy), generate(there)
        assert_same(rollouts, expected, version)
        stopped = [each for each in rollouts if each.finish_reason == "stop"]
        assert any(each.input_ids[-1] in ENDS for each in stopped)
        seen.append([each.input_ids.tolist() for each in rollouts])
        mine, theirs = (asyncio.run(each.logprobs(rollouts)) for each in (policy, there))
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        mine, theirs = (asyncio.run(each.top_ids(rollouts, 3)) for each in (policy, there))
        assert [each.tolist() for each in mine] == [each.tolist() for each in theirs]
        moved(learner)
        policy.update(version + 1)
    assert seen[0] != seen[1] != seen[2]


def test_slow_worker_gets_the_version_it_requests(started):
    learner, first, make_policy = started
    second = make_policy()
    second.update(0)
    old = generate(worker_policy(learner))
    moved(learner)
    first.update(1)
    new = generate(worker_policy(learner))

    async def together():
        parts = [policy.generate(prompts(), PARAMETERS, range(24)) for policy in (first, second) * 3]
        return await asyncio.gather(*parts)

    for number, rollouts in enumerate(asyncio.run(together())):
        assert_same(rollouts, old if number % 2 else new, 1 - number % 2)


def test_fast_worker_waits_for_the_publication(started):
    learner, first, make_policy = started
    second = make_policy()
    second.update(1)

    async def ahead():
        task = asyncio.create_task(second.generate(prompts(), PARAMETERS, range(24)))
        await asyncio.sleep(0.2)
        assert not task.done()
        moved(learner)
        first.update(1)
        return await task

    assert_same(asyncio.run(ahead()), generate(worker_policy(learner)), 1)


def test_damaged_weights_are_not_used(started):
    learner, policy, _ = started
    weights = pack_weights(learner)
    sound = checksum(weights)
    data = weights["lm_head.weight"].data.copy()
    data[7] ^= 1
    torn = weights | {"lm_head.weight": replace(weights["lm_head.weight"], data=data)}
    version = WeightVersion(policy._version.attempt, 1)
    ray.get(policy._store.publish.remote(version, PublishedWeights(sound, ray.put(torn))))
    before = policy._version
    policy._version = version
    with pytest.raises(RaykError, match="served policy failed at generate: .* weights of version 1 were damaged"):
        generate(policy)
    policy._version = before
    assert_same(generate(policy), generate(worker_policy(learner)), 0)


def test_dropped_version_is_an_error(started):
    learner, policy, make_policy = started
    late = make_policy()
    late.update(0)
    for version in (1, 2):
        policy.update(version)
    with pytest.raises(RaykError, match="weights of version 0 are stale"):
        generate(late)
    with pytest.raises(RaykError, match="stale and were not published"):
        policy.update(2)
    policy.begin("a new group of workers")
    with pytest.raises(RaykError, match="stale"):
        generate(late)
    policy.update(2)
    assert_same(generate(policy), generate(worker_policy(learner)), 2)


def test_replica_death_changes_no_rollout(started):
    learner, policy, _ = started
    rows, parameters = prompts(64), SamplingParameters(max_new_tokens=200, temperature=1.0)
    expected = generate(worker_policy(learner), rows, parameters)

    async def disturbed():
        task = asyncio.create_task(policy.generate(rows, parameters, range(64)))
        calls = policy.statistics.calls
        while policy.statistics.calls <= calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        replica_processes(APPLICATION)[0].kill()
        return await task

    for _ in range(6):  # until a kill has hit a replica that was answering
        wait_until(lambda: len(replica_processes(APPLICATION)) == 2, seconds=120)
        assert_same(asyncio.run(disturbed()), expected, 0)
        if policy.statistics.retries:
            return
    pytest.fail("no kill hit a replica that was answering")


def test_replicas_report_waiting_tokens(started):
    _, policy, _ = started

    async def reported():
        task = asyncio.create_task(policy.generate(prompts(64), SamplingParameters(max_new_tokens=200), range(64)))
        reported_tokens = []
        while not task.done():
            reported_tokens += (await policy._handle.record_autoscaling_stats.remote()).values()
        return max(reported_tokens)

    # Of all calls, or of the first of two; earlier requesters are remembered for some seconds.
    assert asyncio.run(reported()) >= 64 * 200 / 2


def test_served_policy_rejects_teacher_mixed_sampling(started):
    _, policy, _ = started
    with pytest.raises(InputError, match="use rollouts.kind 'worker'"):
        asyncio.run(policy.generate_mixed(prompts(), None, None, range(24)))


@contextmanager
def temporary_policy(config, student):
    """Serve a separate policy; afterwards its application and its store must have ended."""
    application = "_policy-temporary"
    try:
        with serve_policy(config, application, student) as address:
            assert ray.get_actor(address.store, NAMESPACE)
            yield address
    finally:
        assert application not in serve.status().applications
        wait_until(lambda: not [each for each in named_actors() if each.startswith(application)], seconds=60)


def named_actors():
    return [each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE]


@pytest.mark.long
def test_missing_version_and_removed_policy_are_errors_at_the_deadline(ray_cluster, tiny_student, tmp_path):
    config = run_config(tmp_path, tiny_student, replicas=1, deadline_seconds=2)
    learner = load_model(tiny_student)
    with temporary_policy(config, tiny_student) as address:
        policy = ServedPolicy(learner, config.rollouts, address, publishes=False)
        policy.begin("attempt")
        policy.update(3)
        with pytest.raises(RaykError, match="weights of version 3 were not published within 1 s"):
            generate(policy)
        ray.kill(ray.get_actor(address.store, NAMESPACE))
        with pytest.raises(RaykError, match="store of the student's weights has died"):
            generate(policy)
        serve.delete("_policy-temporary")
        with pytest.raises(PolicyUnavailable, match=r"did not answer within 2 s.* raise rollouts.deadline_seconds"):
            generate(policy)
