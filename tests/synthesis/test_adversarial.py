"""Lion generates instructions on which the student is behind, the same after any interruption."""

import json
import random
import re

import pyarrow.parquet as pq
import pytest

from rayk.config import AdversarialConfig, TeacherConfig, parse_config
from rayk.errors import RunFailed
from rayk.run import distill
from rayk.synthesis import CompletionStore, RecipeContext, synthesize_rows
from rayk.synthesis.instruction_pools import CACHE, TRAIN, read_pool
from rayk.teachers import serve_teacher
from rayk.text import build_filters, rouge_l
from tests.engines.endpoint import Reply, completion, prompt_of
from tests.runs import settings
from tests.synthesis.helpers import engine_of, prompts_of

pytestmark = pytest.mark.cluster

WORDS = ["river", "copper", "violin", "desert", "lantern", "orbit", "pepper", "castle", "signal", "winter", "marble"]
WORDS += ["thread", "harbour", "comet", "ladder", "meadow", "glacier", "saddle", "walnut", "mirror"]
GIVEN = [f"Tell me {what} about {word}s in general" for word in WORDS[:4] for what in ("much", "little")]


def respond(body) -> bytes:
    """Respond as teacher, student or referee, depending on model and prompt; equal for equal prompts and seeds.

    The student is as good as its teacher on prompts that contain "little", and far behind on all others. The referee
    gives the first answer one point more than it deserves.
    """
    prompt = prompt_of(body)
    draw = random.Random(f"{prompt} {body.get('seed')}")
    if "[Answer A]" in prompt:
        a, b = prompt.rsplit("[Answer A]", 1)[1].rsplit("[", 1)[0].split("[Answer B]")
        good = [9 if "good" in answer else 3 for answer in (a, b)]
        begun = "" if prompt.endswith("Score of A:") else "I have read both.\nScore of A:"
        return completion(body, f"{begun} {good[0] + 1}\nScore of B: {good[1]}")
    if "Write only the new prompt" in prompt:
        rarity = "little" if "rarer" in prompt else "much"
        return completion(body, f"New prompt: Tell {rarity} of {' and '.join(draw.sample(WORDS, 4))}")
    good = body["model"] != "pupil" or "little" in prompt
    return completion(body, f"{'good' if good else 'poor'} {body['model']} {draw.random()}")


@pytest.fixture(scope="module")
def served_student(ray_cluster, _endpoint):
    """The student, named 'pupil': a teacher on an endpoint in the place of a served model."""
    engine = engine_of(_endpoint, chat=False)
    config = TeacherConfig(name="pupil", model="pupil", engine=engine, resources={"num_cpus": 0.25})
    with serve_teacher(config) as served:
        yield served


@pytest.fixture
def world(tmp_path, chat_teacher, served_student, endpoint):
    endpoint.answer = respond
    return World(tmp_path, chat_teacher, served_student)


class World:
    """Runs rounds of the recipe, each in its own folder."""

    def __init__(self, folder, teacher, student):
        self.folder, self.teacher, self.student = folder, teacher, student

    def round(self, number, given=GIVEN, opening=CompletionStore, seed=0, **changed):
        settings = AdversarialConfig(**({"instructions": 4} | changed))
        folder = self.folder / f"round-{number}"
        before = self.folder / f"round-{number - 1}" if number else None
        with opening(folder) as store:
            store.claim({}, set(), set())
            if before is not None:
                store.add_earlier_round(before)
            return synthesize_rows(
                settings, prompts_of(*given), self.teacher, store, build_filters(settings.filters), seed=seed,
                context=RecipeContext(number, before, self.student if number else None)
            )  # fmt: skip

    def rows(self, number, name="rows"):
        return pq.read_table(self.folder / f"round-{number}" / f"{name}.parquet").to_pylist()

    def pool(self, number, name):
        return read_pool(self.folder / f"round-{number}", name)


def figures(summary):
    return {each["name"]: each["value"] for each in summary["figures"]}


def test_the_first_round_answers_the_given_prompts_each_once(world, endpoint):
    summary = world.round(0, given=[*GIVEN, GIVEN[3], f" {GIVEN[0]}\n"])
    asked = [each.prompt for each in endpoint.requests if "[Answer A]" not in each.prompt]
    assert sorted(asked) == sorted(GIVEN)
    assert [row["prompt"] for row in world.rows(0)] == GIVEN
    train, cache = world.pool(0, TRAIN), world.pool(0, CACHE)
    assert train == cache and [each.instruction for each in cache] == GIVEN
    assert [each.answer for each in cache] == [row["completion"] for row in world.rows(0)]
    assert figures(summary) == {"train pool": 8, "cache pool": 8}


def test_new_instructions_come_from_hard_ones_and_as_many_from_easy_ones(world, endpoint):
    world.round(0)
    endpoint.requests.clear()
    summary = world.round(1)
    compared = world.rows(1, "comparisons")
    assert [each["instruction"] for each in compared] == GIVEN
    assert {each["kind"] for each in compared if "much" in each["instruction"]} == {"hard"}
    assert {each["kind"] for each in compared if "little" in each["instruction"]} == {"easy"}
    assert {each["lead"] for each in compared} == {6.0, 0.0}  # the bonus of the first place cancels out
    rows = world.rows(1)
    assert [row["kind"] for row in rows] == ["hard", "easy"] * 4
    for row in rows:
        word = "much" if row["kind"] == "hard" else "little"
        assert row["prompt"].startswith(f"Tell {word} of") and word in row["made_from"]
        assert row["made_from"] in GIVEN and row["completion"].startswith("good parrot-1")
    pool = [*GIVEN, *(row["prompt"] for row in rows)]
    assert all(rouge_l(row["prompt"], other) <= 0.7 for row in rows for other in pool if other != row["prompt"])
    assert [each.instruction for each in world.pool(1, TRAIN)] == [row["prompt"] for row in rows]
    assert [each.instruction for each in world.pool(1, CACHE)] == pool
    # The teacher's completions of the cache pool are not requested again.
    assert {each.body["model"] for each in endpoint.requests if each.prompt in GIVEN} == {"pupil"}
    statistics = figures(summary)
    assert statistics["teacher's lead over the student, of 9 points"] == 3.0
    assert statistics["hard instructions"] == statistics["the order of the answers decides"] == 0.5
    assert statistics["judgements without scores"] == 0
    assert (statistics["new from hard ones"], statistics["new from easy ones"]) == (4, 4)
    assert (statistics["train pool"], statistics["cache pool"]) == (8, 16)
    world.round(2)
    assert len(world.pool(2, CACHE)) == 24 and len(world.rows(2, "comparisons")) == 16
    assert {row["origin"] for row in map(vars, world.pool(2, TRAIN))} <= set(range(8))


class Stopping(CompletionStore):
    """A store that fails after `room` completions."""

    room = 0

    def add(self, written, provenance):
        if len(self) >= self.room:
            raise RunFailed("No room is left.")
        super().add(written, provenance)


@pytest.mark.parametrize("room", [6, 14, 28, 37], ids=["student", "referee", "new", "answers"])
def test_an_interrupted_round_continues_without_repeating_requests(world, endpoint, room, monkeypatch):
    world.round(0)
    endpoint.requests.clear()
    monkeypatch.setattr(Stopping, "room", room)
    with pytest.raises(RunFailed, match="No room is left"):
        world.round(1, opening=Stopping, in_flight=1)
    assert len(endpoint.requests) == room + 1  # the last completion was not stored
    world.round(1)
    asked = [(each.prompt, each.body["seed"], each.body["model"]) for each in endpoint.requests]
    assert len(set(asked)) == len(asked) - 1
    interrupted = (world.rows(1), world.rows(1, "rejected"), world.pool(1, CACHE))
    world.folder = world.folder / "whole"
    world.round(0, in_flight=2)
    endpoint.requests.clear()
    world.round(1, in_flight=3)
    assert (world.rows(1), world.rows(1, "rejected"), world.pool(1, CACHE)) == interrupted
    assert len(endpoint.requests) == len(set(asked))


def test_another_seed_gives_other_instructions(world):
    world.round(0)
    world.round(1)
    once = {row["prompt"] for row in world.rows(1)}
    world.folder = world.folder / "other"
    world.round(0, seed=1)
    world.round(1, seed=1)
    assert not once & {row["prompt"] for row in world.rows(1)}


def respond_without_scores(body) -> bytes:
    return completion(body, "Both are nice.") if "[Answer A]" in prompt_of(body) else respond(body)


def test_a_referee_without_scores_is_detected_before_training(world, endpoint):
    endpoint.answer = respond_without_scores
    with pytest.raises(RunFailed, match=r"in 4 test comparisons .* no two scores: 'Both are nice\.'.*referee_template"):
        world.round(0)
    endpoint.requests.clear()
    endpoint.answer = respond
    world.round(0, referee_template="{instruction}? [Answer A]\n{first}\n\n[Answer B]\n{second}\n\n[End")
    assert len(endpoint.requests) == 4 and {each.prompt[-4:] for each in endpoint.requests} == {"[End"}


def test_a_referee_without_scores_in_a_later_round_is_queried_twice_and_reported(world, endpoint):
    world.round(0)
    endpoint.requests.clear()
    endpoint.answer = respond_without_scores
    with pytest.raises(RunFailed, match=r"None of the cache pool's 8 instructions could be compared .*nice"):
        world.round(1)
    judged = [(each.prompt, each.body["seed"]) for each in endpoint.requests if "[Answer A]" in each.prompt]
    assert len(judged) == len(set(judged)) == 8 * 2 * 2
    assert {each["kind"] for each in world.rows(1, "comparisons")} == {"unscored"}


def test_an_instruction_without_scores_is_neither_hard_nor_easy_and_stays_in_the_cache_pool(world, endpoint):
    silent = GIVEN[0]

    def sometimes(body):
        prompt = prompt_of(body)
        if "[Answer A]\ngood" in prompt and silent in prompt:
            return completion(body, "They differ.")
        if "[Answer A]" in prompt and prompt not in once:
            once.add(prompt)
            return completion(body, "Let me see.")
        return respond(body)

    once = set()
    world.round(0)
    endpoint.answer = sometimes
    statistics = figures(world.round(1, in_flight=1))
    (unscored,) = [each for each in world.rows(1, "comparisons") if each["kind"] == "unscored"]
    assert unscored["instruction"] == silent and unscored["scores_student_first"] is not None
    assert "no two scores: 'They differ.'" in unscored["reason"]
    assert statistics["judgements without scores"] == 1 / 16
    assert silent not in {row["made_from"] for row in world.rows(1)}
    assert silent in {each.instruction for each in world.pool(1, CACHE)}


def test_a_teacher_that_repeats_itself_ends_the_generation(world, endpoint):
    def repeat(body):
        if "Write only the new prompt" in prompt_of(body):
            return completion(body, "Describe the weather of the northern coast.")
        return respond(body)

    world.round(0)
    endpoint.answer = repeat
    summary = world.round(1)
    statistics = figures(summary)
    assert summary["kept"] == 1 and statistics["new from hard ones"] == 1 and statistics["new from easy ones"] == 0
    assert statistics["left out: rouge"] == 6 * 4 + 5 * 4 - 1 == summary["rejected"]["rouge"]
    assert len(world.pool(1, CACHE)) == 9
    endpoint.answer = repeat
    with pytest.raises(RunFailed, match="rouge"):  # none is new in the next round
        world.round(2)


@pytest.mark.parametrize(("given", "kinds"), [("much", {"hard"}), ("little", {"easy"})])
def test_a_pool_of_one_instruction_is_enough(world, given, kinds):
    given = [f"Tell {given} of everything"]
    world.round(0, given)
    statistics = figures(world.round(1, given, instructions=3))
    assert {row["kind"] for row in world.rows(1)} == kinds
    assert (statistics["train pool"], statistics["cache pool"]) == (3, 4)


@pytest.mark.parametrize(("easy", "kinds"), [(0, ["hard"] * 4), (2, ["hard", "easy"] * 2 + ["hard"] * 2)])
def test_easy_instructions_sets_the_number_generated_from_easy_ones(world, endpoint, easy, kinds):
    world.round(0)
    endpoint.requests.clear()
    statistics = figures(world.round(1, easy_instructions=easy))
    assert [row["kind"] for row in world.rows(1)] == kinds
    assert (statistics["new from hard ones"], statistics["new from easy ones"]) == (4, easy)
    rarer = [each for each in endpoint.requests if "rarer" in each.prompt]
    assert bool(rarer) == bool(easy)


def test_a_round_without_hard_instructions_and_with_easy_instructions_0_fails(world):
    given = ["Tell little of everything"]
    world.round(0, given)
    with pytest.raises(RunFailed, match=r"No .* cache pool's 1 is hard .* in round 2.*easy_instructions"):
        world.round(1, given, easy_instructions=0)


def test_each_rule_rejects_its_instructions(world, endpoint):
    bad = {
        "keywords": "Write an instruction about rivers", "length": "Only three words", "cut": "Tell me all that",
        "beginning": "-- of rivers and lakes and seas", "rouge": GIVEN[0], "unanswered": "",
    }  # fmt: skip
    left = list(bad)

    def misbehave(body):
        if "Write only the new prompt" not in prompt_of(body) or not left:
            return respond(body)
        rule = left.pop()
        if rule == "unanswered":
            endpoint.replies[prompt_of(body)] = [Reply(body=b"{")]
            return b"{"
        return completion(body, bad[rule], **({"finish_reason": "length"} if rule == "cut" else {}))

    world.round(0)
    endpoint.answer = misbehave
    summary = world.round(1, in_flight=1)
    assert {rule: summary["rejected"].get(rule) for rule in bad} == dict.fromkeys(bad, 1)
    assert summary["kept"] == 8


def test_an_unanswered_instruction_is_requested_again_before_the_comparison(world, endpoint):
    endpoint.replies[GIVEN[0]] = [Reply(body=b"{")] * 2
    assert world.round(0)["unanswered"] == 1
    assert world.pool(0, CACHE)[0].answer is None
    endpoint.requests.clear()
    world.round(1)
    assert [each.body["model"] for each in endpoint.requests_for(GIVEN[0])].count("parrot-1") == 1
    assert world.rows(1, "comparisons")[0]["kind"] == "hard"


def test_a_refused_instruction_is_not_requested_in_every_round(world, endpoint):
    endpoint.replies[GIVEN[0]] = [Reply(400, b'{"error": {"message": "too rude"}}')] * 9
    summary = world.round(0, in_flight=1)
    assert (summary["unanswered"], summary["refused"], summary["rejected"]["refused"]) == (0, 1, 1)
    for number in (1, 2):
        world.round(number, in_flight=1)
        assert world.rows(number, "comparisons")[0]["reason"] == "refused by the teacher: 400: too rude"
    assert [each.body["model"] for each in endpoint.requests_for(GIVEN[0])].count("parrot-1") == 2


def test_a_request_that_succeeds_later_changes_no_other(world, endpoint):
    """One of four requests for new instructions fails; the instruction requested instead is then not needed."""
    world.round(0)
    failed = []

    def fail_once(body):
        if "Write only the new prompt" in prompt_of(body) and not failed:
            failed.append(prompt_of(body))
            endpoint.replies[prompt_of(body)] = [Reply(body=b"{")]
            return b"{"
        return respond(body)

    endpoint.answer = fail_once
    assert world.round(1, in_flight=1)["unanswered"] == 1
    before = {row["prompt"]: row["completion"] for row in world.rows(1)}
    endpoint.requests.clear()
    assert world.round(1)["unanswered"] == 0
    assert len(endpoint.requests) == 2  # the instruction and its completion
    after = {row["prompt"]: row["completion"] for row in world.rows(1)}
    assert len(after) == len(before) == 8 and len(after.items() & before.items()) == 7


def test_base_models_continue_the_prompt(world, endpoint):
    def go_on(body):
        prompt = prompt_of(body)
        if prompt.endswith("Score of A:"):
            return completion(body, " 9\nScore of B: 4\n\n[Request]\nAnother one")
        if prompt.endswith("New prompt:"):
            words = random.Random(body["seed"]).sample(WORDS, 4)
            return completion(body, f" Say all of {' and '.join(words)}\nGiven prompt: More")
        return respond(body)

    world.teacher, world.student = world.student, world.teacher
    endpoint.answer = go_on
    world.round(0)
    statistics = figures(world.round(1))
    assert statistics["judgements without scores"] == 0 and statistics["the order of the answers decides"] == 1.0
    assert all(re.fullmatch(r"Say all of \w+ and \w+ and \w+ and \w+", row["prompt"]) for row in world.rows(1))
    assert {row["kind"] for row in world.rows(1)} == {"easy"}  # the first answer always scores 9


def test_a_damaged_pool_is_reported(world):
    world.round(0)
    (world.folder / "round-0" / "cache_pool.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunFailed, match=r"cache_pool\.parquet' of the previous round cannot be read"):
        world.round(1)


def completions(folder):
    parts = (folder / "synthesis" / "completions").glob("part-*.parquet")
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


@pytest.mark.long
def test_two_rounds_in_one_run_each_use_the_previous_student(
    tmp_path, tiny_student, chat_teacher, plain_teacher, endpoint
):
    """A separate referee is queried for scores only."""

    def without_ideas(body):
        return b"{" if "Write only the new prompt" in prompt_of(body) else respond(body)

    values = settings(tmp_path, tiny_student, "supervised", steps=2)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in GIVEN))
    values |= {
        "rounds": 2, "teachers": [{"name": name, "attach": True} for name in ("parrot", "scribbler")],
        "data": {"train": {"path": str(tmp_path / "prompts.jsonl")}},
        "synthesis": {
            "kind": "adversarial", "instructions": 3, "sampling": {"max_new_tokens": 8}, "referee": "scribbler",
            "student": {"resources": {"num_cpus": 0.25}},
        },
    }  # fmt: skip
    endpoint.answer = without_ideas
    with pytest.raises(RunFailed, match="unanswered"):
        distill(parse_config(values))
    second = tmp_path / "run" / "rounds" / "02"
    by_referee = [each.body["model"] == "scribbler-1" for each in endpoint.requests]
    assert by_referee == ["[Answer A]" in each.prompt for each in endpoint.requests]
    assert sum(by_referee) == 4 + 2 * len(GIVEN)
    before = {row["key"]: row for row in completions(second)}
    assert {row["model"] for row in before.values() if row["teacher"] == "referee"} == {"scribbler-1"}
    assert sorted(row["prompt"] for row in before.values() if row["teacher"] == "student") == sorted(GIVEN)
    endpoint.requests.clear()
    endpoint.answer = respond
    result = distill(parse_config(values), resume=True)
    assert [each["rows"]["train"] for each in result.summary["rounds"]] == [len(GIVEN), 3]
    assert all("Write only" in each.prompt or each.prompt.startswith("Tell much of") for each in endpoint.requests)
    after = {row["key"]: row for row in completions(second)}
    assert {key: after[key] for key in before} == before
    compared = pq.read_table(second / "synthesis" / "comparisons.parquet").to_pylist()
    assert {each["kind"] for each in compared} == {"hard"}
    said = {row["prompt"]: row["text"].rstrip() for row in after.values() if row["teacher"] == "student"}
    assert {each["instruction"]: each["student_answer"] for each in compared} == said
    assert len(read_pool(second / "synthesis", CACHE)) == len(GIVEN) + 3
    assert "hard instructions" in (second / "report.html").read_text()
    endpoint.requests.clear()
    distill(parse_config(values), resume=True)
    assert not endpoint.requests
