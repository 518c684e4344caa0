"""A chat model generates instructions from the beginning of a user's turn, and responds to those that pass."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayk.config import MagpieConfig, parse_config
from rayk.engines.base import SamplingParameters
from rayk.errors import InputError, RunFailed
from rayk.run import distill, synthesize
from rayk.run.synthesis_inputs import read_synthesis_prompts
from rayk.serving.event_loop import run_until_complete
from rayk.synthesis import synthesize_rows
from rayk.synthesis.magpie import Magpie
from rayk.text import build_filters
from tests.engines.endpoint import Reply, completion
from tests.runs import settings
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cluster

BEGUN = "<|user|>\n"


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """The tokenizer of the model behind the endpoint, which adds BOS to every text."""
    folder = tmp_path_factory.mktemp("template")
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_recipe(teacher, store, seed=0, **changed):
    given = MagpieConfig(**({"instructions": 12} | changed))
    return synthesize_rows(given, Magpie.seed_prompts(given), teacher, store, build_filters(given.filters), seed=seed)


def rows(store, name="rows"):
    return pq.read_table(store.folder / f"{name}.parquet").to_pylist()


def user_and_assistant(instructions, **whole):
    """Respond as a chat model behind plain completions: as the user with the next of `instructions`."""
    said = list(instructions)

    def answer(body):
        if body["prompt"].endswith(BEGUN):
            return completion(body, said.pop(0), **whole)
        asked = body["prompt"].removeprefix(BEGUN).removesuffix("<|end|>\n<|assistant|>\n")
        return completion(body, f"On {asked}:{' well' * len(asked)}")

    return answer


def test_a_model_generates_instructions_and_then_responds_to_them(served, store):
    # A model with random weights rarely ends its turn; letters end it sooner.
    sampling = {"max_new_tokens": 24, "stop": ["a", "e", "n", "s"]}
    given = {"sampling": sampling, "responses": sampling, "instruction_filters": [], "filters": []}
    summary = run_recipe(served, store, 3, **given)
    kept, rejected = rows(store), rows(store, "rejected")
    assert summary["kept"] == len(kept) > 0
    assert {row["rejected_by"] for row in rejected} <= {"empty", "unfinished", "role_word", "duplicate"}
    parts = (store.folder / "completions").glob("*.parquet")
    sent = {row["key"]: row for part in parts for row in pq.read_table(part).to_pylist()}
    for row in kept:
        response = sent[row["keys"][0]]
        assert response["prompt"] == f"{BEGUN}{row['prompt']}<|end|>\n<|assistant|>\n"
    first = [row for row in sent.values() if row["prompt"] == BEGUN]
    assert len(first) == 12 and len({row["seed"] for row in first}) == 12
    ids = np.asarray(tiny_tokenizer()(BEGUN, add_special_tokens=False)["input_ids"])
    drawing = SamplingParameters(24, 1.0, stop=("<|end|>", "assistant", *sampling["stop"]))
    expected = run_until_complete(served.agenerate([ids] * 12, drawing, [row["seed"] for row in first]))
    assert [row["text"] for row in first] == [each.text for each in expected]
    before = len(store)
    run_recipe(served, store, 3, **given)
    assert (len(store), rows(store)) == (before, kept)


def test_an_endpoint_is_sent_the_template_without_the_prefix_that_it_adds(plain_teacher, endpoint, store, template):
    endpoint.answer = user_and_assistant([" What is the tide? ", "Who was Ada Lovelace?"])
    run_recipe(plain_teacher, store, instructions=2, in_flight=1, tokenizer=template)
    first, *_, last = endpoint.requests
    assert (first.path, first.prompt) == ("/v1/completions", BEGUN)
    assert (first.body["temperature"], first.body["top_p"], first.body["max_tokens"]) == (1.0, 1.0, 2048)
    assert first.body["stop"] == ["<|end|>", "assistant"]
    assert last.prompt == f"{BEGUN}Who was Ada Lovelace?<|end|>\n<|assistant|>\n"
    assert (last.body["temperature"], last.body["max_tokens"], last.body["stop"]) == (0.0, 4096, ["<|end|>"])
    assert [row["prompt"] for row in rows(store)] == ["What is the tide?", "Who was Ada Lovelace?"]


def test_only_instructions_that_pass_the_filters_get_responses(plain_teacher, endpoint, store, template):
    said = [
        "What is the tide of the sea?", "Hi", "Translate the following text:", "What is the tide of the sea ?", " ",
        "Write an ad for a virtual ", "How do bees find home?", "Why is the sky blue?assistant\n\nIt",
    ]  # fmt: skip
    endpoint.answer = user_and_assistant(said)
    endpoint.replies[BEGUN] = [Reply(), Reply(400, b'{"error": {"message": "no"}}')]
    summary = run_recipe(plain_teacher, store, instructions=9, in_flight=1, tokenizer=template)
    assert [row["prompt"] for row in rows(store)] == [said[0], said[6], "Why is the sky blue?"]
    assert {row["rejected_by"]: (row["prompt"], row["reason"]) for row in rows(store, "rejected")} == {
        "refused": ("", "400: no"),
        "instruction length": ("Hi", "has 1 of at least 3 words"),
        "instruction ending": ("Translate the following text:", "ends with ':'"),
        "instruction near_duplicates": (said[3], f"is a near-duplicate (1.00) of {said[0]!r}"),
        "empty": ("", "the teacher generated no text"),
        "role_word": ("Write an ad for a virtual", "the instruction breaks off before 'assistant' within a line"),
    }
    assert len(endpoint.requests) == 9 + 3
    assert summary["figures"][0] == {"name": "instructions that could be used", "value": 3 / 8, "share": True}


def test_a_truncated_instruction_gets_no_response(plain_teacher, endpoint, store, template):
    endpoint.answer = user_and_assistant(["What is the tide of"] * 2, finish_reason="length")
    with pytest.raises(RunFailed, match="2 unfinished, the first: the instruction was truncated at synthesis.samp"):
        run_recipe(plain_teacher, store, instructions=2, tokenizer=template)
    assert len(endpoint.requests) == 2


def test_an_instruction_followed_by_more_text_than_its_end_is_complete(plain_teacher, endpoint, store, template):
    endpoint.answer = user_and_assistant(["What is the tide?<|end|>\n<|assistant|>\nThe"], finish_reason="length")
    run_recipe(plain_teacher, store, instructions=1, tokenizer=template)
    assert [row["prompt"] for row in rows(store)] == ["What is the tide?"]


def test_the_longest_responses_are_kept_and_stored_ones_reused(plain_teacher, endpoint, store, template):
    subjects = ["tides", "bees", "volcanoes", "ink", "glaciers", "moss"]
    endpoint.answer = user_and_assistant([f"Tell me about {subject}." for subject in subjects])
    given = {"tokenizer": template, "in_flight": 1}
    run_recipe(plain_teacher, store, instructions=4, **given)
    few = rows(store)
    asked = len(endpoint.requests)
    run_recipe(plain_teacher, store, instructions=6, **given)
    assert len(endpoint.requests) == asked + 4
    assert rows(store)[:4] == few
    summary = run_recipe(plain_teacher, store, instructions=6, keep_longest=2, **given)
    assert [row["prompt"] for row in rows(store)] == ["Tell me about volcanoes.", "Tell me about glaciers."]
    assert summary["rejected"]["not_longest"] == 4
    run_recipe(
        plain_teacher, store, instructions=6, instruction_filters=[{"kind": "keywords", "keywords": ["bees"]}], **given
    )
    assert len(rows(store)) == 5
    assert len(endpoint.requests) == asked + 4


def test_system_prompt_and_stop_at_newline(plain_teacher, endpoint, store, template):
    answer = user_and_assistant(["What is an opening?"])
    endpoint.answer = answer
    run_recipe(
        plain_teacher,
        store,
        instructions=1,
        tokenizer=template,
        system="On chess.",
        stop_at_newline=True,
        role_words=[],
    )
    first, last = endpoint.requests
    assert first.prompt == f"<|system|>\nOn chess.<|end|>\n{BEGUN}"
    assert first.body["stop"] == ["<|end|>", "\n"]
    assert last.prompt.startswith(BEGUN)


def test_an_endpoint_with_a_chat_template_is_refused_by_name(chat_teacher, plain_teacher, endpoint, store, template):
    for teacher, tokenizer in ((chat_teacher, template), (plain_teacher, None)):
        with pytest.raises(InputError, match="set engine.chat: false and synthesis.tokenizer"):
            run_recipe(teacher, store, tokenizer=tokenizer)


def test_a_missing_template_is_reported_before_anything_starts(tmp_path, tiny_student):
    tiny_model(tmp_path / "base", tokenizer=tiny_tokenizer(chat_template=None))
    values = settings(tmp_path, tiny_student, "supervised", steps=2)
    teacher = {"name": "base", "model": str(tmp_path / "base")}
    values |= {"teachers": [teacher], "data": {}, "synthesis": {"kind": "magpie"}}
    with pytest.raises(InputError, match="teacher 'base' has no chat template in its tokenizer, which magpie requires"):
        read_synthesis_prompts(parse_config(values))
    values["synthesis"] |= {"tokenizer": tiny_student}
    assert read_synthesis_prompts(parse_config(values))


def test_magpie_in_a_whole_run(tmp_path, tiny_student, plain_teacher, endpoint, template):
    endpoint.answer = user_and_assistant(f"Tell me about number {n}." for n in range(8))
    values = settings(tmp_path, tiny_student, "supervised", steps=2)
    synthesis = {"kind": "magpie", "instructions": 8, "instruction_filters": [], "tokenizer": template}
    values |= {"teachers": [{"name": "scribbler", "attach": True}], "data": {}, "synthesis": synthesis}
    result = distill(parse_config(values))
    assert result.summary["rows"]["train"] == 8
    page = (result.output / "report.html").read_text()
    assert "instructions that could be used" in page
    asked = len(endpoint.requests)
    assert synthesize(parse_config(values))["kept"] == 8
    assert len(endpoint.requests) == asked
