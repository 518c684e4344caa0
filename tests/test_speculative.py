"""The core of teacher-mixed sampling on models small enough to enumerate: tables of bigrams."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rayk import speculative
from rayk.errors import InputError
from rayk.speculative import (
    Continuation,
    Draft,
    DraftLength,
    MixedSampling,
    Stream,
    Verdict,
    draw,
    first_taken,
    one_step_weights,
    tokens_a_call,
    uniforms,
)

TOKENS, LENGTH, SAMPLES = 4, 2, 20_000
PROMPT = np.zeros(1, np.int32)
HOPELESS = 1e-4  # a p-value no right sampler reaches with these seeds


def tables(spread, seed=0):
    """Log-probs [TOKENS, TOKENS] of the next token after each, of a teacher and a student."""
    random = torch.Generator().manual_seed(seed)
    return [(spread * torch.randn(TOKENS, TOKENS, generator=random)).log_softmax(1) for _ in range(2)]


MODELS = {"flat": 0.5, "peaked": 4.0}


def answered(teacher, draft):
    """What an engine does: `Draft` to `Verdict`."""
    ids = torch.from_numpy(draft.input_ids.astype(np.int64))
    logprobs = teacher[ids[draft.start - 1 : -1], ids[draft.start :]].numpy()
    kept = draft.kept(logprobs)
    nothing = np.zeros(0, np.int32)
    if draft.drafted and kept == draft.drafted:
        return Verdict(kept, logprobs, nothing, nothing.astype(np.float32))
    last = teacher[ids[draft.start + kept - 1]]
    candidates = draw(last[None], torch.from_numpy(draft.candidate_numbers(kept))[None])[0]
    return Verdict(kept, logprobs[: kept + 1], candidates.numpy().astype(np.int32), last[candidates].numpy())


def continued(teacher, student, alpha, drafted, seed, **settings):
    """One sequence, in drafts of up to `drafted` tokens."""
    one = Continuation(PROMPT, seed, MixedSampling(alpha, LENGTH, **settings))
    while not one.finish_reason:
        if not one.open:
            ids, last = [], one.token_ids[-1] if one.token_ids else 0
            for number in uniforms(Stream.DRAFTS, seed, min(drafted, one.room), start=one.position):
                last = int(draw(student[last][None], torch.tensor([[number]], dtype=torch.float64)))
                ids.append(last)
            sequence = [one.token_ids[-1] if one.token_ids else 0, *ids]
            one.propose(ids, [float(student[a, b]) for a, b in itertools.pairwise(sequence)])

        def evaluate(position, ids, one=one):
            before = one.token_ids[-1] if one.token_ids else 0
            assert position == one.position
            return student[before][torch.from_numpy(ids.astype(np.int64))].numpy()

        one.settle(answered(teacher, one.question()), evaluate)
    return one


def many(teacher, student, alpha, drafted, samples=SAMPLES, **settings):
    return [continued(teacher, student, alpha, drafted, seed, **settings) for seed in range(samples)]


def mixture(teacher, student, alpha):
    """p̃ of every sequence of LENGTH tokens."""
    mixed = alpha * teacher.double().exp() + (1 - alpha) * student.double().exp()
    return {
        ids: float(np.prod([mixed[a, b] for a, b in itertools.pairwise((0, *ids))]))
        for ids in itertools.product(range(TOKENS), repeat=LENGTH)
    }


def p_value(sequences, exact):
    """Of the chi-square test of `sequences` against `exact`; outcomes expected fewer than 5 times are one cell."""
    seen = Counter(tuple(ids) for ids in sequences)
    cells = {True: [0.0, 0.0]}
    for ids, probability in exact.items():
        expected = probability * len(sequences)
        cell = cells.setdefault(True if expected < 5 else ids, [0.0, 0.0])
        cell[0] += seen[ids]
        cell[1] += expected
    if cells[True][1] < 5:
        cells.pop(True)
    observed, expected = np.array(list(cells.values())).T
    return chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.parametrize("spread", MODELS)
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_samples_are_those_of_the_mixture_whatever_the_draft_length(spread, alpha):
    teacher, student = tables(MODELS[spread])
    long = [one.token_ids for one in many(teacher, student, alpha, drafted=16)]
    assert p_value(long, mixture(teacher, student, alpha)) > HOPELESS
    # Not in distribution only: the same tokens, drafted one by one and with other numbers of candidates.
    short = [one.token_ids for one in many(teacher, student, alpha, 1, SAMPLES // 20, candidates=1)]
    assert short == long[: len(short)]
    assert p_value(long, mixture(teacher, student, abs(alpha - 0.15))) < HOPELESS  # the test can tell


SHARED = {
    "one stream for coins and candidates": {Stream.CANDIDATES: Stream.COINS},
    "one stream for candidates and their coins": {Stream.CANDIDATE_COINS: Stream.CANDIDATES},
    "one stream for drafts and coins": {Stream.COINS: Stream.DRAFTS},
}


@pytest.mark.parametrize("streams", SHARED.values(), ids=SHARED)
def test_shared_streams_would_show(monkeypatch, streams):
    """A wrong variant on purpose: the chi-square test above has to find it."""

    def shared(stream, seed, count, *, start, position=0):
        by_position = stream in (Stream.CANDIDATES, Stream.CANDIDATE_COINS)
        if stream in streams and streams[stream] is Stream.COINS and by_position:
            return np.resize(uniforms(Stream.COINS, seed, 1, start=position), count)
        return uniforms(streams.get(stream, stream), seed, count, start=start, position=position)

    monkeypatch.setattr(speculative, "uniforms", shared)
    teacher, student = tables(2.0)
    wrong = [one.token_ids for one in many(teacher, student, 0.5, drafted=16, samples=3000)]
    assert p_value(wrong, mixture(teacher, student, 0.5)) < 1e-12


def test_candidates_tried_twice_would_show(monkeypatch):
    """A wrong variant on purpose: every call brings the first candidates again, though with new coins."""

    def again(stream, seed, count, *, start, position=0):
        numbers = uniforms(stream, seed, count, start=0 if stream is Stream.CANDIDATES else start, position=position)
        return np.resize(numbers[:2], count) if stream is Stream.CANDIDATES else numbers

    monkeypatch.setattr(speculative, "uniforms", again)
    teacher, student = tables(2.0)
    wrong = [one.token_ids for one in many(teacher, student, 1.0, drafted=16, samples=5000, candidates=2)]
    assert p_value(wrong, mixture(teacher, student, 1.0)) < 1e-12


@pytest.mark.parametrize("spread", MODELS)
def test_logprobs_and_weights_are_the_tables(spread):
    teacher, student = tables(MODELS[spread])
    weights = []
    for one in many(teacher, student, 0.2, drafted=4, samples=2000):
        pairs = np.array([*itertools.pairwise((0, *one.token_ids))]).T
        log_p, log_q = (table[pairs[0], pairs[1]].numpy() for table in (teacher, student))
        np.testing.assert_allclose(one.teacher_logprobs, log_p, rtol=1e-6)
        np.testing.assert_allclose(one.student_logprobs, log_q, rtol=1e-6)
        w = one_step_weights(np.array(one.student_logprobs), np.array(one.teacher_logprobs), 0.2)
        np.testing.assert_allclose(w, np.exp(log_q) / (0.2 * np.exp(log_p) + 0.8 * np.exp(log_q)), rtol=1e-5)
        weights.append(w)
    weights = np.concatenate(weights)
    assert weights.max() <= 1 / 0.8 + 1e-6
    assert abs(weights.mean() - 1) < 4 * weights.std() / np.sqrt(weights.size)  # E w = 1 under p̃


def test_weights_do_not_overflow():
    w = one_step_weights(np.array([-900.0, -1.0]), np.array([-0.1, -np.inf]), 0.2)
    np.testing.assert_allclose(w, [0.0, 1.25], atol=1e-6)
    assert one_step_weights(np.array([-900.0]), np.array([-0.1]), 0.0) == 1.0


def test_equal_models_keep_everything():
    teacher, _ = tables(2.0)
    for one in many(teacher, teacher, 0.5, drafted=16, samples=500):
        assert (one.kept, one.rejected, one.calls) == (LENGTH, 0, 1)


def test_a_hopeless_rejection_ends_with_the_drafted_token():
    """Candidates of probability p = q are never taken; without a cap this would ask for ever."""
    teacher, _ = tables(0.5)
    one = Continuation(PROMPT, 7, MixedSampling(0.5, 1, candidates=8, max_candidates=100))
    one.propose([2], [float(teacher[0, 2])])
    asked = []
    while not one.finish_reason:
        draft = one.question()
        asked.append((draft.drafted, draft.tried, draft.candidates))
        unkind = Draft(draft.input_ids, draft.logprobs, draft.coins * 0 + 1.0, 0.5, 7, draft.candidates, draft.tried)
        one.settle(answered(teacher, unkind), lambda _, ids: teacher[0][torch.from_numpy(ids).long()].numpy())
    assert asked == [(1, 0, 8), (0, 8, 16), (0, 24, 32), (0, 56, 44)]
    assert (one.token_ids, one.capped, one.rejected, one.calls) == ([2], 1, 1, 4)
    assert one.teacher_logprobs == one.student_logprobs == [pytest.approx(float(teacher[0, 2]))]


def test_a_token_the_teacher_excludes_is_never_kept_at_alpha_1():
    draft = Draft(np.array([0, 1, 2], np.int32), np.log([0.5, 0.5]), np.zeros(2), 1.0, 0, 8)
    assert draft.kept(np.array([-0.5, -np.inf])) == 1
    assert draft.kept(np.array([-np.inf, -0.5])) == 0
    assert first_taken(np.array([0.0, -np.inf]), np.array([-1.0, -1.0]), np.array([0.0, 0.99])) == 1


def test_nan_from_the_teacher_keeps_nothing():
    draft = Draft(np.array([0, 1], np.int32), np.log([0.5]), np.zeros(1), 0.5, 0, 8)
    assert draft.kept(np.array([np.nan])) == 0


@pytest.mark.parametrize("drafted", [4, 16])
def test_calls_a_token_follow_the_formula(drafted):
    """A single distribution at every position, so that TV is one number, and sequences long against a draft."""
    p, q = torch.tensor([0.5, 0.3, 0.1, 0.1]), torch.tensor([0.2, 0.3, 0.3, 0.2])
    teacher, student = (each.log().expand(TOKENS, TOKENS) for each in (p, q))
    tv, alpha, tokens = float((p - q).clamp(min=0).sum()), 0.2, 0
    drafts = []
    for seed in range(1500):
        one = Continuation(PROMPT, seed, MixedSampling(alpha, drafted, candidates=64))
        ids = draw(student[:1], torch.from_numpy(uniforms(Stream.DRAFTS, seed, drafted, start=1))[None])[0]
        one.propose(ids.tolist(), student[0, ids].tolist())
        one.settle(answered(teacher, one.question()), lambda _, ids: student[0][torch.from_numpy(ids).long()].numpy())
        drafts.append(len(one.token_ids))
        tokens += one.kept + one.rejected
    assert tokens == sum(drafts)
    error = np.std(drafts) / np.sqrt(len(drafts))
    assert abs(np.mean(drafts) - tokens_a_call(alpha * tv, drafted)) < 4 * error
    assert error < 0.03 * drafts[0] + 0.2


def test_tokens_a_call():
    assert tokens_a_call(0.06, 8) == pytest.approx(6.5, abs=0.05)
    assert tokens_a_call(0.06, 16) == pytest.approx(10.5, abs=0.05)
    assert tokens_a_call(0.06, 10**6) == pytest.approx(16.7, abs=0.05)
    assert [tokens_a_call(rate, 8) for rate in (0.0, 1.0)] == [8.0, 1.0]
    assert tokens_a_call(1e-12, 8) == pytest.approx(8.0)


def test_drafts_grow_with_acceptance():
    begin = DraftLength().tokens
    kind, unkind = DraftLength(longest=48), DraftLength()
    kind.observe(kept=10_000, rejected=0)
    unkind.observe(kept=500, rejected=500)
    assert (begin, kind.tokens) == (16, 48)
    assert unkind.tokens < 8


def test_numbers_are_uniform_and_each_use_has_its_own():
    places = list(itertools.product(Stream, [0, 1, 2**64 - 1], [0, 1, 2]))
    numbers = np.array([uniforms(s, seed, 64, start=0, position=place) for s, seed, place in places])
    assert len(np.unique(numbers)) == numbers.size
    assert chisquare(np.histogram(numbers, 32, (0, 1))[0]).pvalue > HOPELESS
    assert np.abs(np.corrcoef(numbers)[np.triu_indices(len(places), 1)]).max() < 0.6
    for start in range(9):
        np.testing.assert_array_equal(
            uniforms(Stream.COINS, 5, 9, start=start), uniforms(Stream.COINS, 5, 18, start=0)[start : start + 9]
        )


def test_draws_follow_the_distribution_and_avoid_what_is_impossible():
    logprobs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log()
    drawn = draw(logprobs, torch.tensor([[0.0, 0.2499, 0.25, 1 - 2**-53]], dtype=torch.float64))
    assert drawn.tolist() == [[1, 1, 3, 3]]


def test_what_cannot_be_sampled_is_refused():
    for wrong in ({"alpha": 1.2}, {"max_new_tokens": 0}, {"candidates": 0}, {"candidates": 9, "max_candidates": 8}):
        with pytest.raises(InputError, match="alpha"):
            MixedSampling(**wrong)
    with pytest.raises(ValueError, match="a token before them"):
        Draft(np.zeros(2, np.int32), np.zeros(2), np.zeros(2), 0.2, 0, 8)
