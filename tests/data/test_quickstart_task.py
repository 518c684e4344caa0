import json
import math
from collections import Counter, defaultdict

import pytest
from transformers import AutoTokenizer, LlamaConfig

from rayk.data import quickstart_task
from rayk.data.quickstart_task import (
    ENDING_PROBABILITIES,
    EVALUATION_PROMPTS,
    LANGUAGE,
    TRAIN_PROMPTS,
    generate_rows,
    prompts,
    task_tokenizer,
    true_distribution,
    write_rows,
)

SPLITS = ("train", "evaluation")


def contexts(prompt: str) -> list[tuple[str, str, str]]:
    words = ["", *prompt.split()[:-1], ""]
    return list(zip(words, words[1:], words[2:], strict=False))


@pytest.mark.parametrize("split", SPLITS)
def test_rows_depend_on_the_seed_only(split):
    rows = generate_rows(50, 7, split)
    assert rows == generate_rows(50, 7, split)
    assert rows != generate_rows(50, 8, split)


def test_fewer_rows_are_a_prefix_of_more_rows():
    assert generate_rows(10, 0) == generate_rows(2 * TRAIN_PROMPTS, 0)[:10]


def test_rows_of_seed_0_are_the_same_on_every_machine():
    """A cached teacher stays right only while the language and the draws stay what they are."""
    assert generate_rows(1, 0, "train") == [
        {
            "prompt": "red boat finds wild boat ->",
            "completion": "ruden naven kelen dora nava",
            "answer": "ruden nava kela doren nava",
        }
    ]


def test_splits_do_not_overlap():
    train, evaluation = (set(prompts(split)) for split in SPLITS)
    assert (len(train), len(evaluation)) == (TRAIN_PROMPTS, EVALUATION_PROMPTS)
    assert not train & evaluation
    assert {row["prompt"] for row in generate_rows(3000, 0, "train")} == train
    assert {row["prompt"] for row in generate_rows(600, 0, "evaluation")} == evaluation


def test_every_pass_has_each_sentence_once():
    counts = Counter(row["prompt"] for row in generate_rows(2 * TRAIN_PROMPTS + 1, 0, "train"))
    assert sorted(counts.values())[-2:] == [2, 3] and min(counts.values()) == 2


def test_training_sentences_contain_every_context():
    assert {context for prompt in prompts("train") for context in contexts(prompt)} == set(LANGUAGE)


def test_written_rows_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, 20, 3, "evaluation")
    assert [json.loads(line) for line in path.read_text().splitlines()] == generate_rows(20, 3, "evaluation")


def test_answer_is_the_mode_at_every_word():
    for row in generate_rows(EVALUATION_PROMPTS, 0, "evaluation"):
        words = true_distribution(row["prompt"])
        assert row["answer"].split() == [max(word, key=word.get) for word in words]
        assert all(math.isclose(sum(word.values()), 1) for word in words)


def test_completions_follow_the_closed_form():
    """Chi-square against the three probabilities: of every context, and of all together."""
    seen = defaultdict(Counter)
    for row in generate_rows(40_000, 0):
        for context, said in zip(contexts(row["prompt"]), row["completion"].split(), strict=True):
            seen[context][said] += 1
    assert set(seen) == set(LANGUAGE)

    statistics = []
    for context, counts in seen.items():
        observed = [counts[rendering] for rendering in LANGUAGE[context]]
        assert sum(observed) == counts.total()
        expected = [counts.total() * p for p in ENDING_PROBABILITIES]
        statistics.append(sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True)))
    # Two degrees of freedom a context: P(statistic > x) = exp(-x / 2), here 1e-4 over all contexts together.
    assert max(statistics) < 2 * math.log(len(LANGUAGE) / 1e-4)
    degrees = 2 * len(LANGUAGE)
    assert abs(sum(statistics) - degrees) < 4 * math.sqrt(2 * degrees)


def test_words_of_a_sentence_vary_independently():
    rows = generate_rows(40_000, 1, "train")
    usual = [[s == a for s, a in zip(r["completion"].split(), r["answer"].split(), strict=True)] for r in rows]
    share = sum(all(row) for row in usual) / len(usual)
    expected = ENDING_PROBABILITIES[0] ** 5
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(usual))


def test_tokenizer_round_trips_rows_without_unknown_words():
    tokenizer = task_tokenizer()
    assert len(tokenizer) == 60
    for row in generate_rows(200, 0, "train"):
        for text in row.values():
            ids = tokenizer.encode(text)
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_tokenizer_splits_a_prompt_from_the_completion_that_follows_it():
    tokenizer = task_tokenizer()
    row = generate_rows(1, 0, "train")[0]
    parts = tokenizer.encode(row["prompt"]) + tokenizer.encode(row["completion"]) + [tokenizer.eos_token_id]
    assert tokenizer.encode(row["prompt"] + row["completion"] + tokenizer.eos_token) == parts
    assert tokenizer.decode(parts, skip_special_tokens=True) == f"{row['prompt']} {row['completion']}"


def test_tokenizer_survives_a_save(tmp_path):
    tokenizer = task_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token, loaded.eos_token) == ("<pad>", "<eos>")
    assert loaded.encode("old fox sees red king -> ") == tokenizer.encode("old fox sees red king ->")


@pytest.mark.parametrize("kwargs", [quickstart_task.TEACHER_MODEL, quickstart_task.STUDENT_MODEL])
def test_model_settings_fit_the_tokenizer(kwargs):
    tokenizer = task_tokenizer()
    config = LlamaConfig(**kwargs)
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
