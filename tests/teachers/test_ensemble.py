"""Ensembles, compared with the dense mean of their models, and runs with several teachers."""

import asyncio
import json
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk import losses
from rayk.config import parse_config
from rayk.config.support import Hidden, Logprob, TopK
from rayk.data.tokenizing import tokenize
from rayk.data.views import RowViews
from rayk.errors import InputError
from rayk.run import distill
from rayk.serving.event_loop import run_until_complete
from rayk.signals.sequence import TokenSequence
from rayk.teachers import Ensemble, serve_teacher
from tests.runs import assert_losses_close, curve, metrics, settings
from tests.teachers.helpers import EngineScorer, random_sequences, teacher_config

WEIGHTS = [1.0, 3.0]
SEQUENCES = random_sequences(6)


@pytest.fixture(scope="module")
def teachers(tiny_teacher, second):
    return [EngineScorer(tiny_teacher), EngineScorer(second)]


@pytest.fixture(scope="module")
def logits(tiny_teacher, second):
    """Dense logits of both models at the counted positions, [2, tokens, columns]."""
    found = []
    for folder in (tiny_teacher, second):
        model, rows = AutoModelForCausalLM.from_pretrained(folder).eval(), []
        for one in SEQUENCES:
            with torch.no_grad():
                whole = model(input_ids=torch.from_numpy(one.input_ids.astype(np.int64))[None]).logits[0].double()
            rows.append(whole[torch.from_numpy(np.flatnonzero(one.counted)) - 1])
        found.append(torch.cat(rows))
    return torch.stack(found)


def ensemble_signals(teachers, combine, support):
    return asyncio.run(Ensemble(teachers, WEIGHTS, combine).ascore(SEQUENCES, support))


def targets():
    return torch.from_numpy(np.concatenate([one.targets for one in SEQUENCES]).astype(np.int64))[:, None]


@pytest.mark.parametrize("k", [3, 16, 300])
def test_the_mean_of_probabilities_is_exact_at_the_union_and_in_the_tail(teachers, logits, k):
    signals = ensemble_signals(teachers, "probabilities", TopK(k))
    mean = (0.25 * logits[0].softmax(1) + 0.75 * logits[1].softmax(1)).log()
    likeliest = logits[:, :, : teachers[0].vocab_size].topk(k).indices
    for ids, *named in zip(signals.ids, *likeliest, strict=True):
        assert len(set(ids.tolist())) == min(2 * k, teachers[0].vocab_size)
        assert set(torch.cat(named).tolist()) <= set(ids.tolist())
    torch.testing.assert_close(signals.logprobs.double(), mean.gather(1, signals.ids), atol=1e-4, rtol=0)
    rest = mean.scatter(1, signals.ids, -torch.inf).logsumexp(1)
    torch.testing.assert_close(signals.log_tails[:, 0].double(), rest, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(signals.target_logprobs.double(), mean.gather(1, targets())[:, 0], atol=1e-4, rtol=0)
    assert bool((signals.logprobs.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_of_logits_is_exact_on_the_union_and_bounds_the_tail(teachers, logits, temperature):
    mean = 0.25 * logits[0].log_softmax(1) + 0.75 * logits[1].log_softmax(1)
    exact = (mean / temperature).log_softmax(1)
    for k in (4, 64, 150):
        signals = ensemble_signals(teachers, "logits", TopK(k, (1.0, temperature)))
        log_p, log_tail = (part.double() for part in signals.at_temperature(temperature))
        inside = exact.gather(1, signals.ids)
        torch.testing.assert_close(log_p - log_p[:, :1], inside - inside[:, :1], atol=1e-4, rtol=0)
        rest = exact.scatter(1, signals.ids, -torch.inf).logsumexp(1)
        assert bool((log_tail >= rest - 1e-4).all())


def test_concatenated_hidden_states_are_the_mean_of_logits(teachers, logits):
    mean = (0.25 * logits[0] + 0.75 * logits[1]).float()
    signals = ensemble_signals(teachers, "logits", Hidden("float32"))
    assert losses.forward_kl(mean, signals).abs().max() < 1e-5
    expected = mean.log_softmax(1).gather(1, targets())[:, 0]
    torch.testing.assert_close(signals.target_logprobs, expected, atol=1e-4, rtol=0)


def test_the_joint_head_is_built_once_and_off_the_event_loop(teachers, monkeypatch):
    built, build = [], Ensemble._build_joint_head

    def record(ensemble, heads):
        built.append(threading.current_thread())
        return build(ensemble, heads)

    monkeypatch.setattr(Ensemble, "_build_joint_head", record)
    ensemble = Ensemble(teachers, WEIGHTS, "logits")

    async def main():
        calls = [ensemble.ascore(SEQUENCES[i % 2 :], Hidden("float32")) for i in range(6)]
        return await asyncio.gather(*calls), threading.current_thread()

    (first, *others), loop = run_until_complete(main())
    assert len(built) == 1
    assert built[0] is not loop
    assert all(one.head is first.head for one in others)
    torch.testing.assert_close(others[0].target_logprobs, first.target_logprobs[len(SEQUENCES[0].targets) :])


def test_ensemble_of_equal_teachers_equals_one_of_them(teachers):
    single = asyncio.run(teachers[0].ascore(SEQUENCES, TopK(200)))
    for combine in ("probabilities", "logits"):
        signals = asyncio.run(Ensemble([teachers[0]] * 2, [1, 1], combine).ascore(SEQUENCES, TopK(200)))
        dense = torch.full((single.tokens, 384), -30.0)
        dense.scatter_(1, signals.ids, signals.logprobs)
        torch.testing.assert_close(dense.gather(1, single.ids), single.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("combine", "support"),
    [("probabilities", Hidden()), ("logits", Logprob()), ("probabilities", TopK(4, (1.0, 2.0)))],
    ids=str,
)
def test_unsupported_means_are_rejected(teachers, combine, support):
    with pytest.raises(InputError, match="ensemble|mean of probabilities|average the"):
        ensemble_signals(teachers, combine, support)


def test_runs_with_several_teachers(tmp_path, tiny_student, served, second_served):
    method = {"kind": "logit_kd", "support": {"kind": "topk", "k": 8}}
    values = settings(tmp_path, tiny_student, method) | {
        "teachers": [{"name": "served", "attach": True}, {"name": "another", "attach": True}]
    }
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    lines = [json.dumps(each | {"domain": "ab"[i % 2]}) for i, each in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    values["data"]["evaluation"] = {"path": str(tmp_path / "rows.jsonl"), "rows": 6}
    one_for_each = {"field": "domain", "teachers": {"a": "served", "b": "another"}}
    for name, many in {
        "one": {},
        "equal": {"route": {"field": "domain", "teachers": {"a": "served"}, "default": "served"}},
        "route": {"route": one_for_each},
        "ensemble": {"ensemble": {"weights": {"another": 2}}},
        "both": {"ensemble": {}, "route": one_for_each | {"default": "ensemble"}},
    }.items():
        summary = distill(parse_config(values | many | {"output": str(tmp_path / name)})).summary
        assert summary["teacher"]["loss"] > 0
        assert len(metrics(tmp_path / name)) == 6
    assert_losses_close(curve(tmp_path / "equal"), curve(tmp_path / "one"), 1e-5)
    assert curve(tmp_path / "route") != curve(tmp_path / "one") != curve(tmp_path / "ensemble")
    wrong = {"route": {"field": "domain", "teachers": {"a": "served"}}, "output": str(tmp_path / "wrong")}
    with pytest.raises(InputError, match="line 2 has 'b' in its field 'domain', which chooses no teacher"):
        distill(parse_config(values | wrong))


def test_ensemble_member_without_requested_support_is_rejected(tmp_path, tiny_student, served):
    engine = {"kind": "simulated", "tokens_per_second": 1e5}
    method = {"kind": "logit_kd", "support": {"kind": "topk", "k": 8}}
    values = settings(tmp_path, tiny_student, method) | {"ensemble": {}}
    with serve_teacher(teacher_config("pretender", tiny_student, engine=engine)):
        values["teachers"] = [{"name": "served", "attach": True}, {"name": "pretender", "attach": True}]
        with pytest.raises(InputError, match=r"Teacher 'pretender' \(engine kind 'simulated'\) cannot return"):
            distill(parse_config(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble": {"teachers": ["one", "three"]}}, "'three' is none of the teachers (one, two)"),
        ({"ensemble": {"teachers": ["one"]}}, "ensemble needs at least two teachers"),
        ({"ensemble": {"weights": {"tow": 1}}}, "'tow' is none of the teachers"),
        ({"ensemble": {"weights": {"two": 0}}}, "ensemble.weights.two"),
        ({"route": {"field": "a", "teachers": {"x": "nobody"}}}, "route.teachers.x: 'nobody' is none of the teachers"),
        ({"route": {"field": "a", "teachers": {"x": "ensemble"}}}, "route.teachers.x: 'ensemble' is none of the"),
        ({"ensemble": {}, "method": {"kind": "logit_kd", "teacher": "one"}}, "method.teacher names one teacher, but"),
    ],
)
def test_settings_without_a_known_teacher_are_named(changes, message):
    values = {
        "teachers": [{"name": "one", "model": "m"}, {"name": "two", "model": "m"}],
        "student": {"model": "m"}, "data": {"train": {"path": "p"}}, "method": {"kind": "logit_kd"},
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        parse_config(values | changes)
    assert message in str(caught.value)


def test_teacher_reads_its_own_prompt(tmp_path, tiny_student, served):
    """Its signals are those after that prompt, at the same tokens of the completion."""
    values = settings(tmp_path, tiny_student, {"kind": "logit_kd", "support": {"kind": "topk", "k": 8}})
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    template = "The answer is {answer}.\n{prompt} ="
    teacher = {"name": "served", "attach": True, "prompt_template": template}
    with_hints = parse_config(values | {"teachers": [teacher]})
    data, views = with_hints.data, RowViews.from_config(with_hints, tokenizer)
    rows = [views.apply(tokenize(data.train, data, tokenizer)[i]) for i in range(5)]
    signals = served.score(rows, TopK(8))
    for i, one in enumerate(rows):
        prompt = tokenizer(template.format(**one.fields), add_special_tokens=False).input_ids
        completion = one.input_ids[one.prompt_tokens :]
        single = TokenSequence(
            np.array([*prompt, *completion], np.int32), np.arange(len(prompt) + len(completion)) >= len(prompt)
        )
        torch.testing.assert_close(
            signals.select([i]).logprobs, served.score([single], TopK(8)).logprobs, atol=1e-3, rtol=0
        )
    for name, prompt in {"own": None, "same": "{prompt}", "hint": template}.items():
        values["teachers"] = [{"name": "served", "attach": True, "prompt_template": prompt}]
        distill(parse_config(values | {"output": str(tmp_path / name)}))
    assert_losses_close(curve(tmp_path / "own"), curve(tmp_path / "same"))
    assert abs(curve(tmp_path / "hint")[0] / curve(tmp_path / "own")[0] - 1) > 1e-3
    for prompt, message in (
        ("{hint}", "set teachers.prompt_template"),
        ("{answer}" * 400, "after the prompt of teacher"),
    ):
        values["teachers"] = [{"name": "served", "attach": True, "model": tiny_student, "prompt_template": prompt}]
        with pytest.raises(InputError, match=message):
            distill(parse_config(values | {"output": str(tmp_path / "wrong")}))


def test_each_member_of_an_ensemble_or_route_reads_its_own_prompt(tmp_path, tiny_student, served, second_served):
    """In training and in evaluation."""
    template = "The answer is {answer}.\n{prompt} ="
    names = ("served", "another")
    values = settings(tmp_path, tiny_student, {"kind": "logit_kd", "support": {"kind": "topk", "k": 8}})
    values["data"]["evaluation"] = {"path": str(tmp_path / "rows.jsonl"), "rows": 4}
    found = []
    for name, hinted, many in (
        ("plain", (), {"ensemble": {}}),
        ("one", ("served",), {"ensemble": {}}),
        ("both", names, {"ensemble": {}}),
        ("route", ("served",), {"route": {"field": "nothing", "teachers": {}, "default": "served"}}),
    ):
        values["teachers"] = [
            {"name": each, "attach": True, **({"prompt_template": template} if each in hinted else {})}
            for each in names
        ]
        summary = distill(parse_config(values | many | {"output": str(tmp_path / name)})).summary
        found.append((curve(tmp_path / name)[0], summary["teacher"]["loss"]))
    for compared in zip(*found, strict=True):
        assert len({round(each, 4) for each in compared}) == 4
