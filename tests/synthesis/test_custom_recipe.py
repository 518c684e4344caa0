"""A user's recipe in one file generates training rows, and one sentence says what is wrong with it."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import yaml

from rayk.config import CustomSynthesisConfig
from rayk.errors import InputError
from rayk.synthesis import find_recipe, synthesize_rows
from rayk.text import build_filters
from tests.engines.endpoint import Reply, completion, prompt_of
from tests.runs import run_rayk, settings
from tests.synthesis.helpers import prompts_of

RECIPE = Path(__file__).with_name("shortest.py")
BROKEN = """
from rayk.synthesis import Candidate, PromptGeneratingRecipe, Recipe
from rayk.synthesis.store import StoredCompletion

RESPONSE = StoredCompletion("key", "text", 1, None, "stop")

class Empty(Recipe):
    pass

class Own(PromptGeneratingRecipe):
    async def candidates(self):
        yield Candidate("made up", "completion", 0, (RESPONSE,))

class Yields(Recipe):
    async def candidates(self):
        yield eval(self.settings.options["value"])

class Fails(Recipe):
    async def generate(self, index, prompt):
        return self.settings.options["samples"]

class NoRecipe:
    pass
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder with the user's modules, in which rayk is started."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(RECIPE, tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN)
    yield tmp_path
    for name in ("shortest", "broken"):
        sys.modules.pop(name, None)


def test_the_tested_recipe_is_the_one_in_contributing():
    page = Path(__file__).parents[2].joinpath("CONTRIBUTING.md").read_text(encoding="utf-8")
    assert RECIPE.read_text(encoding="utf-8") in page


def config_of(path, **changed):
    return CustomSynthesisConfig(path=path, **changed)


@pytest.mark.parametrize(
    ("path", "changed", "message"),
    [
        ("absent:Recipe", {}, "^synthesis.path: module 'absent' cannot be imported"),
        ("broken:Absent", {}, "module 'broken' has no class 'Absent'"),
        ("broken:NoRecipe", {}, "'broken:NoRecipe' is not a subclass of rayk.Recipe"),
        ("broken:Empty", {}, "recipe 'broken:Empty' generates nothing; define its method 'generate'"),
        ("broken:Yields", {"own_prompts": True}, "own_prompts is true, but recipe 'broken:Yields' is not derived from"),
        ("broken:Own", {}, "own_prompts is false, but recipe 'broken:Own' is derived from rayk.synthesis.Prompt"),
        ("unknown", {}, "registers 'unknown' as entry point in group 'rayk.recipes'"),
    ],
)
def test_a_recipe_that_cannot_be_loaded_is_named(path, changed, message):
    with pytest.raises(InputError, match=message):
        find_recipe(config_of(path, **changed))


def run_recipe(teacher, store, path, prompts, **changed):
    config = config_of(path, **changed)
    return synthesize_rows(config, prompts, teacher, store, build_filters(config.filters))


def rows_of(folder, name="rows"):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def counting(body):
    """An endpoint whose completions of a prompt differ in length by seed."""
    return completion(body, "x" * (1 + body["seed"] % 7) + prompt_of(body))


@pytest.mark.cluster
def test_a_recipe_in_one_file_generates_rows_that_keep_the_fields_of_their_source(chat_teacher, endpoint, store):
    endpoint.answer = counting
    endpoint.replies["b"] = [Reply(400, b'{"error": {"message": "too rude"}}')] * 3
    prompts = prompts_of("a", "b", "c", hint="look", domain="math")
    summary = run_recipe(chat_teacher, store, "shortest:Shortest", prompts, options={"samples": 3}, in_flight=1)
    rows, rejected = rows_of(store.folder), rows_of(store.folder, "rejected")
    assert [(row["prompt"], row["hint"], row["domain"]) for row in rows] == [(p, "look", "math") for p in "ac"]
    assert all(row["characters"] == len(row["completion"]) for row in rows)
    for row in rows:
        others = [each for each in rejected if each["prompt"] == row["prompt"]]
        assert all(each["characters"] >= row["characters"] for each in others) and len(others) == 2
    assert summary["rejected"] == {"truncated": 0, "not_shortest": 4, "refused": 3}
    assert (summary["kind"], summary["about"]) == ("custom", "the shortest of several completions of each prompt")
    num_requests = len(endpoint.requests)
    run_recipe(chat_teacher, store, "shortest:Shortest", prompts, options={"samples": 3}, in_flight=1)
    assert (len(endpoint.requests), rows_of(store.folder)) == (num_requests, rows)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("'text'", "candidate 1 is a str; yield rayk.synthesis.Candidate objects"),
        ("Candidate(' ', 'c', 0, (RESPONSE,))", "candidate 1 has no prompt; give one as text, or reject"),
        ("Candidate('p', '', 0, (RESPONSE,))", "candidate 1 has no completion; give one as text, or reject"),
        ("Candidate('p', None, 0, (RESPONSE,))", "candidate 1 has no completion"),
        ("Candidate('p', 'c', 1, (RESPONSE,))", "has prompt_index 1; give the index of one of the 1 prompts"),
        ("Candidate('p', 'c', 0, ())", "has no responses; give the completions that it was made from"),
        ("Candidate('p', 'c', 0, (RESPONSE,), worse='w')", "has a worse completion; set synthesis.pairs: true"),
    ],
)
def test_a_candidate_that_cannot_become_a_row_is_named(chat_teacher, endpoint, store, value, message):
    with pytest.raises(InputError, match="^Recipe 'broken:Yields': candidate 1 ") as caught:
        run_recipe(chat_teacher, store, "broken:Yields", prompts_of("a"), options={"value": value})
    assert message in str(caught.value)


@pytest.mark.cluster
def test_pairs_need_a_worse_completion_and_errors_name_the_line(chat_teacher, endpoint, store):
    value = "Candidate('p', 'c', 0, (RESPONSE,))"
    with pytest.raises(InputError, match="candidate 1 has no worse completion; give one as text"):
        run_recipe(chat_teacher, store, "broken:Yields", prompts_of("a"), options={"value": value}, pairs=True)
    with pytest.raises(InputError, match=r"'broken:Fails' failed with KeyError: 'samples' \(broken.py, line \d+\)"):
        run_recipe(chat_teacher, store, "broken:Fails", prompts_of("a"))


@pytest.mark.cluster
def test_a_recipe_may_generate_its_own_prompts(chat_teacher, endpoint, store):
    recipe = find_recipe(config_of("broken:Own", own_prompts=True))
    prompts = recipe.seed_prompts(config_of("broken:Own", own_prompts=True))
    assert run_recipe(chat_teacher, store, "broken:Own", prompts, own_prompts=True)["prompts"] == 0
    assert [row["prompt"] for row in rows_of(store.folder)] == ["made up"]


@pytest.mark.cluster
@pytest.mark.long
def test_the_commands_run_a_recipe_in_the_current_folder(folder, tiny_student, chat_teacher, endpoint):
    endpoint.answer = counting
    values = settings(folder, tiny_student, "supervised", steps=2)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?", "hint": n}) + "\n" for n in range(8)))
    values |= {
        "teachers": [{"name": "parrot", "attach": True}],
        "data": {"train": {"path": str(folder / "rows.jsonl")}},
        "synthesis": {"kind": "custom", "path": "shortest:Shortest", "options": {"samples": 2}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    address = ray.get_runtime_context().gcs_address
    for command in ("synthesize", "run"):
        done = run_rayk(command, folder / "run.yaml", RAY_ADDRESS=address)
        assert done.returncode == 0, done.stderr
        assert len(endpoint.requests) == 16
    rows = rows_of(Path(values["output"]) / "synthesis")
    assert [(row["prompt"], row["hint"]) for row in rows] == [(f"{n}?", n) for n in range(8)]
