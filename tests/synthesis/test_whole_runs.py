"""From prompts to a trained student in one run, with any teacher and after any kill."""

import json
import os
import shutil
import signal

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from ray import serve

from rayk.commands.cache import fill_cache
from rayk.commands.doctor import examine
from rayk.config import parse_config
from rayk.errors import InputError, RunFailed
from rayk.run import ProgressListener, distill, synthesize, with_absolute_paths
from rayk.run.synthesis_inputs import with_synthesized_rows
from tests.engines.endpoint import Reply, completion, prompt_of
from tests.runs import curve, rayk, settings, wait_until
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cluster

PARROT = {"name": "parrot", "attach": True}


class Stages(ProgressListener):
    def __init__(self):
        self.stages, self.applications, self.seen = [], {}, []

    def stage(self, text):
        self.stages.append(text)
        if text.startswith("Training"):
            self.applications = serve.status().applications

    def progress(self, done, total, text, unit):
        assert unit == "completion"
        self.seen.append((done, total, text))


def run_of(folder, student, synthesis, teacher=PARROT, method="supervised", count=24, **sections):
    values = settings(folder, student, method, steps=3)
    rows = folder / "questions.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} + {n} =", "answer": 2 * n}) + "\n" for n in range(count)))
    values |= {"teachers": [teacher], "data": {"train": {"path": str(rows)}}, "synthesis": synthesis, **sections}
    return values


def rows_of(folder):
    return pq.read_table(folder / "run" / "synthesis" / "rows.parquet").to_pylist()


def test_responses_are_generated_and_trained_on_in_one_run(tmp_path, tiny_student, chat_teacher, endpoint):
    values = run_of(tmp_path, tiny_student, {"kind": "responses", "samples": 2, "filters": [{"kind": "repetition"}]})
    values["data"]["evaluation"] = values["data"]["train"] | {"completion_field": "answer"}
    numbers = iter(range(1000))
    endpoint.answer = lambda body: completion(body, f" sum {next(numbers)}")
    watching = Stages()
    result = distill(parse_config(values), listener=watching)
    assert len(rows_of(tmp_path)) == 48 == result.summary["rows"]["train"]
    assert watching.seen[-1][:2] == (48, 48)
    assert len(endpoint.requests) == 48
    page = (result.output / "report.html").read_text()
    assert "Synthesized training rows" in page
    assert "48 (100.0%)" in page
    # Training is the same as on rows of the user's.
    (tmp_path / "plain").mkdir()
    plain = settings(tmp_path / "plain", tiny_student, steps=3)
    plain["data"] = {"train": {"path": str(result.output / "synthesis" / "rows.parquet")}}
    assert curve(distill(parse_config(plain)).output) == curve(result.output)

    asked = len(endpoint.requests)
    watching = Stages()
    distill(parse_config(values), resume=True, listener=watching)
    assert len(endpoint.requests) == asked
    assert not any("Synthesizing" in stage for stage in watching.stages)
    with pytest.raises(InputError, match=r"was started with another 'synthesis\.samples'"):
        distill(parse_config(values | {"synthesis": values["synthesis"] | {"samples": 3}}), resume=True)


def test_a_teacher_with_another_tokenizer_generates_and_stops_before_training(tmp_path, tiny_student):
    tokenizer = tiny_tokenizer(sentences=("ein anderer Wortschatz als der des Schülers",), vocab_size=300)
    tiny_model(tmp_path / "teacher", vocab_size=300, peaked=3.0, tokenizer=tokenizer)
    teacher = {"name": "own", "model": str(tmp_path / "teacher"), "resources": {"num_cpus": 0.25}}
    synthesis = {
        "kind": "chain_of_thought", "chat": True, "rationales": 2, "keep": "answered", "answer_tokens": 8,
        "sampling": {"max_new_tokens": 12, "temperature": 1.0}, "filters": [],
    }  # fmt: skip
    watching = Stages()
    result = distill(parse_config(run_of(tmp_path, tiny_student, synthesis, teacher, count=8)), listener=watching)
    assert "own" in watching.stages[2]
    assert not [name for name in watching.applications if name.startswith("own")]
    rows = rows_of(tmp_path)
    assert 0 < len(rows) <= 16
    for row in rows:
        assert row["prompt"].endswith(" = ###")
        assert row["completion"] == f" {row['rationale']} --> {row['teacher_answer']}"
        assert row["answer"] == 2 * int(row["prompt"].split()[0])
    assert result.summary["teacher"] == {}
    assert (result.model / "config.json").exists()


def test_the_generating_teacher_may_also_give_signals(tmp_path, tiny_student, served):
    synthesis = {"kind": "responses", "sampling": {"max_new_tokens": 8}, "filters": []}
    values = run_of(tmp_path, tiny_student, synthesis, {"name": "served", "attach": True}, "logit_kd", count=8)
    with pytest.raises(InputError, match="The training rows are not synthesized yet .*; run `rayk synthesize` first"):
        with_synthesized_rows(with_absolute_paths(parse_config(values)))
    values["cache"] = {"path": str(tmp_path / "cache")}
    with pytest.raises(InputError, match="not synthesized yet"):
        fill_cache(parse_config(values))
    summary = synthesize(parse_config(values))
    assert summary["kept"] == 8
    assert sum(filled.tokens for filled in fill_cache(parse_config(values))) > 8
    result = distill(parse_config(values))
    assert {"forward_kl", "loss"} <= json.loads((result.output / "metrics.jsonl").read_text().splitlines()[0]).keys()


def test_an_endpoint_generates_rows_for_another_teachers_signals(
    tmp_path, tiny_student, served, chat_teacher, endpoint
):
    values = run_of(tmp_path, tiny_student, {"kind": "responses"}, PARROT, "logit_kd", count=8)
    values["teachers"] = [PARROT | {"engine": {"kind": "openai"}}, {"name": "served", "attach": True}]
    values["data"]["evaluation"] = values["data"]["train"] | {"completion_field": "answer"}
    result = distill(parse_config(values))
    assert [row["completion"] for row in rows_of(tmp_path)] == [f"[{n} + {n} =]" for n in range(8)]
    assert result.summary["teacher"]["loss"] > 0
    assert result.summary["student"].keys() >= {"forward_kl", "agreement"}


@pytest.mark.long
def test_a_killed_process_does_not_repeat_stored_requests(tmp_path, tiny_student, chat_teacher, endpoint):
    values = run_of(tmp_path, tiny_student, {"kind": "responses", "in_flight": 4}, count=150)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    for n in range(150):
        endpoint.replies[f"{n} + {n} ="] = [Reply(delay_seconds=0.1)] * 3
    folder = tmp_path / "run" / "synthesis"
    address = ray.get_runtime_context().gcs_address

    def on_disk():
        parts = (folder / "completions").glob("part-*.parquet")
        return [key for part in parts for key in pq.read_table(part).column("prompt").to_pylist()]

    with rayk("synthesize", path, log=tmp_path / "first.log", RAY_ADDRESS=address) as process:
        wait_until(lambda: len(on_disk()) > 20, "some completions", process)
        os.killpg(process.pid, signal.SIGKILL)
    kept, before = on_disk(), len(endpoint.requests)
    assert 20 < len(kept) < 150
    with rayk("synthesize", path, log=tmp_path / "second.log", RAY_ADDRESS=address) as process:
        assert process.wait() == 0, (tmp_path / "second.log").read_text()
    again = [asked.prompt for asked in endpoint.requests[before:]]
    assert not set(again) & set(kept)
    assert sorted(set(again) | set(kept)) == sorted(f"{n} + {n} =" for n in range(150))
    log = (tmp_path / "second.log").read_text()
    assert f"for 150 prompts; {len(kept)} completions exist already" in log
    assert "150 of 150 for 150 prompts" in log
    interrupted = rows_of(tmp_path)

    (tmp_path / "whole").mkdir()
    endpoint.reset()
    whole = run_of(tmp_path / "whole", tiny_student, values["synthesis"], count=150)
    synthesize(parse_config(whole))
    path_of = {"where": None}
    assert [row | path_of for row in rows_of(tmp_path / "whole")] == [row | path_of for row in interrupted]


def test_unanswered_requests_are_repeated_until_training_begins(tmp_path, tiny_student, chat_teacher, endpoint):
    values = run_of(tmp_path, tiny_student, {"kind": "responses"}, count=8)
    busy = [Reply(503, b'{"error": {"message": "busy"}}')] * 2
    endpoint.replies["3 + 3 ="], endpoint.replies["4 + 4 ="] = [*busy], [*busy, *busy]
    assert synthesize(parse_config(values))["unanswered"] == 2
    asked = len(endpoint.requests)
    result = distill(parse_config(values))  # the folder contains only synthesis/, so a run may use it
    assert sorted(each.prompt for each in endpoint.requests[asked:]) == ["3 + 3 =", "4 + 4 =", "4 + 4 ="]
    assert result.summary["rows"]["train"] == 7
    distill(parse_config(values), resume=True)
    assert len(endpoint.requests) == asked + 3
    assert synthesize(parse_config(values))["kept"] == 8
    with pytest.raises(InputError, match="are not those that the run in .* was started with"):
        distill(parse_config(values), resume=True)


def test_refused_requests_are_repeated_only_after_their_record_is_deleted(
    tmp_path, tiny_student, chat_teacher, endpoint
):
    values = run_of(tmp_path, tiny_student, {"kind": "responses"}, count=8)
    endpoint.replies["3 + 3 ="] = [Reply(400, b'{"error": {"message": "too rude"}}')] * 2
    summary = synthesize(parse_config(values))
    assert (summary["unanswered"], summary["refused"], summary["rejected"]["refused"]) == (0, 1, 1)
    watching = Stages()
    synthesize(parse_config(values), listener=watching)
    assert len(endpoint.requests) == 8
    assert not any("Synthesizing" in stage for stage in watching.stages)
    for kept, asked in ((7, 9), (8, 10)):
        shutil.rmtree(tmp_path / "run" / "synthesis" / "refused")
        assert synthesize(parse_config(values))["kept"] == kept
        assert len(endpoint.requests) == asked


def test_other_filters_make_other_rows_of_the_same_completions(tmp_path, tiny_student, chat_teacher, endpoint):
    values = run_of(tmp_path, tiny_student, {"kind": "responses"}, count=8)
    assert synthesize(parse_config(values))["kept"] == 8
    asked = len(endpoint.requests)
    values["synthesis"]["filters"] = [{"kind": "keywords", "keywords": ["3"]}]
    assert synthesize(parse_config(values))["rejected"] == {"keywords": 1}
    rows = tmp_path / "questions.jsonl"
    values["synthesis"] |= {"keep": "best", "scorer": "answer", "answer": {"type": "number"}}
    rows.write_text(rows.read_text().replace('"answer": 4', '"answer": 2'))  # the end of the endpoint's "[2 + 2 =]"
    assert synthesize(parse_config(values))["rejected"]["wrong_answer"] == 6
    assert {row["answer"] for row in rows_of(tmp_path)} == {0, 2}
    assert len(endpoint.requests) == asked
    values["synthesis"]["sampling"] = {"temperature": 0.1}
    with pytest.raises(InputError, match=r"were generated with another 'synthesis\.sampling\.temperature'"):
        synthesize(parse_config(values))


def test_empty_completions_stop_the_run_before_training(tmp_path, tiny_student, chat_teacher, endpoint):
    endpoint.answer = lambda body: completion(body, "")
    values = run_of(tmp_path, tiny_student, {"kind": "responses"}, count=3)
    with pytest.raises(RunFailed, match="All 3 candidate rows were rejected"):
        distill(parse_config(values))
    endpoint.answer = lambda body: completion(body, f"so {prompt_of(body)}")
    asked = len(endpoint.requests)
    with pytest.raises(RunFailed, match="All 3"):  # the completions are stored and not requested again
        distill(parse_config(values), resume=True)
    assert len(endpoint.requests) == asked


def test_an_unused_attached_endpoint_is_reported(tmp_path, tiny_student, chat_teacher, plain_teacher, endpoint):
    values = run_of(tmp_path, tiny_student, {"kind": "responses"}, count=3)
    values["teachers"] += [PARROT | {"name": plain_teacher.name}]
    with pytest.raises(
        InputError, match=f"'{plain_teacher.name}' is an endpoint, .* this run generates nothing with it"
    ):
        distill(parse_config(values))
    assert not endpoint.requests


def test_doctor_checks_the_synthesis(tmp_path, tiny_student, chat_teacher):
    values = run_of(tmp_path, tiny_student, {"kind": "responses"})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    checks = [(check.state, check.text) for check in examine(str(path))]
    assert ("ok", "synthesis: teacher 'parrot' generates responses for 24 prompts.") in checks
    assert ("note", "The training rows are not synthesized yet; the run does this first.") in checks
    assert not [text for state, text in checks if state == "wrong"]
