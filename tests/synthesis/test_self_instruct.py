"""A teacher generates tasks and solves them, the same after any interruption."""

import random
import re
from contextlib import nullcontext

import pyarrow.parquet as pq
import pytest

from rayk.config import SelfInstructConfig, parse_config
from rayk.errors import InputError, RunFailed
from rayk.run import distill, synthesize
from rayk.synthesis import CompletionStore, synthesize_rows
from rayk.synthesis.self_instruct import SelfInstruct
from rayk.synthesis.self_instruct_texts import read_seed_tasks
from rayk.text import build_filters, rouge_l
from tests.engines.endpoint import Reply, completion, prompt_of
from tests.runs import settings

pytestmark = pytest.mark.cluster

WORDS = ["river", "copper", "violin", "desert", "lantern", "orbit", "pepper", "castle", "signal", "winter", "marble"]
WORDS += ["thread", "harbour", "comet", "ladder", "meadow"]


def imagine(body) -> bytes:
    """Respond as a chat teacher for Self-Instruct; equal for equal prompts and seeds."""
    prompt = prompt_of(body)
    draw = random.Random(f"{prompt} {body['seed']}")
    if "Continue the list" in prompt:
        lines = [f"{number}. {_instruction(draw)}" for number in range(9, 17)]
        return completion(body, "Here you are:\n" + "\n".join(lines))
    if "Task: " not in prompt:
        return completion(body)  # the request that tests whether a teacher responds
    task = prompt.split("\n\n")[-2].removeprefix("Task: ")
    if "Yes or No" in prompt:
        return completion(body, "Yes." if task.startswith("Decide") else "No.")
    if task.startswith("Decide"):
        return completion(
            body, f"Class label: warm\nInput: the {task[-9:]}\n\nClass label: cold\nInput: no {task[-9:]}"
        )
    if task.startswith("Compare"):
        return completion(body, "Example 1\nInput: a\nOutput: b\n\nExample 2\nInput: a\nOutput: c")
    return completion(body, f"Output: {task[::-1]}")


def _instruction(draw: random.Random) -> str:
    words = " ".join(draw.sample(WORDS, 6))
    beginnings = ["Decide whether it is", "Compare", "Describe the", "Sing of the", "Draw the", "Write a program on"]
    return f"{draw.choice(beginnings)} {words}"


def run_recipe(teacher, store, seed=0, **changed):
    given = SelfInstructConfig(**({"instructions": 40, "batch": 3} | changed))
    return synthesize_rows(
        given, SelfInstruct.seed_prompts(given), teacher, store, build_filters(given.filters), seed=seed
    )


def rows(store, name="rows"):
    return pq.read_table(store.folder / f"{name}.parquet").to_pylist()


def opened(folder):
    store = CompletionStore(folder)
    store.__enter__()
    store.claim({}, set(), set())
    return store


def test_tasks_are_generated_classified_and_solved(chat_teacher, endpoint, store):
    endpoint.answer = imagine
    summary = run_recipe(chat_teacher, store)
    kept, rejected = rows(store), rows(store, "rejected")
    instructions = {row["instruction"] for row in kept}
    assert summary["kept"] == len(kept) and summary["unanswered"] == 0
    assert {row["rejected_by"] for row in rejected} >= {"keywords", "beginning", "instances"}
    assert all(row["instruction"].startswith("Compare") for row in rejected if row["rejected_by"] == "instances")
    assert len(instructions | {r["instruction"] for r in rejected if r["rejected_by"] == "instances"}) == 40
    for row in kept:
        sort = row["instruction"].startswith("Decide")
        assert row["is_classification"] is sort
        assert row["completion"] in (("warm", "cold") if sort else (row["instruction"][::-1],))
        assert row["instruction"] in row["prompt"] and row["input"] in row["prompt"]
        assert re.search(r"seed_tasks.jsonl, line \d+$", row["where"])
        assert [bool(store.find(key)) for key in row["keys"]] == [True] * 3
    assert [figure["name"] for figure in summary["figures"]] == ["tasks", "classification among them", "rows a task"]
    assert summary["figures"][0]["value"] == len(instructions)


def test_new_instructions_differ_from_the_pool_and_two_are_in_each_prompt(chat_teacher, endpoint, store):
    endpoint.answer = imagine
    run_recipe(chat_teacher, store)
    made = {row["instruction"] for name in ("rows", "rejected") for row in rows(store, name)
            if row.get("rejected_by") in (None, "instances")}  # fmt: skip
    pool = [*made, *(seed.instruction for seed in read_seed_tasks())]
    assert all(rouge_l(one, other) < 0.7 for one in made for other in pool if one != other)
    lists = [each.prompt for each in endpoint.requests if "Continue the list" in each.prompt]
    shown = [[line.split(". ", 1)[1] for line in prompt.split("\n")[1:9]] for prompt in lists]
    by_machine = [len(made & set(each)) for each in shown]
    assert by_machine[:3] == [0, 0, 0] and set(by_machine[3:]) == {2}
    assert all(len(set(each)) == 8 for each in shown)


def test_rows_depend_on_the_seed_and_not_on_in_flight(chat_teacher, endpoint, tmp_path):
    endpoint.answer = imagine
    made = []
    for name, seed, in_flight in (("one", 3, 64), ("two", 3, 1), ("other", 4, 64)):
        store = opened(tmp_path / name)
        with store:
            run_recipe(chat_teacher, store, seed, in_flight=in_flight)
            made.append((rows(store), rows(store, "rejected")))
    assert made[0] == made[1]
    assert not {row["instruction"] for row in made[0][0]} & {row["instruction"] for row in made[2][0]}


@pytest.mark.parametrize(("broken_at", "in_lists"), [(2, True), (7, True), (70, False)])
def test_an_interrupted_run_continues_without_repeating_requests(chat_teacher, endpoint, tmp_path, broken_at, in_lists):
    endpoint.answer = imagine
    with opened(tmp_path / "whole") as store:
        run_recipe(chat_teacher, store)
        whole, asked = rows(store), len(endpoint.requests)
    count = 0

    def breaking(body):
        nonlocal count
        count += 1
        return imagine(body) if count <= broken_at else b"{"

    endpoint.reset()
    endpoint.answer = breaking
    with opened(tmp_path / "broken") as store:
        with pytest.raises(RunFailed, match="did not answer a request for new") if in_lists else nullcontext():
            run_recipe(chat_teacher, store, in_flight=1)
        done = len(store)
        endpoint.reset()
        endpoint.answer = imagine
        run_recipe(chat_teacher, store)
        assert rows(store) == whole
    assert done == broken_at
    assert len(endpoint.requests) == asked - done


def test_more_instructions_keep_the_earlier_ones(chat_teacher, endpoint, store):
    endpoint.answer = imagine
    run_recipe(chat_teacher, store, instructions=20)
    few = rows(store)
    run_recipe(chat_teacher, store, instructions=40)
    assert {row["instruction"] for row in few} < {row["instruction"] for row in rows(store)}


def lists_of(endpoint):
    return [(each.prompt, each.body["seed"]) for each in endpoint.requests if "Continue the list" in each.prompt]


def test_requests_for_few_instructions_are_reused_for_more(chat_teacher, endpoint, tmp_path):
    endpoint.answer = imagine
    for instructions in (16, 20, 40):
        with opened(tmp_path / "growing") as store:
            run_recipe(chat_teacher, store, instructions=instructions)
            grown = rows(store)
    asked = lists_of(endpoint)
    endpoint.reset()
    endpoint.answer = imagine
    with opened(tmp_path / "at once") as store:
        run_recipe(chat_teacher, store, instructions=40)
        assert rows(store) == grown
    assert sorted(asked) == sorted(lists_of(endpoint))


def test_a_refused_list_is_skipped_for_good(chat_teacher, endpoint, tmp_path):
    endpoint.answer = imagine
    with opened(tmp_path / "whole") as store:
        run_recipe(chat_teacher, store)
    (_, (second, _), *_) = lists_of(endpoint)
    endpoint.reset()
    endpoint.answer = imagine
    endpoint.replies[second] = [Reply(400, b'{"error": {"message": "too rude"}}')]
    with opened(tmp_path / "refused") as store:
        run_recipe(chat_teacher, store)
        kept, asked = rows(store), len(endpoint.requests)
        (refusal,) = [row for row in rows(store, "rejected") if row["rejected_by"] == "refused"]
        assert refusal["reason"] == "a list of instructions: 400: too rude"
        summary = run_recipe(chat_teacher, store)
        assert (rows(store), len(endpoint.requests), summary["unanswered"]) == (kept, asked, 0)


def test_a_teacher_that_repeats_itself_ends_the_generation(chat_teacher, endpoint, store):
    def repeat(body):
        if "Continue the list" not in prompt_of(body):
            return imagine(body)
        return completion(body, "\n".join(f"{n}. Describe the weather of the northern coast." for n in range(9, 17)))

    endpoint.answer = repeat
    summary = run_recipe(chat_teacher, store)
    assert summary["kept"] == 1
    assert summary["rejected"]["rouge"] == 3 * 8 * 6 - 1


def test_a_teacher_that_generates_no_list_is_reported(chat_teacher, endpoint, store):
    endpoint.answer = lambda body: completion(body, "I would rather not.")
    with pytest.raises(
        RunFailed, match=r"None of the \d+ completions has the form that synthesis 'self_instruct' requested"
    ):
        run_recipe(chat_teacher, store)


def test_prompts_are_generated(tmp_path, tiny_student):
    values = settings(tmp_path, tiny_student, "supervised", steps=1)
    rows_file = values["data"]["train"]
    values |= {"teachers": [{"name": "parrot", "attach": True}], "synthesis": {"kind": "self_instruct"}}
    with pytest.raises(InputError, match="makes its own prompts; leave out data.train and synthesis.prompts"):
        parse_config(values)
    with pytest.raises(InputError, match="makes its own prompts"):
        parse_config(values | {"data": {}, "synthesis": values["synthesis"] | {"prompts": rows_file}})


def test_self_instruct_in_a_whole_run(tmp_path, tiny_student, chat_teacher, endpoint):
    endpoint.answer = imagine
    values = settings(tmp_path, tiny_student, "supervised", steps=2)
    synthesis = {"kind": "self_instruct", "instructions": 12, "batch": 2, "filters": [{"kind": "empty"}]}
    values |= {"teachers": [{"name": "parrot", "attach": True}], "data": {}, "synthesis": synthesis}
    result = distill(parse_config(values))
    written = pq.read_table(tmp_path / "run" / "synthesis" / "rows.parquet").num_rows
    assert result.summary["rows"]["train"] == written > 0
    asked = len(endpoint.requests)
    assert synthesize(parse_config(values))["kept"] == written
    assert len(endpoint.requests) == asked
    seeds = tmp_path / "broken.jsonl"
    seeds.write_text('{"instruction": "x"\n')
    values["synthesis"]["seed_tasks"] = str(seeds)
    with pytest.raises(InputError, match=r"broken\.jsonl is not JSON"):
        synthesize(parse_config(values | {"output": str(tmp_path / "other")}))


def test_a_malformed_response_affects_only_its_task(chat_teacher, endpoint, store):
    failed = []

    def sometimes(body):
        if "in the same form" in prompt_of(body) and prompt_of(body) not in failed and len(failed) < 2:
            failed.append(prompt_of(body))
            endpoint.replies[prompt_of(body)] = [Reply(body=b"{")]
            return b"{"
        return imagine(body)

    endpoint.answer = sometimes
    summary = run_recipe(chat_teacher, store, in_flight=1)
    assert summary["unanswered"] >= 1 and summary["rejected"]["unanswered"] == summary["unanswered"]
    assert run_recipe(chat_teacher, store)["unanswered"] == 0
