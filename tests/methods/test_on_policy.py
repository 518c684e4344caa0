"""on_policy trains on the student's own completions, reproducibly at any staleness."""

import asyncio
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.commands.plan import plan
from rayk.config import OnPolicyConfig, TeacherConfig, WorkerRollouts, parse_config
from rayk.config.support import Hidden, Requested, TopK
from rayk.data.batches import collate
from rayk.data.examples import Example
from rayk.data.tokenizing import tokenize
from rayk.errors import InputError, TeacherUnavailable, UnusableSignal
from rayk.evaluation.evaluate import Evaluator
from rayk.methods import METHODS, OnPolicy
from rayk.rollouts import Rollout, WorkerPolicy
from rayk.run import distill
from rayk.teachers import serve_teacher
from rayk.training.student import Student
from tests.runs import assert_same_learning, config, curve, metrics, settings, weights
from tests.tiny import tiny_model, tiny_tokenizer

TOP = {"kind": "on_policy", "support": {"kind": "topk", "k": 16}}


def changed(folder, student, method=TOP, rollouts=None, **training):
    folder.mkdir(exist_ok=True)
    values = settings(folder, student, method, **training)
    values["rollouts"] |= rollouts or {}
    return parse_config(values)


def assert_equal_runs(one, other):
    assert curve(one) == curve(other)
    mine, theirs = weights(one), weights(other)
    assert all((mine[name] == theirs[name]).all() for name in mine)


@pytest.fixture
def watched(monkeypatch):
    """The rows of each step of a run, and the student's weights before it."""
    rows: dict[int, list] = {}
    states: dict[int, dict[str, torch.Tensor]] = {}

    class Watching(OnPolicy):
        step = 0

        def loss(self, student, experience):
            if self.step not in states:
                states[self.step] = {name: value.clone() for name, value in student.model.state_dict().items()}
            rows.setdefault(self.step, []).extend(experience.batch.sequences)
            return super().loss(student, experience)

        def on_step(self, step):
            self.step = step

    monkeypatch.setitem(METHODS, "on_policy", Watching)
    return rows, states


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_rollouts_of_a_step_come_from_exactly_its_weight_version(
    max_staleness, watched, tmp_path, tiny_student, served
):
    rows, states = watched
    rollouts = {"max_staleness": max_staleness}
    run = changed(tmp_path, tiny_student, rollouts=rollouts, batch_size=4, micro_batch_tokens=100_000)
    distill(run)
    model = AutoModelForCausalLM.from_pretrained(tiny_student)
    for step in range(6):
        version = max(0, step - max_staleness)
        assert {row.version for row in rows[step]} == {version}
        for each, state in states.items():
            model.load_state_dict(state)
            again = [log_probs(model, row) for row in rows[step]]
            same = all(np.allclose(row.logprobs, mine, atol=1e-5) for row, mine in zip(rows[step], again, strict=True))
            assert same == (each == version)
    assert curve(run.output_path, "rollout_staleness") == [min(step, max_staleness) for step in range(6)]


def log_probs(model, row, vocabulary=None):
    ids = torch.from_numpy(row.input_ids).long()
    with torch.no_grad():
        logprobs = model(input_ids=ids[None]).logits[0, :-1, :vocabulary].log_softmax(-1)
    return logprobs.gather(1, ids[1:, None])[row.counted[1:], 0].numpy()


def test_loss_is_the_divergence_at_generated_tokens_only(watched, tmp_path, tiny_student, tiny_teacher, served):
    rows, states = watched
    vocabulary = served.info.vocab_size
    method = TOP | {"support": {"kind": "topk", "k": vocabulary}, "temperature": 2.0, "temperature_squared": True}
    run = changed(tmp_path, tiny_student, method, steps=2)
    distill(run)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_student, tiny_teacher))
    for step, row in enumerate(metrics(run.output_path)):
        student.load_state_dict(states[step])
        total = tokens = 0
        for sequence in rows[step]:
            assert isinstance(sequence, Rollout)
            ids = torch.from_numpy(sequence.input_ids).long()[None]
            with torch.no_grad():
                log_q, log_p = ((model(input_ids=ids).logits[0] / 2).log_softmax(-1) for model in (student, teacher))
            # For a signal, the padding of the embedding is part of the tail.
            log_q, log_p = (
                torch.cat([each[:, :vocabulary], each[:, vocabulary:].logsumexp(1, keepdim=True)], 1)
                for each in (log_q, log_p)
            )
            written = slice(sequence.prompt_tokens - 1, len(sequence) - 1)
            total += 4 * F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1)[written].sum()
            tokens += len(sequence) - sequence.prompt_tokens
        assert row["counted_tokens"] == tokens
        assert row["loss"] == pytest.approx(float(total / tokens), rel=1e-3)


@pytest.mark.parametrize("form", ["divergence", "policy"])
def test_only_the_first_share_of_a_rollout_is_trained_on(watched, tmp_path, tiny_student, tiny_teacher, served, form):
    rows, states = watched
    distill(changed(tmp_path, tiny_student, {"kind": "on_policy", "form": form, "first_share": 0.3}, steps=2))
    for step, row in enumerate(metrics(tmp_path / "run")):
        lengths = [len(each) - each.prompt_tokens for each in rows[step]]
        kept = [math.ceil(0.3 * length) for length in lengths]
        assert [np.flatnonzero(each.counted).tolist() for each in rows[step]] == [
            list(range(each.prompt_tokens, each.prompt_tokens + count))
            for each, count in zip(rows[step], kept, strict=True)
        ]
        assert row["counted_tokens"] == sum(kept)
        assert row["rollout_tokens"] == pytest.approx(np.mean(lengths))
    if form == "policy":
        student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_student, tiny_teacher))
        student.load_state_dict(states[0])
        vocabulary = served.info.vocab_size
        ratios = [log_probs(student, each, vocabulary) - log_probs(teacher, each) for each in rows[0]]
        first = metrics(tmp_path / "run")[0]
        assert first["log_ratio"] == pytest.approx(np.concatenate(ratios).mean(), rel=1e-3, abs=1e-5)


def test_each_prompt_has_several_different_completions(watched, tmp_path, tiny_student, served):
    rows, _ = watched
    run = changed(tmp_path, tiny_student, rollouts={"samples": 4}, steps=None, epochs=0.25)
    distill(run)
    assert len(rows) == 6  # a quarter of 48 prompts, two in each step of 8 completions
    for sampled in rows.values():
        completions: dict[tuple, set] = {}
        for row in sampled:
            prompt = tuple(row.input_ids[: row.prompt_tokens])
            completions.setdefault(prompt, set()).add(tuple(row.input_ids[row.prompt_tokens :]))
        assert [len(different) for different in completions.values()] == [4, 4]
    assert curve(run.output_path, "epoch")[-1] == 0.25


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_run_is_reproducible_bit_for_bit(max_staleness, tmp_path, tiny_student, served):
    for name in ("one", "other"):
        distill(changed(tmp_path / name, tiny_student, rollouts={"max_staleness": max_staleness}))
    assert_equal_runs(tmp_path / "one" / "run", tmp_path / "other" / "run")


def test_without_rollouts_it_equals_logit_kd(tmp_path, tiny_student, served):
    shared = {"support": {"kind": "topk", "k": 16}, "divergence": "reverse_kl", "temperature": 2.0}
    distill(changed(tmp_path / "on", tiny_student, {"kind": "on_policy", "student_fraction": 0.0} | shared))
    (tmp_path / "off").mkdir()
    distill(config(tmp_path / "off", tiny_student, {"kind": "logit_kd"} | shared))
    assert_equal_runs(tmp_path / "on" / "run", tmp_path / "off" / "run")


def test_sources_of_completions_are_drawn_per_row_and_reproducible(
    watched, tmp_path, tiny_student, tiny_teacher, served
):
    rows, _ = watched
    method = TOP | {"student_fraction": 0.4, "teacher_written": 0.5}
    run = changed(tmp_path, tiny_student, method, batch_size=48)
    distill(run)
    table = tokenize(run.data.train, run.data, AutoTokenizer.from_pretrained(tiny_student))
    data = {row.where: row.input_ids.tolist() for row in table}
    shares = []
    for step in rows.values():
        assert {row.where for row in step} == set(data)
        student = {row.where for row in step if isinstance(row, Rollout)}
        kept = {row.where for row in step if row.where not in student and row.input_ids.tolist() == data[row.where]}
        shares.append((len(student) / 48, len(kept) / 48))
        teacher = [row for row in step if row.where not in student | kept]
        assert all(len(row) - row.prompt_tokens <= 12 and row.counted_tokens for row in teacher)
    np.testing.assert_allclose(np.mean(shares, axis=0), [0.4, 0.3], atol=0.1)
    assert len(set(shares)) > 1
    assert curve(run.output_path, "rollouts") == [round(48 * share) for share, _ in shares]


def test_student_equal_to_its_teacher_has_zero_loss(tmp_path, tiny_teacher, served):
    run = changed(tmp_path, tiny_teacher, learning_rate=1e-5)
    distill(run)
    assert max(map(abs, curve(run.output_path))) < 1e-4


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_resumed_run_equals_an_undisturbed_one(max_staleness, tmp_path, tiny_student, served):
    rollouts = {"max_staleness": max_staleness}
    method = TOP | {"student_fraction": 0.7, "support": {"kind": "requested", "k": 8}, "requested_ids": 4}
    distill(changed(tmp_path / "whole", tiny_student, method, rollouts))
    parts = changed(tmp_path / "parts", tiny_student, method, rollouts, checkpoint_every_steps=2, keep_checkpoints=5)
    distill(parts)
    for step in (4, 6):
        shutil.rmtree(parts.output_path / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(parts.output_path / "model")
    distill(parts, resume=True)
    assert_equal_runs(tmp_path / "whole" / "run", parts.output_path)


def adaptive(folder, student, max_staleness=0, **training):
    """Settings of a run whose evaluation loss mostly rises."""
    folder.mkdir(exist_ok=True)
    method = TOP | {"adaptive": {"tolerance": 0.0, "increment": 0.4, "replay_capacity": 6}}
    values = settings(folder, student, method, learning_rate=0.05, steps=10, **training)
    values["rollouts"]["max_staleness"] = max_staleness
    values["data"]["evaluation"] = {**values["data"]["train"], "rows": 4}
    values["evaluation"] = {"every_steps": 1}
    return parse_config(values)


def test_rising_evaluation_loss_increases_rollouts_and_replay(watched, tmp_path, tiny_student, served):
    rows, _ = watched
    run = adaptive(tmp_path, tiny_student)
    distill(run)
    losses, reference, fraction, kept = curve(run.output_path, "evaluation_loss"), None, 0.0, []
    again = 0
    for step in range(10):
        rollouts = [row for row in rows[step] if isinstance(row, Rollout)]
        assert (fraction > 0) or not rollouts
        assert fraction < 1 or len(rollouts) == 8
        old = [row for row in rollouts if row.version < step]
        oldest_kept = kept[-6] if len(kept) >= 6 else step
        assert all(oldest_kept <= row.version for row in old)
        again += len(old)
        kept += [step] * (len(rollouts) - len(old))
        if reference is None:
            reference = losses[step]
        elif losses[step] >= reference:
            reference, fraction = losses[step], min(1.0, fraction + 0.4)
    assert fraction == 1
    assert again > 3


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_resumed_adaptive_run_restores_its_replay_buffer(max_staleness, tmp_path, tiny_student, served):
    distill(adaptive(tmp_path / "whole", tiny_student, max_staleness))
    parts = adaptive(tmp_path / "parts", tiny_student, max_staleness, checkpoint_every_steps=6, keep_checkpoints=5)
    distill(parts)
    shutil.rmtree(parts.output_path / "checkpoints" / "step-00000010")
    shutil.rmtree(parts.output_path / "model")
    distill(parts, resume=True)
    assert_equal_runs(tmp_path / "whole" / "run", parts.output_path)
    assert max(curve(parts.output_path, "rollout_staleness")) > max_staleness


def test_failed_evaluation_is_repeated_after_resume(tmp_path, tiny_student, served, monkeypatch):
    distill(adaptive(tmp_path / "whole", tiny_student))
    evaluations, run = itertools.count(1), Evaluator.run

    def failing(self, *given, **named):
        if next(evaluations) == 6:  # the first one measures the student before training
            raise TeacherUnavailable("nobody answers")
        return run(self, *given, **named)

    monkeypatch.setattr(Evaluator, "run", failing)
    stopped = adaptive(tmp_path / "stopped", tiny_student)
    with pytest.raises(TeacherUnavailable):
        distill(stopped)
    assert [step for step, row in enumerate(metrics(stopped.output_path), 1) if "evaluation_loss" not in row] == [5]
    distill(stopped, resume=True)
    assert_equal_runs(tmp_path / "whole" / "run", stopped.output_path)
    assert curve(tmp_path / "whole" / "run", "evaluation_loss") == curve(stopped.output_path, "evaluation_loss")


@pytest.mark.long
def test_number_of_workers_does_not_change_rollouts_or_learning(tmp_path, tiny_student, served):
    rollouts = {"max_staleness": 1}  # the first step uses rollouts of the current weights, as all steps do with 0
    distill(changed(tmp_path / "alone", tiny_student, rollouts=rollouts, steps=3))
    distill(changed(tmp_path / "group", tiny_student, rollouts=rollouts, steps=3, workers=2))
    alone, group = (metrics(tmp_path / name / "run") for name in ("alone", "group"))
    for name in ("tokens", "rollouts", "rollout_tokens", "rollout_stopped", "rollout_repetition", "rollout_staleness"):
        assert [row[name] for row in alone] == pytest.approx([row[name] for row in group])
    assert_same_learning(tmp_path / "alone" / "run", tmp_path / "group" / "run")


def test_prompts_alone_suffice(tmp_path, tiny_student, served):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "What is {n}?"}}\n' for n in range(16)))
    run = changed(tmp_path, tiny_student, steps=2)
    distill(run)
    assert all(np.isfinite(curve(run.output_path)))
    with pytest.raises(InputError, match="completion"):
        distill(changed(tmp_path, tiny_student, TOP | {"student_fraction": 0.5}), output=str(tmp_path / "other"))


def test_rows_that_allow_no_generation_are_refused_before_the_run(tmp_path, tiny_student, served):
    with pytest.raises(InputError, match=r"takes 512; lower rollouts.max_new_tokens"):
        distill(changed(tmp_path, tiny_student, rollouts={"max_new_tokens": 500}))
    vllm = {"kind": "served", "engine": {"kind": "vllm", "max_model_len": 100}}
    with pytest.raises(InputError, match=r"the policy takes 99 on vLLM; .* raise rollouts.engine.max_model_len"):
        distill(changed(tmp_path, tiny_student, rollouts=vllm | {"max_new_tokens": 90}))
    with pytest.raises(InputError, match="learns from rollouts, whose lengths are not known"):
        plan(changed(tmp_path, tiny_student))
    (tmp_path / "rows.jsonl").write_text('{"text": "What is 1?"}\n' * 8)
    for fraction, said in (
        (1.0, "has no prompt to generate from"),
        (0.5, "line 1 has no prompt, but method 'on_policy' generates"),
    ):
        with pytest.raises(InputError, match=said):
            distill(changed(tmp_path, tiny_student, TOP | {"student_fraction": fraction}))


@pytest.fixture(scope="module")
def wide(ray_cluster, tmp_path_factory):
    """A teacher and a student without padding whose most likely ids differ."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), tiny_tokenizer()
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    tiny_model(folder, seed=1, peaked=4.0, vocab_size=vocabulary, tokenizer=tokenizer)
    student = tiny_model(seed=2, hidden=16, layers=1, peaked=4.0, vocab_size=vocabulary)
    with serve_teacher(TeacherConfig(name="wide", model=str(folder), resources={"num_cpus": 0.25})) as teacher:
        yield teacher, student


def test_requested_student_ids_bring_reverse_kl_closer_to_the_dense_value(wide):
    teacher, student = wide
    policy = WorkerPolicy(student, tiny_tokenizer(), WorkerRollouts(max_new_tokens=12), batch_tokens=100_000)
    random = np.random.default_rng(0)
    prompts = [random.integers(4, 350, 6).astype(np.int32) for _ in range(32)]
    batch = collate([Example(prompt, np.zeros(6, bool), None, 6) for prompt in prompts], pad_id=0)
    losses = {}
    for support in (TopK(16), Requested(8), Hidden("float32")):
        method = OnPolicy(OnPolicyConfig(support=support, requested_ids=8), teacher, policy)
        rollouts = asyncio.run(method.sample(batch, range(32), progress=0.0))
        experience = asyncio.run(method.prepare(rollouts))
        losses[support.kind] = method.loss(Student(student), experience).per_token.detach()
    dense, topk, requested = (losses[kind] for kind in ("hidden", "topk", "requested"))
    assert (topk <= dense + 1e-3).all()
    assert (requested <= dense + 1e-3).all()
    assert topk.mean() < 0.5 * dense.mean() < requested.mean()


def test_policy_form_rewards_each_token_alone(watched, tmp_path, tiny_student, tiny_teacher, served):
    rows, states = watched
    run = changed(tmp_path, tiny_student, {"kind": "on_policy", "form": "policy"}, steps=2, micro_batch_tokens=60)
    assert run.method.support.kind == "logprob"
    distill(run)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_student, tiny_teacher))
    for step, row in enumerate(metrics(run.output_path)):
        student.load_state_dict(states[step])
        # Padding of the embedding is never sampled and not part of q.
        own = [log_probs(student, each, served.info.vocab_size) for each in rows[step]]
        ratios = np.concatenate([mine - log_probs(teacher, each) for mine, each in zip(own, rows[step], strict=True)])
        assert row["loss"] == pytest.approx(ratios.mean(), rel=1e-3)  # the ratio of an unchanged student is 1
        assert row["log_ratio"] == pytest.approx(ratios.mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "rollouts", "said"),
    [
        ({"student_fraction": 0.5}, {}, "leave out student_fraction and adaptive"),
        ({}, {"temperature": 0.5}, "sampled at temperature 1 without truncation"),
        ({"form": "divergence", "support": {"kind": "logprob"}}, {}, "cannot learn from support 'logprob'"),
    ],
)
def test_invalid_settings_of_the_policy_form_are_named(tmp_path, method, rollouts, said):
    with pytest.raises(InputError) as caught:
        changed(tmp_path, "m", {"kind": "on_policy", "form": "policy"} | method, rollouts=rollouts)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            {"student_fraction": 0, "first_share": 0.5},
            "the student generates no completions; set student_fraction",
        ),
        ({"hard_label_weight": 0.5}, "so there are no hard labels; set student_fraction below 1"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, method, said):
    with pytest.raises(InputError, match=said):
        changed(tmp_path, "m", {"kind": "on_policy"} | method)


def test_teachers_score_one_group_while_the_next_is_generated(monkeypatch, tmp_path, tiny_student, served):
    happened: list[tuple[str, int]] = []
    learned: list[list[int]] = []

    class Telling(OnPolicy):
        async def sample(self, batch, seeds, progress):
            written = await super().sample(batch, seeds, progress)
            happened.append(("written", batch.rows))
            return written

        async def prepare(self, batch):
            happened.append(("asked", batch.rows))
            experience = await super().prepare(batch)
            happened.append(("answered", batch.rows))
            return experience

        def updates(self, experience, seed):
            learned.append([int(row.where.rsplit(" ")[-1]) for row in experience.batch.sequences])
            return super().updates(experience, seed)

    monkeypatch.setitem(METHODS, "on_policy", Telling)
    one = distill(changed(tmp_path / "one", tiny_student, steps=2))
    assert happened == [(what, 8) for _ in range(2) for what in ("written", "asked", "answered")]
    happened.clear()
    several = distill(changed(tmp_path / "several", tiny_student, steps=2, rollouts={"batch_tokens": 120}))
    assert sum(rows for what, rows in happened if what == "written") == 16
    kinds = [what for what, _ in happened]
    assert kinds.count("written") > 4
    assert kinds.index("asked") < [place for place, what in enumerate(kinds) if what == "written"][1]
    assert learned[:2] == learned[2:], "rows stand in another order than the data's"
    assert_same_learning(one.output, several.output)


def test_rows_with_unusable_signals_are_left_out_of_their_group(monkeypatch, tmp_path, tiny_student, served):
    learned: list[list[int]] = []

    class Refusing(OnPolicy):
        async def prepare(self, batch):
            bad = [row for row, sequence in enumerate(batch.sequences) if int(sequence.where.rsplit(" ")[-1]) % 3 == 0]
            if bad:
                raise UnusableSignal("These rows cannot be used.", bad)
            return await super().prepare(batch)

        def updates(self, experience, seed):
            learned.append([int(row.where.rsplit(" ")[-1]) for row in experience.batch.sequences])
            return super().updates(experience, seed)

    monkeypatch.setitem(METHODS, "on_policy", Refusing)
    runs = {
        tokens: distill(
            changed(
                tmp_path / str(tokens), tiny_student, rollouts={"batch_tokens": tokens}, steps=3, unusable_rows="skip"
            )
        )
        for tokens in (8192, 120)
    }  # fmt: skip
    assert learned[:3] == learned[3:]
    assert all(line % 3 for rows in learned for line in rows)
    assert curve(runs[120].output, "skipped_rows") == [8 - len(rows) for rows in learned[3:]]
    assert_same_learning(runs[8192].output, runs[120].output)
