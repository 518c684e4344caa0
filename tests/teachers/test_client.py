"""The asker's side on real Ray Serve, with replicas that stay up."""

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

from rayk.config import TeacherConfig
from rayk.config.support import Hidden, Logprob, Requested, Sampled, TopK
from rayk.engines.base import SamplingParameters
from rayk.engines.transformers import TransformersEngine
from rayk.errors import InputError, RaykError, TeacherUnavailable
from rayk.serving import application, event_loop
from rayk.signals.sequence import TokenSequence
from rayk.teachers import connect_teacher, serve_teacher
from tests.teachers.helpers import assert_alike, config_of, eventually, sequences_of
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def engine(tiny_teacher):
    return TransformersEngine(tiny_teacher)


@pytest.fixture
def watched(served, monkeypatch):
    """The served teacher, with few credits and a count of the calls it has open."""
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
    """A teacher to be hard on: one replica that may become two, NaN where token 300 is read. It is
    brought up again for the test after the one that took it down."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        model = tiny_model(tokenizer=tiny_tokenizer())
        with torch.no_grad():
            model.model.embed_tokens.weight[300] = float("nan")  # one token, so that loading finds nothing wrong
        model.save_pretrained(folder)
        tiny_tokenizer(folder)
    config = config_of(
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
    return [Batch(sequences_of(3, seed=seed + i)) for i in range(count)]


@pytest.mark.parametrize("support", [TopK(64), TopK(5, (1.0, 2.0)), Logprob()])
def test_score_is_the_engines(served, engine, support):
    sequences = sequences_of(20)
    assert_alike(served.score(sequences, support), asyncio.run(engine.score(sequences, support)))


def test_score_takes_batches_and_many_calls(watched, engine):
    sequences = sequences_of(30)
    signals = watched.score(Batch(sequences), TopK(8))
    assert watched.statistics.calls > 5
    assert watched.statistics.tokens == signals.tokens == sum(s.counted_tokens for s in sequences)
    assert_alike(signals, asyncio.run(engine.score(sequences, TopK(8))))


def test_in_flight_is_never_exceeded_and_is_used(watched):
    watched.score(sequences_of(60), TopK(8))
    assert 3 <= watched.most_open <= 6  # three for each replica that the client knows of
    assert watched.open == 0


def test_two_hundred_requests_at_once_are_all_answered(served, engine):
    sequences = sequences_of(200)
    teacher = connect_teacher("served", served.settings.model_copy(update={"in_flight": 200}))

    async def main():
        return await asyncio.gather(*(teacher.ascore([one], TopK(8)) for one in sequences))

    expected = asyncio.run(engine.score(sequences, TopK(8)))
    for row, signals in enumerate(asyncio.run(main())):
        assert_alike(signals, expected.select([row]))
    assert teacher.statistics.calls == 200
    assert teacher.statistics.retries == 0


def test_stream_gives_every_batch_in_order(served, engine):
    batches = batches_of(12)
    answered = list(served.stream(iter(batches), TopK(8), prefetch=5))
    assert [id(batch) for batch, _ in answered] == [id(batch) for batch in batches]
    for batch, signals in answered:
        assert_alike(signals, asyncio.run(engine.score(batch.sequences, TopK(8))))


def test_stream_asks_no_further_ahead_than_prefetch(served):
    taken = []

    def source():
        for batch in batches_of(10):
            taken.append(batch)
            yield batch

    for received, _ in enumerate(served.stream(source(), TopK(8), prefetch=2), start=1):
        assert len(taken) <= received + 2


def test_stream_of_nothing_and_without_prefetch(served):
    assert list(served.stream([], TopK(8))) == []
    assert len(list(served.stream(batches_of(3), TopK(8), prefetch=0))) == 3


def test_waiting_is_counted(served):
    before = served.statistics.wait_seconds
    list(served.stream(batches_of(2), TopK(8)))
    assert served.statistics.wait_seconds > before


def test_an_error_in_a_stream_comes_in_its_place(served):
    batches = [*batches_of(2), Batch(sequences_of(1, longest=600, shortest=600)), *batches_of(2)]
    stream = served.stream(batches, TopK(8))
    assert [next(stream)[0], next(stream)[0]] == batches[:2]
    with pytest.raises(InputError, match="600 tokens is longer"):
        next(stream)


def test_asking_from_inside_a_running_event_loop(served, engine):
    """As in a notebook: `ascore` awaits, and even the blocking `score` does not touch the running loop."""
    sequences = sequences_of(4)

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
    assert ticks > 10, "the caller's loop was held"
    assert_alike(awaited, blocking)


def test_asking_from_threads(served, engine):
    results = {}

    def ask(row):
        results[row] = served.score(sequences_of(4, seed=row), TopK(8))

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in range(6):
        assert_alike(results[row], asyncio.run(engine.score(sequences_of(4, seed=row), TopK(8))))


def test_generate_is_the_engines(served):
    prompts = [sequence.input_ids[:8] for sequence in sequences_of(40)]
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


def test_generate_reads_text_and_has_nothing_to_say_to_nothing(served):
    [of_text] = served.generate(["the cat sat"], max_new_tokens=5, temperature=0.0)
    [of_ids] = served.generate([np.array(tiny_tokenizer()("the cat sat").input_ids)], max_new_tokens=5, temperature=0.0)
    assert of_text.text == of_ids.text
    assert served.generate([]) == []


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda t: t.score(sequences_of(2), TopK(1_000)), "support.k is 1000, but .* vocabulary of"),
        (lambda t: t.score(sequences_of(1, longest=600, shortest=600)), "600 tokens is longer than .* takes"),
        (lambda t: t.score([]), "nothing to score"),
        (lambda t: t.generate(["the cat"], max_new_tokens=600), "max_new_tokens"),
        (lambda t: t.generate([""]), "empty prompt"),
        (lambda t: t.generate(["the cat"], top_p=2.0), "top_p"),
    ],
)
def test_what_a_replica_refuses_comes_as_its_own_sentence(served, ask, said):
    with pytest.raises(InputError, match=said) as caught:
        ask(served)
    assert "\n" not in str(caught.value)


def background_tasks():
    return [task for task in asyncio.all_tasks(event_loop._shared_loop.loop) if not task.done()]


def test_leaving_a_stream_early_leaves_nothing_running(watched):
    batches = batches_of(200)
    for _ in watched.stream(batches, TopK(8), prefetch=150):
        break
    eventually(lambda: not background_tasks() and watched.open == 0)
    assert watched.statistics.calls < 150, "what had been begun was asked for after all"
    assert watched.score(sequences_of(1), TopK(8)).tokens > 0


def test_a_cancelled_ascore_leaves_nothing_running(watched):
    async def main():
        asking = asyncio.create_task(watched.ascore(sequences_of(1_000), TopK(8)))
        while not watched.open:
            await asyncio.sleep(0.001)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(main())
    eventually(lambda: not background_tasks() and watched.open == 0)
    assert watched.statistics.calls < 150, "what had been begun was asked for after all"


def test_a_replica_drops_what_waited_for_who_has_left(served):
    """Many minutes of generation, asked of both replicas and given up. They answer the oldest first, so the next asker
    would have to wait for all of it."""
    leaving = connect_teacher("served", served.settings.model_copy(update={"in_flight": 200}))
    prompts = [np.full(4, 4 + i % 300) for i in range(6_000)]
    parameters = SamplingParameters(max_new_tokens=500, temperature=1.0)

    async def main():
        asking = asyncio.create_task(leaving.agenerate(prompts, parameters))
        while leaving.statistics.calls < 188:
            await asyncio.sleep(0.01)
        await asyncio.sleep(2)  # let them arrive
        asking.cancel()

    asyncio.run(main())
    next_asker = connect_teacher("served", served.settings.model_copy(update={"deadline_seconds": 60}))
    assert len(next_asker.generate(["the cat"], max_new_tokens=2)) == 1


def test_a_missing_teacher_is_one_sentence(ray_cluster):
    with pytest.raises(InputError, match="No teacher 'nobody' answers on this Ray cluster; start it with `rayk serve`"):
        connect_teacher("nobody")
    attach = TeacherConfig(name="nobody", attach=True)
    with pytest.raises(InputError, match="No teacher 'nobody'"), serve_teacher(attach):
        pass


def test_attaching_leaves_the_teacher_running(served):
    with serve_teacher(TeacherConfig(name="served", attach=True, deadline_seconds=60, in_flight=2)) as teacher:
        assert teacher.info == served.info
        assert teacher.settings.deadline_seconds == 60
        assert teacher.score(sequences_of(2), TopK(4)).tokens
    assert served.score(sequences_of(2), TopK(4)).tokens
    assert connect_teacher("served").settings.model == served.settings.model


def test_another_teacher_under_a_name_that_runs_is_refused_and_harms_none(served, tiny_student):
    with (
        pytest.raises(InputError, match="'served' with other settings runs"),
        serve_teacher(config_of("served", tiny_student)),
    ):
        pass
    assert served.score(sequences_of(2), TopK(4)).tokens


def test_a_teacher_that_cannot_load_is_one_sentence_and_leaves_nothing(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(application, "_START_ATTEMPTS", 1)
    with pytest.raises(InputError) as caught, serve_teacher(config_of("broken", str(tmp_path / "none"))):
        pass
    assert str(caught.value) == (
        f"Teacher 'broken' did not start: The folder '{tmp_path / 'none'}' does not exist, so no tokenizer can be "
        "loaded; give a model folder or a hub id."
    )
    assert "broken" not in serve.status().applications


def asking(sequences, m=3):
    random = np.random.default_rng(0)
    return [
        TokenSequence(s.input_ids, s.counted, random.integers(-1, 300, (s.counted_tokens, m)).astype(np.int32))
        for s in sequences
    ]


@pytest.mark.parametrize("support", [Requested(4, (1.0, 2.0)), Sampled(12), Sampled(12, 0.9, 5), Hidden()], ids=str)
def test_every_support_comes_through_the_service(served, engine, support):
    sequences = asking(sequences_of(20))
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


def test_hidden_states_that_do_not_fit_the_head_are_noticed(served, engine):
    teacher = connect_teacher("served")
    head = engine.head()
    for wrong in (replace(head, scale=0.5), replace(head, softcap=5.0), replace(head, bias=torch.randn(384) * 4)):
        teacher._head = event_loop.run_in_background(asyncio.sleep(0, wrong))
        with pytest.raises(RaykError, match="hidden states of teacher 'served' and its head do not reproduce its own"):
            teacher.score(sequences_of(8), Hidden())
    teacher._head = None
    assert teacher.score(sequences_of(8), Hidden()).logits().shape[1] == 384


def test_nan_from_a_teacher_names_it_and_is_not_learned_from(spare):
    [well] = sequences_of(1)
    assert spare.score([well], TopK(4)).tokens
    ids = well.input_ids.copy()
    ids[0] = 300
    with pytest.raises(RaykError, match="'spare' returned an unusable signal for row 0 of the batch: .*NaN"):
        spare.score([TokenSequence(ids, well.counted)], TopK(4))
    assert spare.statistics.retries == 0


def test_a_number_of_replicas_that_may_change_deploys(spare):
    assert spare.score(sequences_of(2), TopK(4)).tokens
    application = serve.status().applications["spare"]
    assert application.status == "RUNNING"
    assert 1 <= application.deployments["teacher"].replica_states["RUNNING"] <= 2


def test_a_teacher_taken_away_is_unavailable_at_the_deadline(spare):
    teacher = connect_teacher("spare", spare.settings.model_copy(update={"deadline_seconds": 2}))
    assert teacher.score(sequences_of(2), TopK(4)).tokens
    serve.delete("spare")
    for _ in range(2):
        with pytest.raises(TeacherUnavailable, match="Teacher 'spare' did not answer within 2 s"):
            teacher.score(sequences_of(2), TopK(4))
    eventually(lambda: not background_tasks())


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


def test_serving_writes_nothing_to_the_terminal(tiny_teacher):
    """No INFO lines of Ray Serve, no progress bars of transformers, no tracebacks of replicas."""
    ended = subprocess.run([sys.executable, "-c", SCRIPT, tiny_teacher], capture_output=True, text=True, timeout=300)
    assert (ended.stdout, ended.stderr) == ("done\n", "")
