"""What is to be written is checked at the door with who writes it and for which prompts."""

import pytest
import yaml

from rayk.config import parse_config
from rayk.errors import InputError

API = {"name": "api", "model": "parrot", "engine": {"kind": "openai"}}
BIG = {"name": "big", "model": "models/big"}


def config(**changed):
    return parse_config(
        {
            "teachers": [API], "student": {"model": "models/small"}, "data": {"train": {"path": "rows.jsonl"}},
            "synthesis": {"kind": "responses"}, "method": {"kind": "supervised"},
        } | changed
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "writer", "only_writing", "scoring"),
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
def test_who_only_writes_is_not_there_in_training(changed, writer, only_writing, scoring):
    found = config(**changed)
    assert (found.writer, found.only_writing) == (writer, only_writing)
    assert [teacher.name for teacher in found.scoring_teachers] == scoring
    assert [teacher.name for teacher in found.training_teachers] == [
        teacher.name for teacher in found.teachers if teacher.name not in only_writing
    ]
    assert found.compared_teacher == (scoring or [""])[0]


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
    prompts_alone = config(data={}, synthesis={"kind": "responses", "prompts": {"path": "p.jsonl"}})
    assert prompts_alone.data.train is None
    assert [each.kind for each in prompts_alone.synthesis.filters] == ["truncated"]
