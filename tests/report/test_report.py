"""The report shows what the run directories of one or several runs contain, finished or not, and executes nothing."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayk.config import parse_config
from rayk.errors import InputError
from rayk.report.report import write_report
from rayk.report.run_directory import read_runs

STUDENT = {"loss": 1.5, "forward_kl": 0.3, "reverse_kl": 0.4, "agreement": 0.8, "accuracy": 0.5}
TEACHER = {"loss": 1.2, "accuracy": 0.9}


def make_run(
    folder: Path, *, name: str = "", kd: bool = False, steps: int = 60, finished: bool = True,
    student: dict[str, float] | None = None, samples: list[dict[str, Any]] | None = None,
) -> Path:  # fmt: skip
    """Write a run directory as `rayk run` does."""
    folder.mkdir()
    config = parse_config(
        {
            "name": name or folder.name,
            "output": str(folder),
            "teachers": [{"model": "models/big-teacher"}],
            "student": {"config": {"model_type": "llama"}},
            "data": {"train": {"path": "train.jsonl"}, "evaluation": {"path": "test.jsonl"}},
            "method": {"kind": "logit_kd"} if kd else {"kind": "supervised"},
            "training": {"steps": 60},
            "evaluation": {"every_steps": 20, "generation": {"rows": 100}},
        }
    )
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    rows = [metrics_row(step, kd) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if finished:
        summary = {
            "name": config.name, "method": config.method.kind, "steps": steps, "seconds": 75.0,
            "rows": {"train": 2000, "evaluation": 400, "skipped": 0},
            "student": STUDENT | (student or {}), "teacher": TEACHER, "samples": samples or [],
            "machine": {"cores": 2, "system": "Linux", "python": "3.11.9"},
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def metrics_row(step: int, kd: bool) -> dict[str, float]:
    row = {
        "step": step, "loss": 9 / step if kd else 2 + 1 / step, "cross_entropy": 2 + 1 / step, "learning_rate": 1e-3,
        "gradient_norm": 1.0, "tokens": 1000, "tokens_per_second": 2000.0, "teacher_wait_seconds": 0.1,
        "step_seconds": 0.5,
    }  # fmt: skip
    if step % 20 == 0:
        row |= {f"evaluation_{name}": value + 1 / step for name, value in STUDENT.items() if name != "accuracy"}
    return row


def sample(where: str, **values: Any) -> dict[str, Any]:
    given = {"prompt": f"prompt of {where}", "truth": "4", "text": "4", "teacher": "4", "correct": True}
    return {"where": where, **given, "finish_reason": "stop", "tokens": 3, **values}


def report_of(tmp_path: Path, *runs: Path) -> str:
    write_report(runs, tmp_path / "out" / "report.html")
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """Return the visible text, with white space normalized."""
    page = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def figures_of(page: str) -> list[str]:
    return [html.unescape(title) for title in re.findall(r"<figcaption><strong>(.*?)</strong>", page)]


def row_of(page: str, name: str) -> list[str]:
    """Return the cells of the row `name` in the table of results."""
    table = page[page.index('<table class="numbers">') : page.index("</table>")]
    row = next(row for row in table.split("<tr")[1:] if f"{name}</th>" in row or f"{name}<span" in row)
    return [text_of(cell) for cell in re.findall(r"<td>(.*?)</td>", row)]


def test_single_run_is_described_with_its_numbers_and_curves(tmp_path):
    page = report_of(tmp_path, make_run(tmp_path / "small", kd=True))
    text = text_of(page)
    assert "A new llama model was trained for 60 steps on 2,000 rows with the method logit_kd" in text
    assert "evaluated on 400 held-out rows; the teacher is “big-teacher”." in text
    assert row_of(page, "Teacher") == ["90.0% ± 3.0%", "1.200", "–", "–", "–", "–", "–"]
    assert row_of(page, "small") == ["50.0% ± 5.0%", "1.500", "0.3000", "0.4000", "80.0%", "2,000", "20.0%"]
    assert figures_of(page) == [
        "Cross-entropy", "Objective of logit_kd", "Loss", "Forward KL to teacher", "Agreement with teacher",
        "Tokens per second", "Waiting for the teacher", "Learning rate", "Gradient norm",
    ]  # fmt: skip
    assert "best student" not in page
    assert "30.0 s 1 min 15 s 2 cores, Linux, Python 3.11.9" in text


def test_several_runs_are_compared_and_the_best_marked(tmp_path):
    plain = make_run(tmp_path / "plain")
    kd = make_run(tmp_path / "kd", kd=True, student={"accuracy": 0.7, "forward_kl": 0.1})
    page = report_of(tmp_path, plain, kd)
    assert page.count(">Teacher</th>") == 1
    assert re.findall(r'<b title="best student">(.*?)</b>', page) == ["70.0%", "0.1000"]
    assert re.search(r"<code>method.kind</code>.*?supervised</td>.*?logit_kd</td>", page, re.DOTALL)
    assert "<code>output</code>" not in page
    assert "<code>training.steps</code>" not in page
    assert page.count("<details>") == 2
    # A divergence and a cross-entropy share no axis: supervised's loss is the common panel.
    labels = re.findall(r'aria-label="Line chart of (.*?)"', page)
    objective = next(label for label in labels if label.startswith("objective"))
    assert "plain" not in objective
    assert "kd 9 to 0.15" in objective
    common = next(label for label in labels if label.startswith("cross-entropy"))
    assert "plain 3 to" in common
    assert "kd 3 to" in common


def test_a_run_has_the_same_color_in_all_figures(tmp_path):
    runs = [make_run(tmp_path / f"run{number}", kd=number > 0) for number in range(3)]
    page = report_of(tmp_path, *runs)
    colors = [run.color for run in read_runs(runs)]
    assert len(set(colors)) == 3
    for svg in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        drawn = [color for color in colors if color in svg]
        assert drawn == [color for color, run in zip(colors, runs, strict=True) if f"{run.name} " in svg]


@pytest.mark.slow
def test_many_runs_with_equal_names_are_distinguishable(tmp_path):
    runs = [make_run(tmp_path / f"folder{number}", name="same", kd=True) for number in range(10)]
    text = text_of(report_of(tmp_path, *runs))
    assert all(f"same (folder{number})" in text for number in range(10))
    looks = {(run.color, run.dash) for run in read_runs(runs)}
    assert len(looks) == 10


def test_unfinished_run_is_reported_up_to_its_last_step(tmp_path):
    done = make_run(tmp_path / "done")
    page = report_of(tmp_path, make_run(tmp_path / "half", kd=True, steps=45, finished=False), done)
    assert "unfinished: step 45 of 60, measured at step 40" in text_of(page)
    assert row_of(page, "half") == ["–", "1.525", "0.3250", "0.4250", "82.5%", "2,000", "20.0%"]
    assert "best student" not in page  # a single finished run has nothing to be compared with


def test_run_without_a_step_has_a_report(tmp_path):
    page = report_of(tmp_path, make_run(tmp_path / "begun", steps=0, finished=False))
    assert "unfinished: step 0 of 60, not measured yet" in text_of(page)
    assert "No training step has been recorded yet." in page
    assert "<figure>" not in page


@pytest.mark.slow
def test_one_step_and_long_runs_are_drawn(tmp_path):
    one = report_of(tmp_path, make_run(tmp_path / "one", steps=1))
    long = report_of(tmp_path, make_run(tmp_path / "long", steps=20_000))
    assert "Cross-entropy" in figures_of(one)
    assert "Cross-entropy" in figures_of(long)
    assert len(long) < 500_000


def test_numbers_that_are_nan_are_shown_as_a_dash(tmp_path):
    run = make_run(tmp_path / "run", student={"loss": float("nan")})
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics_row(61, False) | {"loss": float("nan")}) + "\n" + '{"step": 62, "lo')
    assert row_of(report_of(tmp_path, run), "run")[1] == "–"


def test_hostile_completion_is_escaped(tmp_path):
    evil = "<script>alert('x')</script><img src=x onerror=y>{{ 7 * 7 }}"
    samples = [sample("a.jsonl line 1", prompt=evil, truth=evil, text=evil, teacher=evil)]
    page = report_of(tmp_path, make_run(tmp_path / "run", samples=samples))
    assert "<script" not in page
    assert "<img" not in page
    assert page.count(html.escape(evil).replace("&#x27;", "&#39;")) == 4


EVIL = """<script>alert(1)</script><img src=x onerror=y>"'><svg onload=z>{{ 7 * 7 }}</style></svg>]]>$\\frac$"""


def make_hostile(values: Any) -> Any:
    """Return values with hostile text in place of every text, and before every name that may be a user's."""
    if isinstance(values, dict):
        return {f"{key}{EVIL}" if "/" in key else key: make_hostile(value) for key, value in values.items()}
    if isinstance(values, list):
        return [make_hostile(value) for value in values]
    return EVIL if isinstance(values, str) else values


class Elements(HTMLParser):
    """The names of a page's elements and of their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str | None]] = {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value)


@pytest.mark.slow
def test_hostile_run_directory_adds_no_element_and_no_attribute(tmp_path):
    """Every text that rows, models, settings and metrics can contain is shown as text."""
    samples = [sample("line 1", reason="", before="3")]
    runs = [make_run(tmp_path / name, kd=True, samples=samples) for name in ("harmless", "hostile")]
    for run in runs:
        (run / "synthesis").mkdir()
        (run / "synthesis" / "summary.json").write_text(json.dumps(SYNTHESIS))
        (run / "retriever").mkdir()
        (run / "retriever" / "summary.json").write_text(json.dumps(RETRIEVER))
        rollout = {"step": 1, "where": "a", "prompt": "b", "completion": "c", "tokens": 1, "finish_reason": "stop"}
        (run / "rollouts.jsonl").write_text(json.dumps(rollout) + "\n")
        rows = [metrics_row(step, True) | {f"teacher/t/{name}": 1.0 for name in ("loss", "tokens", "score_seconds")}
                for step in (1, 2, 20, 40)]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    harmless = Elements(report_of(tmp_path, runs[0]))
    for path in runs[1].rglob("*.json*"):
        lines = [json.dumps(make_hostile(json.loads(line))) for line in path.read_text().splitlines()]
        path.write_text("".join(line + "\n" for line in lines))
    config = make_hostile(yaml.safe_load((runs[1] / "config.yaml").read_text()))
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    page = report_of(tmp_path, runs[1])
    hostile = Elements(page)
    assert page.count("alert(1)") > 50
    assert hostile.tags <= harmless.tags and "script" not in hostile.tags
    assert hostile.attributes.keys() <= harmless.attributes.keys()
    assert not [name for name in hostile.attributes if name.startswith("on") or name in ("src", "action", "formaction")]
    assert all(value.startswith("#") for name in ("href", "xlink:href") for value in hostile.attributes.get(name, ()))
    assert hostile.attributes["http-equiv"] == {"Content-Security-Policy"}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("metrics.jsonl", '{"step": 1}\nnonsense\n', "has a damaged line after 1 whole ones"),
        ("metrics.jsonl", "[1]\n", "has a damaged line after 0"), ("metrics.jsonl", '{"step": 1}\n', "KeyError"),
        ("summary.json", "[]", "it contains a list"),
        ("summary.json", '{"student": 3, "rows": {}}', "rayk does not write"),
        ("config.yaml", "{name: x, method: [kind]}", "is no config of a run"),
    ],
)  # fmt: skip
def test_damaged_files_of_a_run_are_an_input_error(tmp_path, name, content, complaint):
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(InputError, match=complaint):
        write_report([run], tmp_path / "report.html")


def test_page_loads_nothing_from_outside(tmp_path):
    page = report_of(tmp_path, make_run(tmp_path / "run", kd=True), make_run(tmp_path / "other"))
    assert not re.search(r"https?:|@import|<script|<link|<iframe|\bsrc=", page)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert page.count("<svg ") == page.count('role="img"') == page.count("<figure>") > 0
    assert re.findall(r"<th(?! scope)[ >]", page) == []


def test_samples_are_grouped_by_row(tmp_path):
    first = [sample("line 1", text="first says 4"), sample("line 2", text="first says 5", correct=False)]
    second = [sample("line 2", text="second says 4"), sample("line 3", text="", finish_reason="length")]
    page = report_of(
        tmp_path, make_run(tmp_path / "a", samples=first), make_run(tmp_path / "b", kd=True, samples=second)
    )
    articles = {re.search(r"<h3>(.*?)</h3>", part)[1]: text_of(part) for part in page.split("<article")[1:]}  # type: ignore[index]
    assert list(articles) == ["line 1", "line 2", "line 3"]
    assert "a ✓ correct first says 4 b no completion stored" in articles["line 1"]
    assert "a ✗ wrong first says 5 b ✓ correct second says 4" in articles["line 2"]
    assert "a no completion stored b ✓ correct empty truncated after 3 tokens" in articles["line 3"]


@pytest.mark.parametrize("acceptance", [0.95, 1.0])
def test_rollout_metrics_are_drawn(tmp_path, acceptance):
    run = make_run(tmp_path / "own", kd=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = {
        "rollout_tokens": 30.0, "rollout_stopped": 0.5, "rollout_repetition": 0.1, "rollout_acceptance": acceptance,
        "generate_seconds": 0.3, "score_seconds": 0.1,
    }  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | own) + "\n" for row in rows))
    figures = figures_of(report_of(tmp_path, run))
    assert {"Generating", "Scoring", "Length", "Ended", "Repetition"} <= set(figures)
    assert ("Accepted by the teacher" in figures) == (acceptance < 1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist"),
        ({}, "has no config.yaml"),
        ({"config.yaml": "name: [x"}, "cannot be read"),
        ({"config.yaml": "some: thing"}, "is no config of a run"),
        ({"config.yaml": "{name: x, method: {kind: y}}", "summary.json": "{"}, "summary.json' cannot be read"),
    ],
)
def test_folder_that_is_no_run_is_an_input_error(tmp_path, content, complaint):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=complaint):
        write_report([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_report_that_cannot_be_written_is_an_input_error(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="cannot be written"):
        write_report([run], run / "config.yaml" / "report.html")
    with pytest.raises(InputError, match="at least one"):
        write_report([], tmp_path / "report.html")


SYNTHESIS = {
    "kind": "chain_of_thought", "about": "rationales that end in the right answer", "paper": "arXiv 2212.10071",
    "teacher": {"name": "t", "model": "models/big-teacher", "engine": "openai"},
    "prompts": 5, "candidates": 40, "kept": 30, "rejected": {"repetition": 0, "wrong_answer": 10}, "unanswered": 0,
    "figures": [{"name": "teacher's accuracy", "value": 0.75, "share": True},
                {"name": "different rationales a question", "value": 2.5, "share": False}],
    "usage": {"requests": 1234, "cost": 0.5},
    "examples": {
        "kept": [{"where": "line 1", "prompt": "2 + 2?", "completion": "so --> 4", "rejected_by": "", "reason": ""}],
        "rejected": [{"where": "line 2", "prompt": "3 + 3?", "completion": "<script>", "rejected_by": "wrong_answer",
                      "reason": "7, where 6 is right"}],
    },
}  # fmt: skip
RETRIEVER = {
    "held_out": {"rows": 3, "mean_logprob": {"random": -1.0, "bm25": -0.9, "learned": -0.8},
                 "learned_over_bm25": {"mean": 0.1, "standard_error": 0.01}},
    "rounds": [{"round": 1, "candidates": 9, "refused": 0, "mean_logprob": -0.8}],
    "encoder": "models/encoder", "teacher": "models/teacher", "reward_model": "", "queries": 10, "pool": 5,
}  # fmt: skip


def test_rounds_of_one_student_count_as_one_student(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("01", "02")]
    models = ["models/small-student", str(runs[0] / "model")]
    for run, model in zip(runs, models, strict=True):
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"student": {"model": model}}))
    assert "“small-student” was trained in 2 runs of 60 steps" in text_of(report_of(tmp_path, *runs))


def test_metrics_that_were_not_measured_have_no_column(tmp_path):
    run = make_run(tmp_path / "run", steps=19)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"student": {}, "teacher": {}}))
    text = text_of(report_of(tmp_path, run))
    assert "Accuracy" not in text and "Tokens/s" in text
    assert (
        "The quality of the student was not measured, because the run has no evaluation rows (data.evaluation)." in text
    )


def test_synthesis_is_described_with_kept_and_rejected_candidates(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "synthesis").mkdir()
    (run / "synthesis" / "summary.json").write_text(json.dumps(SYNTHESIS))
    page = report_of(tmp_path, run, make_run(tmp_path / "plain"))
    text = text_of(page)
    assert (
        "big-teacher generated rows for 5 prompts: rationales that end in the right answer (arXiv 2212.10071)." in text
    )
    assert "kept 30 (75.0%) rejected: repetition 0 (0.0%) rejected: wrong_answer 10 (25.0%)" in text
    assert "teacher's accuracy 75.0% different rationales a question 2.50 requests 1,234" in text
    assert "cost, in the currency of the prices 0.5000" in text
    assert "line 2 3 + 3? ✗ wrong_answer: 7, where 6 is right" in text
    assert "line 1 2 + 2? ✓ kept so --> 4" in text
    assert "<script" not in page
    assert "Synthesized training rows" not in report_of(tmp_path, tmp_path / "plain")


def test_samples_show_the_student_before_training(tmp_path):
    answer = {
        "where": "line 1", "prompt": "Say hello", "truth": "Hello!", "text": "Hello there", "correct": False,
        "finish_reason": "stop", "tokens": 3, "teacher": "Hello!",
    }  # fmt: skip
    one = make_run(tmp_path / "one", samples=[answer | {"before": "lo lo lo"}])
    other = make_run(tmp_path / "other", samples=[answer | {"before": "another"}])
    text = text_of(report_of(tmp_path, one))
    assert "Reference Hello! Teacher Hello! Student before training lo lo lo one Hello there" in text
    assert "wrong" not in text.split("Sample completions")[1]
    assert "before training" not in text_of(report_of(tmp_path, one, other)).split("Sample completions")[1]


def test_student_before_training_has_a_row(tmp_path):
    run = make_run(tmp_path / "small", kd=True)
    (run / "student_before.json").write_text(json.dumps({"loss": 4.5, "accuracy": 0.01}))
    page = report_of(tmp_path, run)
    assert row_of(page, "small, before training") == ["1.0% ± 1.0%", "4.500", "–", "–", "–", "–", "–"]
    assert row_of(page, "small")[1] == "1.500"


def test_waiting_is_split_into_teacher_and_rollouts(tmp_path):
    run = make_run(tmp_path / "own", kd=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Each step takes 0.5 s. It waits 0.1 s for its batch; in the first 0.04 s of these, rollouts are generated.
    times = [
        {"ended_at": 100.0 + row["step"], "generate_started_at": 99.3 + row["step"], "generate_seconds": 0.24}
        for row in rows
    ]
    lines = [json.dumps(row | time | {"policy_wait_seconds": 0.01}) for row, time in zip(rows, times, strict=True)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = report_of(tmp_path, run)
    assert row_of(page, "own")[-2:] == ["12.0%", "10.0%"]
    assert {"Waiting for the teacher", "Waiting for rollouts"} <= set(figures_of(page))


def test_sample_rollouts_are_shown(tmp_path):
    run = make_run(tmp_path / "own", kd=True)
    rollouts = [
        {"step": step, "where": "line 1", "prompt": "1 + 1", "completion": f"is <b>{step}</b>", "tokens": 4,
         "finish_reason": "length"}
        for step in range(1, 41)
    ]  # fmt: skip
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    page = report_of(tmp_path, run)
    text = text_of(page)
    assert "step 1 · line 1 1 + 1 is <b>1</b> truncated after 4 tokens" in text
    assert "is <b>40</b>" in text and page.count("truncated after") == 12
    assert "Sample rollouts" not in report_of(tmp_path, make_run(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("count", "title"),
    [
        (1, "Report of run0"), (2, "Comparison of run0 and run1"), (3, "Comparison of run0, run1 and run2"),
        (4, "Comparison of 4 runs"),
    ],
)  # fmt: skip
def test_title_names_the_runs(tmp_path, count, title):
    runs = [make_run(tmp_path / f"run{number}") for number in range(count)]
    assert f"<h1>{title}</h1>" in report_of(tmp_path, *runs)


def test_one_step_is_singular(tmp_path):
    assert "was trained for 1 step on 2,000 rows" in text_of(report_of(tmp_path, make_run(tmp_path / "one", steps=1)))


def test_several_teachers_and_diagnostics_have_curves(tmp_path):
    run = make_run(tmp_path / "many", kd=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"overlap": 0.5, "disagreement": 0.25, "teacher_entropy": 1.0, "student_entropy": 2.0}
        row |= {f"distance_quarter_{number}": float(number) for number in (1, 2, 3, 4)}
        for name in ("math", "code"):
            row |= {f"teacher/{name}/{value}": 3.0 for value in ("loss", "tokens", "score_seconds")}
        if row["step"] % 2:  # a step without rows of one teacher
            del row["teacher/code/loss"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report_of(tmp_path, run)
    assert figures_of(page)[5:13] == [
        "Tokens per second", "Waiting for the teacher", "Overlap", "Disagreement", "Entropy of the teacher",
        "Entropy of the student", "Distance along the completion", "Loss by teacher",
    ]  # fmt: skip
    labels = " ".join(re.findall(r'aria-label="(.*?)"', page))
    assert "many, math 3 to 3, many, code 3 to 3" in labels
    assert "many, first quarter 1 to 1, many, second 2 to 2" in labels
