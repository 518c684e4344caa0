"""The loss of in_context equals that of dense logits, for label words and tokens, with separate demonstrations for
teacher and student."""

import asyncio
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.commands.cache import fill_cache
from rayk.commands.plan import plan
from rayk.config import InContextConfig, parse_config
from rayk.data.batches import collate
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.tokenizing import tokenize
from rayk.errors import InputError
from rayk.methods.in_context import InContext, LabelWords
from rayk.run import distill, evaluate_model
from rayk.run.inputs import read_inputs
from rayk.training.student import Student
from tests.runs import assert_same_learning, config, curve, metrics, settings, weights, write_tasks
from tests.tiny import merge_padding

ALPHA = 0.25


def method_of(demonstrations=None, **values):
    support = {"kind": "hidden", "dtype": "float32"}
    shared = {"hard_label_weight": ALPHA, "final_hard_label_weight": None, "support": support, "text_weight": 0.5}
    return {"kind": "in_context", "demonstrations": {"k": 3} | (demonstrations or {}), **shared, **values}


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_teacher):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    data = config(folder, tiny_teacher).data
    return tokenize(data.train, data, AutoTokenizer.from_pretrained(tiny_teacher))


@pytest.fixture(scope="module")
def make(rows, tiny_teacher, served):
    """make(**settings): the method with the suite's teacher, and its pool of demonstrations."""

    def made(**values):
        given = InContextConfig.model_validate(method_of(**values))
        pool = DemonstrationPool(rows, given, AutoTokenizer.from_pretrained(tiny_teacher), 1024)
        return InContext(given, served), pool

    return made


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def experience_of(method, pool, rows, progress=0.0):
    batch = collate([pool.add_demonstrations(row, seed, progress) for seed, row in enumerate(rows)], pad_id=0)
    return asyncio.run(method.prepare(batch))


def text_ids(tokenizer, rows, places, row):
    """The token ids of a row after the given demonstrations, from its texts."""
    parts = []
    for place in places:
        fields = rows[place].fields
        parts += [fields["prompt"], "\n", fields["completion"], "\n\n\n"]
    return [each for ids in tokenizer([*parts, row.fields["prompt"], "\n"]).input_ids for each in ids]


@torch.no_grad()
def log_probs(model, ids, vocabulary):
    """log p of the next token at each position, [length - 1, vocabulary], and of the actual token."""
    ids = torch.tensor(ids)
    distributions = model(input_ids=ids[None]).logits[0, :-1, :vocabulary].double().log_softmax(-1)
    return distributions, distributions.gather(1, ids[1:, None])[:, 0]


def dense(model, teacher, pool, rows, students, tokenizer, vocabulary):
    """The expected loss of each query over label words, and of all text tokens, from texts and dense logits."""
    of_words, of_text, of_output = [], [], []
    for seed, row in enumerate(rows[i] for i in range(6)):
        chosen = pool.select(row, seed)
        contexts = {
            "teacher": text_ids(tokenizer, rows, chosen, row),
            "student": text_ids(tokenizer, rows, chosen[len(chosen) - students :], row),
        }
        words = {"teacher": [], "student": []}
        for name, each in (("teacher", teacher), ("student", model)):
            for option in row.fields["options"]:
                ids = tokenizer(option).input_ids
                words[name].append(log_probs(each, contexts[name] + ids, vocabulary)[1][-len(ids) :].sum())
        p, q = (torch.stack(words[name]).log_softmax(0) for name in ("teacher", "student"))
        gold = row.fields["options"].index(row.fields["completion"])
        of_words.append(ALPHA * -q[gold] + (1 - ALPHA) * (p.exp() * (p - q)).sum())
        output = tokenizer(row.fields["completion"]).input_ids
        # With hidden states the padding of the embedding is one outcome of both models.
        theirs, _ = log_probs(teacher, contexts["teacher"] + output, None)
        ours, actual = log_probs(model, contexts["student"] + output, None)
        theirs = theirs[-len(ours) :]
        theirs, ours = (merge_padding(logprobs, vocabulary) for logprobs in (theirs, ours))
        distance = (theirs.exp() * (theirs - ours)).sum(1)
        tokens = ALPHA * -actual + (1 - ALPHA) * distance
        of_text.append(tokens)
        of_output.append(tokens[-len(output) :])
    return torch.stack(of_words), torch.cat(of_text), torch.cat(of_output)


@pytest.mark.parametrize("students", [3, 1, 0])
def test_loss_equals_dense_logits(students, make, rows, tiny_student, tiny_teacher, served):
    tokenizer, model, teacher = AutoTokenizer.from_pretrained(tiny_student), loaded(tiny_student), loaded(tiny_teacher)
    method, pool = make(student_demonstrations=students)
    words, text, output = dense(model, teacher, pool, rows, students, tokenizer, served.info.vocab_size)
    experience = experience_of(method, pool, [rows[i] for i in range(6)])
    assert isinstance(experience, LabelWords)
    with torch.no_grad():
        loss, text_loss = (method.loss(Student(model), part) for part in (experience, experience.auxiliary))
        torch.testing.assert_close(loss.per_token.double(), words, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(text_loss.per_token.double(), 0.5 * text, rtol=1e-3, atol=2e-3)
        method, pool = make(student_demonstrations=students, targets="tokens")
        loss = method.loss(Student(model), experience_of(method, pool, [rows[i] for i in range(6)]))
        torch.testing.assert_close(loss.per_token.double(), output, rtol=1e-3, atol=2e-3)


def test_student_equal_to_its_teacher_has_zero_loss_after_the_same_demonstrations(make, rows, tiny_teacher):
    model = Student(loaded(tiny_teacher))
    for students, nothing in ((None, True), (1, False)):
        method, pool = make(student_demonstrations=students)
        experience = experience_of(method, pool, [rows[i] for i in range(6)])
        with torch.no_grad():
            of_words = method.loss(model, experience).terms["forward_kl"]
            of_text = method.loss(model, experience.auxiliary).terms["text_forward_kl"]
        assert (of_text.abs().max() < 1e-4) == nothing
        if nothing:
            assert of_words.abs().max() < 1e-4


def test_losses_of_parts_add_up_to_the_whole(make, rows, tiny_student):
    (method, pool), student = make(), Student(loaded(tiny_student))
    experience = experience_of(method, pool, [rows[i] for i in range(7)])
    assert experience.count == 7
    assert experience.lengths == [
        len(query) * max(map(len, experience.batch.sequences[first : first + len(query)]))
        for query, first in zip(
            [rows[i].fields["options"] for i in range(7)], experience.queries.tolist(), strict=False
        )
    ]
    with torch.no_grad():
        whole = method.loss(student, experience)
        for chosen in ([5, 0], [3], [6, 1, 2, 4]):
            part = method.loss(student, experience.select(chosen))
            for name in whole.terms:
                torch.testing.assert_close(part.terms[name], whole.terms[name][chosen], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(part.per_token, whole.per_token[chosen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("students", [3, 1])
def test_counted_tokens_shifted_by_one_change_the_loss(students, make, rows, tiny_student, tiny_teacher, served):
    tokenizer, model, teacher = AutoTokenizer.from_pretrained(tiny_student), loaded(tiny_student), loaded(tiny_teacher)
    method, pool = make(student_demonstrations=students)
    words, _, _ = dense(model, teacher, pool, rows, students, tokenizer, served.info.vocab_size)
    experience = experience_of(method, pool, [rows[i] for i in range(6)])
    shifted = [replace(row, counted=np.roll(row.counted, -1)) for row in experience.batch.sequences]
    moved = replace(experience, batch=collate(shifted, 0))
    with torch.no_grad():
        assert (method.loss(Student(model), moved).per_token - words).abs().min() > 1e-3


def test_hard_label_weight_changes_linearly():
    linear = InContextConfig(hard_label_weight=0.8, final_hard_label_weight=0.2)
    assert [linear.hard_label_weight_at(share) for share in (0, 0.5, 1)] == pytest.approx([0.8, 0.5, 0.2])
    constant = InContextConfig(hard_label_weight=0.3, final_hard_label_weight=None)
    assert constant.hard_label_weight_at(0.7) == 0.3


def small(folder, student, method=None, **training):
    write_tasks(folder)
    values = settings(folder, student, method or method_of(support={"kind": "topk", "k": 8}), **training)
    values["data"]["max_tokens"] = 256
    return parse_config(values)


def test_run_follows_the_weight_schedule_with_any_micro_batches(tmp_path, tiny_student, served):
    method = method_of(support={"kind": "topk", "k": 8}, hard_label_weight=1.0, final_hard_label_weight=0.0)
    for name, tokens in (("one", 100_000), ("cut", 300)):
        distill(small(tmp_path / name, tiny_student, method, micro_batch_tokens=tokens))
        steps = metrics(tmp_path / name / "run")
        assert [row["hard_label_weight"] for row in steps] == pytest.approx([1 - step / 6 for step in range(6)])
        for row in steps:
            alpha = row["hard_label_weight"]
            loss, text = (
                alpha * row[f"{kind}cross_entropy"] + (1 - alpha) * row[f"{kind}forward_kl"] for kind in ("", "text_")
            )
            assert row["loss"] == pytest.approx(loss + 0.5 * text, rel=1e-4)
    assert_same_learning(tmp_path / "one" / "run", tmp_path / "cut" / "run")


@pytest.mark.long
def test_two_workers_and_a_resumed_run_equal_one_run(tmp_path, tiny_student, served):
    distill(small(tmp_path / "alone", tiny_student))
    distill(small(tmp_path / "group", tiny_student, workers=2, micro_batch_tokens=60))  # less than a query
    assert_same_learning(tmp_path / "alone" / "run", tmp_path / "group" / "run")
    parts = small(tmp_path / "parts", tiny_student, checkpoint_every_steps=2, keep_checkpoints=5)
    distill(parts)
    for step in (4, 6):
        shutil.rmtree(parts.output_path / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(parts.output_path / "model")
    distill(parts, resume=True)
    assert curve(parts.output_path) == curve(tmp_path / "alone" / "run")
    mine, theirs = weights(parts.output_path), weights(tmp_path / "alone" / "run")
    assert all((mine[name] == theirs[name]).all() for name in mine)


@pytest.mark.parametrize("choice", ["bm25", "embedding"])
@pytest.mark.long
def test_nearest_demonstrations_are_shown_in_training_and_evaluation(
    choice, tmp_path, tiny_student, tiny_teacher, served
):
    write_tasks(tmp_path)
    demonstrations = {"choice": choice, "encoder": tiny_teacher if choice == "embedding" else None}
    method = method_of(demonstrations, student_demonstrations=1, targets="tokens", support={"kind": "topk", "k": 8})
    values = settings(tmp_path, tiny_student, method, steps=3)
    values["data"] |= {"max_tokens": 256, "evaluation": {"path": str(tmp_path / "rows.jsonl"), "rows": 8}}
    values["evaluation"] = {"support": {"k": 8}}
    learned = distill(parse_config(values)).summary
    measured = evaluate_model(parse_config(values))
    for who in ("student", "teacher"):
        numbers = {name: learned[who][name] for name in measured[who]}
        assert numbers == pytest.approx(measured[who], rel=1e-4)
        assert {"loss", "accuracy"} <= set(measured[who])
    assert {"loss", "text_forward_kl"} <= set(metrics(tmp_path / "run")[-1])


def test_hard_labels_alone_need_no_teacher(tmp_path, tiny_student):
    write_tasks(tmp_path)
    method = method_of(hard_label_weight=1.0, targets="tokens", text_weight=0.0)
    distill(parse_config(settings(tmp_path, tiny_student, method, steps=2) | {"teachers": []}))
    assert all("forward_kl" not in row for row in metrics(tmp_path / "run"))
    with pytest.raises(InputError, match="'in_context' needs a teacher"):
        parse_config(settings(tmp_path, tiny_student, method_of()) | {"teachers": []})


def test_too_long_demonstrations_are_refused_before_the_run(tmp_path, tiny_student):
    write_tasks(tmp_path)
    method = method_of({"k": 16}, hard_label_weight=1.0, text_weight=0.0)
    values = settings(tmp_path, tiny_student, method) | {"teachers": []}
    read_inputs(parse_config(values), {})
    values["data"]["evaluation"] = {"path": str(tmp_path / "rows.jsonl")}
    values["evaluation"] = {"generation": {"max_new_tokens": 400}}
    with pytest.raises(InputError, match=r"may have \d+ tokens, but the student takes 512; .*demonstrations.k"):
        read_inputs(parse_config(values), {})


def test_chats_are_refused(tmp_path, tiny_student):
    write_tasks(tmp_path)
    values = settings(tmp_path, tiny_student, method_of(hard_label_weight=1.0, text_weight=0.0)) | {"teachers": []}
    chat = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    values["data"]["evaluation"] = {"path": str(tmp_path / "chats.jsonl")}
    with pytest.raises(InputError, match="chats.jsonl, line 1 is a chat, but method 'in_context' formats rows itself"):
        read_inputs(parse_config(values), {})


def test_signals_that_cannot_be_requested_in_advance_are_refused(tmp_path, tiny_student, served):
    run = small(tmp_path, tiny_student)
    with pytest.raises(InputError, match="the run fills the cache"):
        fill_cache(parse_config(run.model_dump(mode="json") | {"cache": {"path": str(tmp_path / "cache")}}))
    teacher = {"name": "served", "model": str(tiny_student)}
    with pytest.raises(InputError, match="learns from rows with demonstrations, whose lengths"):
        plan(parse_config(run.model_dump(mode="json") | {"teachers": [teacher]}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {"student_demonstrations": 4}}, "raise demonstrations.k"),
        ({"method": {"support": {"kind": "logprob"}}}, "cannot compare tokens by support 'logprob'"),
        ({"method": {"demonstrations": {"choice": "embedding"}}}, "set both or neither"),
        ({"data": {"chat_template": True}}, "leave data.chat_template out"),
        (
            {"evaluation": {"demonstration_draws": 3}, "method": {"demonstrations": {"choice": "bm25"}}},
            "choose 'random'",
        ),
        ({"evaluation": {"demonstration_draws": 3}, "method": {"kind": "logit_kd"}}, "shows no demonstrations"),
    ],
    ids=["more", "support", "encoder", "chat", "draws", "other method"],
)
def test_settings_that_do_not_fit_are_refused(change, said, tmp_path, tiny_student):
    write_tasks(tmp_path)
    values = settings(tmp_path, tiny_student, method_of())
    if change.get("method") == {"kind": "logit_kd"}:
        values["method"] = {"kind": "logit_kd"}
    for section, given in change.items():
        values[section] = values.get(section, {}) | given
    with pytest.raises(InputError, match=said):
        parse_config(values)
