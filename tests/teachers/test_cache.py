"""The signal cache between a run and its teacher: one request per signal, equal bit for bit, one key per teacher."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rayk import cli
from rayk.commands.cache import fill_cache, verify_cache
from rayk.config import CacheConfig, parse_config
from rayk.config.support import Hidden, Logprob, Requested, Sampled, TopK
from rayk.errors import InputError
from rayk.run import ProgressListener, distill, with_absolute_paths
from rayk.signals.batch import SignalBatch
from rayk.signals.sequence import TokenSequence
from rayk.teachers import Teacher, connect_teacher
from rayk.teachers.cache import SignalCache
from tests.runs import assert_losses_close, curve, metrics, settings, weights, write_rows
from tests.signals.test_codec import assert_equal
from tests.teachers.helpers import assert_signals_close, random_sequences

pytestmark = pytest.mark.cluster
KD = {"kind": "logit_kd", "support": {"kind": "topk", "k": 8}, "temperature": 2.0}
SUPPORTS = [TopK(8), TopK(8, (1.0, 2.0)), Sampled(20), Sampled(5, tau=0.7), Hidden(), Hidden("float32"), Logprob()]


@pytest.fixture
def place(tmp_path):
    return CacheConfig(path=str(tmp_path / "cache"))


@pytest.fixture
def new_client(served, place):
    """Function that returns a new client of the served teacher with the cache, as in another process."""

    def make() -> object:
        return connect_teacher("served", served.settings, SignalCache(place))

    return make


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_cold_and_warm_cache_agree_bit_for_bit(served, new_client, support):
    sequences = random_sequences(20)
    cold, warm = new_client(), new_client()
    first = cold.score(sequences, support)
    assert cold.statistics.calls and not cold.statistics.cached_tokens
    assert_equal(cold.score(sequences, support), first)
    cold.cache.flush()
    assert_equal(warm.score(sequences, support), first)
    assert warm.statistics.cached_tokens == warm.statistics.tokens == first.tokens
    assert warm.statistics.calls == isinstance(support, Hidden), "only the head is requested"
    own = served.score(sequences, support)
    if isinstance(support, TopK):
        assert (own.logprobs - first.logprobs).abs().max() < 0.3
        own = replace(own, logprobs=first.logprobs)
    assert_signals_close(first, own)
    if isinstance(support, Hidden):
        torch.testing.assert_close(first.logits(), own.logits(), atol=0.05, rtol=0.01)


def test_cached_and_requested_rows_are_in_order(served, new_client):
    sequences = random_sequences(30)
    teacher = new_client()
    known = teacher.score(sequences[::3], TopK(8))
    both = teacher.score(sequences, TopK(8))
    assert teacher.statistics.cached_tokens == known.tokens
    assert_equal(both.select(range(0, 30, 3)), known)
    assert_signals_close(replace(both, logprobs=None), replace(served.score(sequences, TopK(8)), logprobs=None))


def test_a_repeated_row_has_the_same_signal(new_client):
    [one, other] = random_sequences(2)
    signals = new_client().score([one, other, one], TopK(8))
    assert_equal(signals.select([0]), signals.select([2]))


def test_threads_on_one_cache_agree(new_client):
    teacher, sequences = new_client(), random_sequences(40)
    answers: dict[int, SignalBatch] = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: teacher.score(sequences, TopK(8))})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for signals in answers.values():
        assert_equal(signals, answers[0])
    teacher.cache.flush()
    assert_equal(new_client().score(sequences, TopK(8)), answers[0])


def test_key_contains_everything_that_a_signal_depends_on(served, place):
    sequence = random_sequences(1, shortest=10)[0]
    cache, info = SignalCache(place), served.info
    cache.add(info, [sequence], served.score([sequence], TopK(8, (1.0, 2.0))))
    assert cache.find(info, [sequence], TopK(8, (1.0, 2.0)))
    ids, counted = sequence.input_ids.copy(), sequence.counted.copy()
    ids[-1] += 1
    counted[-1] ^= True
    for others in (TokenSequence(ids, sequence.counted), TokenSequence(sequence.input_ids, counted)):
        assert not cache.find(info, [others], TopK(8, (1.0, 2.0)))
    for support in (TopK(8), TopK(7, (1.0, 2.0)), TopK(8, (1.0, 3.0)), Logprob(), Hidden()):
        assert not cache.find(info, [sequence], support)
    for change in (
        {"weights_fingerprint": "another"}, {"tokenizer_fingerprint": "another"}, {"dtype": "bfloat16"},
        {"engine": "vllm"},
    ):  # fmt: skip
        assert not cache.find(replace(info, **change), [sequence], TopK(8, (1.0, 2.0)))
    for one, other in [
        (Sampled(5), Sampled(5, seed=1)),
        (Sampled(5), Sampled(5, tau=0.5)),
        (Hidden(), Hidden("float32")),
    ]:
        cache.add(info, [sequence], served.score([sequence], one))
        assert cache.find(info, [sequence], one)
        assert not cache.find(info, [sequence], other)


def test_requested_signals_are_never_cached(new_client):
    teacher = new_client()
    sequences = [replace(s, requested=np.full((s.counted_tokens, 2), 5, np.int32)) for s in random_sequences(3)]
    for _ in range(2):
        teacher.score(sequences, Requested(4))
    assert (teacher.statistics.calls, teacher.statistics.cached_tokens) == (2, 0)


def test_teacher_with_unknown_weights_cannot_be_cached(served, place):
    info = replace(served.info, weights_fingerprint="")
    with pytest.raises(InputError, match="its weights are unknown; remove 'cache'"):
        Teacher("served", info, served.settings, SignalCache(place))


def cached_config(folder: Path, student: str, name: str, **changes):
    values = settings(folder, student, KD, **changes) | {"output": str(folder / name)}
    return values | {"cache": {"path": str(folder / "cache")}}


def steps(run: Path) -> list[dict]:
    timed = ("_seconds", "_at", "tokens_per_second", "cached_tokens")
    return [{name: value for name, value in row.items() if not name.endswith(timed)} for row in metrics(run)]


def test_second_run_sends_no_requests_and_trains_the_same(tmp_path, tiny_student, served):
    for name in ("cold", "warm"):
        distill(parse_config(cached_config(tmp_path, tiny_student, name, steps=9)))  # 48 rows: 1.5 epochs
    cold, warm = metrics(tmp_path / "cold"), metrics(tmp_path / "warm")
    assert steps(tmp_path / "cold") == steps(tmp_path / "warm")
    assert 0 < sum(row["cached_tokens"] for row in cold) < sum(row["counted_tokens"] for row in cold)
    assert sum(row["cached_tokens"] for row in warm) == sum(row["counted_tokens"] for row in warm)
    one, other = weights(tmp_path / "cold"), weights(tmp_path / "warm")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_other_divergence_or_temperature_sends_no_requests(tmp_path, tiny_student, served):
    support = {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]}
    for name, method in {
        "one": {"divergence": "forward_kl"},
        "two": {"divergence": "reverse_kl", "temperature": 2.0},
    }.items():
        values = cached_config(tmp_path, tiny_student, name) | {
            "method": {"kind": "logit_kd", "support": support} | method
        }
        distill(parse_config(values))
    rows = metrics(tmp_path / "two")
    assert sum(row["cached_tokens"] for row in rows) == sum(row["counted_tokens"] for row in rows)
    assert curve(tmp_path / "one") != curve(tmp_path / "two")


@pytest.mark.long
def test_worker_reads_the_filled_cache(tmp_path, tiny_student, served):
    seen = []

    class Watching(ProgressListener):
        def progress(self, done, total, text):
            seen.append((done, total))

    write_rows(tmp_path / "held_out.jsonl", count=5, seed=9)
    values = cached_config(tmp_path, tiny_student, "worker", workers=1)
    values["data"]["evaluation"] = {"path": str(tmp_path / "held_out.jsonl")}
    config = parse_config(values)
    filled = fill_cache(config, Watching())
    assert [(each.row_kind, each.rows, each.cached_tokens) for each in filled] == [
        ("training rows", 48, 0), ("evaluation rows", 5, 0), ("evaluation rows", 5, 0),
    ]  # fmt: skip
    assert seen[-1] == (5, 5) and (48, 48) in seen
    found = verify_cache(config)
    assert (found.entries, found.damaged) == (48 + 5 + 5, [])
    assert 0 <= found.bytes - sum(each.bytes for each in filled) <= 16 * found.segments
    assert [each.tokens - each.cached_tokens for each in fill_cache(config)] == [0, 0, 0]
    distill(config)
    rows = metrics(tmp_path / "worker")
    assert sum(row["cached_tokens"] for row in rows) >= sum(row["counted_tokens"] for row in rows)
    (tmp_path / "alone").mkdir()
    distill(parse_config(values | {"output": str(tmp_path / "alone"), "training": values["training"] | {"workers": 0}}))
    assert_losses_close(curve(tmp_path / "worker"), curve(tmp_path / "alone"))


def test_resumed_run_may_move_its_cache_but_not_drop_it(tmp_path, tiny_student, served):
    values = cached_config(tmp_path, tiny_student, "run")
    distill(parse_config(values))
    with pytest.raises(InputError, match="was started with another 'cache'"):
        distill(parse_config(values | {"cache": None}), resume=True)
    distill(parse_config(values | {"cache": {"path": str(tmp_path / "moved"), "max_gigabytes": 1}}), resume=True)
    with pytest.raises(InputError, match="The cache '.*rows.jsonl/no' cannot be used"):
        distill(parse_config(values | {"cache": {"path": str(tmp_path / "rows.jsonl" / "no")}}), resume=True)


def test_relative_cache_path_is_the_same_for_all_workers(tmp_path, tiny_student, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, meant in [("kept", str(tmp_path / "kept")), ("s3://bucket/kept", "s3://bucket/kept")]:
        values = cached_config(tmp_path, tiny_student, "run") | {"cache": {"path": given}}
        assert with_absolute_paths(parse_config(values)).cache.path == meant


def test_damaged_signals_are_requested_again(tmp_path, tiny_student, served):
    distill(parse_config(cached_config(tmp_path, tiny_student, "cold")))
    for path in (tmp_path / "cache").glob("*.rks"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
    distill(parse_config(cached_config(tmp_path, tiny_student, "mended")))
    assert_losses_close(curve(tmp_path / "cold"), curve(tmp_path / "mended"))
    distill(parse_config(cached_config(tmp_path, tiny_student, "warm")))
    assert steps(tmp_path / "mended") == steps(tmp_path / "warm")


def test_cache_command_fills_and_verifies(tmp_path, tiny_student, served, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(cached_config(tmp_path, tiny_student, "run")))

    def rayk(*arguments):
        monkeypatch.setattr("sys.argv", ["rayk", "cache", str(path), *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    code, out, err = rayk()
    assert code == 0
    assert "bytes per entry" in out and "training rows  topk" in out
    assert "row 48/48" in err
    code, _, err = rayk("--verify")
    assert code == 0 and err.startswith("1 segments contain 48 signals in ")
    [segment] = (tmp_path / "cache").glob("*.rks")
    segment.write_bytes(segment.read_bytes()[:-3])
    code, _, err = rayk("--verify")
    assert code == 1 and f"Damaged and deleted: {segment.name}" in err
    assert rayk("--verify")[0] == 0
    assert rayk("--set", "cache=null")[::2] == (
        2,
        "rayk: cache is missing; set cache.path to a folder or URI.\n",
    )
