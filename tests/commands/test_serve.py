"""`rayk serve` reads only the teachers of a config."""

import pytest
import yaml

from rayk.config import load_teachers
from rayk.errors import InputError


@pytest.fixture
def write(tmp_path):
    def write_values(**values):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write_values


def test_config_with_only_teachers(write):
    path = write(teachers=[{"name": "one", "model": "org/model"}, {"name": "two", "attach": True}])
    assert [teacher.name for teacher in load_teachers(path, ["teachers.0.name=first"])] == ["first", "two"]


def test_other_sections_are_not_checked(write):
    path = write(teachers=[{"model": "org/model"}], student={"modle": "x"}, method={"kind": "none"})
    assert [teacher.name for teacher in load_teachers(path)] == ["teacher"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"student": {"model": "m"}}, "has no teachers; add one under 'teachers'"),
        ({"teachers": [{"name": "a", "model": "m"}] * 2}, "two teachers are named 'a'"),
        ({"teachers": [{"modle": "m"}]}, "unknown key 'modle'; did you mean 'model'"),
        ({"teachers": "big"}, "teachers is 'big', but must be a list"),
        ({"teachers": [{"name": "a"}]}, "teachers.0 needs 'model'"),
    ],
)
def test_wrong_teachers_are_one_sentence(write, values, message):
    with pytest.raises(InputError) as caught:
        load_teachers(write(**values))
    assert message in str(caught.value)
