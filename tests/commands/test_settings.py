"""`rayk settings` prints the settings, and every command shows all wrong settings with exit code 2."""

import sys

import pytest

from rayk import cli


@pytest.fixture
def rayk(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rayk", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_settings_are_printed(rayk):
    code, out, err = rayk("settings", "training")
    assert (code, err) == (0, "")
    assert out.startswith("training\n")
    assert "  learning_rate: number > 0 or null, default null\n" in out


def test_all_settings_are_one_page(rayk):
    code, out, _ = rayk("settings", "--markdown")
    assert code == 0
    assert out.startswith("# Settings\n")
    assert "| `batch_size` | integer ≥ 1 | 32 |" in out


def test_an_unknown_section_is_one_sentence(rayk):
    code, out, err = rayk("settings", "trainig")
    assert (code, out) == (2, "")
    assert err.startswith("rayk: There is no section 'trainig'; did you mean 'training'?")


def test_each_wrong_setting_has_a_line(rayk, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("student: {modle: s}\ndata: {train: {path: p}}\nmethod: {kind: sft}\ntraining: {lr: 1}\n")
    code, out, err = rayk("run", path)
    assert (code, out) == (2, "")
    first, *others = err.splitlines()
    assert first == f"rayk: {path}: 3 settings are wrong."
    assert [line.split(":")[0] for line in others] == ["student", "method", "training"]
