"""Names of the previous release work for one more release, and warn with the new name."""

import pytest

from rayk import run
from tests.runs import config


def test_watcher_is_the_progress_listener(tmp_path, tiny_student):
    stages = []
    with pytest.warns(DeprecationWarning, match="is now rayk.run.ProgressListener"):
        base = run.Watcher
    listener = type("Stages", (base,), {"stage": lambda _, text: stages.append(text)})()
    with pytest.warns(DeprecationWarning, match=r"is now distill\(listener=…\)"):
        run.distill(config(tmp_path, tiny_student, steps=1), watcher=listener)
    assert stages[:2] == ["Reading data and models", f"The run directory is {tmp_path}/run"]
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        run.Nothing  # noqa: B018
