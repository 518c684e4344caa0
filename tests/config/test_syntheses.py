"""A synthesis is checked against its teacher, its prompts and the student."""

import pytest
import yaml

from rayk.config import parse_config
from rayk.errors import InputError
from rayk.run.applications import required_cpus, served_student_config, teacher_applications
from rayk.run.rounds import round_config

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
    ("changed", "generates", "synthesis_only", "gives_signals"),
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
def test_teachers_that_only_generate_rows_do_not_run_during_training(changed, generates, synthesis_only, gives_signals):
    found = config(**changed)
    assert (found.synthesis_teacher, found.synthesis_only_teachers) == (generates, synthesis_only)
    assert [teacher.name for teacher in found.signal_teachers] == gives_signals
    assert [teacher.name for teacher in found.training_teachers] == [
        teacher.name for teacher in found.teachers if teacher.name not in synthesis_only
    ]
    assert found.evaluation_teacher == (gives_signals or [""])[0]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"data": {}}, "synthesis 'responses' completes the prompts of data.train or of synthesis.prompts"),
        ({"data": {}, "synthesis": None}, "data.train is missing; set it."),
        ({"synthesis": {"kind": "responses", "prompts": {"path": "p"}}}, "set one of the two"),
        ({"synthesis": {"kind": "respones"}}, "unknown kind 'respones'; did you mean 'responses'?"),
        ({"synthesis": {}}, "synthesis needs a 'kind'"),
        ({"synthesis": {"kind": "responses", "sample": 2}}, "synthesis: unknown key 'sample'; did you mean 'samples'?"),
        ({"teachers": []}, "synthesis needs a teacher that generates; add one under 'teachers'"),
        ({"synthesis": {"kind": "responses", "teacher": "apy"}}, "synthesis.teacher 'apy' is none of the teachers"),
        ({"method": {"kind": "logit_kd"}}, "teacher 'api': engine kind 'openai' generates text and gives no signals"),
        ({"synthesis": {"kind": "responses", "chat": True}}, "set engine.chat"),
        ({"synthesis": {"kind": "responses", "keep": "best"}}, "set engine.logprobs, or another scorer"),
        ({"synthesis": {"kind": "responses", "scorer": "a b:c"}}, "scorer is 'a b:c'; write it as 'module:name'"),
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
        (
            {"teachers": [BIG | {"prompt_template": "{answer}"}]},
            "teacher 'big' only generates training rows, so its prompt_template",
        ),
        ({"synthesis": {"kind": "responses", "filters": [{"kind": "lenght"}]}}, "did you mean 'length'?"),
        (
            {"synthesis": {"kind": "responses", "filters": [{"kind": "length", "unit": "tokens"}]}},
            "synthesis.filters: 'length' counts tokens, which teacher 'api' does not return; set another unit",
        ),
        (
            MAGPIE | {"teachers": [API]},
            "synthesis 'magpie' sends the beginning of a user's turn, which chat completions do not accept",
        ),
        (MAGPIE | {"teachers": [PLAIN]}, "needs engine.chat: false (an endpoint that has plain completions), and"),
        (MAGPIE | {"synthesis": {"kind": "magpie", "chat": True}}, "always uses the teacher's chat template"),
        (MAGPIE | {"data": {"train": {"path": "p"}}}, "synthesis 'magpie' makes its own prompts; leave out data."),
        (
            MAGPIE | {"synthesis": {"kind": "magpie", "instruction_filters": [{"kind": "contamination"}]}},
            "synthesis.instruction_filters.0: unknown kind 'contamination'",
        ),
        ({"rounds": 2}, "the rows of synthesis 'responses' do not depend on the student"),
        ({"rounds": 2, "synthesis": None}, "rounds is 2, but without 'synthesis' it has no effect"),
        ({"method": DPO}, "use synthesis 'preferences', another method, or rows that have pairs"),
        ({"synthesis": PAIRS}, "which only method 'preference' trains on; use it instead of 'supervised'"),
        (
            {"synthesis": PAIRS, "method": DPO, "student": {"config": {"model_type": "llama"}}},
            "'student.config' creates one with random weights; give student.model",
        ),
        (
            {"synthesis": PAIRS | {"chosen": "best", "student_samples": 0, "samples": 2}, "method": DPO, "rounds": 2},
            "the rows of synthesis 'preferences' do not depend on the student",
        ),
        ({"synthesis": PAIRS | {"student_samples": 0}, "method": DPO},
         "chosen 'teacher' needs samples of the student, but student_samples is 0"),
        ({"synthesis": PAIRS | {"chosen": "best", "student_samples": 0}, "method": DPO}, "a pair needs two samples"),
        (
            {"synthesis": PAIRS | {"chosen": "best", "scorer": "mean_logprob"}, "method": DPO},
            "scorer 'mean_logprob' compares samples of one model",
        ),
        ({"synthesis": PAIRS | {"student": {"engine": {"kind": "openai"}}}, "method": DPO}, "unknown kind 'openai'"),
    ],
)  # fmt: skip
def test_a_synthesis_that_does_not_fit_is_one_sentence(changed, sentence):
    with pytest.raises(InputError) as caught:
        config(**changed)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resolved_settings_can_be_loaded_again():
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
def test_one_sampling_setting_keeps_the_defaults_of_the_others(kind, temperature, top_p):
    rows = {} if kind == "chain_of_thought" else {"data": {}}
    sampling = config(
        **rows, synthesis={"kind": kind, "sampling": {"max_new_tokens": 9}}, teachers=[BIG]
    ).synthesis.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (9, temperature, top_p)


def test_the_served_student_counts_in_the_resources_of_a_synthesis():
    student = {"engine": {"batch_tokens": 64}, "replicas": 3, "resources": {"num_cpus": 2}}
    found = config(teachers=[BIG], synthesis=PAIRS | {"student": student}, method=DPO)
    assert required_cpus(found) == 1 + 3 * 2 + 1
    student = served_student_config(found)
    assert (student.model, student.engine.batch_tokens, student.engine.kind) == ("models/small", 64, "transformers")
    assert student.name not in teacher_applications(found).values()


def test_each_round_starts_from_the_model_of_the_previous_round():
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
