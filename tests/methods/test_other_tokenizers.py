"""Teachers with another tokenizer: the aligned loss of whole rows, and runs of logit_kd and on_policy."""

import logging
from dataclasses import replace

import pytest
import torch

from rayk.config import DataConfig, DataSource, LogitKDConfig, parse_config
from rayk.config.support import Hidden, TopK
from rayk.data.alignment import RowAligner
from rayk.data.batches import collate
from rayk.data.examples import ExampleTable
from rayk.data.tokenizing import tokenize
from rayk.data.views import RowViews
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError
from rayk.methods import Experience, LogitKD
from rayk.models import load_tokenizer
from rayk.run import distill
from rayk.run.alignment import check_aligned_rows
from rayk.run.inputs import read_inputs
from rayk.training.student import Student
from tests.runs import metrics, settings, write_rows
from tests.tiny import tiny_model, tiny_sentencepiece

OTHER = "other-tokenizer"


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory):
    """The folder of a teacher with a SentencePiece tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "other"
    sentences = ("12+34=46. 46+7=53. #### 53", "99+1=100. 5+77=82. #### 182")
    tokenizer = tiny_sentencepiece(vocab_size=400, sentences=sentences)
    tiny_model(folder, seed=5, peaked=4.0, vocab_size=len(tokenizer), tokenizer=tokenizer)
    return str(folder)


def rows_of(path, student):
    source = DataSource(path=str(path))
    return source, tokenize(source, DataConfig(train=source), load_tokenizer(student))


def aligned_batch(path, student, teacher, max_tokens=512):
    source, rows = rows_of(path, student)
    aligner = RowAligner(OTHER, DataConfig(train=source), load_tokenizer(student), load_tokenizer(teacher), max_tokens)
    views = RowViews(aligners={OTHER: aligner})
    return collate([views.align(row) for row in rows], 0)


def scorer(folder, on_loop):
    """Return a function that scores sequences with the model in `folder`."""
    engine = TransformersEngine(folder)

    def score(sequences, support):
        signals = on_loop(engine.score(sequences, support))
        return replace(signals, head=engine.head()) if isinstance(support, Hidden) else signals

    return score


def loss_of(student, batch, signals, **values):
    method = LogitKD(LogitKDConfig(support=signals.support, **values), None)
    return method.loss(Student(student), Experience(batch, signals))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", {"name": "jensen_shannon", "beta": 0.3}])
@pytest.mark.parametrize("support", [TopK(8, (1.0, 2.0)), Hidden("float32")], ids=["topk", "hidden"])
def test_teacher_with_the_same_tokenizer_gives_the_plain_loss(
    support, divergence, tmp_path, tiny_student, tiny_teacher, on_loop
):
    batch = aligned_batch(write_rows(tmp_path / "rows.jsonl", 6), tiny_student, tiny_teacher)
    student = tiny_model(seed=7, vocab_size=len(load_tokenizer(tiny_student)))  # without padding columns
    score = scorer(tiny_teacher, on_loop)
    signals = score(batch.sequences, support)
    own = score([row.view(OTHER) for row in batch.sequences], support)
    for temperature in (1.0, 2.0):
        values = {"divergence": divergence, "temperature": temperature}
        plain = loss_of(student, batch, signals, **values)
        aligned = loss_of(student, batch, own, alignment={"kind": "bytes"}, **values)
        torch.testing.assert_close(aligned.per_token, plain.per_token, atol=1e-5, rtol=1e-5)
        assert aligned.terms["compared"].all()


def test_loss_does_not_depend_on_micro_batches(tmp_path, tiny_student, other_teacher, on_loop):
    batch = aligned_batch(write_rows(tmp_path / "rows.jsonl", 6), tiny_student, other_teacher)
    signals = scorer(other_teacher, on_loop)([row.view(OTHER) for row in batch.sequences], TopK(16))
    student, experience = Student(tiny_model(seed=7)), Experience(batch, signals)
    method = LogitKD(LogitKDConfig(support=TopK(16), alignment={"kind": "bytes"}), None)
    whole = method.loss(student, experience)
    parts = [method.loss(student, experience.select(rows)) for rows in ([0, 1], [2], [3, 4, 5])]
    assert 0 < whole.terms["compared"].mean() < whole.terms["aligned"].mean() <= 1
    assert whole.terms["unmatched"].any()
    for name, values in {"loss": whole.per_token, **whole.terms}.items():
        of_parts = torch.cat([part.per_token if name == "loss" else part.terms[name] for part in parts])
        torch.testing.assert_close(of_parts, values, atol=1e-5, rtol=1e-5)


def run_settings(folder, student, teacher, method, **training):
    values = settings(folder, student, {"alignment": {"kind": "bytes"}, **method}, **training)
    values["teachers"] = [{"name": OTHER, "model": teacher, "resources": {"num_cpus": 0.25}}]
    return values


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "method",
    [
        {"kind": "logit_kd", "support": {"kind": "topk", "k": 32}},
        {"kind": "on_policy", "support": {"kind": "hidden"}, "student_fraction": 0.7},
    ],
    ids=["logit_kd", "on_policy"],
)
def test_student_learns_from_a_teacher_with_another_tokenizer(method, tmp_path, tiny_student, other_teacher):
    values = run_settings(tmp_path, tiny_student, other_teacher, method, steps=8)
    values["data"]["evaluation"] = {"path": str(write_rows(tmp_path / "test.jsonl", 4, seed=1))}
    values["cache"] = {"path": str(tmp_path / "cache")}
    result = distill(parse_config(values))
    steps = metrics(tmp_path / "run")
    assert steps[-1]["loss"] < steps[0]["loss"]
    # Rollouts of a random student soon contain bytes that are no text.
    aligned, compared = (0.8, 0.3) if method["kind"] == "logit_kd" else (0.0, 0.0)
    assert all(row["aligned"] > aligned and row["compared"] > compared for row in steps)
    assert set(result.summary["teacher"]) == set() and result.summary["student"]["loss"] > 0


def test_row_too_long_in_the_teachers_tokens_is_refused_or_left_out(tmp_path, tiny_student, other_teacher, caplog):
    source, rows = rows_of(write_rows(tmp_path / "rows.jsonl", 12), tiny_student)
    aligner = RowAligner(
        OTHER, DataConfig(train=source), load_tokenizer(tiny_student), load_tokenizer(other_teacher), 60
    )
    views = RowViews(aligners={OTHER: aligner})
    values = run_settings(tmp_path, tiny_student, other_teacher, {"kind": "logit_kd"})
    with pytest.raises(InputError, match=r"rows.jsonl, line \d+ has \d+ tokens in the tokenizer of teacher 'other-"):
        check_aligned_rows(parse_config(values), views, ExampleTable(rows.table))
    values["training"]["unusable_rows"] = "skip"
    with caplog.at_level(logging.WARNING):
        check_aligned_rows(parse_config(values), views, ExampleTable(rows.table))
    assert "Left out, with" in caplog.text


@pytest.mark.parametrize(
    ("method", "others", "said"),
    [
        ({"kind": "logit_kd", "support": {"kind": "sampled"}}, {}, "support 'sampled'; use 'topk'"),
        ({"kind": "on_policy", "support": {"kind": "requested"}}, {}, "support 'requested'; use 'topk'"),
        ({"kind": "on_policy", "form": "policy"}, {}, "form 'policy' does not; use form 'divergence'"),
        ({"kind": "on_policy", "teacher_written": 0.5, "student_fraction": 0.5}, {}, "synthesis 'responses' instead"),
        ({"kind": "logit_kd"}, {"route": {"field": "task", "teachers": {"a": OTHER}}}, "leave out 'ensemble' and"),
        ({"kind": "minillm"}, {}, "method 'minillm' needs a teacher with the student's tokenizer; only 'logit_kd'"),
        ({"kind": "preference"}, {}, "method 'preference' needs a teacher with the student's tokenizer"),
        ({"kind": "in_context"}, {}, "method 'in_context' needs a teacher with the student's tokenizer"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(method, others, said, tmp_path):
    values = run_settings(tmp_path, "student", "teacher", method) | others
    with pytest.raises(InputError, match=said):
        parse_config(values)


def test_several_trained_turns_and_prompt_templates_are_refused(tmp_path):
    values = run_settings(tmp_path, "student", "teacher", {"kind": "logit_kd"})
    values["data"]["train"]["train_on"] = "all"
    with pytest.raises(InputError, match="train_on is 'all'; set it to 'last'"):
        parse_config(values)
    values["data"]["train"]["train_on"] = "last"
    values["teachers"][0]["prompt_template"] = "{answer}: {prompt}"
    with pytest.raises(InputError, match="has a prompt_template.*leave one of the two out"):
        parse_config(values)


@pytest.mark.parametrize("kind", ["logit_kd", "on_policy"])
def test_inputs_of_a_run_have_the_rows_in_the_teachers_tokens(kind, tmp_path, tiny_student, other_teacher):
    method = {"kind": kind, "support": {"kind": "topk", "k": 300}}
    values = run_settings(tmp_path, tiny_student, other_teacher, method)
    inputs = read_inputs(parse_config(values), {})
    assert inputs.train is not None and inputs.views.aligners[OTHER].shared_tokens > 200
    row = inputs.train[0]
    completion = row.fields["completion"] + "<eos>" if kind == "logit_kd" else ""
    decoded = load_tokenizer(other_teacher).decode(inputs.views.align(row).view(OTHER).input_ids)
    assert decoded == row.fields["prompt"] + completion
    del values["method"]["alignment"]
    with pytest.raises(InputError, match="give tokens different ids.*set method.alignment"):
        read_inputs(parse_config(values), {})
    values["method"] |= {"alignment": {"kind": "bytes"}, "support": {"kind": "topk", "k": 1000}}
    with pytest.raises(InputError, match=r"method.support.k is 1000, but the vocabulary of teacher 'other-"):
        read_inputs(parse_config(values), {})
