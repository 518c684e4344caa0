"""Whole runs on preference pairs: they equal plain PyTorch with any micro-batches and workers, resumed or killed."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayk.commands.cache import fill_cache
from rayk.commands.results import results_table
from rayk.config import parse_config
from rayk.data.batches import BatchSampler
from rayk.data.tokenizing import tokenize
from rayk.errors import InputError, RunFailed
from rayk.methods import METHODS, Preference
from rayk.run import distill, evaluate_model
from tests.runs import assert_losses_close, assert_same_learning, curve, failing_once, metrics, settings, weights
from tests.tiny import tiny_model, tiny_tokenizer

BETA, SMOOTHING = 0.5, 0.1
DPO = {"kind": "preference", "beta": BETA, "label_smoothing": SMOOTHING}
PLEASANT, UNPLEASANT = {"cat": " mat", "dog": " log"}, {"cat": " log", "dog": " mat"}


def write_pairs(path, count=48, seed=0, alike=False):
    """Cats belong on mats and dogs on logs; the answers say so in sentences of unequal length, or, where they are to be
    `alike`, of the same."""
    random = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            animal = str(random.choice(["cat", "dog"]))
            prompt = f"the {animal} number {random.integers(1000)} sat on the"
            endings = [" and sat" * int(random.integers(0, 6)) for _ in range(2)]
            endings = endings[:1] * 2 if alike else endings
            chosen, rejected = PLEASANT[animal] + endings[0], UNPLEASANT[animal] + endings[1]
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return path


def config(folder, student, method=DPO, evaluation=None, cache=None, **training):
    folder.mkdir(exist_ok=True)
    values = settings(folder, student, method, **training)
    values["data"] = {"train": {"path": str(write_pairs(folder / "pairs.jsonl"))}}
    values["teachers"] = [{"name": method["reference"], "attach": True}] if "reference" in method else []
    if evaluation:
        values["data"]["evaluation"] = {"path": str(evaluation)}
    return parse_config(values | {"cache": cache and {"path": str(cache)}})


@pytest.mark.slow
def test_steps_equal_a_dense_reference_in_plain_pytorch(tmp_path, tiny_student):
    run = config(tmp_path, tiny_student, micro_batch_tokens=200, steps=8, learning_rate=2e-3)
    distill(run)
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    table = tokenize(run.data.train, run.data, tokenizer, pairs=True)
    policy, frozen = (AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    losses, margins = [], []
    for step in range(8):
        rows = [table[int(i)] for i in BatchSampler(table.lengths, 8, run.seed, 8).rows(step)]
        rewards = torch.stack([
            torch.stack([BETA * (_logprob(policy, each) - _logprob(frozen, each).detach()) for each in row.answers])
            for row in rows
        ])  # fmt: skip
        margin = rewards[:, 0] - rewards[:, 1]
        loss = -(1 - SMOOTHING) * F.logsigmoid(margin).mean() - SMOOTHING * F.logsigmoid(-margin).mean()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / 8))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        margins.append(margin.mean().item())
    assert np.ptp(losses) > 0.02  # otherwise equal curves would prove nothing
    assert_losses_close(curve(tmp_path / "run"), losses)
    np.testing.assert_allclose(curve(tmp_path / "run", "reward_margin"), margins, rtol=1e-3, atol=1e-4)
    for name, value in policy.named_parameters():
        np.testing.assert_allclose(weights(tmp_path / "run")[name], value.detach(), atol=2e-4, err_msg=name)


def _logprob(model, row):
    logits = model(input_ids=torch.tensor(row.input_ids[None], dtype=torch.long)).logits[0, :-1]
    targets = torch.tensor(row.input_ids[1:], dtype=torch.long)
    own = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return own[row.prompt_tokens - 1 :].sum()


@pytest.mark.slow
def test_micro_batches_do_not_change_learning(tmp_path, tiny_student):
    for name, tokens in (("whole", 100_000), ("cut", 150), ("pairs", 1)):
        distill(config(tmp_path / name, tiny_student, micro_batch_tokens=tokens))
        assert_same_learning(tmp_path / "whole" / "run", tmp_path / name / "run")
    step, *_ = metrics(tmp_path / "cut" / "run")
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.long
def test_two_workers_equal_one(tmp_path, tiny_student, ray_cluster):
    # With batches of 7 the workers have 4 and 3 pairs, in different numbers of micro-batches.
    distill(config(tmp_path / "alone", tiny_student, batch_size=7))
    distill(config(tmp_path / "group", tiny_student, batch_size=7, micro_batch_tokens=120, workers=2))
    assert_same_learning(tmp_path / "alone" / "run", tmp_path / "group" / "run")


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5], ids=["before the first checkpoint", "after it"])
def test_reference_is_the_initial_student_after_a_worker_death(tmp_path, tiny_student, monkeypatch, step):
    distill(config(tmp_path / "whole", tiny_student))
    monkeypatch.setitem(METHODS, "preference", failing_once(Preference, step))
    hurt = config(tmp_path / "hurt", tiny_student, checkpoint_every_steps=2)
    with pytest.raises(KeyboardInterrupt):
        distill(hurt)
    assert len(metrics(tmp_path / "hurt" / "run")) == step - 1
    distill(hurt, resume=True)
    assert_same_learning(tmp_path / "whole" / "run", tmp_path / "hurt" / "run", 1e-6)


@pytest.mark.slow
def test_reference_survives_a_change_of_its_folder(tmp_path, tiny_student, monkeypatch):
    student = tmp_path / "student"
    shutil.copytree(tiny_student, student)
    distill(config(tmp_path / "whole", str(student)))
    monkeypatch.setitem(METHODS, "preference", failing_once(Preference, 5))
    hurt = config(tmp_path / "hurt", str(student), checkpoint_every_steps=2)
    with pytest.raises(KeyboardInterrupt):
        distill(hurt)
    tiny_model(student, seed=99, hidden=16, layers=1, tokenizer=tiny_tokenizer())
    distill(hurt, resume=True)
    assert_same_learning(tmp_path / "whole" / "run", tmp_path / "hurt" / "run", 1e-6)


def test_served_reference_equal_to_the_student_equals_the_initial_student(tmp_path, tiny_teacher, served):
    by_teacher = DPO | {"reference": "served"}
    distill(config(tmp_path / "own", tiny_teacher, learning_rate=1e-3))
    distill(config(tmp_path / "served", tiny_teacher, by_teacher, learning_rate=1e-3))
    assert curve(tmp_path / "served" / "run")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert_same_learning(tmp_path / "own" / "run", tmp_path / "served" / "run", 1e-3)


def test_another_reference_changes_the_loss_and_is_queried_once_for_all_epochs(tmp_path, tiny_student, served):
    by_teacher = DPO | {"reference": "served"}
    run = config(tmp_path / "served", tiny_student, by_teacher, cache=tmp_path / "cache", steps=12)
    training, *_ = fill_cache(run)
    assert (training.row_kind, training.rows, training.support.kind) == ("training rows", 96, "logprob")
    distill(run)
    rows = metrics(tmp_path / "served" / "run")
    assert sum(row["cached_tokens"] for row in rows) == sum(row["counted_tokens"] for row in rows)
    assert sum(row["counted_tokens"] for row in rows) == 2 * training.tokens
    assert abs(rows[0]["loss"] - math.log(2)) > 0.1


def test_pair_with_one_unusable_answer_is_left_out_as_a_whole(tmp_path, tiny_student, broken):
    values = config(tmp_path, tiny_student, DPO | {"reference": "broken"}, steps=3, batch_size=16).model_dump(
        mode="json"
    )
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().replace("8", "7").splitlines()]
    for row in rows[::3]:
        row["rejected"] += " 8"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["teachers"] = broken
    with pytest.raises(RunFailed, match=r"'broken' returned an unusable signal for .*pairs.jsonl, line \d+: .*NaN"):
        distill(parse_config(values))
    values["output"] = str(tmp_path / "skipping")
    values["training"]["unusable_rows"] = "skip"
    run = parse_config(values)
    distill(run)
    table = tokenize(run.data.train, run.data, AutoTokenizer.from_pretrained(tiny_student), pairs=True)
    left = [row for row in table if not row.fields["rejected"].endswith("8")]
    steps = metrics(tmp_path / "skipping")
    assert sum(step["skipped_rows"] for step in steps) == len(table) - len(left) == 16
    assert sum(step["tokens"] for step in steps) == sum(len(answer) for row in left for answer in row.answers)
    assert all(math.isfinite(step["loss"]) for step in steps)


@pytest.mark.slow
def test_preference_accuracy_on_held_out_pairs_rises(tmp_path, tiny_student):
    held_out = write_pairs(tmp_path / "held_out.jsonl", count=60, seed=7, alike=True)
    run = config(tmp_path, tiny_student, DPO | {"label_smoothing": 0.0}, held_out, steps=60, batch_size=16)
    write_pairs(tmp_path / "pairs.jsonl", count=200, alike=True)
    before = _measured_by_hand(tiny_student, run)
    summary = distill(run).summary
    after = _measured_by_hand(str(tmp_path / "run" / "model"), run)
    found = summary["student"]
    assert [found["preference_margin"], found["preference_accuracy"]] == pytest.approx(after, rel=1e-4)
    assert before[1] < 0.7
    assert after[1] > 0.95
    assert after[0] > before[0] + 2
    last = metrics(tmp_path / "run")[-1]
    assert last["reward_accuracy"] > 0.9
    assert last["reward_margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"], abs=1e-4)
    assert last["evaluation_preference_margin"] == found["preference_margin"]
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Reward margin" in report
    assert "Preference accuracy" in report


def _measured_by_hand(model, run):
    """Mean margin and accuracy on the evaluation pairs, from dense logits."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    table = tokenize(run.data.evaluation, run.data, tokenizer, pairs=True)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        margins = np.array([_logprob(policy, row).item() - _logprob(policy, row.rejected).item() for row in table])
    return [float(margins.mean()), float((margins > 0).mean())]


def test_any_model_is_evaluated_on_pairs(tmp_path, tiny_student, ray_cluster):
    held_out = write_pairs(tmp_path / "held_out.jsonl", count=9, seed=7)
    run = config(tmp_path, tiny_student, evaluation=held_out)
    summary = evaluate_model(run, tiny_student)
    found = summary["student"]
    assert [found["preference_margin"], found["preference_accuracy"]] == pytest.approx(
        _measured_by_hand(tiny_student, run), rel=1e-4
    )
    headings = [column.header for column in results_table([summary]).columns]
    assert {"pref. accuracy", "pref. margin"} < set(headings)


def test_rows_without_pairs_are_refused(tmp_path, tiny_student):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    values = config(tmp_path, tiny_student).model_dump(mode="json")
    values["data"]["train"]["path"] = str(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="rows.jsonl, line 1 has no field 'chosen' .* set data.train.chosen_field"):
        distill(parse_config(values))
