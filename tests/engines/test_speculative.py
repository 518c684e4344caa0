"""Teacher-mixed sampling with models that are small enough to enumerate: bigram tables."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rayk.engines import speculative
from rayk.engines.speculative import (
    Continuation,
    Draft,
    DraftLength,
    MixedSampling,
    Stream,
    Verdict,
    draw_uniforms,
    expected_tokens_per_call,
    first_accepted,
    importance_weights,
    sample_ids,
)
from rayk.errors import InputError

TOKENS, LENGTH, SAMPLES = 4, 2, 12_000
PROMPT = np.zeros(1, np.int32)
HOPELESS = 1e-4  # no correct sampler has a smaller p-value with these seeds


def tables(spread, seed=0):
    """Return next-token log-probs [TOKENS, TOKENS] of a teacher and a student."""
    random = torch.Generator().manual_seed(seed)
    return [(spread * torch.randn(TOKENS, TOKENS, generator=random)).log_softmax(1) for _ in range(2)]


MODELS = {"flat": 0.5, "peaked": 4.0}


def verify(teacher, drafts):
    """Return a verdict per draft, as an engine does."""
    kept, logprobs, befores = [], [], []
    for draft in drafts:
        logprobs.append(teacher.numpy()[draft.input_ids[draft.start - 1 : -1], draft.input_ids[draft.start :]])
        kept.append(draft.count_accepted(logprobs[-1]))
        befores.append(draft.input_ids[draft.start + kept[-1] - 1])
    numbers = [draft.candidate_numbers(own) for draft, own in zip(drafts, kept, strict=True)]
    width = max(map(len, numbers))
    wide = np.stack([np.resize(own, width) for own in numbers])
    ids = sample_ids(teacher[torch.tensor(np.array(befores), dtype=torch.long)], torch.from_numpy(wide)).numpy()
    verdicts = []
    for row, (draft, own) in enumerate(zip(drafts, kept, strict=True)):
        rejected = own < draft.drafted or not draft.drafted
        candidates = ids[row, : len(numbers[row]) if rejected else 0].astype(np.int32)
        verdicts.append(Verdict(own, logprobs[row][: own + 1], candidates, teacher.numpy()[befores[row], candidates]))
    return verdicts


def propose_tokens(student, rows, tokens):
    """Propose `tokens` tokens to each row, or fewer up to its limit."""
    numbers = np.stack([draw_uniforms(Stream.DRAFTS, row.seed, tokens, start=row.position) for row in rows])
    drawn = [torch.tensor([row.sequence()[-1] for row in rows], dtype=torch.long)]
    for step in range(tokens):
        drawn.append(sample_ids(student[drawn[-1]], torch.from_numpy(numbers[:, step, None]))[:, 0])
    ids = torch.stack(drawn, dim=1)
    logprobs = student[ids[:, :-1], ids[:, 1:]].tolist()
    for row, own, own_logprobs in zip(rows, ids[:, 1:].tolist(), logprobs, strict=True):
        row.propose(own[: row.remaining_tokens], own_logprobs[: row.remaining_tokens])


def sample_many(teacher, student, alpha, drafted, samples=SAMPLES, length=LENGTH, **settings):
    """Sample sequences with seeds 0 to `samples`, in drafts of up to `drafted` tokens."""
    sampling = MixedSampling(alpha, length, **settings)
    rows = [Continuation(PROMPT, seed, sampling) for seed in range(samples)]
    while going := [row for row in rows if not row.finish_reason]:
        if fresh := [row for row in going if not row.is_pending]:
            propose_tokens(student, fresh, min(drafted, length))
        verdicts = verify(teacher, [row.next_draft() for row in going])
        for row, verdict in zip(going, verdicts, strict=True):
            row.apply_verdict(
                verdict, lambda position, ids, row=row: student.numpy()[row.sequence()[position - 1], ids]
            )
    return rows


def mixture(teacher, student, alpha):
    """Return p̃ of every sequence of LENGTH tokens."""
    mixed = alpha * teacher.double().exp() + (1 - alpha) * student.double().exp()
    return {
        ids: float(np.prod([mixed[a, b] for a, b in itertools.pairwise((0, *ids))]))
        for ids in itertools.product(range(TOKENS), repeat=LENGTH)
    }


def p_value(sequences, exact):
    """Return the p-value of a chi-square test of `sequences` against `exact`; rare outcomes (< 5) form one cell."""
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


@pytest.mark.slow
@pytest.mark.parametrize("spread", MODELS)
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_samples_follow_the_mixture_at_every_draft_length(spread, alpha):
    teacher, student = tables(MODELS[spread])
    long = [one.token_ids for one in sample_many(teacher, student, alpha, drafted=16)]
    assert p_value(long, mixture(teacher, student, alpha)) > HOPELESS
    # Not only the distribution: the tokens are equal if drafted one by one and with other numbers of candidates.
    short = [one.token_ids for one in sample_many(teacher, student, alpha, 1, SAMPLES // 20, candidates=1)]
    assert short == long[: len(short)]
    assert p_value(long, mixture(teacher, student, abs(alpha - 0.15))) < HOPELESS  # the test detects a wrong alpha


SHARED = {
    "one stream for coins and candidates": {Stream.CANDIDATES: Stream.COINS},
    "one stream for candidates and their coins": {Stream.CANDIDATE_COINS: Stream.CANDIDATES},
    "one stream for drafts and coins": {Stream.COINS: Stream.DRAFTS},
}


@pytest.mark.slow
@pytest.mark.parametrize("streams", SHARED.values(), ids=SHARED)
def test_shared_random_streams_are_detected(monkeypatch, streams):
    """A deliberately wrong variant, which the chi-square test above must detect."""

    def shared(stream, seed, count, *, start, position=0):
        by_position = stream in (Stream.CANDIDATES, Stream.CANDIDATE_COINS)
        if stream in streams and streams[stream] is Stream.COINS and by_position:
            return np.resize(draw_uniforms(Stream.COINS, seed, 1, start=position), count)
        return draw_uniforms(streams.get(stream, stream), seed, count, start=start, position=position)

    monkeypatch.setattr(speculative, "draw_uniforms", shared)
    teacher, student = tables(2.0)
    wrong = [one.token_ids for one in sample_many(teacher, student, 0.5, drafted=16, samples=6000)]
    assert p_value(wrong, mixture(teacher, student, 0.5)) < 1e-12


@pytest.mark.slow
def test_repeated_candidates_are_detected(monkeypatch):
    """A deliberately wrong variant: every call sends the first candidates again, with new coins."""

    def again(stream, seed, count, *, start, position=0):
        numbers = draw_uniforms(
            stream, seed, count, start=0 if stream is Stream.CANDIDATES else start, position=position
        )
        return np.resize(numbers[:2], count) if stream is Stream.CANDIDATES else numbers

    monkeypatch.setattr(speculative, "draw_uniforms", again)
    teacher, student = tables(2.0)
    wrong = [one.token_ids for one in sample_many(teacher, student, 1.0, drafted=16, samples=5000, candidates=2)]
    assert p_value(wrong, mixture(teacher, student, 1.0)) < 1e-12


@pytest.mark.parametrize("spread", MODELS)
def test_logprobs_and_weights_equal_the_tables(spread):
    teacher, student = tables(MODELS[spread])
    weights = []
    for one in sample_many(teacher, student, 0.2, drafted=4, samples=2000):
        pairs = np.array([*itertools.pairwise((0, *one.token_ids))]).T
        log_p, log_q = (table[pairs[0], pairs[1]].numpy() for table in (teacher, student))
        np.testing.assert_allclose(one.teacher_logprobs, log_p, rtol=1e-6)
        np.testing.assert_allclose(one.student_logprobs, log_q, rtol=1e-6)
        w = importance_weights(np.array(one.student_logprobs), np.array(one.teacher_logprobs), 0.2)
        np.testing.assert_allclose(w, np.exp(log_q) / (0.2 * np.exp(log_p) + 0.8 * np.exp(log_q)), rtol=1e-5)
        weights.append(w)
    weights = np.concatenate(weights)
    assert weights.max() <= 1 / 0.8 + 1e-6
    assert abs(weights.mean() - 1) < 4 * weights.std() / np.sqrt(weights.size)  # E w = 1 under p̃


def test_weights_do_not_overflow():
    w = importance_weights(np.array([-900.0, -1.0]), np.array([-0.1, -np.inf]), 0.2)
    np.testing.assert_allclose(w, [0.0, 1.25], atol=1e-6)
    assert importance_weights(np.array([-900.0]), np.array([-0.1]), 0.0) == 1.0


def test_equal_models_accept_all_tokens():
    teacher, _ = tables(2.0)
    for one in sample_many(teacher, teacher, 0.5, drafted=16, samples=500):
        assert (one.accepted, one.rejected, one.calls) == (LENGTH, 0, 1)


def test_after_the_last_candidate_the_drafted_token_is_used():
    """Candidates with p = q are never accepted; without a limit this would not end."""
    teacher, _ = tables(0.5)
    one = Continuation(PROMPT, 7, MixedSampling(0.5, 1, candidates=8, max_candidates=100))
    one.propose([2], [float(teacher[0, 2])])
    asked = []
    while not one.finish_reason:
        draft = one.next_draft()
        asked.append((draft.drafted, draft.tried, draft.candidates))
        unkind = Draft(draft.input_ids, draft.logprobs, draft.coins * 0 + 1.0, 0.5, 7, draft.candidates, draft.tried)
        one.apply_verdict(verify(teacher, [unkind])[0], lambda _, ids: teacher.numpy()[0, ids])
    assert asked == [(1, 0, 8), (0, 8, 16), (0, 24, 32), (0, 56, 44)]
    assert (one.token_ids, one.capped, one.rejected, one.calls) == ([2], 1, 1, 4)
    assert one.teacher_logprobs == one.student_logprobs == [pytest.approx(float(teacher[0, 2]))]


def test_a_token_impossible_for_the_teacher_is_rejected_at_alpha_1():
    draft = Draft(np.array([0, 1, 2], np.int32), np.log([0.5, 0.5]), np.zeros(2), 1.0, 0, 8)
    assert draft.count_accepted(np.array([-0.5, -np.inf])) == 1
    assert draft.count_accepted(np.array([-np.inf, -0.5])) == 0
    assert first_accepted(np.array([0.0, -np.inf]), np.array([-1.0, -1.0]), np.array([0.0, 0.99])) == 1


def test_nan_from_the_teacher_rejects_all_tokens():
    draft = Draft(np.array([0, 1], np.int32), np.log([0.5]), np.zeros(1), 0.5, 0, 8)
    assert draft.count_accepted(np.array([np.nan])) == 0


@pytest.mark.parametrize("drafted", [4, 16])
def test_tokens_per_call_match_the_formula(drafted):
    """The same distribution at every position, so that TV is one number; one draft each, so that none is truncated."""
    p, q = torch.tensor([0.5, 0.3, 0.1, 0.1]), torch.tensor([0.2, 0.3, 0.3, 0.2])
    alpha, tv = 0.2, float((p - q).clamp(min=0).sum())
    teacher, student = (each.log().repeat(TOKENS, 1) for each in (p, q))
    rows = [Continuation(PROMPT, seed, MixedSampling(alpha, 2 * drafted, candidates=64)) for seed in range(1500)]
    propose_tokens(student, rows, drafted)
    for row, verdict in zip(rows, verify(teacher, [row.next_draft() for row in rows]), strict=True):
        row.apply_verdict(verdict, lambda _, ids: student.numpy()[0, ids])
    settled = [len(row.token_ids) for row in rows]
    error = np.std(settled) / np.sqrt(len(settled))
    assert abs(np.mean(settled) - expected_tokens_per_call(alpha * tv, drafted)) < 4 * error < 0.05 * drafted


def test_expected_tokens_per_call():
    assert expected_tokens_per_call(0.06, 8) == pytest.approx(6.5, abs=0.05)
    assert expected_tokens_per_call(0.06, 16) == pytest.approx(10.5, abs=0.05)
    assert expected_tokens_per_call(0.06, 10**6) == pytest.approx(16.7, abs=0.05)
    assert [expected_tokens_per_call(rate, 8) for rate in (0.0, 1.0)] == [8.0, 1.0]
    assert expected_tokens_per_call(1e-12, 8) == pytest.approx(8.0)


def test_drafts_grow_with_the_acceptance_rate():
    begin = DraftLength().tokens
    kind, unkind = DraftLength(longest=48), DraftLength()
    kind.observe(accepted=10_000, rejected=0)
    unkind.observe(accepted=500, rejected=500)
    assert (begin, kind.tokens) == (16, 48)
    assert unkind.tokens < 8


def test_random_numbers_are_uniform_and_never_shared():
    places = list(itertools.product(Stream, [0, 1, 2**64 - 1], [0, 1, 2]))
    numbers = np.array([draw_uniforms(s, seed, 64, start=0, position=place) for s, seed, place in places])
    assert len(np.unique(numbers)) == numbers.size
    assert chisquare(np.histogram(numbers, 32, (0, 1))[0]).pvalue > HOPELESS
    assert np.abs(np.corrcoef(numbers)[np.triu_indices(len(places), 1)]).max() < 0.6
    for start in range(9):
        np.testing.assert_array_equal(
            draw_uniforms(Stream.COINS, 5, 9, start=start),
            draw_uniforms(Stream.COINS, 5, 18, start=0)[start : start + 9],
        )


def test_sample_ids_never_returns_impossible_ids():
    logprobs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log()
    drawn = sample_ids(logprobs, torch.tensor([[0.0, 0.2499, 0.2501, 1 - 2**-53]], dtype=torch.float64))
    assert drawn.tolist() == [[1, 1, 3, 3]]


def test_invalid_sampling_parameters_are_refused():
    for wrong in ({"alpha": 1.2}, {"max_new_tokens": 0}, {"candidates": 0}, {"candidates": 9, "max_candidates": 8}):
        with pytest.raises(InputError, match="alpha"):
            MixedSampling(**wrong)
    with pytest.raises(ValueError, match="a token before them"):
        Draft(np.zeros(2, np.int32), np.zeros(2), np.zeros(2), 0.2, 0, 8)
