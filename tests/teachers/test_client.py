"""The client of a teacher on Ray Serve, with replicas that keep running."""

import asyncio
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from ray import serve

from rayk import make_batches
from rayk.config import TeacherConfig
from rayk.config.support import Hidden, Logprob, Requested, Sampled, TopK
from rayk.engines.base import SamplingParameters
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError, RaykError, TeacherUnavailable
from rayk.serving import application, event_loop
from rayk.signals.sequence import TokenSequence
from rayk.teachers import connect_teacher, serve_teacher
from tests.runs import wait_until
from tests.teachers.helpers import assert_signals_close, random_sequences, teacher_config
from tests.tiny import tiny_model, tiny_sentencepiece, tiny_tokenizer

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def engine(tiny_teacher):
    return TransformersEngine(tiny_teacher)


@pytest.fixture
def watched(served, monkeypatch):
    """A client of the served teacher with little credit, which counts its open calls."""
    teacher = connect_teacher("served", served.settings.model_copy(update={"in_flight": 3, "call_tokens": 64}))
    teacher.open = teacher.most_open = 0
    attempt = teacher._attempt

    async def counting(*arguments):
        teacher.open += 1
        teacher.most_open = max(teacher.most_open, teacher.open)
        try:
            return await attempt(*arguments)
        finally:
            teacher.open -= 1

    monkeypatch.setattr(teacher, "_attempt", counting)
    return teacher


@pytest.fixture(scope="module")
def spares():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def spare(spares, ray_cluster, tmp_path_factory):
    """A teacher for destructive tests: one or two replicas, NaN after token 300. It is started again for the test after
    the one that removed it."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        model = tiny_model(tokenizer=tiny_tokenizer())
        with torch.no_grad():
            model.model.embed_tokens.weight[300] = float("nan")  # one token only, so that loading finds no error
        model.save_pretrained(folder)
        tiny_tokenizer(folder)
    config = teacher_config(
        "spare",
        str(folder),
        replicas={"min": 1, "max": 2},
        engine={"batch_tokens": 1},
        in_flight=200,
        deadline_seconds=30,
    )
    return spares.enter_context(serve_teacher(config))


@dataclass
class Batch:
    sequences: list


def batches_of(count, seed=0):
    return [Batch(random_sequences(3, seed=seed + i)) for i in range(count)]


@pytest.mark.parametrize("support", [TopK(64), TopK(5, (1.0, 2.0)), Logprob()])
def test_score_equals_the_engine(served, engine, support):
    sequences = random_sequences(20)
    assert_signals_close(served.score(sequences, support), asyncio.run(engine.score(sequences, support)))


def test_score_accepts_batches_and_splits_calls(watched, engine):
    sequences = random_sequences(30)
    signals = watched.score(Batch(sequences), TopK(8))
    assert watched.statistics.calls > 5
    assert watched.statistics.tokens == signals.tokens == sum(s.counted_tokens for s in sequences)
    assert_signals_close(signals, asyncio.run(engine.score(sequences, TopK(8))))


def test_batches_of_another_tokenizer_are_refused(served, on_loop):
    batches = make_batches([{"prompt": "2 + 2?", "completion": "4"}], tiny_sentencepiece(), 1)
    for request in (
        lambda: served.score(batches[0]),
        lambda: on_loop(served.ascore(batches[0])),
        lambda: list(served.stream(batches)),
    ):
        with pytest.raises(InputError, match="Teacher 'served' and the tokenizer of the batches give tokens different"):
            request()


def test_in_flight_is_reached_and_never_exceeded(watched):
    watched.score(random_sequences(60), TopK(8))
    assert 3 <= watched.most_open <= 6  # three for each replica that the client knows of
    assert watched.open == 0


def test_two_hundred_concurrent_requests_are_answered(served, engine):
    sequences = random_sequences(200)
    teacher = connect_teacher("served", served.settings.model_copy(update={"in_flight": 200}))

    async def main():
        return await asyncio.gather(*(teacher.ascore([one], TopK(8)) for one in sequences))

    expected = asyncio.run(engine.score(sequences, TopK(8)))
    for row, signals in enumerate(asyncio.run(main())):
        assert_signals_close(signals, expected.select([row]))
    assert teacher.statistics.calls == 200
    assert teacher.statistics.retries == 0


def test_stream_yields_every_batch_in_order(served, engine):
    batches = batches_of(12)
    answered = list(served.stream(iter(batches), TopK(8), prefetch=5))
    assert [id(batch) for batch, _ in answered] == [id(batch) for batch in batches]
    for batch, signals in answered:
        assert_signals_close(signals, asyncio.run(engine.score(batch.sequences, TopK(8))))


def test_stream_requests_at_most_prefetch_batches_ahead(served):
    taken = []

    def source():
        for batch in batches_of(10):
            taken.append(batch)
            yield batch

    for received, _ in enumerate(served.stream(source(), TopK(8), prefetch=2), start=1):
        assert len(taken) <= received + 2


def test_stream_without_batches_or_prefetch(served):
    assert list(served.stream([], TopK(8))) == []
    assert len(list(served.stream(batches_of(3), TopK(8), prefetch=0))) == 3


def test_wait_seconds_are_counted(served):
    before = served.statistics.wait_seconds
    list(served.stream(batches_of(2), TopK(8)))
    assert served.statistics.wait_seconds > before


def test_stream_raises_an_error_at_its_batch(served):
    batches = [*batches_of(2), Batch(random_sequences(1, longest=600, shortest=600)), *batches_of(2)]
    stream = served.stream(batches, TopK(8))
    assert [next(stream)[0], next(stream)[0]] == batches[:2]
    with pytest.raises(InputError, match="600 tokens is longer"):
        next(stream)


def test_score_in_a_running_event_loop(served, engine):
    """As in a notebook: `ascore` does not block the loop, and the blocking `score` works, too."""
    sequences = random_sequences(4)

    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        signals = await served.ascore(sequences, TopK(8))
        ticking.cancel()
        return ticks, signals, served.score(sequences, TopK(8))

    ticks, awaited, blocking = asyncio.run(main())
    assert ticks > 10, "the caller's loop was blocked"
    assert_signals_close(awaited, blocking)


def test_score_from_threads(served, engine):
    results = {}

    def call(row):
        results[row] = served.score(random_sequences(4, seed=row), TopK(8))

    threads = [threading.Thread(target=call, args=(row,)) for row in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in range(6):
        assert_signals_close(results[row], asyncio.run(engine.score(random_sequences(4, seed=row), TopK(8))))


def test_generate_equals_the_engine(served):
    prompts = [sequence.input_ids[:8] for sequence in random_sequences(40)]
    completions = served.generate(prompts, max_new_tokens=6, seed=3)
    assert len(completions) == 40
    assert [c.token_ids.tolist() for c in served.generate(prompts, max_new_tokens=6, seed=3)] == [
        c.token_ids.tolist() for c in completions
    ]
    assert [c.token_ids.tolist() for c in served.generate(prompts, max_new_tokens=6, seed=4)] != [
        c.token_ids.tolist() for c in completions
    ]
    tokenizer = tiny_tokenizer()
    for completion in completions:
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.logprobs.shape == completion.token_ids.shape
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 6


def test_generate_accepts_text_ids_and_no_prompts(served):
    [of_text] = served.generate(["the cat sat"], max_new_tokens=5, temperature=0.0)
    [of_ids] = served.generate([np.array(tiny_tokenizer()("the cat sat").input_ids)], max_new_tokens=5, temperature=0.0)
    assert of_text.text == of_ids.text
    assert served.generate([]) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.score(random_sequences(2), TopK(1_000)), "support.k is 1000, but .* vocabulary of"),
        (lambda t: t.score(random_sequences(1, longest=600, shortest=600)), "600 tokens is longer than the limit of"),
        (lambda t: t.score([]), "nothing to score"),
        (lambda t: t.generate(["the cat"], max_new_tokens=600), "max_new_tokens"),
        (lambda t: t.generate([""]), "empty prompt"),
        (lambda t: t.generate(["the cat"], top_p=2.0), "top_p"),
    ],
)
def test_errors_of_a_replica_are_passed_on_as_one_sentence(served, call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(served)
    assert "\n" not in str(caught.value)


def background_tasks():
    return [task for task in asyncio.all_tasks(event_loop._shared_loop.loop) if not task.done()]


def test_closing_a_stream_early_cancels_its_requests(watched):
    batches = batches_of(200)
    for _ in watched.stream(batches, TopK(8), prefetch=150):
        break
    wait_until(lambda: not background_tasks() and watched.open == 0, seconds=60)
    assert watched.statistics.calls < 150, "cancelled requests were sent"
    assert watched.score(random_sequences(1), TopK(8)).tokens > 0


def test_cancelling_ascore_cancels_its_requests(watched):
    async def main():
        task = asyncio.create_task(watched.ascore(random_sequences(1_000), TopK(8)))
        while not watched.open:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_until(lambda: not background_tasks() and watched.open == 0, seconds=60)
    assert watched.statistics.calls < 150, "cancelled requests were sent"


def test_replica_drops_cancelled_requests(served):
    """Many minutes of generation are requested from both replicas and cancelled. Replicas answer the oldest request
    first, so the next client would have to wait for all of them."""
    first_client = connect_teacher("served", served.settings.model_copy(update={"in_flight": 200}))
    prompts = [np.full(4, 4 + i % 300) for i in range(6_000)]
    parameters = SamplingParameters(max_new_tokens=500, temperature=1.0)

    async def main():
        task = asyncio.create_task(first_client.agenerate(prompts, parameters))
        while first_client.statistics.calls < 188:
            await asyncio.sleep(0.01)
        await asyncio.sleep(2)  # until the requests have arrived
        task.cancel()

    asyncio.run(main())
    next_client = connect_teacher("served", served.settings.model_copy(update={"deadline_seconds": 60}))
    assert len(next_client.generate(["the cat"], max_new_tokens=2)) == 1


def test_missing_teacher_is_one_sentence(ray_cluster):
    with pytest.raises(InputError, match="No teacher 'nobody' answers on this Ray cluster; start it with `rayk serve`"):
        connect_teacher("nobody")
    attach = TeacherConfig(name="nobody", attach=True)
    with pytest.raises(InputError, match="No teacher 'nobody'"), serve_teacher(attach):
        pass


def test_attached_teacher_keeps_running(served):
    with serve_teacher(TeacherConfig(name="served", attach=True, deadline_seconds=60, in_flight=2)) as teacher:
        assert teacher.info == served.info
        assert teacher.settings.deadline_seconds == 60
        assert teacher.score(random_sequences(2), TopK(4)).tokens
    assert served.score(random_sequences(2), TopK(4)).tokens
    assert connect_teacher("served").settings.model == served.settings.model


def test_other_settings_under_a_used_name_are_rejected(served, tiny_student):
    with (
        pytest.raises(InputError, match="'served' with other settings runs"),
        serve_teacher(teacher_config("served", tiny_student)),
    ):
        pass
    assert served.score(random_sequences(2), TopK(4)).tokens


def test_teacher_that_cannot_load_is_one_sentence_and_is_removed(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(application, "_START_ATTEMPTS", 1)
    with pytest.raises(InputError) as caught, serve_teacher(teacher_config("broken", str(tmp_path / "none"))):
        pass
    assert str(caught.value) == (
        f"Teacher 'broken' did not start: The folder '{tmp_path / 'none'}' does not exist, so no tokenizer can be "
        "loaded; give a model folder or a hub id."
    )
    assert "broken" not in serve.status().applications


def with_requested_ids(sequences, m=3):
    random = np.random.default_rng(0)
    return [
        TokenSequence(s.input_ids, s.counted, random.integers(-1, 300, (s.counted_tokens, m)).astype(np.int32))
        for s in sequences
    ]


@pytest.mark.parametrize("support", [Requested(4, (1.0, 2.0)), Sampled(12), Sampled(12, 0.9, 5), Hidden()], ids=str)
def test_every_support_passes_through_serve(served, engine, support):
    sequences = with_requested_ids(random_sequences(20))
    signals, expected = served.score(sequences, support), asyncio.run(engine.score(sequences, support))
    assert signals.support == expected.support
    assert torch.equal(signals.offsets, expected.offsets)
    torch.testing.assert_close(signals.target_logprobs, expected.target_logprobs, atol=1e-4, rtol=0)
    if signals.ids is not None:
        assert (signals.ids == expected.ids).float().mean() > 0.99
    if signals.hidden is not None:
        exact = asyncio.run(engine.score(sequences, TopK(16)))
        log_p = signals.logits().log_softmax(1)
        torch.testing.assert_close(log_p.gather(1, exact.ids), exact.logprobs, atol=0.02, rtol=0.01)


def test_wrong_head_is_detected(served, engine):
    teacher = connect_teacher("served")
    head = engine.head()
    for wrong in (replace(head, scale=0.5), replace(head, softcap=5.0), replace(head, bias=torch.randn(384) * 4)):
        teacher._head = event_loop.run_in_background(asyncio.sleep(0, wrong))
        with pytest.raises(RaykError, match="hidden states of teacher 'served' and its head do not reproduce its own"):
            teacher.score(random_sequences(8), Hidden())
    teacher._head = None
    assert teacher.score(random_sequences(8), Hidden()).logits().shape[1] == 384


def test_nan_from_a_teacher_is_an_error_that_names_it(spare):
    [well] = random_sequences(1)
    assert spare.score([well], TopK(4)).tokens
    ids = well.input_ids.copy()
    ids[0] = 300
    with pytest.raises(RaykError, match="'spare' returned an unusable signal for row 0 of the batch: .*NaN"):
        spare.score([TokenSequence(ids, well.counted)], TopK(4))
    assert spare.statistics.retries == 0


def test_autoscaled_teacher_deploys(spare):
    assert spare.score(random_sequences(2), TopK(4)).tokens
    application = serve.status().applications["spare"]
    assert application.status == "RUNNING"
    assert 1 <= application.deployments["teacher"].replica_states["RUNNING"] <= 2


def test_removed_teacher_is_unavailable_at_the_deadline(spare):
    teacher = connect_teacher("spare", spare.settings.model_copy(update={"deadline_seconds": 2}))
    assert teacher.score(random_sequences(2), TopK(4)).tokens
    serve.delete("spare")
    for _ in range(2):
        with pytest.raises(TeacherUnavailable, match="Teacher 'spare' did not answer within 2 s"):
            teacher.score(random_sequences(2), TopK(4))
    wait_until(lambda: not background_tasks(), seconds=60)


SCRIPT = """
from rayk.config import TeacherConfig
from rayk.errors import InputError
from rayk.teachers import serve_teacher
import sys
from rayk.environment import set_threading
set_threading()
for model in sys.argv[1:]:
    try:
        with serve_teacher(TeacherConfig(name="quiet", model=model, resources={"num_cpus": 0.25})) as teacher:
            teacher.generate(["the cat"], max_new_tokens=2)
    except InputError:
        pass
print("done")
"""


@pytest.mark.long
def test_serving_prints_nothing(tiny_teacher):
    """No INFO lines of Ray Serve, no progress bars of transformers, no tracebacks of replicas."""
    ended = subprocess.run([sys.executable, "-c", SCRIPT, tiny_teacher], capture_output=True, text=True, timeout=300)
    assert (ended.stdout, ended.stderr) == ("done\n", "")
