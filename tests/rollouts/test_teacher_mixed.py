"""Teacher-mixed rollouts with real models on both sides."""

import asyncio
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from rayk.engines.speculative import DraftLength, MixedSampling, expected_tokens_per_call
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError, RaykError, UnusableSignal
from rayk.rollouts.teacher_mixed import sample_teacher_mixed
from tests.engines.reference import VOCAB, prompts_of
from tests.tiny import EOS, tiny_model, tiny_tokenizer

END = tiny_tokenizer().convert_tokens_to_ids(EOS)
PROMPTS = prompts_of(7, 30, 1, 12, 3, 19)


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return TransformersEngine(tiny_teacher)


@pytest.fixture(scope="module")
def student(tiny_student):
    return AutoModelForCausalLM.from_pretrained(tiny_student).eval()


class FixedLength(DraftLength):
    """Drafts of a constant length."""

    def __init__(self, tokens):
        super().__init__(longest=tokens, call_cost=1e9)


def sampled(student, verify, prompts=PROMPTS, seed=0, alpha=0.4, max_new_tokens=24, drafted=None, **settings):
    seeds = [1000 * seed + int(prompt.sum()) for prompt in prompts]
    settings = {"vocab_size": VOCAB, "eos_token_ids": [END]} | settings
    return asyncio.run(
        sample_teacher_mixed(
            student, verify, prompts, seeds, MixedSampling(alpha, max_new_tokens),
            draft_length=drafted and FixedLength(drafted), **settings,
        )
    )  # fmt: skip


@torch.no_grad()
def logprobs(model, prompt, ids):
    """Log-probs of a continuation among the real tokens, by one forward from the start."""
    whole = torch.from_numpy(np.concatenate([prompt, ids]).astype(np.int64))
    logits = model(input_ids=whole[None]).logits[0, len(prompt) - 1 : -1, :VOCAB].float()
    return logits.log_softmax(1).gather(1, whole[len(prompt) :, None])[:, 0].numpy()


def assert_same(one, other):
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    np.testing.assert_allclose(one.student_logprobs, other.student_logprobs, atol=1e-4)
    np.testing.assert_allclose(one.teacher_logprobs, other.teacher_logprobs, atol=1e-4)
    assert one.finish_reason == other.finish_reason


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_logprobs_and_weights_equal_those_of_one_forward(student, teacher, alpha):
    for prompt, one in zip(PROMPTS, rollouts := sampled(student, teacher.verify, alpha=alpha), strict=True):
        log_q, log_p = (logprobs(model, prompt, one.token_ids) for model in (student, teacher.model))
        np.testing.assert_allclose(one.student_logprobs, log_q, atol=1e-4)
        np.testing.assert_allclose(one.teacher_logprobs, log_p, atol=1e-4)
        q, p = np.exp(log_q), np.exp(log_p)
        np.testing.assert_allclose(one.weights, q / (alpha * p + (1 - alpha) * q), rtol=1e-3, atol=1e-4)
        assert one.token_ids.max() < VOCAB
        assert (one.finish_reason == "stop") == (one.token_ids[-1] == END)
        assert one.finish_reason == "stop" or len(one.token_ids) == 24
    assert sum(one.rejected for one in rollouts) > 5 or alpha == 0


@pytest.mark.slow
@torch.no_grad()
def test_two_tokens_are_sampled_from_the_mixture(student, teacher):
    """End to end: the chi-square of the first token and of the second, whose law is summed over all first ones."""
    alpha, prompt, count = 0.5, PROMPTS[4], 4000
    sampling = MixedSampling(alpha, 2)
    drawn = sample_teacher_mixed(
        student, teacher.verify, [prompt] * count, range(count), sampling, vocab_size=VOCAB, batch_size=500
    )
    tokens = np.stack([one.token_ids for one in asyncio.run(drawn)])

    def mixed(ids):
        q, p = (model(input_ids=ids).logits[:, -1, :VOCAB].double().softmax(1) for model in (student, teacher.model))
        return (alpha * p + (1 - alpha) * q).numpy()

    start = torch.from_numpy(prompt.astype(np.int64))[None]
    first = mixed(start)[0]
    second = first @ mixed(torch.cat([start.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], dim=1))
    for column, law in zip(tokens.T, (first, second), strict=True):
        common = law * count >= 5
        seen = np.bincount(column, minlength=VOCAB)
        cells = ([*each[common], each[~common].sum()] for each in (seen, law * count))
        assert common.sum() > 20
        assert chisquare(*cells).pvalue > 1e-4


@pytest.mark.slow
def test_batch_draft_length_and_teacher_cache_change_nothing(student, tiny_teacher, teacher):
    """Nor do replicas: every second draft goes to an engine that has no or not enough of the sequence in its cache."""
    together = sampled(student, teacher.verify)
    other, turns = TransformersEngine(tiny_teacher), itertools.count()
    other._verifier._cache._max_bytes = 40_000

    async def either(drafts):
        return await (teacher if next(turns) % 2 else other).verify(drafts)

    for one, again in zip(together, sampled(student, either, drafted=5, batch_size=2), strict=True):
        assert_same(one, again)
    assert 0 < other._verifier._cache.nbytes <= 40_000
    alone = sampled(student, other.verify, PROMPTS[1:2], drafted=1)[0]
    assert_same(alone, together[1])
    assert alone.calls >= len(alone.token_ids)
    others = sampled(student, teacher.verify, seed=1)
    assert [one.token_ids.tolist() for one in together] != [one.token_ids.tolist() for one in others]


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "granite"])
def test_rollback_on_other_architectures(architecture, teacher):
    """Up to the last position; a sequence that has reached it must not read on with the others."""
    student = tiny_model(architecture=architecture, seed=5, positions=64)
    prompts = prompts_of(30, 7, 30, 30, 30, 30)
    for prompt, one in zip(prompts, sampled(student, teacher.verify, prompts, max_new_tokens=34), strict=True):
        np.testing.assert_allclose(one.student_logprobs, logprobs(student, prompt, one.token_ids), atol=1e-4)


def test_end_token_inside_a_draft_ends_the_sequence(student, teacher):
    """Whichever model samples it; an eighth of all tokens are end tokens."""
    ends = set(range(0, VOCAB, 8))
    for one in sampled(student, teacher.verify, drafted=16, eos_token_ids=ends, max_new_tokens=40):
        places = np.flatnonzero(np.isin(one.token_ids, list(ends)))
        assert one.finish_reason == "stop"
        assert places.tolist() == [len(one.token_ids) - 1]


def test_student_equal_to_the_teacher_is_always_accepted(teacher):
    for one in sampled(teacher.model, teacher.verify, drafted=8, max_new_tokens=24, eos_token_ids=()):
        assert (one.acceptance, one.calls, one.finish_reason) == (1.0, 3, "length")
        np.testing.assert_allclose(one.weights, 1.0, atol=1e-4)


def test_sequences_of_the_largest_length(teacher, student):
    rollouts = sampled(
        student, teacher.verify, [np.full(500, 9, np.int32), PROMPTS[0]], max_new_tokens=12, eos_token_ids=()
    )
    assert [len(one.token_ids) for one in rollouts] == [12, 12]


def test_calls_per_token_follow_the_formula(student, teacher):
    """With the measured acceptance; the rest of a sequence and calls for more candidates add to it."""
    rollouts = sampled(student, teacher.verify, PROMPTS * 4, alpha=0.2, max_new_tokens=64, drafted=8, eos_token_ids=())
    kept, rejected = (sum(getattr(one, name) for one in rollouts) for name in ("accepted", "rejected"))
    expected = 1 / expected_tokens_per_call(rejected / (kept + rejected), 8)
    measured = sum(one.calls for one in rollouts) / sum(len(one.token_ids) for one in rollouts)
    assert expected == pytest.approx(measured, rel=0.15)


def test_wrong_arguments_are_one_sentence(student, teacher):
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1)).eval()
    with pytest.raises(InputError, match="cannot remove tokens from its cache"):
        sampled(mamba, teacher.verify)
    with pytest.raises(InputError, match="takes 1 to 512 tokens"):
        sampled(student, teacher.verify, [np.zeros(0, np.int32)])
    with pytest.raises(InputError, match="lower|takes 1 to 512"):
        sampled(student, teacher.verify, max_new_tokens=500)
    with pytest.raises(InputError, match="share a tokenizer"):
        sampled(student, teacher.verify, vocab_size=10_000)
    student.train()
    with pytest.raises(InputError, match=r"call eval\(\)"):
        sampled(student, teacher.verify)
    student.eval()


def test_nan_is_never_sampled_from(student, teacher):
    broken = tiny_model(seed=3)
    with torch.no_grad():
        broken.lm_head.weight[17] = float("nan")
    with pytest.raises(RaykError, match="student's log-probs are NaN"):
        sampled(broken, teacher.verify)

    async def nan(drafts):
        verdicts = await teacher.verify(drafts)
        if len(drafts[-1]) > 20:
            verdicts[-1].logprobs[:] = np.nan
        return verdicts

    with pytest.raises(UnusableSignal, match="after prompt 5") as raised:
        sampled(student, nan, batch_size=6, drafted=4)
    assert raised.value.rows == [5]
