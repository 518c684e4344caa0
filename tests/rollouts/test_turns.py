"""Rollouts of several turns: which ids they have, what is counted, and runs that learn from them."""

import asyncio
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rayk.config import DataConfig, ToolConfig, WorkerRollouts, parse_config
from rayk.data.examples import Example
from rayk.data.text_encoder import TextEncoder
from rayk.errors import InputError
from rayk.rollouts import Tool, ToolPolicy, WorkerPolicy
from rayk.run import distill
from rayk.run.inputs import read_inputs
from tests.runs import curve, metrics, settings
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|end|>")
ENDS = [END, *range(200, 300)]
"""Many end tokens, so that a random model often generates one."""
AFTER = "\n<|tool|>\n{}<|end|>\n<|assistant|>\n"
FUNCTIONS = """
def count(messages, row):
    assert [each["role"] for each in messages[::2]] == ["assistant"] * (len(messages) // 2 + 1)
    assert [each["content"] for each in messages[1::2]] == [str(n) for n in range(1, len(messages) // 2 + 1)]
    return str(len(messages) // 2 + 1)

def echo(messages, row):
    return messages[-1]["content"]

def never(messages, row):
    return None

def once(messages, row):
    return "again" if len(messages) == 1 and int(row["prompt"]) % 2 else None

def long(messages, row):
    return " the cat sat on the mat" * 9

def fails(messages, row):
    return row["nothing"]

def number(messages, row):
    return 4
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "own_tools.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def learner():
    model = tiny_model(seed=3, hidden=16, layers=1, peaked=2.0)
    model.generation_config.eos_token_id = ENDS
    return model.eval()


def make_tool(name, tokenizer=TOKENIZER, **given):
    return Tool(ToolConfig(function=f"own_tools:{name}", **given), DataConfig(chat_template=True), tokenizer)


def make_policy(learner, name=None, **given):
    policy = WorkerPolicy(learner, TOKENIZER, WorkerRollouts(max_new_tokens=8), batch_tokens=10_000)
    return policy if name is None else ToolPolicy(policy, make_tool(name, **given))


def prompts(count=24):
    encoder = TextEncoder(TOKENIZER)
    rows = []
    for number in range(count):
        ids = np.array(encoder.chat_prompt([{"role": "user", "content": f"{number} + 1"}], ""), np.int32)
        rows.append(Example(ids, np.zeros(len(ids), bool), None, len(ids), f"line {number}", {"prompt": str(number)}))
    return rows


def generate(policy, rows=None):
    rows = prompts() if rows is None else rows
    return asyncio.run(policy.generate(rows, policy.parameters, range(len(rows))))


def parts(rollout):
    """Return the ids after the prompt as runs of counted and uncounted ones."""
    ids, counted = rollout.completion_ids, rollout.counted[rollout.prompt_tokens :]
    edges = np.flatnonzero(np.diff(counted.astype(int))) + 1
    return [(bool(counted[at[0]]), ids[at]) for at in np.split(np.arange(len(ids)), edges)]


def test_turns_are_counted_and_answers_are_printed_in_the_template_between_them(learner):
    rollouts = generate(make_policy(learner, "count", max_turns=3))
    assert {rollout.turns for rollout in rollouts} == {1, 2, 3}
    for prompt, rollout in zip(prompts(), rollouts, strict=True):
        assert rollout.prompt_ids.tolist() == prompt.input_ids.tolist()
        found = parts(rollout)
        assert [counted for counted, _ in found] == [True, False] * (rollout.turns - 1) + [True]
        for number, (_, ids) in enumerate(found[1::2], start=1):
            turn_end = found[2 * number - 2][1][-1]
            printed = AFTER.format(number) if turn_end == END else "<|end|>" + AFTER.format(number)
            assert TOKENIZER.decode(ids) == printed
        turns = [ids for counted, ids in found if counted]
        assert all(ids[-1] in ENDS and len(ids) <= 8 for ids in turns[:-1])
        assert rollout.finish_reason == ("stop" if turns[-1][-1] in ENDS else "length")
        assert rollout.turns == 3 or rollout.finish_reason == "length"
        assert rollout.text == TOKENIZER.decode(turns[-1], skip_special_tokens=True)
    assert any(ids[-1] == END for rollout in rollouts for counted, ids in parts(rollout)[:-1] if counted)


def test_log_probs_are_those_of_the_whole_conversation(learner):
    rollouts = generate(make_policy(learner, "count", max_turns=3))
    for rollout in rollouts:
        ids = torch.from_numpy(rollout.input_ids).long()
        with torch.no_grad():
            log_q = learner(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        expected = log_q.gather(1, ids[1:, None])[rollout.counted[1:], 0].numpy()
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5)


def test_first_turns_are_those_of_rollouts_without_a_tool(learner):
    without = generate(make_policy(learner))
    silent, talking = generate(make_policy(learner, "never")), generate(make_policy(learner, "count"))
    assert [row.input_ids.tolist() for row in silent] == [row.input_ids.tolist() for row in without]
    assert [parts(row)[0][1].tolist() for row in talking] == [row.completion_ids.tolist() for row in without]
    repeated = generate(make_policy(learner, "count"))
    assert [row.input_ids.tolist() for row in repeated] == [row.input_ids.tolist() for row in talking]


def test_the_function_reads_the_turns(learner):
    for rollout in generate(make_policy(learner, "echo", max_turns=3)):
        found = [TOKENIZER.decode(ids, skip_special_tokens=True) for _, ids in parts(rollout)]
        for turn, answer in zip(found[::2], found[1::2], strict=False):
            assert answer == AFTER.format(turn).replace("<|end|>", "")


def test_each_turn_has_a_seed_of_its_own(learner, monkeypatch):
    policy, used = make_policy(learner, "count", max_turns=3), []
    whole = WorkerPolicy.generate

    async def watched(self, prompts, parameters, seeds):
        used.append(list(seeds))
        return await whole(self, prompts, parameters, seeds)

    monkeypatch.setattr(WorkerPolicy, "generate", watched)
    generate(policy)
    assert used[0] == list(range(24))
    every = [seed for turn in used for seed in turn]
    assert len(used) == 3 and len(set(every)) == len(every)


def test_the_function_reads_the_row_and_ends_a_rollout(learner):
    for number, rollout in enumerate(generate(make_policy(learner, "once"))):
        first_ended = parts(rollout)[0][1][-1] in ENDS
        assert rollout.turns == (2 if number % 2 and first_ended else 1)


def test_the_end_of_a_long_answer_is_cut_off(learner):
    rollouts = generate(make_policy(learner, "long", max_turns=2, max_answer_tokens=30))
    answers = [ids for rollout in rollouts for counted, ids in parts(rollout) if not counted]
    assert answers and all(25 <= len(ids) <= 30 for ids in answers)
    for ids in answers:
        text = TOKENIZER.decode(ids)
        assert "<|tool|>\n the cat sat on the mat the" in text and text.endswith("<|end|>\n<|assistant|>\n")


@pytest.mark.parametrize("limit", range(21, 30))
def test_no_answer_is_cut_inside_a_character(limit):
    ids = make_tool("count", max_answer_tokens=limit).encode("🙂" * 9, END)
    text = TOKENIZER.decode(ids).removeprefix("\n<|tool|>\n").removesuffix("<|end|>\n<|assistant|>\n")
    around, of_a_character = 20, 4
    assert len(ids) <= limit and text == "🙂" * ((limit - around) // of_a_character)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", r"rollouts.tool.function: 'own_tools:fails' fails for line \d+: KeyError: 'nothing' \(own_tools.py"),
        ("number", r"rollouts.tool.function: 'own_tools:number' returns 4 for line \d+; return a text or None"),
        ("missing", r"rollouts.tool.function: module 'own_tools' has no function 'missing'"),
    ],
)
def test_a_wrong_function_is_one_sentence(learner, name, said):
    with pytest.raises(InputError, match=said):
        generate(make_policy(learner, name))


def test_templates_that_cannot_print_an_answer_are_refused():
    only_two = CHAT_TEMPLATE.replace("messages %}", "messages if message['role'] != 'tool' %}", 1)
    with pytest.raises(InputError, match="does not print messages of role tool .* set it to 'user'"):
        make_tool("count", tiny_tokenizer(chat_template=only_two))
    assert make_tool("count", tiny_tokenizer(chat_template=only_two), role="user")
    with pytest.raises(InputError, match="max_answer_tokens is 9, but the chat template prints .* around an answer"):
        make_tool("count", max_answer_tokens=9)
    with pytest.raises(InputError, match="requires a chat template, but the tokenizer has none"):
        make_tool("count", tiny_tokenizer(chat_template=None))


@pytest.mark.parametrize(
    ("turn", "answer"),
    [
        ("<calc>48 / 2</calc> and <calc>-(3 + 4) * 0.5</calc>", "48 / 2 = 24\n-(3 + 4) * 0.5 = -3.5"),
        ("<calc>1 / 0</calc><calc>2 +</calc><calc>print(1)</calc>", "1 / 0 = error\n2 + = error\nprint(1) = error"),
        ("The answer is 24.", None),
    ],
)
def test_the_calculator_of_the_jobs_answers_calculations(turn, answer, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "jobs"))
    calculator = importlib.import_module("calculator")
    assert calculator.answer([{"role": "assistant", "content": turn}], {}) == answer


def run_settings(folder, student, method="on_policy", **tool):
    values = settings(folder, student, method, steps=4)
    values["data"]["chat_template"] = True
    values["rollouts"]["tool"] = {"function": "own_tools:count", "max_answer_tokens": 30, **tool}
    return values


@pytest.fixture(scope="module")
def ending_student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ending")
    model = tiny_model(hidden=16, layers=1, peaked=2.0)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"chat_template": False}}, "the rows are not rendered in it; set data.chat_template to true"),
        ({"rollouts": {"tool": {"function": "own_tools:gone"}}}, "module 'own_tools' has no function 'gone'"),
        ({"rollouts": {"tool": {"function": "own_tools:count", "max_turns": 40}}}, "prompt with its rollout may have"),
    ],
)
def test_a_tool_that_does_not_fit_is_refused_before_the_run(tmp_path, ending_student, tiny_teacher, change, said):
    values = run_settings(tmp_path, ending_student)
    values["teachers"] = [{"name": "served", "model": tiny_teacher}]
    for section, own in change.items():
        values[section] |= own
    with pytest.raises(InputError, match=said):
        read_inputs(parse_config(values), {})


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"kind": "minillm", "pretraining": None}, "rollouts.tool answers the student alone; set method.teacher_share"),
        ({"kind": "on_policy", "alignment": {}}, "but method.alignment reads a single one"),
    ],
)
def test_settings_that_need_single_turns_are_refused(tmp_path, ending_student, method, said):
    with pytest.raises(InputError, match=said):
        parse_config(run_settings(tmp_path, ending_student, method))


@pytest.mark.cluster
@pytest.mark.parametrize(
    "method",
    [{"kind": "on_policy"}, {"kind": "on_policy", "form": "policy"},
     {"kind": "minillm", "teacher_share": 0, "pretraining": None}],
    ids=["divergence", "policy", "minillm"],
)  # fmt: skip
def test_a_run_learns_from_conversations(tmp_path, ending_student, served, method):
    result = distill(parse_config(run_settings(tmp_path, ending_student, method, max_turns=3)))
    rows = metrics(result.output)
    assert all(1 < row["rollout_turns"] <= 3 for row in rows)
    assert all(np.isfinite(row["loss"]) for row in rows)
    written = [json.loads(line) for line in (result.output / "rollouts.jsonl").read_text().splitlines()]
    assert any("<|tool|>\n1<|end|>\n<|assistant|>\n" in row["completion"] for row in written)


@pytest.mark.cluster
def test_served_students_and_workers_hold_the_same_conversations(tmp_path, ending_student, served):
    curves = []
    for rollouts in ({"kind": "worker"}, {"kind": "served", "resources": {"num_cpus": 0.25}}):
        (folder := tmp_path / rollouts["kind"]).mkdir()
        values = run_settings(folder, ending_student)
        values["rollouts"] |= rollouts
        result = distill(parse_config(values))
        curves.append([curve(result.output, name) for name in ("rollout_turns", "rollout_tokens", "loss")])
    np.testing.assert_allclose(*curves, rtol=1e-4)


@pytest.mark.cluster
def test_student_equal_to_its_teacher_has_no_loss_in_conversations(tmp_path, tiny_teacher, served):
    values = run_settings(tmp_path, tiny_teacher)
    values["rollouts"] |= {"max_new_tokens": 32}
    values["training"] |= {"steps": 1}
    assert abs(curve(distill(parse_config(values)).output)[0]) < 1e-4
