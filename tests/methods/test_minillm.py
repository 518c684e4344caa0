"""The loss of minillm equals the paper's formula, term by term, on small models; runs are reproducible."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayk.commands.cache import fill_cache
from rayk.config import MiniLLMConfig, parse_config
from rayk.errors import InputError
from rayk.losses import whiten
from rayk.methods import METHODS, Experience, MiniLLM
from rayk.rollouts import Rollout
from rayk.run import distill
from rayk.teachers import serve_teacher
from tests.runs import assert_same_learning, curve, metrics, settings
from tests.teachers.helpers import teacher_config
from tests.tiny import merge_padding, tiny_model, tiny_tokenizer

EXACT = {"kind": "minillm", "support": {"kind": "hidden", "dtype": "float32"}}


def changed(folder, student, method=EXACT, rollouts=None, **training):
    folder.mkdir(exist_ok=True)
    values = settings(folder, student, method, **training)
    values["rollouts"] |= rollouts or {}
    return parse_config(values)


@pytest.fixture
def watched(monkeypatch):
    """The experience of each update, and the student's weights before it."""
    seen: list[tuple[Experience, dict[str, torch.Tensor]]] = []

    class Watching(MiniLLM):
        def loss(self, student, experience):
            seen.append((experience, {name: each.clone() for name, each in student.model.state_dict().items()}))
            return super().loss(student, experience)

    monkeypatch.setitem(METHODS, "minillm", Watching)
    return seen


def by_hand(experience, student, teacher, vocabulary, alpha, form, single_step=True):
    """The loss, token by token and sequence by sequence, from dense logits of both models.

    q is a distribution over real tokens: the padding of the embedding is never drawn. The teacher's log-probs of single
    tokens are normalized over all its columns.
    """
    returns_of = []
    for row in experience.batch.sequences:
        ids = torch.from_numpy(row.input_ids).long()[None]
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[0].double() for model in (student, teacher)]
        log_q, log_p = (each[:, :vocabulary].log_softmax(-1) for each in logits)
        log_p_of_all = logits[1].log_softmax(-1)
        places = range(row.prompt_tokens, len(row))
        rewards = [float(log_p_of_all[t - 1, ids[0, t]] - log_q[t - 1, ids[0, t]]) for t in places]
        if form == "lmops":
            rewards = [max(-100.0, min(100.0, reward / 0.5)) for reward in rewards]
        for i, t in enumerate(places):
            first, discount = (i + 1 if single_step else i, 1.0) if form == "paper" else (i, 0.95)
            after = [discount**n * reward for n, reward in enumerate(rewards[first:])]
            p, q = (float(each[t - 1, ids[0, t]].exp()) for each in (log_p, log_q))
            weight = q / (alpha * p + (1 - alpha) * q)
            reverse_kl = float((log_q[t - 1].exp() * (log_q[t - 1] - log_p[t - 1])).sum())
            returns_of.append((sum(after) / max(1, len(after)), weight, reverse_kl))
    returns, weight, reverse_kl = np.array(returns_of).T
    if form == "lmops":
        returns = (returns - returns.mean()) / np.sqrt(returns.var() + 1e-8)
    clipped = np.clip(weight, 0.8, 1.2)
    total = np.maximum(-returns * weight, -returns * clipped)
    if single_step:
        total += (weight if form == "paper" else 1.0) * reverse_kl
    return total.mean()


@pytest.mark.parametrize(
    ("form", "single_step", "alpha"),
    [
        ("paper", True, 0.0),
        ("paper", True, 0.5),
        ("paper", False, 0.5),
        ("lmops", True, 0.0),
        ("lmops", True, 0.5),
        ("lmops", False, 0.0),
    ],
)
def test_loss_on_teacher_mixed_rollouts_equals_the_paper(
    form, single_step, alpha, watched, tmp_path, tiny_student, tiny_teacher, served
):
    method = EXACT | {"form": form, "single_step": single_step, "teacher_share": alpha}
    run = changed(tmp_path, tiny_student, method, steps=2, micro_batch_tokens=100_000)
    distill(run)
    vocabulary = served.info.vocab_size
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_student, tiny_teacher))
    for (experience, state), row in zip(watched, metrics(run.output_path), strict=True):
        student.load_state_dict(state)
        assert all(isinstance(each, Rollout) for each in experience.batch.sequences)
        assert row["counted_tokens"] == sum(len(each) - each.prompt_tokens for each in experience.batch.sequences)
        expected = by_hand(experience, student, teacher, vocabulary, alpha, form, single_step)
        assert row["loss"] == pytest.approx(expected, rel=5e-3, abs=2e-3)
        assert 0 < row["rollout_acceptance"] <= 1 and (row["rollout_teacher_calls"] > 0) == (alpha > 0)


def test_student_equal_to_its_teacher_learns_nothing(tmp_path, ray_cluster):
    tokenizer, twin = tiny_tokenizer(), str(tmp_path / "twin")
    tiny_model(twin, seed=3, hidden=16, vocab_size=len(tokenizer), tokenizer=tokenizer)
    with serve_teacher(teacher_config("twin", twin)):
        # Adam makes full-size steps even from gradients that are rounding errors, so the steps must be small.
        values = settings(tmp_path, twin, EXACT, learning_rate=1e-5)
        distill(parse_config(values | {"teachers": [{"name": "twin", "attach": True}]}))
    assert max(map(abs, curve(tmp_path / "run"))) < 1e-3
    assert curve(tmp_path / "run", "gradient_norm")[0] < 1e-4


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_run_is_reproducible(max_staleness, tmp_path, tiny_student, served):
    method = EXACT | {"inner_epochs": 2, "minibatches": 2}
    for name in ("one", "other"):
        distill(changed(tmp_path / name, tiny_student, method, rollouts={"max_staleness": max_staleness}))
    assert_same_learning(tmp_path / "one" / "run", tmp_path / "other" / "run")


def test_each_inner_epoch_uses_every_row(watched, tmp_path, tiny_student, served):
    method = EXACT | {"inner_epochs": 3, "minibatches": 2}
    run = changed(tmp_path, tiny_student, method, steps=2, batch_size=5, micro_batch_tokens=100_000)
    distill(run)
    assert len(watched) == 2 * 3 * 2
    for step in (0, 1):
        updates = watched[6 * step : 6 * step + 6]
        for epoch in (0, 1, 2):
            halves = [experience.batch.sequences for experience, _ in updates[2 * epoch : 2 * epoch + 2]]
            assert len({row.where for half in halves for row in half}) == sum(map(len, halves)) == 5
        for before, after in pairwise(state for _, state in updates):
            assert any((before[name] != after[name]).any() for name in before)


def test_micro_batches_do_not_change_the_run(tmp_path, tiny_student, served):
    for name, tokens in (("small", 60), ("whole", 100_000)):
        distill(changed(tmp_path / name, tiny_student, EXACT | {"form": "lmops"}, micro_batch_tokens=tokens))
    assert_same_learning(tmp_path / "small" / "run", tmp_path / "whole" / "run")


@pytest.mark.long
def test_two_workers_equal_one(tmp_path, tiny_student, served):
    for name, workers in (("one", 0), ("two", 2)):
        distill(changed(tmp_path / name, tiny_student, EXACT | {"form": "lmops"}, workers=workers, steps=3))
    assert_same_learning(tmp_path / "one" / "run", tmp_path / "two" / "run")


def test_returns_are_whitened_over_all_workers():
    torch.manual_seed(0)
    returns = torch.randn(9) * 3 + 1
    method = MiniLLM(MiniLLMConfig(form="lmops"), None)
    shares = [Experience(None, columns={"returns": part}) for part in (returns[:2], returns[2:])]
    moments: list[list[float]] = []
    for share in shares:
        method.synchronize(share, SimpleNamespace(sums=lambda values: moments.append(values) or values), 0)
    whole = [sum(each) for each in zip(*moments, strict=True)]
    workers = SimpleNamespace(sums=lambda _: whole)
    found = torch.cat([method.synchronize(share, workers, 0).columns["returns"] for share in shares])
    torch.testing.assert_close(found, (returns - returns.mean()) / returns.std(correction=0))
    torch.testing.assert_close(whiten(returns, torch.tensor(whole)), found)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_pretraining_loss_is_averaged_over_its_own_tokens(share, watched, tmp_path, tiny_student, tiny_teacher, served):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{"plain words " * (i % 3 + 1)}{i}"}}\n' for i in range(9)))
    pretraining = {"data": {"path": str(text)}, "weight": 2.0, "batch_size": 3, "teacher_share": share}
    run = changed(tmp_path, tiny_student, EXACT | {"pretraining": pretraining}, steps=1, micro_batch_tokens=100_000)
    distill(run)
    (completions, state), (plain, _) = watched
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_student, tiny_teacher))
    student.load_state_dict(state)
    values = []
    for row in plain.batch.sequences:
        ids = torch.from_numpy(row.input_ids).long()[None]
        with torch.no_grad():
            log_q, log_p = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (student, teacher))
        for t in np.flatnonzero(row.counted):
            p, q = (merge_padding(logprobs[t - 1], served.info.vocab_size) for logprobs in (log_p, log_q))
            forward_kl = float((p.exp() * (p - q)).sum())
            values.append(share * forward_kl - (1 - share) * float(log_q[t - 1, ids[0, t]]))
    [row] = metrics(run.output_path)
    assert plain.batch.rows == 3 and row["pretraining"] == pytest.approx(np.mean(values), rel=5e-3)
    expected = by_hand(completions, student, teacher, served.info.vocab_size, 0.2, "paper") + 2 * np.mean(values)
    assert row["loss"] == pytest.approx(expected, rel=5e-3, abs=2e-3)


@pytest.mark.long
def test_student_approaches_its_teacher(tmp_path, tiny_student, served):
    method = {"kind": "minillm", "support": {"kind": "requested", "k": 16}, "requested_ids": 16}
    distill(changed(tmp_path, tiny_student, method, steps=40, batch_size=16))
    found = curve(tmp_path / "run", "reverse_kl")
    assert np.mean(found[-10:]) < np.mean(found[:10]) - 0.05


def test_mass_on_padding_is_not_rewarded(tmp_path, tiny_student, served):
    """The distribution that is sampled is the one that is rewarded: the mean reward is minus the reverse KL. (With the
    embedding's padding in q, rewards rose while reverse KL rose too.)"""
    method = EXACT | {"teacher_share": 0.0}
    distill(changed(tmp_path, tiny_student, method, steps=40, batch_size=16))
    reverse_kl, reward = (np.mean(curve(tmp_path / "run", name)[-20:]) for name in ("reverse_kl", "reward"))
    assert abs(reverse_kl + reward) < 0.5


def test_rollouts_cannot_be_cached_in_advance(tmp_path, tiny_student):
    values = settings(tmp_path, tiny_student, EXACT) | {"cache": {"path": str(tmp_path / "cache")}}
    with pytest.raises(InputError, match="learns from rollouts, which are generated during the run"):
        fill_cache(parse_config(values))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": {"kind": "minillm", "support": {"kind": "sampled"}}}, "from support 'sampled'; use 'topk'"),
        ({"method": {"kind": "minillm", "support": {"kind": "logprob"}}}, "from support 'logprob'"),
        ({"method": {"kind": "minillm", "teacher_share": 1.0}}, "teacher_share"),
        ({"method": {"kind": "minillm", "form": "lmops", "length_norm": False}}, "always divides returns"),
        ({"method": {"kind": "minillm", "minibatches": 9}}, "method.minibatches (9) for each of training.workers (1)"),
        (
            {"method": {"kind": "minillm", "minibatches": 2, "pretraining": {"data": {"path": "p"}, "batch_size": 1}}},
            "but method.pretraining.batch_size is 1; raise it",
        ),
        ({"rollouts": {"temperature": 0.7}}, "sampled at temperature 1 without truncation"),
        ({"teachers": [{"name": "one", "model": "m", "engine": {"kind": "vllm"}}]}, "set method.teacher_share to 0"),
        ({"teachers": []}, "method.kind 'minillm' needs a teacher"),
    ],
)
def test_invalid_settings_are_named(given, said):
    values = {
        "teachers": [{"name": "one", "model": "m"}], "student": {"model": "m"}, "data": {"train": {"path": "p"}},
        "method": {"kind": "minillm"}, "training": {"workers": 1, "batch_size": 8},
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        parse_config(values | given)
    assert said in str(caught.value)
