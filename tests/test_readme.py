"""README's commands, settings and Python are run or parsed as they stand there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from rayk.cli import app
from rayk.config import load_config
from rayk.methods import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Every command of `program` in the bash blocks, also behind `ray job submit … --`."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index(program) :] for line in words if program in line]


@pytest.fixture
def newcomer(tmp_path, tiny_teacher, tiny_student):
    """A folder with what README's examples name: teacher/, student/, train.jsonl and jobs/ with these put in."""
    (tmp_path / "teacher").symlink_to(tiny_teacher)
    (tmp_path / "student").symlink_to(tiny_student)
    rows = [{"prompt": f"Question: {n} + {n}?", "completion": f"Answer: {2 * n}"} for n in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "jobs").mkdir()
    for job in JOBS:
        settings = yaml.safe_load(job.read_text())
        settings["student"]["model"] = "student"
        if "train" in settings["data"]:
            settings["data"]["train"]["path"] = "train.jsonl"
        for teacher in settings.get("teachers", []):
            teacher["model"] = "teacher"
        settings["training"] |= {"epochs": 1, "batch_size": 8, "resources": {"num_cpus": 0.5}}
        (tmp_path / "jobs" / job.name).write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.mark.cluster
def test_python_in_readme_runs_as_it_stands(newcomer):
    program = "\n".join(blocks("python"))
    assert "rayk.distill(" in program
    assert "serve_teacher(" in program
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=newcomer, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (newcomer / "runs" / "from-python" / "model" / "config.json").exists()


def test_job_without_a_teacher_runs_as_it_is(newcomer, monkeypatch):
    monkeypatch.chdir(newcomer)
    app(["run", "jobs/supervised.yaml", "--set", "training.workers=0"], standalone_mode=False)
    assert (newcomer / "runs" / "supervised" / "summary.json").exists()


@pytest.mark.parametrize("command", commands("rayk"), ids=" ".join)
def test_command_in_readme_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = command[1:]
    context = get_command(app).make_context("rayk", words, resilient_parsing=False)
    name, *rest = words
    parsed = get_command(app).commands[name].make_context(name, rest, parent=context)
    if parsed.params.get("config"):
        load_config(parsed.params["config"], parsed.params.get("overrides"))


@pytest.mark.parametrize("command", commands("make"), ids=" ".join)
def test_make_target_in_readme_exists(command):
    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_readme_lists_every_method():
    section = README.split("## Choosing a method")[1].split("\n## ")[0]
    assert {f"`{kind}`" for kind in METHODS} == set(re.findall(r"^\| (`\w+`) \|", section, re.MULTILINE))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_job_is_a_config(job):
    config = load_config(job)
    assert (config.synthesis or config.method).kind == job.stem


def test_files_that_readme_links_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
