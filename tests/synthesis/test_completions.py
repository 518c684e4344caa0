"""Every completion is requested once, whatever happens, and failed requests do not affect the others."""

import asyncio
import time
from concurrent.futures import CancelledError

import pyarrow.parquet as pq
import pytest

from rayk.config import ResponsesConfig
from rayk.engines.base import SamplingParameters
from rayk.errors import InputError, RunFailed
from rayk.serving.event_loop import run_until_complete
from rayk.synthesis import CompletionStore
from rayk.synthesis import completions as completion_client
from rayk.synthesis.completions import CompletionClient
from rayk.synthesis.concurrency import run_in_order
from rayk.synthesis.requests import CompletionRequest
from rayk.synthesis.usage import UsageTracker
from rayk.teachers.client import Teacher
from tests.engines.endpoint import Reply, completion

pytestmark = pytest.mark.cluster

SHORT = SamplingParameters(8, 0.7)
REFUSED = Reply(400, b'{"error": {"message": "too rude"}}')


def request(teacher, store, requests, **settings):
    """Return the completions of the requests, the client and the progress reports."""
    reports = []
    tracker = UsageTracker(store.usage, lambda *report: reports.append(report))
    client = CompletionClient(teacher, store, ResponsesConfig(**settings), tracker=tracker)
    client.total = len(requests)

    async def work():
        async with client:
            return await client.complete_all(requests)

    return run_until_complete(work()), client, reports


def requests(count, parameters=SHORT, prompt="prompt {}"):
    return [CompletionRequest(prompt.format(i), i, parameters) for i in range(count)]


def test_completions_of_a_served_teacher_are_requested_once_and_equal_direct_ones(served, store):
    written, client, reports = request(served, store, requests(12))
    assert client.tracker.requested == 12
    assert reports[-1][:2] == (12, 12)
    assert "completions/s" in reports[-1][2] and "tokens/s" in reports[-1][2]
    expected = run_until_complete(served.agenerate([each.prompt for each in requests(12)], SHORT, range(12)))
    assert [each.text for each in written] == [each.text for each in expected]
    assert [each.tokens for each in written] == [len(each.token_ids) for each in expected]
    assert written[3].mean_logprob == pytest.approx(expected[3].logprobs.mean(), abs=1e-4)
    repeated, client, _ = request(served, store, requests(12))
    assert (repeated, client.tracker.requested) == (written, 0)


@pytest.mark.parametrize(("chat", "ends"), [(False, (1,)), (True, (1, 3))])
def test_the_students_completions_end_where_its_training_ends(served, store, chat, ends):
    student = CompletionClient(served, store, ResponsesConfig(), role="student", chat=chat)
    assert student._end_token_ids == ends  # EOS, and the template's end of a turn
    assert CompletionClient(served, store, ResponsesConfig(), chat=chat)._end_token_ids == ()


def test_rows_have_their_provenance(served, store):
    written, _, _ = request(served, store, requests(1))
    (part,) = (store.folder / "completions").glob("*.parquet")
    (row,) = pq.read_table(part).to_pylist()
    assert (row["prompt"], row["seed"], row["teacher"], row["text"]) == ("prompt 0", 0, "served", written[0].text)
    assert (row["model"], row["weights"]) == (served.info.model, served.info.weights_fingerprint)
    assert '"temperature": 0.7' in row["parameters"]
    assert abs(row["written_at_seconds"] - time.time()) < 600


def test_parameters_seeds_and_repetitions_distinguish_requests(chat_teacher, endpoint, store):
    one = CompletionRequest("prompt", 1, SHORT)
    asked = [
        one,
        one,
        CompletionRequest("prompt", 2, SHORT),
        CompletionRequest("prompt", 1, SamplingParameters(9, 0.7)),
    ]
    written, _, _ = request(chat_teacher, store, asked)
    assert len({each.key for each in written}) == 4
    assert len(endpoint.requests) == 4
    request(chat_teacher, store, asked)
    assert len(endpoint.requests) == 4


def test_chat_wraps_the_prompt_in_the_teachers_template(served, store):
    (written,), _, _ = request(served, store, requests(1, prompt="Hello {}"), chat=True)
    (part,) = (store.folder / "completions").glob("*.parquet")
    assert pq.read_table(part).to_pylist()[0]["prompt"] == "<|user|>\nHello 0<|end|>\n<|assistant|>\n"
    plain, client, _ = request(served, store, requests(1, prompt="Hello {}"))
    assert client.tracker.requested == 1
    assert plain[0].text != written.text


def test_at_most_in_flight_requests_run_at_a_time(chat_teacher, endpoint, store):
    endpoint.max_concurrent = 0
    endpoint.replies |= {f"prompt {i}": [Reply(delay_seconds=0.05)] for i in range(12)}
    request(chat_teacher, store, requests(12), in_flight=3)
    assert endpoint.max_concurrent == 3


def test_failed_requests_are_reported_and_repeated_in_the_next_run(chat_teacher, endpoint, store):
    endpoint.replies["prompt 1"] = [Reply(503, b'{"error": {"message": "down"}}')] * 2
    endpoint.replies["prompt 2"] = [Reply(body=b'{"choices": [{"mess')] * 2
    endpoint.replies["prompt 3"] = [Reply(429, b"slow down", {"retry-after": "0.2"})]
    written, client, reports = request(chat_teacher, store, requests(5))
    assert [each.finish_reason for each in written] == ["stop", "error", "error", "stop", "stop"]
    assert written[1].reason == "503: down"
    assert "not JSON" in written[2].reason
    first, second = endpoint.requests_for("prompt 3")
    assert second.at_seconds - first.at_seconds >= 0.2
    assert client.tracker.unanswered == 2
    assert "2 unanswered" in reports[-1][2]
    before = len(endpoint.requests)
    repeated, client, _ = request(chat_teacher, store, requests(5))
    assert [each.text for each in repeated] == [f"[prompt {i}]" for i in range(5)]
    assert sorted(each.prompt for each in endpoint.requests[before:]) == ["prompt 1", "prompt 2"]


def test_an_endpoint_that_is_down_stops_the_run_and_loses_no_completion(chat_teacher, endpoint, store):
    request(chat_teacher, store, requests(3))
    endpoint.replies |= {f"prompt {i}": [Reply(503, b'{"error": {"message": "down"}}')] * 2 for i in range(3, 200)}
    with pytest.raises(RunFailed, match=r"did not answer 32 requests in a row; the last error: 503: down\."):
        request(chat_teacher, store, requests(200), in_flight=8)
    assert len(endpoint.requests) <= 3 + 2 * (32 + 8)
    endpoint.reset()
    _, client, _ = request(chat_teacher, store, requests(5))
    assert client.tracker.requested == 2


def test_refused_prompts_do_not_stop_a_run(chat_teacher, endpoint, store):
    endpoint.replies |= {f"prompt {i}": [REFUSED] for i in range(2, 42)}
    written, client, reports = request(chat_teacher, store, requests(44), in_flight=1)
    assert [each.finish_reason for each in written] == ["stop"] * 2 + ["error"] * 40 + ["stop"] * 2
    assert [each.refused for each in written] == [each.finish_reason == "error" for each in written]
    assert (client.tracker.refused, client.tracker.unanswered) == (40, 0)
    assert "40 refused" in reports[-1][2]
    before = len(endpoint.requests)
    repeated, client, _ = request(chat_teacher, store, requests(44))
    assert (repeated, len(endpoint.requests), store.num_refusals) == (written, before, 40)


def test_an_endpoint_that_refuses_everything_stops_the_run(chat_teacher, endpoint, store):
    endpoint.replies |= {f"prompt {i}": [REFUSED] for i in range(400)}
    with pytest.raises(RunFailed, match=r"refused the first 256 requests; the last error: 400: too rude\."):
        request(chat_teacher, store, requests(400), in_flight=8)
    assert len(endpoint.requests) <= 256 + 8


def test_a_refusal_is_stored_once_the_endpoint_has_answered_a_request(chat_teacher, endpoint, store):
    """Until then the endpoint's settings may be at fault, not the prompt."""
    endpoint.replies["prompt 0"] = [REFUSED] * 2
    (written,), _, _ = request(chat_teacher, store, requests(1))
    assert (written.finish_reason, written.reason, written.refused) == ("error", "400: too rude", True)
    assert store.num_refusals == 0
    again, client, _ = request(chat_teacher, store, requests(2), in_flight=1)
    assert (again[0], client.tracker.requested, store.num_refusals) == (written, 2, 1)
    _, client, _ = request(chat_teacher, store, requests(2))
    assert client.tracker.requested == 0


def test_charges_add_up_over_sessions(chat_teacher, endpoint, store):
    _, client, _ = request(chat_teacher, store, requests(4))
    assert client.tracker.charges["requests"] == 4
    assert client.tracker.charges["cost"] == pytest.approx(4 * 5e-6)
    _, client, _ = request(chat_teacher, store, requests(6))
    assert (client.tracker.charges["requests"], store.usage["completion_tokens"]) == (6, 12)


def test_charges_are_on_disk_before_their_completions(chat_teacher, endpoint, store, monkeypatch):
    """Charges are written before their completions, also for completions that arrive meanwhile."""
    bills, write, usage = [], CompletionStore.flush, Teacher.ausage

    async def slowly(teacher):
        used = await usage(teacher)
        await asyncio.sleep(0.2)
        return used

    def noted(store, keys=None):
        write(store, keys)
        rows = [row for part in store.folder.glob("completions/*.parquet") for row in pq.read_table(part).to_pylist()]
        bills.append((len(rows), store.usage.get("requests", 0)))

    monkeypatch.setattr(Teacher, "ausage", slowly)
    monkeypatch.setattr(CompletionStore, "flush", noted)
    monkeypatch.setattr(completion_client, "_FLUSH_COMPLETIONS", 4)
    endpoint.replies |= {f"prompt {i}": [Reply(delay_seconds=0.1)] for i in range(40)}
    request(chat_teacher, store, requests(40), in_flight=3)
    assert len(bills) > 3 and bills[-1] == (40, 40)
    assert all(charged >= kept for kept, charged in bills)


def test_a_prompt_that_is_too_long_is_reported_and_not_sent(served, store):
    long = CompletionRequest("the cat sat " * 200, 0, SHORT)
    (one, other), client, _ = request(served, store, [long, CompletionRequest("the cat", 0, SHORT)])
    assert (one.finish_reason, other.finish_reason != "error") == ("error", True)
    assert one.reason.endswith("leaves no room for 8 new tokens: the model is limited to 512")
    assert one.refused
    assert client.tracker.unanswered == 0  # a repetition would not help


def test_an_interruption_keeps_received_completions(chat_teacher, endpoint, store):
    endpoint.replies["prompt 9"] = [Reply(delay_seconds=5)]

    client = CompletionClient(chat_teacher, store, ResponsesConfig())

    async def work():
        async with client:
            await client.complete_all(requests(10))

    async def interrupted():
        task = asyncio.create_task(work())
        while client.done < 9:
            await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(CancelledError):
        run_until_complete(interrupted())
    assert store.num_pending == 0
    endpoint.reset()
    _, client, _ = request(chat_teacher, store, requests(10))
    assert client.tracker.requested == 1


def test_a_wrong_key_stops_at_once(chat_teacher, endpoint, store):
    endpoint.replies["prompt 0"] = [Reply(401, b'{"error": {"message": "who are you?"}}')]
    with pytest.raises(InputError, match="refused the key"):
        request(chat_teacher, store, requests(1))


def test_results_are_in_order_and_closing_early_cancels_the_others():
    begun, ended = [], []

    async def piece(number):
        begun.append(number)
        await asyncio.sleep(0.02 * (number % 3))
        ended.append(number)
        return number

    async def some(count):
        results = []
        work = run_in_order((piece(number) for number in range(20)), 4)
        async for result in work:
            results.append(result)
            if len(results) == count:
                break
        await work.aclose()
        return results

    assert asyncio.run(some(20)) == list(range(20))
    assert ended != list(range(20))
    begun.clear()
    assert asyncio.run(some(2)) == [0, 1]
    assert len(begun) <= 6


def test_seeds_depend_on_the_position(chat_teacher, store):
    one, other = (CompletionClient(chat_teacher, store, ResponsesConfig(), seed) for seed in (0, 1))
    assert one.seed(0, 1, 2) == CompletionClient(chat_teacher, store, ResponsesConfig(), 0).seed(0, 1, 2)
    assert len({one.seed(0, 1, 2), one.seed(0, 2, 1), one.seed(1, 1, 2), other.seed(0, 1, 2)}) == 4


def test_half_a_surrogate_pair_is_stored_as_a_question_mark(chat_teacher, endpoint, store):
    endpoint.answer = lambda body: completion(body, "snow \ud83d")
    (written,), _, _ = request(chat_teacher, store, requests(1))
    assert written.text == "snow ?"
    assert request(chat_teacher, store, requests(1))[1].tracker.requested == 0


def test_a_prompt_that_times_out_does_not_affect_the_others(chat_teacher, endpoint, store):
    impatient = Teacher(
        chat_teacher.name, chat_teacher.info, chat_teacher.settings.model_copy(update={"deadline_seconds": 8.0})
    )

    def slow_at_two(body):
        if "prompt 2" in str(body):
            time.sleep(14)
        return completion(body, "well")

    endpoint.answer = slow_at_two
    written, client, _ = request(impatient, store, requests(5))
    assert [each.finish_reason for each in written] == ["stop", "stop", "error", "stop", "stop"]
    assert "did not answer within 8 s" in written[2].reason
    assert client.tracker.unanswered == 1


def test_an_endpoint_has_its_own_chat_template(chat_teacher, store):
    with pytest.raises(InputError, match="is an endpoint, which has a chat template of its own; remove"):
        request(chat_teacher, store, requests(1), chat=True)
