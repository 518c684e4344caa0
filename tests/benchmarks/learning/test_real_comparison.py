"""The tools of `real_models` and `other_tokenizer`: rows, measures of a student, and the wrong alignment."""

import json

import numpy as np
import pytest

from rayk.data.examples import Example
from rayk.signals.alignment import AlignedView, TokenGroups
from tests.benchmarks.learning.other_tokenizer import read_prompts, shuffle_groups
from tests.benchmarks.learning.real_models import Measurer
from tests.benchmarks.learning.real_rows import prepare_rows, read_task, split_by_length
from tests.benchmarks.learning.words import write_rows
from tests.tiny import tiny_model, tiny_tokenizer


def write_data(folder):
    long = " ".join(["the cat sat on the mat and"] * 30)
    for task, prompt, completion in (("dolly", "instruction", "output"), ("gsm8k", "question", "answer")):
        for split in ("train", "test"):
            (folder / task).mkdir(parents=True, exist_ok=True)
            rows = [
                {prompt: f"{task} {split} {i}?", "input": "", completion: long if i % 2 else "the dog"}
                for i in range(6)
            ]
            write_rows(folder / task / f"{split}.jsonl", rows)


def test_no_row_is_both_recovered_on_and_trained_on_or_held_out(tmp_path):
    write_data(tmp_path / "data")
    tokenizer, rows = tiny_tokenizer(), tmp_path / "rows"
    rows.mkdir()
    prepare_rows(tmp_path / "data", tokenizer, rows)
    prompts = {
        path.stem: [json.loads(line)["prompt"] for line in path.read_text().splitlines()] for path in rows.iterdir()
    }
    assert [len(prompts[f"{task}-{part}"]) for task in ("dolly", "gsm8k") for part in ("pool", "held-out")] == [3] * 4
    assert len(prompts["recovery"]) == len(prompts["recovery-held-out"]) == 6
    assert not {*prompts["recovery"]} & {*prompts["dolly-pool"], *prompts["gsm8k-pool"]}
    assert {*prompts["recovery-held-out"]} == {*prompts["dolly-held-out"], *prompts["gsm8k-held-out"]}


def test_rows_are_split_by_all_their_tokens(tmp_path):
    write_data(tmp_path)
    tokenizer, rows = tiny_tokenizer(), read_task(tmp_path, "gsm8k", "train")
    longest = len(tokenizer(rows[0]["prompt"] + rows[0]["completion"]).input_ids)
    assert split_by_length(rows, tokenizer, longest) == (rows[::2], rows[1::2])
    assert split_by_length(rows[:1], tokenizer, longest - 1) == ([], rows[:1])


def test_measures_of_the_teacher_and_of_another_model(tmp_path):
    for name, seed in (("teacher", 0), ("student", 1)):
        tiny_model(tmp_path / name, seed=seed, peaked=20.0, tokenizer=tiny_tokenizer())
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "completion": "the cat sat"} for i in range(20)])
    measurer = Measurer(str(tmp_path / "teacher"), rows)
    teacher, student = measurer.measure_teacher(), measurer.measure(tmp_path / "student")
    assert (teacher["forward_kl"], teacher["reverse_kl"], teacher["agreement"]) == pytest.approx((0, 0, 1), abs=1e-6)
    assert student["forward_kl"] > 0.001 and student["reverse_kl"] > 0.001


def test_a_shuffled_alignment_compares_every_group_with_another_of_its_kind():
    spans = np.array([[0, 1], [1, 3], [3, 4], [4, 5], [5, 8]])
    single = np.array([True, False, True, True, False])
    ids, counted = np.arange(9, dtype=np.int32), np.arange(9) > 0
    view = AlignedView(Example(ids, counted), TokenGroups(spans, spans, single), vocabulary=None)
    groups = shuffle_groups(Example(ids, counted, aligned={"teacher": view})).aligned["teacher"].groups
    assert (groups.student == spans).all() and (groups.is_single == single).all()
    assert (groups.teacher != spans).any(1).all()
    assert sorted(groups.teacher[single].tolist()) == spans[single].tolist()
    assert sorted(groups.teacher[~single].tolist()) == spans[~single].tolist()


def test_long_prompts_are_left_out_before_rows_are_counted(tmp_path):
    rows = [{"instruction": "Why " * times} for times in (1, 20, 2, 3)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert read_prompts(str(path), "Q: {instruction}", 2, 20) == ["Q: Why ", "Q: Why Why "]
