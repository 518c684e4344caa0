"""The `rayk` command: what it prints, and its exit codes."""

import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import rayk as rayk_package
from rayk import cli
from rayk.commands.progress import TerminalProgress
from rayk.config.secrets import remember_secret
from rayk.methods import METHODS
from rayk.run import ProgressListener, distill
from tests.checkpoints import write_checkpoint
from tests.report.test_report import make_run
from tests.runs import config, settings, write_rows
from tests.runs import rayk as started
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def rayk(capsys, monkeypatch):
    """Call the command in this process; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["rayk", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def write_config(tmp_path, tiny_student):
    def write(method="supervised", /, **sections):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings(tmp_path, tiny_student, method, steps=2) | sections))
        return path

    return write


def the_sentence(outcome, code=2):
    """Return the one line of error; only lines of stages may precede it."""
    exit_code, out, err = outcome
    assert (exit_code, out) == (code, "")
    *stages, sentence = err.splitlines()
    assert all(re.match(r" *\d+ s  ", line) for line in stages), err
    assert sentence.startswith("rayk: ")
    return sentence


def test_help_names_every_command(rayk):
    code, out, _ = rayk("--help")
    assert code == 0
    for name in (
        "quickstart",
        "init",
        "run",
        "synthesize",
        "serve",
        "cache",
        "evaluate",
        "report",
        "methods",
        "plan",
        "status",
        "doctor",
    ):
        assert name in out


@pytest.mark.parametrize("arguments", [["zzzz"], ["run"], ["run", "x.yaml", "--fast"]])
def test_a_wrong_command_line_exits_with_2(rayk, arguments):
    the_sentence(rayk(*arguments))


def test_bare_command_prints_help(rayk):
    code, out, err = rayk()
    assert (code, err) == (0, "")
    assert "quickstart" in out


def test_version_is_printed(rayk):
    assert rayk("--version")[:2] == (0, f"rayk {importlib.metadata.version('rayk')}\n")


@pytest.mark.parametrize(
    ("name", "meant"), [("rnu", "run"), ("trian", "run"), ("train", "run"), ("evalute", "evaluate")]
)
def test_a_misspelled_command_gets_a_suggestion(rayk, name, meant):
    sentence = the_sentence(rayk(name, "x.yaml"))
    assert sentence == f"rayk: There is no command '{name}'; did you mean '{meant}'?"


def test_an_unknown_command_lists_the_commands(rayk):
    assert the_sentence(rayk("zzzz")).startswith("rayk: There is no command 'zzzz'; the commands are quickstart, init,")


def test_synthesizing_without_a_synthesis_is_an_error(rayk, write_config):
    assert the_sentence(rayk("synthesize", write_config())) == (
        "rayk: synthesis is missing; set synthesis.kind to the way in which rows are generated."
    )


def test_methods_lists_each_with_its_needs(rayk):
    code, out, _ = rayk("methods")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 100
    paragraphs = [" ".join(paragraph.split()) for paragraph in out.split("\n\n")]
    assert [next(name for name in METHODS if text.startswith(name)) for text in paragraphs] == list(METHODS)
    for kind, text in zip(METHODS, paragraphs, strict=True):
        assert f"{METHODS[kind].summary} needs: {METHODS[kind].needs} paper: {METHODS[kind].paper}" in text


def test_a_run_prints_its_result_and_its_files(rayk, write_config, tmp_path):
    code, out, err = rayk("run", write_config(), "--set", "training.steps=3", "--output", tmp_path / ("long" * 40))
    assert code == 0
    assert re.search(r"^run .* \d", out, re.MULTILINE)
    assert f"The student: {tmp_path}/{'long' * 40}/model\n" in err
    assert re.search(r"^ +step 3/3  loss \d+\.\d+ ", err, re.MULTILINE)


def test_user_texts_are_no_markup(rayk, write_config, tmp_path):
    path = tmp_path / "[red]"
    assert f"The report:  {path}/report.html\n" in rayk("run", write_config(), "--output", path)[2]
    assert f"'{path}' already contains a run" in the_sentence(rayk("run", write_config(), "--output", path))
    assert "'[bold]'" in the_sentence(rayk("run", "[bold]"))


BAD = {
    "unknown key": ({"trainig": {}}, "run.yaml: unknown key 'trainig'; did you mean 'training'?"),
    "no such model": ({"student": {"model": "./nowhere"}}, "/nowhere' does not exist"),
    "no model type": ({"student": {"config": {"hidden_size": 8}, "tokenizer": "STUDENT"}}, "needs a 'model_type'"),
    "no such model type": (
        {"student": {"config": {"model_type": "lama"}, "tokenizer": "STUDENT"}},
        "student.config does not describe a model",
    ),
    "no tokenizer": ({"student": {"config": {"model_type": "llama"}}}, "student.tokenizer is missing"),
    "small vocabulary": (
        {"student": {"config": {"model_type": "llama", "vocab_size": 100}, "tokenizer": "STUDENT"}},
        "The student's vocabulary (100) is smaller than its tokenizer's",
    ),
    "no such module": (
        {"student": {"model": "STUDENT", "lora": {"target_modules": ["q_prof"]}}},
        "student.lora.target_modules names 'q_prof', which LlamaForCausalLM lacks; it has",
    ),
    "no such data": ({"data": {"train": {"path": "./nowhere.jsonl"}}}, "nowhere.jsonl"),
    "empty data": ({"data": {"train": {"path": "EMPTY"}}}, "empty.jsonl"),
    "no such field": (
        {"data": {"train": {"path": "ROWS", "completion_field": "response"}}},
        "rows.jsonl, line 1 has neither 'prompt' with 'response'",
    ),
    "odd row": (
        {"data": {"train": {"path": "ODD", "prompt_field": "question", "completion_field": "answer"}}},
        "odd.jsonl, line 2 has no field 'answer' (it has: question); other rows have it, so correct or remove this row",
    ),
    "long prompt": ({"data": {"train": {"path": "ROWS"}, "max_prompt_tokens": 3}}, "rows.jsonl, line"),
    "long row": ({"data": {"train": {"path": "LONG"}}}, "but the student takes 512; lower data.max_tokens"),
    "no room to answer": (
        {"data": {"train": {"path": "ROWS"}, "evaluation": {"path": "ROWS"}},
         "evaluation": {"generation": {"max_new_tokens": 600}}},
        "lower evaluation.generation.max_new_tokens",
    ),
    "no truth": (
        {"data": {"train": {"path": "ROWS"}, "evaluation": {"path": "ROWS"}},
         "evaluation": {"generation": {}, "answer_field": "sum"}},
        "has no field 'sum'; set evaluation.answer_field",
    ),
    "no place for checkpoints": ({"training": {"checkpoints": "nowhere://x"}}, "training.checkpoints 'nowhere://x' c"),
}  # fmt: skip


@pytest.mark.parametrize(("sections", "sentence"), BAD.values(), ids=BAD.keys())
def test_wrong_input_is_one_sentence_and_exit_2(rayk, write_config, tmp_path, tiny_student, sections, sentence):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"question": "1", "answer": "2"}\n{"question": "1"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b c" * 400}))
    places = {
        "STUDENT": tiny_student,
        "EMPTY": "empty.jsonl",
        "ROWS": "rows.jsonl",
        "LONG": "long.jsonl",
        "ODD": "odd.jsonl",
    }

    def placed(value):
        if isinstance(value, dict):
            return {key: placed(each) for key, each in value.items()}
        return str(tmp_path / places[value]) if isinstance(value, str) and value in places else value

    assert sentence in the_sentence(rayk("run", write_config(**placed(sections))))
    assert not (tmp_path / "run").exists()


def test_a_missing_or_unreadable_config_is_named(rayk, tmp_path):
    assert "missing.yaml' cannot be read" in the_sentence(rayk("run", tmp_path / "missing.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    assert "bad.yaml' is not YAML" in the_sentence(rayk("run", tmp_path / "bad.yaml"))


def test_a_teacher_with_another_vocabulary_is_refused(rayk, write_config, tmp_path):
    other = tmp_path / "other"
    tiny_model(other, tokenizer=tiny_tokenizer(sentences=("entirely different words make other merges " * 9,)))
    sentence = the_sentence(rayk("run", write_config("logit_kd", teachers=[{"name": "other", "model": str(other)}])))
    assert "Teacher 'other' and the student's tokenizer" in sentence


def test_a_support_larger_than_the_vocabulary_is_refused(rayk, write_config, tiny_teacher):
    method = {"kind": "logit_kd", "support": {"kind": "topk", "k": 1000}}
    sentence = the_sentence(rayk("run", write_config(method, teachers=[{"model": tiny_teacher}])))
    assert "method.support.k is 1000, but the vocabulary has" in sentence


def test_a_teacher_that_is_not_running_is_named(rayk, write_config, ray_cluster):
    sentence = the_sentence(rayk("run", write_config("logit_kd", teachers=[{"name": "nobody", "attach": True}])))
    assert "No teacher 'nobody' answers on this Ray cluster" in sentence


def test_an_output_with_other_contents_is_refused(rayk, write_config, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path):
        assert "is not a run directory of rayk" in the_sentence(rayk("run", write_config(), "--output", place))
    assert "cannot be written" in the_sentence(rayk("run", write_config(), "--output", tmp_path / "file" / "run"))
    assert rayk("run", write_config())[0] == 0
    assert "already contains a run" in the_sentence(rayk("run", write_config()))
    assert "started with another 'seed'" in the_sentence(rayk("run", write_config(seed=5), "--resume"))
    write_rows(tmp_path / "rows.jsonl", seed=5)
    sentence = the_sentence(rayk("run", write_config(), "--resume"))
    assert f"The rows of data.train '{tmp_path}/rows.jsonl' are not those that the run" in sentence


@pytest.mark.parametrize(
    "arguments",
    [["quickstart", "--output"], ["init", "-o"], ["status"], ["report"], ["export"], ["report", "--output"]],
)
def test_a_uri_in_place_of_a_local_path_is_refused(rayk, arguments):
    sentence = the_sentence(rayk(*arguments, "s3://user:secret@bucket/run"))
    assert "is a URI, but it must be a path on this machine." in sentence and "secret" not in sentence


def test_outputs_have_defaults(rayk, tmp_path, monkeypatch, tiny_student):
    given = []
    monkeypatch.setattr("rayk.commands.quickstart.run_quickstart", lambda output, _: given.append(output) or 1 // 0)
    assert "ZeroDivisionError" in the_sentence(rayk("quickstart"), code=1)
    assert given == [Path("runs/quickstart")]
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    assert rayk("init", "--student", tiny_student, "--data", "rows.jsonl")[0] == 0
    assert (tmp_path / "run.yaml").is_file()


def test_a_setting_without_an_equals_sign_is_explained(rayk, write_config):
    assert "write it as a.b=value" in the_sentence(rayk("run", write_config(), "--set", "training.workers"))
    sentence = the_sentence(rayk("run", write_config(), "--set", "training.workers=2", "3"))
    assert sentence.endswith("(3); write settings as --set a.b=value")


def test_an_unexpected_error_is_one_sentence_too(rayk, write_config, monkeypatch):
    monkeypatch.setattr("rayk.commands.run.distill", lambda *_, **__: 1 // 0)
    assert "ZeroDivisionError: integer division or modulo by zero" in the_sentence(rayk("run", write_config()), code=1)


def test_evaluate_measures_the_trained_student(rayk, write_config, tmp_path, tiny_student, ray_cluster):
    write_rows(tmp_path / "held_out.jsonl", count=5, seed=9)
    data = {"train": {"path": str(tmp_path / "rows.jsonl")}, "evaluation": {"path": str(tmp_path / "held_out.jsonl")}}
    path = write_config(data=data)
    assert "no trained student" in the_sentence(rayk("evaluate", path))
    assert rayk("run", path)[0] == 0
    (tmp_path / "rows.jsonl").unlink()  # the training rows are not needed
    code, out, _ = rayk("evaluate", path)
    assert code == 0
    assert re.search(r"^run +\d+\.\d{3}$", out, re.MULTILINE)
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    code, out, _ = rayk("evaluate", path, "--json")
    assert (code, json.loads(out)) == (0, kept)
    assert kept["name"] == "run" and kept["student"].keys() >= {"loss"} and kept["teacher"] == {}
    other = shutil.copytree(tiny_student, tmp_path / "other")
    assert rayk("evaluate", path, "--model", other)[0] == 0
    assert json.loads((other / "evaluation.json").read_text())["student"]["loss"] > kept["student"]["loss"]
    sentence = the_sentence(rayk("evaluate", path, "--set", f"student.model={tiny_student}"))
    assert f"Give --model {tiny_student} instead" in sentence
    sentence = the_sentence(rayk("evaluate", path, "--model", "./nowhere"))
    assert f"The model '{Path('nowhere').absolute()}' does not exist; check the path." in sentence
    assert "data.evaluation is missing" in the_sentence(rayk("evaluate", write_config(data={"train": data["train"]})))


def test_doctor_checks_machine_and_config(rayk, write_config, tmp_path):
    code, out, err = rayk("doctor")
    assert (code, "ray 2." in out, err) == (0, True, "")
    code, out, _ = rayk("doctor", write_config())
    assert code == 0
    assert "data.train: 48 rows" in out
    assert f"The run directory will be {tmp_path}/run." in out
    assert re.search(r"The student trains all of its [\d,]+ parameters", out)
    assert not (tmp_path / "run").exists()
    assert "Memory of a worker" in out and re.search(r"^ +optimizer +0\.00 GB *$", out, re.MULTILINE)
    code, out, _ = rayk("doctor", write_config(), "--device-memory", "0.0001GB")
    assert code == 2 and "but has 0.0 GB (given); use student.lora" in out
    code, out, _ = rayk("doctor", write_config(), "--set", "student.lora.r=2")
    assert (code, bool(re.search(r"trains [\d,]+ of [\d,]+ parameters \(\d+\.\d\d%\)", out))) == (0, True)
    code, out, _ = rayk("doctor", write_config(student={"model": "./nowhere"}))
    assert (code, "✗ " in out, "does not exist" in out) == (2, True, True)


def test_plan_computes_the_replicas_that_keep_the_student_busy(rayk, write_config, tiny_teacher):
    simulated = {"model": tiny_teacher, "engine": {"kind": "simulated", "tokens_per_second": 250.0}}
    path = write_config({"kind": "logit_kd", "support": {"kind": "topk", "k": 16}}, teachers=[simulated])
    code, out, _ = rayk("plan", path, "--student-tokens-per-second", "1000")
    assert code == 0
    assert re.search(r"^the student trains +all of its ", out, re.MULTILINE)
    assert re.search(r"^student, never waiting +1,000 tokens/s \(given\) *$", out, re.MULTILINE)
    assert re.search(r"^one replica +250 tokens/s \(simulated\) *$", out, re.MULTILINE)
    assert re.search(r"^replicas +5, ", out, re.MULTILINE)  # 1.2 · 1000 / 250, rounded up
    assert re.search(r"^the student would wait +with 1: 75%, with 2: 50%, with 4: 0%", out, re.MULTILINE)
    assert re.search(r"^a counted token +about 72 bytes; \d+% of the tokens count", out, re.MULTILINE)
    assert "--student-tokens-per-second" in the_sentence(rayk("plan", path))
    assert "needs no signals of a teacher; there is nothing to plan" in the_sentence(
        rayk("plan", write_config("supervised"))
    )


@pytest.mark.long
def test_plan_measures_rates_that_are_not_given(rayk, write_config, tiny_teacher, ray_cluster):
    teachers = [{"model": tiny_teacher, "resources": {"num_cpus": 0.25}}]
    path = write_config({"kind": "logit_kd", "support": {"kind": "topk", "k": 16}}, teachers=teachers)
    assert rayk("run", path, "--set", "training.steps=4")[0] == 0
    code, out, _ = rayk("plan", path)
    assert code == 0
    assert re.search(r"^one replica +[\d,]+ tokens/s", out, re.MULTILINE)


@pytest.mark.slow
def test_report_compares_run_directories(rayk, tmp_path, tiny_student):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        distill(config(tmp_path / name, tiny_student, steps=2), listener=ProgressListener())
    runs = [tmp_path / name / "run" for name in ("one", "two")]
    code, _, err = rayk("report", *runs, "--output", tmp_path / "both.html")
    assert (code, f"The report: {tmp_path}/both.html\n" in err) == (0, True)
    assert "<html" in (tmp_path / "both.html").read_text()
    assert the_sentence(rayk("report", tmp_path / "nowhere"))
    code, out, _ = rayk("status", runs[0])
    assert (code, "finished after 2 steps" in out) == (0, True)
    assert the_sentence(rayk("status", tmp_path / "nowhere"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["run"], "Interrupted before the run started; nothing is lost."),
        (["synthesize"], "Interrupted; the completions are kept, and the same command continues from there."),
        (["evaluate"], "Interrupted."),
    ],
)
def test_an_interruption_says_what_is_kept(tmp_path, command, sentence):
    path = tmp_path / "config.yaml"
    os.mkfifo(path)
    with started(*command, path, log=tmp_path / "log") as process, path.open("w"):  # blocks until the command reads
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert (tmp_path / "log").read_text().strip() == f"rayk: {sentence}"


def test_a_traceback_contains_no_secret(monkeypatch, rayk, write_config):
    secret = "planted-in-a-traceback"
    remember_secret(secret)

    def fail(*_, **__):
        raise RuntimeError(secret)

    monkeypatch.setattr("rayk.commands.run.distill", fail)
    monkeypatch.setenv("RAYK_VERBOSE", "1")
    code, _, err = rayk("run", write_config())
    assert code == 1 and "Traceback" in err and "RuntimeError: ***" in err and secret not in err


def interrupted(monkeypatch, rayk, path, prepare=lambda: None):
    """Run the config, which is interrupted after `prepare`; return the error's sentence."""

    def stop(*_, **__):
        prepare()
        raise KeyboardInterrupt

    monkeypatch.setattr("rayk.commands.run.distill", stop)
    return the_sentence(rayk("run", path), code=130)


def test_an_interrupted_run_says_what_is_kept(monkeypatch, rayk, write_config, tmp_path):
    path = write_config()
    assert "before training started; nothing is lost" in interrupted(monkeypatch, rayk, path)
    (tmp_path / "run").mkdir()

    def start_training():
        (tmp_path / "run" / "data.fingerprint").write_text("of the rows")

    sentence = interrupted(monkeypatch, rayk, path, start_training)
    assert "before the first checkpoint; with --resume the training starts again at step 1" in sentence
    folder = str(tmp_path / "run" / "checkpoints")
    sentence = interrupted(monkeypatch, rayk, path, lambda: write_checkpoint(folder, 40))
    assert "checkpointed at step 40. Continue it with --resume" in sentence


def test_a_comparison_does_not_overwrite_a_runs_report(rayk, tmp_path, monkeypatch):
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    (runs[0] / "report.html").write_text("its own")
    monkeypatch.chdir(tmp_path)
    code, _, err = rayk("report", *runs)
    assert (code, err) == (0, "The report: comparison.html\n")
    assert "Comparison of one and two" in (tmp_path / "comparison.html").read_text()
    assert (runs[0] / "report.html").read_text() == "its own"
    assert rayk("report", runs[1])[2] == f"The report: {runs[1]}/report.html\n"


def test_doctor_notes_settings_that_are_probably_wrong(rayk, write_config, tmp_path, tiny_teacher):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    tiny_model(tmp_path / "large", hidden=64, layers=3, tokenizer=tokenizer)
    path = write_config("logit_kd", teachers=[{"model": tiny_teacher}], student={"model": str(tmp_path / "large")})
    code, out, _ = rayk("doctor", path, "--set", "training.learning_rate=10000", "--set", "training.batch_size=64")
    assert code == 0
    assert "training.batch_size is 64, but data.train has only 48 rows" in out
    assert "training.learning_rate is 10000, at which training diverges" in out
    assert "tokenizer has a chat template, but data.chat_template is false" in out
    assert re.search(r"Teacher 'teacher' has [\d,]+ parameters and the student [\d,]+; if they were swapped", out)
    code, out, _ = rayk("doctor", path, "--set", "data.chat_template=true")
    assert (code, "data.chat_template is false" in out) == (0, False)
    assert "is the same model" not in out
    assert "Teacher 'teacher' was trained on another chat template" in out


def test_doctor_notes_a_teacher_that_is_the_student(rayk, write_config, tiny_teacher):
    path = write_config("logit_kd", teachers=[{"model": tiny_teacher}], student={"model": tiny_teacher})
    note = "Teacher 'teacher' is the same model as the student"
    assert note in rayk("doctor", path)[1]
    assert note not in rayk("doctor", path, "--set", "teachers.0.prompt_template='{prompt} {answer}'")[1]


def test_doctor_compares_requirements_with_the_machine(rayk, write_config, tiny_teacher):
    path = write_config("logit_kd", teachers=[{"model": tiny_teacher, "resources": {"num_gpus": 90}}])
    code, out, _ = rayk("doctor", path)
    assert code == 2
    assert re.search(r"✗ The run requires 90 GPUs at the same time \(teacher 'teacher' 90\), but there are \d", out)
    path = write_config("logit_kd", teachers=[{"model": tiny_teacher, "replicas": 900}])
    code, out, _ = rayk("doctor", path)
    assert code == 0
    assert re.search(r"• The run requires 900 CPUs .* but there are \d+; .* so the run is slow", out)


def test_doctor_ends_with_the_command_that_runs_the_config(rayk, write_config):
    path = write_config("supervised")
    code, out, _ = rayk("doctor", path, "--set", "output=my run")
    assert code == 0, out
    assert out.splitlines()[-1] == f"✓ Ready: rayk run {path} --set 'output=my run'"


def test_the_package_is_the_command_line_too():
    done = subprocess.run([sys.executable, "-m", "rayk", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"rayk {rayk_package.__version__}\n"


def test_doctor_finds_a_dead_cluster(rayk, monkeypatch):
    monkeypatch.setattr("rayk.serving.cluster.CONNECT_SECONDS", 0.2)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    code, out, _ = rayk("doctor")
    assert (code, "✗ No Ray cluster answers at RAY_ADDRESS '127.0.0.1:9'" in out) == (2, True)


def test_progress_after_a_resume_only_counts_forward(capsys):
    shown = io.StringIO()
    progress = TerminalProgress(Console(file=shown, width=200))
    row = {"loss": 1.0, "tokens_per_second": 10.0}
    progress.stage("Training")
    for steps in ([5, 6], [1, 2, 3, 4, 5], [6], [7, 8]):
        progress._last_line = 0.0
        progress.steps([row | {"step": step} for step in steps], 9)
    assert re.findall(r"step (\d)/9", shown.getvalue()) == ["6", "8"]
