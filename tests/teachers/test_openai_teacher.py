"""A teacher whose replica queries an endpoint, on Ray Serve."""

import pytest

from rayk.config import parse_config
from rayk.config.support import TopK
from rayk.engines.base import Usage
from rayk.errors import InputError
from rayk.run import with_absolute_paths
from rayk.run.inputs import read_inputs
from rayk.teachers import serve_teacher
from tests.engines.endpoint import Endpoint, Reply
from tests.teachers.helpers import random_sequences, teacher_config


@pytest.mark.cluster
def test_endpoint_teacher_returns_completions_errors_and_usage(ray_cluster):
    endpoint = Endpoint()
    endpoint.replies["prompt 7"] = [Reply(400, b'{"error": {"message": "too rude"}}')]
    engine = {"kind": "openai", "base_url": endpoint.url, "api_key_variable": None}
    engine |= {"price_per_million_prompt_tokens": 1.0, "price_per_million_completion_tokens": 1.0}
    prompts = [f"prompt {i}" for i in range(40)]
    try:
        with serve_teacher(teacher_config("endpoint", "parrot", engine=engine)) as teacher:
            assert teacher.usage() == Usage()  # starting it costs nothing
            completions = teacher.generate(prompts, max_new_tokens=8)
            assert [one.text for one in completions if not one.reason] == [f"[{p}]" for p in prompts if p != "prompt 7"]
            assert (completions[7].text, completions[7].finish_reason, completions[7].reason) == (
                "",
                "error",
                "400: too rude",
            )
            assert teacher.usage() == Usage(40, 39 * 3, 39 * 2, pytest.approx(39 * 5 / 1e6), 1)
            with pytest.raises(InputError, match="black box"):
                teacher.score(random_sequences(2), TopK(4))
            assert teacher.info.supports == ()
    finally:
        endpoint.close()


@pytest.mark.cluster
def test_other_teachers_have_no_usage(served):
    assert served.usage() is None


def test_no_model_or_tokenizer_of_an_endpoint_is_loaded(tiny_student, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the cat", "completion": " sat"}\n' * 3, encoding="utf-8")
    config = parse_config(
        {
            "teachers": [{"model": "parrot", "engine": {"kind": "openai"}}],
            "student": {"model": tiny_student},
            "data": {"train": {"path": str(rows)}, "evaluation": {"path": str(rows)}},
            "method": {"kind": "supervised"},
        }
    )
    inputs = read_inputs(with_absolute_paths(config), {})
    assert (len(inputs.train), inputs.tokenizer_name) == (3, tiny_student)
