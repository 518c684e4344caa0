"""Whole runs with a teacher that has more tokens than the student, and one that has fewer."""

import pytest

from rayk import distill
from rayk.config import parse_config
from rayk.models import load_tokenizer, real_vocab_size
from tests.runs import metrics, settings
from tests.tiny import tiny_model, tiny_tokenizer

BASE = real_vocab_size(tiny_tokenizer())


def save(folder, *tokens, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tiny_model(folder, tokenizer=tokenizer, layers=1, hidden=16, **options)
    return str(folder)


def run(tmp_path, teacher, student, method, **changes):
    values = settings(tmp_path, student, method, steps=2) | changes
    values["teachers"] = [{"name": "extended", "model": teacher, "resources": {"num_cpus": 0.5}}]
    return distill(parse_config(values))


@pytest.mark.parametrize("support", [{"kind": "topk", "k": 8}, {"kind": "hidden"}], ids=lambda one: one["kind"])
def test_a_student_learns_from_a_teacher_with_more_tokens(ray_cluster, tmp_path, support):
    teacher = save(tmp_path / "teacher", "<think>", "</think>", seed=1, peaked=4.0)
    student = save(tmp_path / "student", vocab_size=BASE, seed=2)
    run(tmp_path, teacher, student, {"kind": "logit_kd", "divergence": "reverse_kl", "support": support})
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert len(losses) == 2
    assert 0 < losses[1] < losses[0] < 50


@pytest.mark.long
def test_a_student_with_more_tokens_generates_only_the_teachers(ray_cluster, tmp_path):
    """The teacher refuses ids that it does not have, so a rollout with one would end the run."""
    extra = [f"<extra {i}>" for i in range(40)]
    teacher, student = save(tmp_path / "teacher", seed=1), save(tmp_path / "student", *extra, seed=2, peaked=2.0)
    result = run(tmp_path, teacher, student, {"kind": "on_policy", "support": {"kind": "requested", "k": 4}})
    assert len(metrics(tmp_path / "run")) == 2
    assert len(load_tokenizer(str(result.model))) == BASE + 40
