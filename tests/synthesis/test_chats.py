"""Conversations and thoughts: what teachers are asked, and which rows are written."""

import json

import pyarrow.parquet as pq
import pytest

from rayk.config import (
    AdversarialConfig,
    ChainOfThoughtConfig,
    PreferencesConfig,
    ResponsesConfig,
    TeacherConfig,
    parse_config,
)
from rayk.data.chat_template import ChatTemplate
from rayk.data.sources import read_rows
from rayk.data.tokenizing import tokenize
from rayk.errors import InputError
from rayk.models import load_tokenizer
from rayk.run import synthesize
from rayk.run.synthesis_inputs import read_synthesis_prompts, with_synthesized_rows
from rayk.synthesis import Prompt, RecipeContext, synthesize_rows
from rayk.synthesis.adversarial import Adversarial
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.prompt_format import PromptFormat
from rayk.synthesis.prompts import transcript
from rayk.teachers import serve_teacher
from rayk.text import build_filters
from tests.engines.endpoint import completion
from tests.runs import settings
from tests.synthesis.helpers import prompts_of
from tests.teachers.helpers import teacher_config
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "2 + 2?"},
]
TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}"


def chat_prompt(*messages, truth=None, **fields):
    messages = messages or tuple(CHAT)
    return Prompt(transcript(messages), "rows.jsonl, line 1", {"messages": list(messages), **fields}, truth, messages)


def run_recipe(given, teacher, store, prompts, **context):
    filters = build_filters(given.filters)
    return synthesize_rows(given, prompts, teacher, store, filters, context=RecipeContext(**context))


def rows(store, name="rows"):
    return pq.read_table(store.folder / f"{name}.parquet").to_pylist()


@pytest.mark.cluster
def test_an_endpoint_reads_the_whole_conversation_and_rows_stay_messages(chat_teacher, endpoint, store):
    endpoint.answer = lambda body: completion(body, "4")
    prompts = [chat_prompt(domain="math"), chat_prompt(CHAT[1], domain="talk")]
    run_recipe(ResponsesConfig(), chat_teacher, store, prompts)
    assert sorted((each.body["messages"] for each in endpoint.requests), key=len) == [CHAT[1:2], CHAT]
    answer = {"role": "assistant", "content": "4"}
    assert [(row["messages"], row["domain"]) for row in rows(store)] == [
        ([*CHAT, answer], "math"), ([CHAT[1], answer], "talk")
    ]  # fmt: skip


@pytest.mark.cluster
def test_equal_last_messages_of_other_conversations_are_no_duplicates(chat_teacher, endpoint, store):
    endpoint.answer = lambda body: completion(body, "Yes.")
    prompts = [chat_prompt(CHAT[1], CHAT[2], {"role": "user", "content": each}, CHAT[3]) for each in ("a", "b", "a")]
    summary = run_recipe(ResponsesConfig(), chat_teacher, store, prompts)
    assert (summary["kept"], summary["rejected"]["duplicate"]) == (2, 1)


@pytest.mark.cluster
def test_plain_completions_refuse_a_conversation(plain_teacher, endpoint, store):
    with pytest.raises(InputError, match="A prompt with 4 messages can only be sent in a chat template"):
        run_recipe(ResponsesConfig(), plain_teacher, store, [chat_prompt()])


@pytest.mark.cluster
def test_the_last_message_of_a_conversation_is_the_question_of_a_chain_of_thought(chat_teacher, endpoint, store):
    endpoint.answer = lambda body: completion(body, "4." if "Therefore" in str(body) else "Two and two.")
    given = ChainOfThoughtConfig(answer={"type": "number"})
    run_recipe(given, chat_teacher, store, [chat_prompt(truth="4")])
    first, second = (each.body["messages"] for each in endpoint.requests)
    assert first[:3] == second[:3] == CHAT[:3]
    assert first[3]["content"] == "Q: 2 + 2?\nA: Let's think step by step."
    assert second[3]["content"].endswith("Let's think step by step. Two and two.\nTherefore, the answer is")
    assert rows(store)[0]["messages"][3:] == [
        {"role": "user", "content": "2 + 2? ###"}, {"role": "assistant", "content": " Two and two. --> 4"}
    ]  # fmt: skip


@pytest.mark.cluster
def test_pairs_of_a_conversation_have_messages(chat_teacher, endpoint, store):
    endpoint.answer = lambda body: completion(body, "5" if body["temperature"] == 0.3 else "4")
    given = PreferencesConfig(student_sampling={"max_new_tokens": 32, "temperature": 0.3})
    run_recipe(given, chat_teacher, store, [chat_prompt()], student=chat_teacher)
    (row,) = rows(store)
    assert (row["prompt"], row["chosen"]) == (CHAT, [{"role": "assistant", "content": "4"}])
    assert row["rejected"] == [{"role": "assistant", "content": "5"}]


def test_adversarial_instructions_come_from_single_ones():
    Adversarial.check_prompts([chat_prompt(CHAT[1]), *prompts_of("a")])
    with pytest.raises(InputError, match="line 1 has 4 messages before its last answer, but synthesis 'adversarial'"):
        Adversarial.check_prompts([chat_prompt()])
    assert AdversarialConfig().prefers_chat


@pytest.mark.cluster
def test_answers_are_read_without_thoughts(chat_teacher, endpoint, store):
    def answer(body):
        prompt = body["messages"][0]["content"]
        if prompt.startswith("Rate"):
            return completion(body, "It may be Score: 1. Hm.</think>Score: 5")
        cut = prompt == "long"
        text = "<think>\nPerhaps 5? I cannot help you with that." + ("" if cut else "\n</think>\n\nIt is 4.")
        return completion(body, text, finish_reason="length" if cut else "stop")

    endpoint.answer = answer
    filters = [{"kind": "truncated"}, {"kind": "refusal"}, {"kind": "judge", "template": "Rate {completion}"}]
    prompts = prompts_of("short", "long")
    summary = run_recipe(ResponsesConfig(filters=filters), chat_teacher, store, prompts)
    assert [row["completion"] for row in rows(store)] == ["It is 4."]
    assert [each.prompt for each in endpoint.requests if each.prompt.startswith("Rate")] == ["Rate It is 4."]
    (cut,) = rows(store, "rejected")
    assert (cut["rejected_by"], cut["completion"]) == ("truncated", "")
    assert cut["reason"].startswith("ends inside the model's thought; allow more tokens")
    num_requests = len(endpoint.requests)
    run_recipe(ResponsesConfig(filters=filters, thoughts="keep"), chat_teacher, store, prompts)
    kept = "<think>\nPerhaps 5? I cannot help you with that.\n</think>\n\nIt is 4."
    assert [row["completion"] for row in rows(store)] == [kept]
    assert len(endpoint.requests) == num_requests  # the store contains both
    assert summary["kept"] == 1


@pytest.mark.parametrize("kind", ["chain_of_thought", "self_instruct"])
def test_composed_rows_keep_no_thoughts(kind):
    with pytest.raises(InputError, match="thoughts: synthesis .* composes its rows from parts of several replies"):
        parse_config({
            "teachers": [{"model": "m"}], "student": {"model": "m"}, "method": {"kind": "supervised"},
            "synthesis": {"kind": kind, "thoughts": "keep"},
        })  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "changed", "problem"),
    [
        ({"engine": {"kind": "openai"}}, {"synthesis": {"kind": "responses"}}, "set engine.extra_body: {chat_templ"),
        ({}, {}, "generates no training rows"),
    ],
)
def test_template_variables_without_effect_are_refused(teacher, changed, problem):
    teacher = {"model": "m", "chat_template_kwargs": {"enable_thinking": False}} | teacher
    values = {"teachers": [teacher], "student": {"model": "m"}, "method": {"kind": "supervised"}}
    with pytest.raises(InputError) as caught:
        parse_config(values | {"data": {"train": {"path": "p"}}} | changed)
    assert problem in " ".join(str(caught.value).split())


@pytest.fixture(scope="module")
def thinker(ray_cluster, tmp_path_factory):
    """A teacher whose chat template opens a thought, unless `enable_thinking` is false."""
    folder = tmp_path_factory.mktemp("models") / "thinker"
    template = CHAT_TEMPLATE.replace("<|assistant|>\n{% endif", f"<|assistant|>\n{THINKING}{{% endif")
    tiny_model(folder, seed=3, tokenizer=tiny_tokenizer(chat_template=template))
    with serve_teacher(teacher_config("thinker", str(folder))) as teacher:
        yield teacher


@pytest.mark.cluster
def test_the_teachers_template_variables_reach_its_prompts(thinker, store):
    quiet_settings = thinker.settings.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    quiet = type(thinker)(thinker.name, thinker.info, quiet_settings)
    sampling = {"max_new_tokens": 8}
    for teacher, begins_with in ((thinker, "<think>"), (quiet, "<think></think>")):
        prompt = PromptFormat(teacher.info, teacher.settings, chat=True).format(prompts_of("a")[0].request(0, None))
        assert prompt.read == f"<|user|>\na<|end|>\n<|assistant|>\n{begins_with}"
    given = ResponsesConfig(sampling=sampling, filters=[])
    run_recipe(given, quiet, store, prompts_of("a"), student_chats=True)
    (row,) = rows(store)
    assert row["completion"]
    with pytest.raises(Exception, match="ends inside the model's thought"):
        run_recipe(given, thinker, store, prompts_of("a"), student_chats=True)
    assert [row["rejected_by"] for row in rows(store, "rejected")] == ["truncated"]


@pytest.mark.cluster
def test_the_teacher_reads_a_chat_if_the_student_does(thinker, store):
    for chat, prefers, expected in (
        (None, True, True),
        (None, False, False),
        (False, True, False),
        (True, False, True),
    ):
        client = CompletionClient(thinker, store, ResponsesConfig(chat=chat), prefers_chat=prefers)
        assert client.uses_chat is expected


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A model whose chat template prints tools."""
    folder = tmp_path_factory.mktemp("models") / "caller"
    tiny_model(folder, seed=4, tokenizer=tiny_tokenizer(chat_template=TOOLS + CHAT_TEMPLATE))
    return str(folder)


def run_config(tmp_path, student, row, **changed):
    values = settings(tmp_path, student, {"kind": "supervised"})
    values["teachers"] = [{"name": "writer", "model": student}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    values["synthesis"] = {"kind": "responses", "sampling": {"max_new_tokens": 4}, "filters": [], **changed}
    return parse_config(values)


def test_problems_with_chats_are_found_before_the_teacher_writes(tmp_path, tiny_student, caller):
    row = {"messages": CHAT, "tools": [{"name": "add"}]}
    assert read_synthesis_prompts(run_config(tmp_path, caller, row))[0].has_context
    with pytest.raises(InputError, match=r"has 4 messages before .* leave out synthesis.chat: false"):
        read_synthesis_prompts(run_config(tmp_path, caller, row, chat=False))
    with pytest.raises(InputError, match="tools"):
        read_synthesis_prompts(run_config(tmp_path, tiny_student, row))
    config = run_config(tmp_path, caller, row)
    api = TeacherConfig(name="writer", model="m", engine={"kind": "openai"})
    with pytest.raises(InputError, match=r"has tools, but calls of tools by teacher 'writer', an endpoint"):
        read_synthesis_prompts(config.model_copy(update={"teachers": [api]}))
    tiny_model(tmp_path / "base", tokenizer=tiny_tokenizer(chat_template=None))
    with pytest.raises(InputError, match="teacher 'writer' has no chat template"):
        read_synthesis_prompts(run_config(tmp_path, str(tmp_path / "base"), row))


@pytest.mark.parametrize("row", [{"prompt": "2 + 2?"}, {"messages": CHAT}])
def test_the_students_template_is_tried_before_the_teacher_writes(tmp_path, tiny_student, row):
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    for name, template in (("bare", None), ("strict", no_system + CHAT_TEMPLATE)):
        tiny_model(tmp_path / name, tokenizer=tiny_tokenizer(chat_template=template))
    config = run_config(tmp_path, tiny_student, row)
    chat = config.model_copy(update={"data": config.data.model_copy(update={"chat_template": True})})
    for name, problem in (("bare", "chat template"), ("strict", "no system role")):
        student = config.student.model_copy(update={"model": str(tmp_path / name)})
        changed = chat.model_copy(update={"student": student})
        if name == "strict" and "prompt" in row:
            assert read_synthesis_prompts(changed)
        else:
            with pytest.raises(InputError, match=rf"for the student's form of .*rows.jsonl, line 1.*{problem}"):
                read_synthesis_prompts(changed)


@pytest.mark.cluster
def test_written_conversations_are_trained_on_as_chats(tmp_path, ray_cluster, caller):
    schema = {"type": "function", "function": {"name": "add", "parameters": {}}}
    config = run_config(tmp_path, caller, {"messages": CHAT, "tools": [schema], "domain": "math"})
    synthesize(config)
    trained = with_synthesized_rows(config)
    (row,) = read_rows(trained.data.train)
    tokenizer = load_tokenizer(caller)
    (example,) = tokenize(trained.data.train, config.data, tokenizer)
    prompt = ChatTemplate(tokenizer).render(CHAT, "", tools=[schema], add_generation_prompt=True)
    assert tokenizer.decode(example.prompt_ids) == prompt
    assert (row.fields["domain"], row.fields["messages"][:4]) == ("math", CHAT)
