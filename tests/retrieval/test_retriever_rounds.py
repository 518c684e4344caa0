"""A retriever is trained on a served teacher's scores, each requested once, and later commands find it."""

import json
import os
import shutil
import signal
from contextlib import suppress

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from rayk.commands.doctor import examine
from rayk.config import parse_config
from rayk.data.demonstrations import DemonstrationPool
from rayk.data.tokenizing import tokenize
from rayk.errors import InputError, UnusableSignal
from rayk.retrieval.model_training import ComputeSettings
from rayk.retrieval.rounds import RetrieverTraining
from rayk.retrieval.teacher_scores import REFUSED, TeacherScores
from rayk.run import distill, evaluate_model
from rayk.run.inputs import read_inputs
from tests.runs import assert_same_learning, metrics, rayk, settings, wait_until, write_tasks
from tests.tiny import tiny_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoders") / "bert", hidden=16, layers=1)


def values_of(folder, student, bert, **changes):
    """The settings of a run that trains a retriever in two short rounds."""
    write_tasks(folder, 40)
    common = {"steps": 4, "warmup_steps": 1, "batch_size": 4, "learning_rate": 1e-3}
    retriever = {
        "encoder": bert, "reward_model": {"model": bert, **common}, "candidates": 8, "nearest": 12, **common,
    } | changes  # fmt: skip
    demonstrations = {"k": 2, "choice": "learned", "retriever": retriever}
    method = {"kind": "in_context", "text_weight": 0.0, "demonstrations": demonstrations}
    values = settings(folder, student, method, steps=2)
    values["data"] |= {"max_tokens": 256, "evaluation": {"path": str(folder / "rows.jsonl"), "rows": 8}}
    return values | {"evaluation": {"support": {"k": 8}}}


@pytest.fixture
def learning(tmp_path, tiny_student, encoder, served):
    """make(asker=served, **settings of the retriever): a `RetrieverTraining` in tmp_path/retriever, and its stages."""

    def make(asker=served, **changes):
        config = parse_config(values_of(tmp_path, tiny_student, encoder, **changes))
        tokenizer = AutoTokenizer.from_pretrained(tiny_student)
        rows = tokenize(config.data.train, config.data, tokenizer)
        pool, stages = DemonstrationPool(rows, config.method, tokenizer, 256), []
        return RetrieverTraining(
            config.retriever, pool, rows, asker, tmp_path / "retriever",
            ComputeSettings(0), None, stages.append, lambda *given, **unit: None,
        ), stages  # fmt: skip

    return make


def stored_scores(folder):
    """All stored scores."""
    return [row for path in sorted((folder / "scores").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


class Interrupted(Exception):
    pass


def interrupting(teacher, after):
    """`teacher`, which raises `Interrupted` after this number of requests."""
    asked = 0

    class Requester(type(teacher)):
        def __init__(self):
            vars(self).update(vars(teacher))

        async def ascore(self, batch, support=None):
            nonlocal asked
            asked += 1
            if asked > after:
                raise Interrupted
            return await teacher.ascore(batch, support)

    return Requester()


def test_score_is_the_mean_log_prob_of_the_answer_after_one_demonstration(learning, tmp_path, tiny_teacher):
    learned, _ = learning(rounds=1)
    learned.run()
    rows = {f"{tmp_path / 'rows.jsonl'}, line {i}": json.loads(line)
            for i, line in enumerate((tmp_path / "rows.jsonl").read_text().splitlines(), start=1)}  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher).eval()
    single = [row for row in stored_scores(tmp_path / "retriever") if len(row["demonstrations"]) == 1]
    assert len(single) > 80
    for score in single[:: len(single) // 8]:
        asked, (shown,) = rows[score["query"]], [rows[where] for where in score["demonstrations"]]
        assert (asked["task"], asked["completion"]) == (shown["task"], shown["completion"])
        assert asked["prompt"] != shown["prompt"]
        parts = [shown["prompt"], "\n", shown["completion"], "\n\n\n", asked["prompt"], "\n", asked["completion"]]
        ids = [tokenizer(part).input_ids for part in parts]
        whole = torch.tensor([token for part in ids for token in part])
        with torch.no_grad():
            logits = model(input_ids=whole[None]).logits[0, :-1]
        of_answer = logits.log_softmax(-1).gather(1, whole[1:, None])[-len(ids[-1]) :]
        assert score["mean_logprob"] == pytest.approx(float(of_answer.mean()), rel=1e-3, abs=1e-3)
        assert score["tokens"] == len(ids[-1])


def test_candidate_with_another_label_is_refused_without_a_request(learning, tmp_path):
    learned, _ = learning(rounds=1)
    summary = learned.run()
    (first,) = summary["rounds"]
    held_out = summary["held_out"]["rows"]
    assert first["candidates"] == 8 * summary["queries"] and 0 < first["refused"] < first["candidates"]
    single = [row for row in stored_scores(tmp_path / "retriever") if len(row["demonstrations"]) == 1]
    assert len(single) == first["candidates"] - first["refused"]
    assert (summary["queries"], held_out) == (36, 4)
    shutil.rmtree(tmp_path / "retriever")
    learned, _ = learning(rounds=1, same_label=False)
    assert learned.run()["rounds"][0]["refused"] == 0


def test_interrupted_training_requests_no_score_twice_and_ends_the_same(learning, served, tmp_path):
    whole, _ = learning()
    expected = whole.run()
    asked = {row["key"]: row["mean_logprob"] for row in stored_scores(tmp_path / "retriever")}
    shutil.copytree(tmp_path / "retriever", tmp_path / "whole")
    shutil.rmtree(tmp_path / "retriever")
    seen: set[str] = set()
    for calls in (3, 4, 100):
        learned, _ = learning(interrupting(served, calls))
        with suppress(Interrupted):
            summary = learned.run()
        rows = [row["key"] for row in stored_scores(tmp_path / "retriever")]
        assert len(rows) == len(set(rows)) and set(rows) > seen
        seen = set(rows)
    assert seen == set(asked)
    without_times = [{k: v for k, v in each.items() if k != "seconds"} for each in summary["rounds"]]
    assert without_times == [{k: v for k, v in each.items() if k != "seconds"} for each in expected["rounds"]]
    assert summary["held_out"] == expected["held_out"]
    for name in ("model.safetensors", "summary.json"):
        assert (tmp_path / "retriever" / name).exists()
    assert (tmp_path / "retriever" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "retriever" / "rounds").exists()


def test_finished_round_is_not_trained_again(learning, served, tmp_path):
    learned, _ = learning()
    learned._measure = lambda what, chosen: None if what != "learned" else (_ for _ in ()).throw(Interrupted)
    with pytest.raises(Interrupted):
        learned.run()
    learned, stages = learning()
    learned.run()
    trained = [stage for stage in stages if "training" in stage]
    assert trained == ["Retriever, round 2: training the reward model", "Retriever, round 2: training the encoder"]


def test_retriever_of_other_rows_is_refused(learning, tmp_path):
    learned, _ = learning(rounds=1, reward_model=None)
    learned.run()
    (tmp_path / "retriever" / "fingerprint").write_text("others")
    learned, _ = learning(rounds=1, reward_model=None)
    with pytest.raises(InputError, match="was started with other training rows or another pool"):
        learned.run()


def test_unusable_score_counts_as_refused(learning, served, tmp_path):
    class Mute(type(served)):
        def __init__(self):
            vars(self).update(vars(served))

        async def ascore(self, batch, support=None):
            bad = [place for place, row in enumerate(batch) if len(row) % 2]
            if bad:
                raise UnusableSignal("no", bad)
            return await served.ascore(batch, support)

    learned, _ = learning()
    scores = TeacherScores(Mute(), tmp_path / "few")
    pool, rows = learned._pool, list(learned._pool.rows)
    shown = [(pool.place_demonstrations(row, [place - 1]), ["somewhere"]) for place, row in enumerate(rows)]
    given = scores.compute(shown, len(shown), lambda *progress: None)
    odd = np.array([len(query.view(served.name)) % 2 == 1 for query, _ in shown])
    assert odd.any() and not odd.all()
    assert (given[odd] == REFUSED).all() and (given[~odd] > REFUSED).all()
    assert scores.unusable == odd.sum()


@pytest.mark.nightly
def test_run_killed_in_every_stage_ends_the_same(tmp_path, tiny_student, encoder, served):
    def run_of(name):
        (tmp_path / name).mkdir()
        values = values_of(tmp_path / name, tiny_student, encoder, rounds=1, steps=100)
        values["method"]["demonstrations"]["retriever"]["reward_model"]["steps"] = 100
        # Both processes compute on as many threads, whose number changes the last digits.
        values["training"] |= {"steps": 30, "checkpoint_every_steps": 4, "threads": 1}
        return values

    whole = distill(parse_config(run_of("whole"))).output
    values, path, log = run_of("killed"), tmp_path / "run.yaml", tmp_path / "log"
    path.write_text(yaml.safe_dump(values))
    out, address = tmp_path / "killed" / "run", ray.get_runtime_context().gcs_address
    first = out / "retriever" / "rounds" / "1"

    def killed_at(condition, what):
        with rayk("run", path, "--resume", log=log, RAY_ADDRESS=address) as process:
            wait_until(condition, what, process)
            os.killpg(process.pid, signal.SIGKILL)

    killed_at(lambda: "training the reward model" in log.read_text(), "the reward model's fit")
    scored = len(stored_scores(out / "retriever"))
    assert not (first / "rewards.parquet").exists()
    killed_at(lambda: "training the encoder" in log.read_text(), "the encoder's fit")
    assert (first / "rewards.parquet").exists() and not (first / "round.json").exists()
    killed_at(lambda: len(metrics(out)) > 8, "steps")
    distill(parse_config(values), resume=True)
    rows = [row["key"] for row in stored_scores(out / "retriever")]
    assert len(rows) == len(set(rows)) == len(stored_scores(whole / "retriever")) > scored > 0
    one, other = (folder / "retriever" / "model.safetensors" for folder in (whole, out))
    assert one.read_bytes() == other.read_bytes()
    assert_same_learning(out, whole)


def test_run_trains_a_retriever_once_and_reports_it(tmp_path, tiny_student, encoder, served):
    values = values_of(tmp_path, tiny_student, encoder, rounds=1)
    with pytest.raises(InputError, match="no trained retriever|no trained student"):
        evaluate_model(parse_config(values), tiny_student)
    summary = distill(parse_config(values)).summary
    folder = tmp_path / "run" / "retriever"
    assert set(summary["retriever"]["held_out"]["mean_logprob"]) == {"random", "bm25", "learned"}
    assert AutoModel.from_pretrained(folder).config.hidden_size == 16
    page = (tmp_path / "run" / "report.html").read_text()
    assert "those of the retriever" in page and "the helpful ones of 40 demonstrations" in page

    weights = (folder / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "run" / "model")
    distill(parse_config(values), resume=True)
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights

    learned = evaluate_model(parse_config(values), tiny_student)
    values["method"]["demonstrations"] = {"k": 2, "choice": "embedding", "encoder": str(folder)}
    assert evaluate_model(parse_config(values), tiny_student) == learned
    values["method"]["demonstrations"] |= {"encoder": encoder}
    assert evaluate_model(parse_config(values), tiny_student) != learned


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder": "nowhere"}, "method.demonstrations.retriever.encoder 'nowhere' cannot be loaded"),
        ({"reward_model": {"model": "nowhere"}}, "retriever.reward_model.model 'nowhere' cannot be loaded"),
        ({"max_tokens": 600}, "retriever.max_tokens is 600, but .* takes 512"),
        ({"positives": 7}, "No training row has more than 6 candidates"),
        ({"teacher": "nobody"}, "retriever.teacher 'nobody' is none of the teachers"),
        ({"candidates": 30}, "raise nearest"),
        ({"positives": 8}, "leave no negative among candidates"),
        ({"warmup_steps": 9}, r"warmup_steps \(9\) must be below steps \(4\)"),
        ({"stepz": 9}, "did you mean 'steps'"),
    ],
    ids=["encoder", "reward model", "positions", "positives", "teacher", "nearest", "all good", "warm-up", "misspelt"],
)
def test_unusable_settings_are_refused_at_the_start(change, said, tmp_path, tiny_student, encoder):
    values = values_of(tmp_path, tiny_student, encoder, **change)
    if "positives" in change:
        lines = (tmp_path / "rows.jsonl").read_text().splitlines()[:14]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    values["teachers"] = [{"name": "own", "model": tiny_student}]
    with pytest.raises(InputError, match=said):
        read_inputs(parse_config(values), {})


def test_retriever_requires_a_teacher_that_returns_log_probs(tmp_path, tiny_student, encoder):
    values = values_of(tmp_path, tiny_student, encoder)
    values["method"] |= {"hard_label_weight": 1.0, "final_hard_label_weight": None}
    with pytest.raises(InputError, match="choice 'learned' needs a teacher"):
        parse_config(values | {"teachers": []})
    endpoint = {"name": "far", "model": "m", "engine": {"kind": "openai", "base_url": "http://localhost:1"}}
    with pytest.raises(InputError, match="'far' is an endpoint"):
        parse_config(values | {"teachers": [endpoint]})
    values["method"]["demonstrations"]["choice"] = "bm25"
    with pytest.raises(InputError, match="'retriever' is only for choice 'learned'"):
        parse_config(values)


def test_doctor_describes_the_retriever(tmp_path, tiny_student, encoder, served):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values_of(tmp_path, tiny_student, encoder)))
    told = [check.text for check in examine(str(file)) if "Retriever" in check.text]
    assert len(told) == 1 and "teacher 'served' scores up to 16 demonstrations" in told[0]
