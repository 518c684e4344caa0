"""Rollouts: which tokens are counted, log-probs, weight versions, and an unchanged learner."""

import asyncio
import copy

import numpy as np
import pytest
import torch

from rayk.config import LoraConfig, WorkerRollouts
from rayk.data.examples import Example
from rayk.engines.base import SamplingParameters
from rayk.models import real_vocab_size
from rayk.models.body import get_body
from rayk.models.lora import add_adapter
from rayk.rollouts import Rollout, WorkerPolicy, summarize_rollouts
from rayk.rollouts.packed_rows import pack_row, unpack_row
from rayk.rollouts.policy import repetition
from tests.tiny import perturb, tiny_model, tiny_tokenizer

EOS_TOKEN_IDS = list(range(100, 160))
"""Many end tokens, so that a random model often generates one."""
PARAMETERS = SamplingParameters(max_new_tokens=8)
TOKENIZER = tiny_tokenizer()
VOCABULARY = real_vocab_size(TOKENIZER)


@pytest.fixture
def learner():
    model = tiny_model(seed=3, hidden=16, layers=1, peaked=2.0)
    model.generation_config.eos_token_id = EOS_TOKEN_IDS
    return model.train()


def make_policy(learner, batch_tokens=10_000, **settings):
    return WorkerPolicy(learner, TOKENIZER, WorkerRollouts(max_new_tokens=8, **settings), batch_tokens=batch_tokens)


def prompts(count=24):
    random = np.random.default_rng(0)
    rows = [random.integers(0, 300, random.integers(1, 9)).astype(np.int32) for _ in range(count)]
    answer = np.array([5, 6, 7], np.int32)
    return [
        Example(
            np.concatenate([row, answer]), np.arange(len(row) + 3) >= len(row), None, len(row), f"line {i}", {"n": i}
        )
        for i, row in enumerate(rows)
    ]


def generate(policy, rows=None, seed=0):
    rows = prompts() if rows is None else rows
    return asyncio.run(policy.generate(rows, PARAMETERS, range(seed, seed + len(rows))))


def test_completion_and_its_end_token_are_counted_and_the_prompt_is_not(learner):
    rows, rollouts = prompts(), generate(make_policy(learner))
    for row, rollout in zip(rows, rollouts, strict=True):
        assert rollout.input_ids[: row.prompt_tokens].tolist() == row.prompt_ids.tolist()
        assert np.flatnonzero(rollout.counted).tolist() == list(range(row.prompt_tokens, len(rollout)))
        assert (rollout.where, rollout.fields, rollout.prompt_tokens) == (row.where, row.fields, row.prompt_tokens)
        *inside, last = rollout.completion_ids.tolist()
        assert not set(inside) & set(EOS_TOKEN_IDS)
        assert (last in EOS_TOKEN_IDS) == (rollout.finish_reason == "stop")
        assert last in EOS_TOKEN_IDS or len(inside) == 7
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


def test_logprobs_are_those_of_the_model(learner):
    for rollout in generate(make_policy(learner, temperature=0.7, top_p=0.9)):
        logits = learner.eval()(input_ids=torch.from_numpy(rollout.input_ids).long()[None]).logits[0]
        logprobs = logits[:-1].log_softmax(-1)[rollout.counted[1:]]
        expected = logprobs.gather(1, torch.from_numpy(rollout.targets).long()[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, expected.detach().numpy(), atol=1e-4)


def test_completion_depends_on_its_seed_and_not_on_its_batch(learner):
    together = generate(make_policy(learner))
    separate = generate(make_policy(learner, batch_tokens=30))
    assert [each.input_ids.tolist() for each in together] == [each.input_ids.tolist() for each in separate]
    others = generate(make_policy(learner), seed=1000)
    assert [each.input_ids.tolist() for each in together] != [each.input_ids.tolist() for each in others]


def test_completions_are_grouped_by_their_own_budget(learner):
    rows = prompts()
    policy = WorkerPolicy(
        learner, TOKENIZER, WorkerRollouts(max_new_tokens=8), batch_tokens=30, generated_tokens=10_000
    )
    assert len(policy.groups(rows)) == 1 < len(make_policy(learner, batch_tokens=30).groups(rows))
    together, apart = generate(policy), generate(make_policy(learner, batch_tokens=30))
    assert [one.input_ids.tolist() for one in together] == [one.input_ids.tolist() for one in apart]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_generation_does_not_change_the_learner(learner, max_staleness):
    policy = make_policy(learner, max_staleness=max_staleness)
    before, stream = copy.deepcopy(learner.state_dict()), torch.random.get_rng_state()
    config = learner.generation_config
    asyncio.run(policy.top_ids(generate(policy), 3))
    assert learner.training
    assert learner.generation_config is config
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert all(torch.equal(before[name], value) for name, value in learner.state_dict().items())
    learner(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in learner.parameters())


def test_stale_policy_generates_with_its_last_weights(learner):
    stale, fresh = make_policy(learner, max_staleness=1), make_policy(learner)
    first = [each.input_ids.tolist() for each in generate(stale)]
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.2 * torch.ones_like(parameter).cumsum(0).sin())
    assert [each.input_ids.tolist() for each in generate(stale)] == first
    now = [each.input_ids.tolist() for each in generate(fresh)]
    assert now != first
    stale.update(1)
    taken = generate(stale)
    assert [each.input_ids.tolist() for each in taken] == now
    assert {each.version for each in taken} == {1}


def test_stale_policy_of_an_adapter_shares_frozen_weights(learner):
    add_adapter(learner, LoraConfig(r=4, dropout=0.5), 0, "base")
    stale, fresh = make_policy(learner, max_staleness=1), make_policy(learner)
    first = [each.input_ids.tolist() for each in generate(stale)]
    assert [each.input_ids.tolist() for each in generate(fresh)] == first  # dropout is off in both
    perturb(learner)
    assert [each.input_ids.tolist() for each in generate(stale)] == first
    now = [each.input_ids.tolist() for each in generate(fresh)]
    assert now != first
    stale.update(1)
    assert [each.input_ids.tolist() for each in generate(stale)] == now
    copies = dict(stale._model.model.named_parameters())
    for name, parameter in learner.named_parameters():
        assert (copies[name] is parameter) == (not parameter.requires_grad), name


def test_top_ids_are_the_most_likely_real_tokens(learner):
    policy, rows = make_policy(learner, batch_tokens=30), prompts()
    padding = learner.get_output_embeddings().weight[VOCABULARY:]
    with torch.no_grad():
        padding.mul_(50)  # would be the most likely id, but is no token
    for row, ids in zip(rows, asyncio.run(policy.top_ids(rows, 5)), strict=True):
        logits = learner.eval()(input_ids=torch.from_numpy(row.input_ids).long()[None]).logits[0, :-1, :VOCABULARY]
        assert ids.tolist() == logits[row.counted[1:]].topk(5).indices.tolist()


def test_packing_a_row_is_lossless(learner):
    [rollout] = generate(make_policy(learner), prompts(1))
    for row in (rollout, prompts(1)[0]):
        back = unpack_row(pack_row(row), prompts(1)[0])
        assert type(back) is type(row)
        for name, value in vars(row).items():
            np.testing.assert_array_equal(getattr(back, name), value)
            assert getattr(getattr(back, name), "dtype", None) == getattr(value, "dtype", None)


def test_rollout_metrics():
    def rollout(completion, finish_reason, version):
        ids = np.array([9, *completion], np.int32)
        return Rollout(
            ids, np.arange(len(ids)) > 0, None, 1, finish_reason=finish_reason, version=version,
            teacher_calls=version, acceptance=1 / version,
        )  # fmt: skip

    assert repetition(np.array([1, 2, 3])) == 0
    assert repetition(np.array([1, 2, 3, 4] * 2)) == pytest.approx(1 / 5)
    assert repetition(np.array([7] * 13)) == pytest.approx(9 / 10)
    sums = summarize_rollouts([rollout([7] * 13, "length", 2), rollout([1, 2], "stop", 3)], version=4)
    assert sums == pytest.approx({
        "rollouts": 2, "rollout_tokens": 15, "rollout_stopped": 1, "rollout_repetition": 9 / 10, "rollout_staleness": 3,
        "rollout_teacher_calls": 5, "rollout_acceptance": 5 / 6, "rollout_turns": 2, "rollout_reward": 0,
    })  # fmt: skip


def test_cancellation_ends_generation(learner):
    learner.generation_config.eos_token_id = None
    policy, forwards = make_policy(learner), []
    get_body(learner).register_forward_hook(lambda *_: forwards.append(1))
    endless = SamplingParameters(max_new_tokens=400)

    async def cancelled_then_next():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(policy.generate(prompts(), endless, range(24)), 0.1)
        return await policy.generate(prompts(1), PARAMETERS, [0])  # on the same thread, afterwards

    [rollout] = asyncio.run(cancelled_then_next())
    assert len(rollout.completion_ids) == 8
    assert 0 < len(forwards) < 300


def test_rollouts_and_their_log_probs_are_over_the_given_number_of_ids(learner):
    settings = WorkerRollouts(max_new_tokens=8)
    policy = WorkerPolicy(learner, TOKENIZER, settings, batch_tokens=10_000, vocab_size=200)
    rollouts = generate(policy, [row for row in prompts() if row.input_ids.max() < 200])
    assert max(rollout.completion_ids.max() for rollout in rollouts) < 200
    assert max(ids.max() for ids in asyncio.run(policy.top_ids(rollouts, 5))) < 200
    [own, *_], [whole, *_] = (asyncio.run(one.logprobs(rollouts)) for one in (policy, make_policy(learner)))
    assert (own > whole).all()  # the same logits, with a smaller normalizer
