"""The pages of this repository are true: commands parse, links exist, code runs as it stands, tables are complete."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest
import yaml
from typer.main import get_command

from rayk.cli import app
from rayk.config import load_config, parse_config
from rayk.config.filters import FilterConfig
from rayk.config.marks import all_places
from rayk.config.run import RunConfig
from rayk.config.syntheses import SynthesisConfig
from rayk.methods import METHODS

ROOT = Path(__file__).parent.parent
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(path for folder in ("deploy", "jobs", "rayk", "tests", ".github")
                                              for path in (ROOT / folder).rglob("*.md"))])
}  # fmt: skip
README, CONTRIBUTING = PAGES["README.md"], PAGES["CONTRIBUTING.md"]


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def named_blocks(page: str) -> dict[str, str]:
    """Code blocks whose first line is a comment with a file name, by that name."""
    blocks = [block for language in ("python", "yaml") for block in code_blocks(page, language)]
    named = [(re.match(r"# (\w+\.(?:py|yaml))$", block.splitlines()[0]), block) for block in blocks]
    return {name[1]: block for name, block in named if name}


def programs(page: str) -> str:
    """The Python of a page that belongs to no named file, one block after the other."""
    files = named_blocks(page).values()
    return "\n".join(block for block in code_blocks(page, "python") if block not in files)


def commands(program: str) -> list:
    """Each command of `program` in the bash blocks of a page, also behind `ray job submit … --`."""
    found = []
    for name, page in PAGES.items():
        lines = "\n".join(code_blocks(page, "bash")).replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        found += [(name, line[line.index(program) :]) for line in words if program in line]
    return [pytest.param(line, id=f"{name}: {' '.join(line)}") for name, line in found]


def heading_anchors(page: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_kinds(page: str, header: str) -> set[str]:
    """The first column of the table with this header, where it is `code`."""
    table = page.split(f"| {header} |")[1].split("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))


def kinds(union) -> set[str]:
    return {member.model_fields["kind"].default for member in get_args(get_args(union)[0])}


@pytest.fixture
def newcomer(tmp_path, tiny_teacher, tiny_student):
    """A folder with what the pages name: teacher/, student/, rows, their named files, and jobs/ on these models."""
    (tmp_path / "teacher").symlink_to(tiny_teacher)
    (tmp_path / "student").symlink_to(tiny_student)
    rows = [{"prompt": f"Question: {n} + {n}?", "completion": f"Answer: {2 * n}"} for n in range(16)]
    for name in ("train.jsonl", "test.jsonl", "prompts.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "jobs").mkdir()
    configs = {f"jobs/{job.name}": job.read_text() for job in JOBS}
    for page in (README, CONTRIBUTING):
        for name, text in named_blocks(page).items():
            if name.endswith(".yaml"):
                configs[name] = text
            else:
                (tmp_path / name).write_text(text)
    for name, text in configs.items():
        (tmp_path / name).write_text(yaml.safe_dump(on_tiny_models(yaml.safe_load(text), tmp_path)))
    return tmp_path


def on_tiny_models(settings: dict, folder: Path) -> dict:
    settings["student"] = settings["student"] | {"model": str(folder / "student"), "layers": None}
    for part, rows in settings["data"].items():
        if part in ("train", "evaluation"):
            rows["path"] = str(folder / "train.jsonl")
    settings["data"]["chat_template"] = False
    for teacher in settings.get("teachers", []):
        model = {} if teacher.get("follows") == "student" else {"model": str(folder / "teacher")}
        teacher |= {**model, "engine": {"kind": "transformers"}}
    training = {"epochs": 1, "batch_size": 8, "precision": "float32", "resources": {"num_cpus": 0.5}}
    settings["training"] = settings.get("training", {}) | training
    return settings


def run_command(*command: str, folder: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.cluster
@pytest.mark.long
def test_python_in_readme_runs_as_it_stands(newcomer):
    program = programs(README)
    assert "rayk.distill(" in program
    assert "serve_teacher(" in program
    run_command(sys.executable, "-c", program, folder=newcomer)
    assert (newcomer / "runs" / "from-python" / "model" / "config.json").exists()


@pytest.mark.cluster
@pytest.mark.long
def test_new_loss_in_readme_trains(newcomer):
    assert len(named_blocks(README)["my_loss.py"].splitlines()) < 15
    [command] = re.findall(r"`rayk (run distill.yaml --set method.divergence=\S+)`", README)
    run_command(sys.executable, "-m", "rayk.cli", *command.split(), folder=newcomer)
    steps = [json.loads(line) for line in (newcomer / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert all(0 < step["hellinger"] < 1 for step in steps)


@pytest.mark.long
@pytest.mark.cluster
def test_new_method_in_contributing_trains(newcomer):
    assert len(named_blocks(CONTRIBUTING)["my_method.py"].splitlines()) < 60
    assert "`rayk run my_method.yaml`" in CONTRIBUTING
    run_command(sys.executable, "-m", "rayk.cli", "run", "my_method.yaml", folder=newcomer)
    steps = [json.loads(line) for line in (newcomer / "runs/my_method/metrics.jsonl").read_text().splitlines()]
    assert steps[0]["weight"] == 1.0 > steps[-1]["weight"]


@pytest.mark.long
@pytest.mark.cluster
def test_recipe_in_contributing_writes_rows(newcomer):
    assert len(named_blocks(CONTRIBUTING)["shortest.py"].splitlines()) < 40
    [recipe] = [block for block in code_blocks(CONTRIBUTING, "yaml") if block.startswith("synthesis:")]
    config = yaml.safe_load((newcomer / "jobs/responses.yaml").read_text())
    config["synthesis"] = yaml.safe_load(recipe)["synthesis"] | {"filters": [], "sampling": {"max_new_tokens": 8}}
    (newcomer / "shortest.yaml").write_text(yaml.safe_dump(config | {"output": "runs/shortest"}))
    run_command(sys.executable, "-m", "rayk.cli", "synthesize", "shortest.yaml", folder=newcomer)
    assert pq.read_table(newcomer / "runs/shortest/synthesis/rows.parquet").num_rows > 0


def test_job_without_a_teacher_runs_as_it_is(newcomer, monkeypatch):
    monkeypatch.chdir(newcomer)
    app(["run", "jobs/supervised.yaml", "--set", "training.workers=0"], standalone_mode=False)
    assert (newcomer / "runs" / "supervised" / "summary.json").exists()


@pytest.mark.parametrize("command", commands("rayk"))
def test_command_in_a_page_parses(command, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    for page in (README, CONTRIBUTING):
        for name, text in named_blocks(page).items():
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    words = command[1:]
    context = get_command(app).make_context("rayk", words, resilient_parsing=False)
    name, *rest = words
    parsed = get_command(app).commands[name].make_context(name, rest, parent=context)
    if parsed.params.get("config"):
        load_config(parsed.params["config"], parsed.params.get("overrides"))


@pytest.mark.parametrize("command", commands("make"))
def test_make_target_in_a_page_exists(command):
    assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github/workflows").glob("*.yaml")), ids=lambda path: path.name)
def test_workflow_calls_make_targets_that_exist(workflow):
    makefile = (ROOT / "Makefile").read_text()
    steps = [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]
    called = [step["run"].split() for step in steps if step.get("run", "").startswith("make ")]
    assert called
    for target in (word for words in called for word in words[1:] if "=" not in word):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_fast_tests_run_on_every_supported_python():
    pyproject = (ROOT / "pyproject.toml").read_text()
    matrix = yaml.safe_load((ROOT / ".github/workflows/fast.yaml").read_text())["jobs"]["fast"]["strategy"]["matrix"]
    assert matrix["python"] == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject)


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_a_page_runs_exist(page):
    for module, options in re.findall(r"python -m ([\w.]+)([^`\n]*)", PAGES[page]):
        found = importlib.util.find_spec(module.split(".")[0]) and importlib.util.find_spec(module)
        assert found, f"python -m {module}"
        if module.startswith("tests.benchmarks"):
            source = Path(found.origin).read_text() + (ROOT / "tests/benchmarks/learning/harness.py").read_text()
            for option in re.findall(r"--[a-z][\w-]*", options):
                assert option in source, f"python -m {module} {option}"


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = os.path.relpath((ROOT / page).parent / path, ROOT) if path else page
        assert (ROOT / target).exists(), link
        if anchor:
            assert anchor in heading_anchors(PAGES[target]), link


def test_files_that_sources_and_pages_name_exist():
    """No document outside this repository is cited: Markdown pages exist, and no section sign follows a bare name."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    names = {Path(path).name for path in tracked} | {"README.md"}
    for path in tracked:
        if path.endswith((".py", ".md", ".yaml", ".j2", ".toml", "Makefile")) and (ROOT / path).exists():
            text = (ROOT / path).read_text(encoding="utf-8")
            assert not (missing := set(re.findall(r"\b[A-Z][\w-]+\.md\b", text)) - names), f"{path} names {missing}"
            assert not (cited := re.findall(r"\b[A-Z]{5,} §\S*", text)), f"{path} cites {cited}"


def test_the_repository_has_no_links():
    """Patches, archives and Windows turn them into small files."""
    files = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [line for line in files.splitlines() if line.startswith("120000")]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "rayk/config/README.md"])
def test_source_files_that_a_page_names_exist(page):
    places = [(ROOT / page).parent, ROOT, ROOT / "rayk"]
    for name in re.findall(r"`((?:[\w.]+/)+\w+\.(?:py|yaml))`", PAGES[page]):
        assert "NAME" in name or any((place / name).exists() for place in places), name


PYTHON_NAMES = {"student.head"}
"""Attributes in pages that look like settings."""


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_settings_that_a_page_names_exist(page):
    sections, places = "|".join(RunConfig.model_fields), set(all_places(RunConfig))
    for name in re.findall(rf"`((?:{sections})(?:\[\])?\.[\w.]+)(?:[:=][^`]*)?`", PAGES[page]):
        if not name.endswith((".json", ".jsonl")) and name not in PYTHON_NAMES:
            assert re.sub(r"\[\]|\.\d+\b", "", name) in places, name


def test_readme_can_be_read_to_the_end():
    assert 8_000 <= len(README.encode()) <= 10_000


def test_readme_lists_every_method_and_synthesis():
    assert table_kinds(README, "`method.kind`") == set(METHODS)
    assert table_kinds(README, "`synthesis.kind`") == kinds(SynthesisConfig) - {"custom"}


def test_the_page_of_jobs_has_every_job_and_filter():
    page = PAGES["jobs/README.md"]
    for job in JOBS:
        assert f"\n### {job.stem}\n" in page
        assert re.search(rf"^\| \[{job.stem}\]\(#{job.stem}\) \|", page, re.MULTILINE)
        assert f"jobs/{job.name}" in page
    assert table_kinds(page, "filter") == kinds(FilterConfig)


JOBS_OF_SETTINGS = dict.fromkeys(("other_tokenizer", "cut_student", "qwen3_235b"), "logit_kd") | {
    "ted": "layerwise", "baby_llama": "logit_kd", "mutual": "logit_kd", "baby_teacher": "supervised",
    "privileged_context": "on_policy", "self_distillation": "on_policy", "several_teachers": "on_policy",
    "task_reward": "on_policy", "tool": "on_policy",
}  # fmt: skip
"""Jobs that show a setting, and their method."""


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_job_is_a_config(job):
    config = load_config(job)
    assert (config.synthesis or config.method).kind == JOBS_OF_SETTINGS.get(job.stem, job.stem)


@pytest.mark.parametrize("block", code_blocks(PAGES["rayk/teachers/README.md"], "yaml"))
def test_settings_of_teachers_in_a_page_are_valid(block):
    run = {"student": {"model": "student"}, "data": {"train": {"path": "rows"}}, "method": {"kind": "logit_kd"}}
    parse_config(run | yaml.safe_load(block))


def test_the_config_in_readme_is_valid(tmp_path):
    (tmp_path / "distill.yaml").write_text(named_blocks(README)["distill.yaml"])
    config = load_config(tmp_path / "distill.yaml")
    assert config.method.kind == "logit_kd"
    assert config.output == "runs/first"
