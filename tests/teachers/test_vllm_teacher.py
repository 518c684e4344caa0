"""A teacher whose replica holds vLLM, on real Ray Serve."""

import asyncio

import numpy as np
import psutil
import pytest

from rayk.engines.base import SamplingParameters
from rayk.engines.transformers import TransformersEngine
from rayk.support import TopK
from rayk.teachers import deployment, serve_teacher
from tests.teachers.asking import assert_alike, config_of, eventually, replicas_of, sequences_of
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cluster


def test_a_vllm_teacher_answers_and_is_replaced_when_its_engine_is_killed(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(deployment, "_HEALTH_CHECK_SECONDS", 1.0)
    tiny_model(tmp_path, hidden=128, tokenizer=tiny_tokenizer())
    engine = {"kind": "vllm", "dtype": "float32", "arguments": {"enforce_eager": True}}
    sequences, prompts = sequences_of(20), [np.arange(4, 12), np.arange(20, 25)]
    twin = TransformersEngine(str(tmp_path))
    expected = asyncio.run(twin.score(sequences, TopK(16)))
    written = asyncio.run(twin.generate(prompts, SamplingParameters(12, 0.0), [0, 0]))
    with serve_teacher(config_of("vllm", str(tmp_path), engine=engine)) as teacher:
        assert teacher.info.supports == ("topk", "logprob")
        assert_alike(teacher.score(sequences, TopK(16)), expected)
        completions = teacher.generate(prompts, max_new_tokens=12, temperature=0.0)
        assert [one.token_ids.tolist() for one in completions] == [one.token_ids.tolist() for one in written]

        [replica] = replicas_of("vllm")
        [core] = [each for each in psutil.Process(replica.pid).children() if "EngineCore" in each.name()]
        core.kill()
        assert_alike(teacher.score(sequences, TopK(16)), expected)
        assert teacher.statistics.retries > 0
        [successor] = replicas_of("vllm")
        assert successor.pid != replica.pid

        processes = psutil.Process(successor.pid).children(recursive=True)
        successor.kill()  # which must not leave vLLM's processes behind, with the memory they hold
        eventually(lambda: not any(each.is_running() for each in processes))
