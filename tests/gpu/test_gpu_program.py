"""The program for a machine with a GPU runs on a CPU, where Ray cannot be imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CODE = "import sys, runpy; sys.modules['ray'] = None; sys.argv = ['gpu', '--device', 'cpu']; " \
       "runpy.run_module('tests.gpu', run_name='__main__')"  # fmt: skip


def run(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False
    )  # fmt: skip


def test_all_checks_pass_on_a_cpu_without_ray():
    done = run(CODE)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "all passed" in done.stdout and "FAIL" not in done.stdout
    assert done.stdout.count("\npass ") >= 10


def test_a_failed_check_is_an_exit_status():
    code = "import sys, tests.gpu.__main__ as program\n" \
           "def wrong(scale): raise AssertionError('too large')\n" \
           "program.CHECKS = [wrong]; sys.argv = ['gpu', '--device', 'cpu']; sys.exit(program.main())"  # fmt: skip
    done = run(code)
    assert done.returncode == 1
    assert "FAIL  wrong" in done.stdout and "AssertionError: too large" in done.stdout
