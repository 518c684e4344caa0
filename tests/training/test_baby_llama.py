"""A student from scratch learns plain text, in other chunks in each pass, and the mean of two teachers' logits."""

import pytest

from rayk.config import TeacherConfig, parse_config
from rayk.teachers import serve_teacher
from tests.data.test_chunks import write_texts
from tests.runs import assert_placement_changes_nothing, metrics, settings
from tests.tiny import tiny_model, tiny_tokenizer

METHOD = {
    "kind": "logit_kd", "support": {"kind": "hidden"}, "hard_label_weight": 0.5, "temperature": 2.0,
    "temperature_squared": True, "soft_reduction": "batchmean",
}  # fmt: skip
STUDENT = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def second(ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "second"
    tiny_model(folder, architecture="gpt2", seed=7, hidden=24, peaked=4.0, tokenizer=tiny_tokenizer())
    with serve_teacher(TeacherConfig(name="second", model=str(folder), resources={"num_cpus": 0.25})):
        yield


def run_config(folder, tokenizer, **training):
    folder.mkdir()
    values = settings(folder, "unused", METHOD, **{"steps": 9, **training})
    return parse_config(
        values
        | {
            "teachers": [{"name": "served", "attach": True}, {"name": "second", "attach": True}],
            "ensemble": {"combine": "logits"},
            "student": {"config": STUDENT, "tokenizer": tokenizer},
            "data": {"train": {"path": write_texts(folder / "texts.jsonl"), "chunk_tokens": 16, "random_offset": True}},
        }
    )


@pytest.mark.long
def test_passes_with_other_offsets_are_the_same_with_two_workers_and_after_a_resume(
    tmp_path, tiny_teacher, served, second, monkeypatch
):
    run = assert_placement_changes_nothing(
        lambda name, **training: run_config(tmp_path / name, tiny_teacher, **training),
        "logit_kd", at=7, every=3, monkeypatch=monkeypatch,
    )  # fmt: skip
    rows = metrics(run)
    assert rows[-1]["epoch"] > 1.5
    assert {row["counted_tokens"] for row in rows} == {8 * 15}
    first, last = rows[0], rows[-1]
    assert last["loss"] < first["loss"]
    assert first["loss"] == pytest.approx(
        0.5 * first["cross_entropy"] + 0.5 * 4 * 15 * first["forward_kl"], rel=1e-4
    )  # fmt: skip
