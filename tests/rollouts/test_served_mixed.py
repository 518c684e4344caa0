"""Teacher-mixed rollouts over real Ray Serve."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from rayk.engines.speculative import Draft, MixedSampling
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError
from rayk.rollouts.teacher_mixed import sample_teacher_mixed
from rayk.teachers import connect_teacher
from tests.engines.reference import VOCAB, prompts_of

pytestmark = pytest.mark.cluster


def test_served_teacher_gives_the_rollouts_of_its_engine(served, tiny_teacher, tiny_student):
    """Two replicas, several calls a round: each sequence meets replicas that have read it and ones that have not."""
    student = AutoModelForCausalLM.from_pretrained(tiny_student).eval()
    teacher = connect_teacher("served", served.settings.model_copy(update={"call_tokens": 64}))
    prompts, sampling = prompts_of(7, 30, 1, 12, 3, 19, 25, 8), MixedSampling(0.4, 40)

    def rollouts(verify):
        return asyncio.run(
            sample_teacher_mixed(student, verify, prompts, range(8), sampling, vocab_size=VOCAB, eos_token_ids=[1])
        )

    for one, other in zip(rollouts(teacher.averify), rollouts(TransformersEngine(tiny_teacher).verify), strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.teacher_logprobs, other.teacher_logprobs, atol=1e-4)
        assert one.finish_reason == other.finish_reason


def test_drafts_that_a_teacher_cannot_verify_are_rejected(served):
    draft = Draft(np.array([5, VOCAB], np.int32), np.array([-1.0]), np.array([0.5]), 0.2, 0, 8)
    with pytest.raises(InputError, match="share a tokenizer"):
        asyncio.run(served.averify([draft]))
    teacher = connect_teacher("served", served.settings)
    teacher.info = replace(teacher.info, can_verify=False, engine="vllm")
    with pytest.raises(InputError, match="'vllm' .* cannot verify drafts"):
        asyncio.run(teacher.averify([draft]))
