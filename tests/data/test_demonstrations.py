"""Selection and layout of demonstrations, with the same counted tokens for teacher and student."""

import pickle

import numpy as np
import pytest

from rayk.config import DataConfig, DataSource, InContextConfig
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.examples import ExampleTable
from rayk.data.nearest import Embedder, bm25_scores, top_indices
from rayk.data.sources import Row
from rayk.data.tokenizing import RowTokenizer
from rayk.errors import InputError
from tests.tiny import BOS, EOS, spaced_tokenizer, tiny_model, tiny_tokenizer

OPTIONS = ["the log", "no"]


def tasks(count=12):
    return [
        {"task": f"task {i % 2}", "prompt": f"cat {i} sat", "completion": OPTIONS[i % 3 == 0], "options": OPTIONS}
        for i in range(count)
    ]


def table_of(rows, tokenizer):
    source = DataSource(path="rows.jsonl", format="prompt_completion")
    lines = [Row(fields, f"rows.jsonl, line {i}") for i, fields in enumerate(rows, start=1)]
    return ExampleTable.from_examples(RowTokenizer(source, DataConfig(train=source), tokenizer).examples(lines))


@pytest.fixture
def make_pool(tokenizer):
    """make(rows, max_tokens=…, **settings of the method): a pool of the rows, and the rows."""

    def make(rows, *, tokenizer=tokenizer, max_tokens=1024, **settings):
        table = table_of(rows, tokenizer)
        demonstrations = settings.pop("demonstrations", {})
        method = InContextConfig(demonstrations={"k": 3} | demonstrations, **settings)
        return DemonstrationPool(table, method, tokenizer, max_tokens), list(table)

    return make


def test_layout_is_that_of_metaicl(make_pool, tokenizer):
    pool, rows = make_pool(tasks())
    query = pool.add_demonstrations(rows[0], seed=5)
    parts = [rows[place] for place in pool.select(rows[0], 5)]
    expected = (
        "".join(f"{part.fields['prompt']}\n{part.fields['completion']}\n\n\n" for part in parts) + "cat 0 sat\nno"
    )
    assert tokenizer.decode(query.input_ids) == expected
    assert tokenizer.decode(query.prompt_ids) == expected.removesuffix("no")
    assert tokenizer.decode(query.targets) == "no"
    assert [tokenizer.decode(option) for option in query.options] == OPTIONS
    assert query.gold == 1
    for answer, option in zip(query.alternatives, OPTIONS, strict=True):
        assert tokenizer.decode(answer.input_ids) == expected.removesuffix("no") + option
        assert tokenizer.decode(answer.targets) == tokenizer.decode(answer.view("any").targets) == option


def test_outputs_and_options_have_no_space_from_the_tokenizer_before_them(make_pool):
    tokenizer = spaced_tokenizer()
    pool, rows = make_pool(tasks(), tokenizer=tokenizer)
    query = pool.add_demonstrations(rows[0], seed=5)
    assert query.gold == 1 and [tokenizer.decode(option) for option in query.options] == OPTIONS
    assert tokenizer.decode(query.input_ids).endswith("\ncat 0 sat\nno")


@pytest.mark.parametrize("student", [0, 1, 2])
def test_a_tokenizer_that_puts_a_space_before_texts_puts_one_before_the_first_input_only(make_pool, student):
    tokenizer = spaced_tokenizer()
    pool, rows = make_pool(tasks(), tokenizer=tokenizer, student_demonstrations=student)
    query = pool.add_demonstrations(rows[0], seed=5)
    parts = [rows[place].fields for place in pool.select(rows[0], 5)]
    texts = [f"{part['prompt']}\n{part['completion']}\n\n\n" for part in parts] + ["cat 0 sat\n"]
    assert tokenizer.decode(query.view("any").input_ids) == f"{BOS} {''.join(texts)}no"
    assert tokenizer.decode(query.prompt_ids) == f"{BOS} {''.join(texts[3 - student :])}"
    whole = query.full_text
    assert whole.view("any").targets.tolist() == whole.targets.tolist() == query.input_ids[1:].tolist()
    before = whole.view("any").input_ids[: -len(whole.targets)]
    assert tokenizer.decode(before) == f"{BOS} {''.join(texts[: 3 - student])}"
    assert pool.max_length(rows) >= max(len(pool.add_demonstrations(row, 5).view("any")) for row in rows)


def test_separators_can_be_set_and_row_without_options_ends_with_eos(make_pool, tokenizer):
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in tasks(4)]
    settings = {"k": 1, "separator": " ### ", "output_separator": " => "}
    pool, rows = make_pool(rows, targets="tokens", demonstrations=settings)
    text = tokenizer.decode(pool.add_demonstrations(rows[3], 0).input_ids)
    assert text.count(" => ") == 2 and text.count(" ### ") == 1
    assert text.endswith(f" => no{EOS}") and text.count(EOS) == 1


def test_prefix_of_the_tokenizer_occurs_once_at_the_start(make_pool):
    tokenizer = tiny_tokenizer(bos=True)
    pool, rows = make_pool(tasks(), tokenizer=tokenizer, student_demonstrations=1)
    query = pool.add_demonstrations(rows[1], 0)
    for ids in (query.input_ids, query.view("any").input_ids):
        assert np.flatnonzero(ids == tokenizer.convert_tokens_to_ids(BOS)).tolist() == [0]
    assert query.full_text.counted.tolist() == [False] + [True] * (len(query) - 1)


def test_random_demonstrations_share_the_task_exclude_the_input_and_repeat(make_pool):
    rows = [*tasks(40), tasks(40)[4]]  # the same row twice
    pool, rows = make_pool(rows)
    seen = set()
    for seed in range(60):
        chosen = pool.select(rows[4], seed)
        assert chosen == pool.select(rows[4], seed) == pickle.loads(pickle.dumps(pool)).select(rows[4], seed)
        assert len(set(chosen)) == 3
        assert all(rows[place].fields["task"] == "task 0" for place in chosen)
        seen |= set(chosen)
    assert seen == set(range(0, 40, 2)) - {4}


def test_small_pool_is_used_completely_in_random_order(make_pool):
    pool, rows = make_pool(tasks(6), demonstrations={"k": 16})
    orders = {tuple(pool.select(rows[0], seed)) for seed in range(20)}
    assert orders == {(2, 4), (4, 2)}


@pytest.mark.parametrize("students", [0, 1, 3])
@pytest.mark.parametrize("max_tokens", [1024, 24])
def test_student_text_is_the_end_of_the_teachers_text(students, max_tokens, make_pool):
    pool, rows = make_pool(tasks(), max_tokens=max_tokens, student_demonstrations=students)
    for row in rows:
        query = pool.add_demonstrations(row, 1)
        assert len(query.view("any")) <= max_tokens
        assert np.array_equal(query.view("any").input_ids[-len(query) :], query.input_ids)
        whole = query.full_text
        assert whole.counted_tokens == len(query) - 1
        for shown in (query, whole, *query.alternatives):
            assert np.array_equal(shown.targets, shown.view("any").targets)


def test_long_context_is_truncated_at_its_beginning(make_pool, tokenizer):
    pool, rows = make_pool(tasks())
    whole = pool.add_demonstrations(rows[0], 2)
    cut, rows = make_pool(tasks(), max_tokens=20)
    query = cut.add_demonstrations(rows[0], 2)
    assert len(query.prompt_ids) + max(map(len, query.options)) == 20
    assert np.array_equal(whole.prompt_ids[-len(query.prompt_ids) :], query.prompt_ids)
    tight, rows = make_pool(tasks(), max_tokens=5)
    with pytest.raises(InputError, match=r"line 1 has no room .* data.max_tokens \(5\)"):
        tight.check(rows[0])


def test_long_demonstration_loses_the_end_of_its_input(make_pool, tokenizer):
    rows = tasks(4)
    rows[2]["prompt"] = "the mat and " * 30
    pool, rows = make_pool(rows, demonstrations={"k": 1, "max_tokens": 8})
    text = tokenizer.decode(pool.add_demonstrations(rows[0], 0).prompt_ids)
    demonstration = text.split("\n\n\n")[0]
    assert demonstration.startswith("the mat and the") and demonstration.endswith("\nthe log")
    assert len(tokenizer(demonstration.replace("\n", "")).input_ids) <= 9


def test_bm25_places_the_nearest_last_and_excludes_the_row(make_pool):
    rows = tasks(2)
    words = ["red fish", "red fish swims", "blue bird", "red fish swims far", "green tree"]
    rows = [rows[0] | {"prompt": text} for text in words]
    pool, rows = make_pool(rows, demonstrations={"k": 2, "choice": "bm25"})
    pool.rank_nearest(rows)
    assert [words[place] for place in pool.select(rows[3], 0)] == ["red fish", "red fish swims"]
    assert pool.select(rows[3], 1) == pool.select(rows[3], 0)


def test_bm25_scores_equal_the_formula():
    pool = [np.array(ids) for ids in ([1, 2, 2], [2, 3], [4, 4, 4, 1])]
    [scores] = bm25_scores(pool, [np.array([2, 4])])
    length, k1, b = 3.0, 1.5, 0.75

    def part(count, matching, tokens):
        inverse = np.log(1 + (len(pool) - matching + 0.5) / (matching + 0.5))
        return inverse * count / (count + k1 * (1 - b + b * tokens / length))

    assert scores == pytest.approx([part(2, 2, 3), part(1, 2, 2), part(3, 1, 4)], rel=1e-5)


def test_embedding_does_not_depend_on_the_other_texts_of_its_batch(make_pool, tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model(tmp_path / "encoder", seed=5, tokenizer=tokenizer)
    embedder = Embedder(str(tmp_path / "encoder"))
    texts = ["the cat sat on the mat", "cat", "the dog sat on the log and the mat"]
    together = embedder.vectors(texts)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(embedder.vectors([text])[0], vector, atol=1e-5)
    rows = [tasks(1)[0] | {"prompt": text} for text in texts]
    pool, rows = make_pool(rows, demonstrations={"k": 1, "choice": "embedding", "encoder": str(tmp_path / "encoder")})
    pool.rank_nearest(rows)
    similar = together @ together.T - 9 * np.eye(3)
    assert [pool.select(row, 0) for row in rows] == [[int(best)] for best in similar.argmax(1)]
    with pytest.raises(InputError, match="encoder 'nowhere' cannot be loaded"):
        Embedder("nowhere")


def test_top_indices_are_sorted_and_ties_go_to_the_lower_index():
    assert top_indices(np.array([1.0, 3.0, 2.0, 3.0, 2.0]), 3) == [1, 3, 2]
    assert top_indices(np.array([1.0]), 0) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"completion": "yes"}, "the output is none of the options"),
        ({"options": ["no"]}, "no list of at least two different texts in its field 'options'"),
        ({"options": ["no", "no"]}, "no list of at least two different texts"),
        ({"options": "no, the log"}, "no list of at least two different texts"),
        ({"options": None}, "set method.targets to 'tokens'"),
        ({"task": "another"}, "task 'another', and there is no other input"),
    ],
    ids=["output", "one", "twice", "text", "none", "lonely"],
)
def test_unusable_row_is_an_error_that_names_it(change, said, make_pool):
    pool, rows = make_pool([*tasks(4), tasks(1)[0] | {"prompt": "here"} | change])
    with pytest.raises(InputError, match=f"line 5.*{said}"):
        pool.check(rows[4])
    pool.check(rows[0])


def test_max_length_bounds_every_row(make_pool):
    for max_tokens in (1024, 30):
        pool, rows = make_pool(tasks(), max_tokens=max_tokens, demonstrations={"k": 16})
        longest = max(
            len(answer.view("any")) for row in rows for answer in pool.add_demonstrations(row, 0).alternatives
        )
        assert longest <= pool.max_length(rows) <= min(max_tokens, longest + 30)
