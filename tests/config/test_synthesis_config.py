"""What is to be written is checked at the door with who writes it and for which prompts."""

import pytest
import yaml

from rayk.config import parse_config
from rayk.errors import InputError
from rayk.run.rounds import round_config
from rayk.run.applications import teacher_applications, required_cpus, served_student_config

API = {"name": "api", "model": "parrot", "engine": {"kind": "openai"}}
PLAIN = API | {"engine": {"kind": "openai", "chat": False}}
PAIRS, DPO = {"kind": "preferences"}, {"kind": "preference"}
BIG = {"name": "big", "model": "models/big"}
MAGPIE = {"teachers": [BIG], "data": {}, "synthesis": {"kind": "magpie"}}


def config(**changed):
    return parse_config(
        {
            "teachers": [API], "student": {"model": "models/small"}, "data": {"train": {"path": "rows.jsonl"}},
            "synthesis": {"kind": "responses"}, "method": {"kind": "supervised"},
        } | changed
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "writer", "synthesis_only_teachers", "scoring"),
    [
        ({}, "api", ["api"], []),
        ({"teachers": [BIG]}, "big", ["big"], []),
        ({"teachers": [BIG, API]}, "big", ["big"], []),
        ({"teachers": [API, BIG], "method": {"kind": "logit_kd"}}, "api", ["api"], ["big"]),
        ({"teachers": [BIG], "method": {"kind": "logit_kd"}}, "big", [], ["big"]),
        (
            {
                "teachers": [BIG, API], "synthesis": {"kind": "responses", "teacher": "api"},
                "method": {"kind": "minillm"},
            },
            "api", ["api"], ["big"],
        ),
        ({"synthesis": None, "teachers": [API, BIG]}, "", [], ["big"]),
    ],
)  # fmt: skip
def test_who_only_writes_is_not_there_in_training(changed, writer, synthesis_only_teachers, scoring):
    found = config(**changed)
    assert (found.synthesis_teacher, found.synthesis_only_teachers) == (writer, synthesis_only_teachers)
    assert [teacher.name for teacher in found.signal_teachers] == scoring
    assert [teacher.name for teacher in found.training_teachers] == [
        teacher.name for teacher in found.teachers if teacher.name not in synthesis_only_teachers
    ]
    assert found.evaluation_teacher == (scoring or [""])[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": {}}, "synthesis 'responses' writes for the prompts of data.train or of synthesis.prompts"),
        ({"data": {}, "synthesis": None}, "data.train is missing; set it."),
        ({"synthesis": {"kind": "responses", "prompts": {"path": "p"}}}, "set one of the two"),
        ({"synthesis": {"kind": "respones"}}, "unknown kind 'respones'; did you mean 'responses'?"),
        ({"synthesis": {}}, "synthesis needs a 'kind'"),
        ({"synthesis": {"kind": "responses", "sample": 2}}, "synthesis: unknown key 'sample'; did you mean 'samples'?"),
        ({"teachers": []}, "synthesis needs a teacher that writes; add one under 'teachers'"),
        ({"synthesis": {"kind": "responses", "teacher": "apy"}}, "synthesis.teacher 'apy' is none of the teachers"),
        ({"method": {"kind": "logit_kd"}}, "teacher 'api': engine kind 'openai' writes text and gives no signals"),
        ({"synthesis": {"kind": "responses", "chat": True}}, "see to engine.chat"),
        ({"synthesis": {"kind": "responses", "keep": "best"}}, "set engine.logprobs, or another scorer"),
        ({"synthesis": {"kind": "responses", "scorer": "a b:c"}}, "synthesis.scorer: string should match pattern"),
        ({"synthesis": {"kind": "chain_of_thought", "answer": {"pattern": "#"}}}, "pattern needs exactly one group"),
        (
            {"synthesis": {"kind": "chain_of_thought", "rationale_template": "Q: {prompt}"}},
            "synthesis.rationale_template needs the names {question} and no others.",
        ),
        (
            {"synthesis": {"kind": "adversarial", "referee_template": "{instruction} {first}"}},
            "synthesis.referee_template needs the names {instruction}, {first}, {second} and no others.",
        ),
        ({"synthesis": {"kind": "adversarial", "referee": "me"}}, "synthesis.referee 'me' is none of the teachers"),
        ({"teachers": [BIG | {"prompt_template": "{answer}"}]}, "teacher 'big' only writes, so its prompt_template"),
        ({"synthesis": {"kind": "responses", "filters": [{"kind": "lenght"}]}}, "did you mean 'length'?"),
        (
            {"synthesis": {"kind": "responses", "filters": [{"kind": "length", "unit": "tokens"}]}},
            "synthesis.filters: 'length' counts tokens, which teacher 'api' does not tell; set another unit",
        ),
        (
            MAGPIE | {"teachers": [API]},
            "synthesis 'magpie' feeds the beginning of a user's turn, which chat completions do not take",
        ),
        (MAGPIE | {"teachers": [PLAIN]}, "needs engine.chat: false (an endpoint that has plain completions), and"),
        (MAGPIE | {"synthesis": {"kind": "magpie", "chat": True}}, "always goes by the teacher's chat template"),
        (MAGPIE | {"data": {"train": {"path": "p"}}}, "synthesis 'magpie' makes up its own prompts; leave out data."),
        (
            MAGPIE | {"synthesis": {"kind": "magpie", "instruction_filters": [{"kind": "contamination"}]}},
            "synthesis.instruction_filters.0: unknown kind 'contamination'",
        ),
        ({"rounds": 2}, "what synthesis 'responses' writes does not depend on the student"),
        ({"rounds": 2, "synthesis": None}, "rounds is 2, but without 'synthesis' nothing is written in a round"),
        ({"method": DPO}, "use synthesis 'preferences', another method, or rows that have pairs"),
        ({"synthesis": PAIRS}, "from which only method 'preference' learns; use it instead of 'supervised'"),
        (
            {"synthesis": PAIRS, "method": DPO, "student": {"config": {"model_type": "llama"}}},
            "'student.config' makes one with random weights; give student.model",
        ),
        (
            {"synthesis": PAIRS | {"chosen": "best", "student_samples": 0, "samples": 2}, "method": DPO, "rounds": 2},
            "what synthesis 'preferences' writes does not depend on the student",
        ),
        ({"synthesis": PAIRS | {"student_samples": 0}, "method": DPO}, "there is nothing to prefer the teacher to"),
        ({"synthesis": PAIRS | {"chosen": "best", "student_samples": 0}, "method": DPO}, "a pair takes two samples"),
        (
            {"synthesis": PAIRS | {"chosen": "best", "scorer": "mean_logprob"}, "method": DPO},
            "scorer 'mean_logprob' compares what one model wrote",
        ),
        ({"synthesis": PAIRS | {"student": {"engine": {"kind": "openai"}}}, "method": DPO}, "unknown kind 'openai'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(changed, said):
    with pytest.raises(InputError) as caught:
        config(**changed)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_survive_the_way_through_yaml():
    found = config(synthesis={"kind": "chain_of_thought", "filters": [{"kind": "length", "maximum": 9}]})
    assert parse_config(yaml.safe_load(found.to_yaml())) == found
    assert found.synthesis.sampling.max_new_tokens == 128
    assert config(**MAGPIE | {"teachers": [PLAIN], "synthesis": {"kind": "magpie", "tokenizer": "t"}})
    prompts_alone = config(data={}, synthesis={"kind": "responses", "prompts": {"path": "p.jsonl"}})
    assert prompts_alone.data.train is None
    assert [each.kind for each in prompts_alone.synthesis.filters] == ["truncated"]


@pytest.mark.parametrize(
    ("kind", "temperature", "top_p"), [("self_instruct", 0.7, 0.5), ("magpie", 1.0, 1.0), ("chain_of_thought", 0.7, 1)]
)
def test_one_sampling_setting_leaves_the_recipes_others(kind, temperature, top_p):
    rows = {} if kind == "chain_of_thought" else {"data": {}}
    sampling = config(
        **rows, synthesis={"kind": kind, "sampling": {"max_new_tokens": 9}}, teachers=[BIG]
    ).synthesis.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (9, temperature, top_p)


def test_the_student_that_is_asked_counts_among_what_is_up_while_rows_are_written():
    student = {"engine": {"batch_tokens": 64}, "replicas": 3, "resources": {"num_cpus": 2}}
    found = config(teachers=[BIG], synthesis=PAIRS | {"student": student}, method=DPO)
    assert required_cpus(found) == 1 + 3 * 2 + 1
    asked = served_student_config(found)
    assert (asked.model, asked.engine.batch_tokens, asked.engine.kind) == ("models/small", 64, "transformers")
    assert asked.name not in teacher_applications(found).values()


def test_each_round_is_a_run_that_begins_with_the_model_of_the_round_before():
    student = {"model": "models/small", "tokenizer": "models/words"}
    found = config(
        output="/runs/here",
        synthesis=PAIRS,
        method=DPO,
        rounds=3,
        student=student,
        training={"checkpoints": "s3://b/c/"},
    )
    (first, nothing), (third, round_info) = round_config(found, 0), round_config(found, 2)
    assert (first.rounds, first.output, first.student) == (1, "/runs/here/rounds/01", found.student)
    assert (nothing.number, nothing.before) == (0, None)
    assert (third.student.model, third.student.tokenizer) == ("/runs/here/rounds/02/model", "models/words")
    assert (third.output, third.training.checkpoints) == ("/runs/here/rounds/03", "s3://b/c/03")
    assert (round_info.number, str(round_info.before)) == (2, "/runs/here/rounds/02/synthesis")
    assert first.name != third.name
