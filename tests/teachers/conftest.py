import pytest

from rayk.teachers import serve_teacher
from tests.teachers.helpers import teacher_config
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def second(tmp_path_factory):
    """The folder of a smaller teacher with the same tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "second"
    tiny_model(folder, seed=5, hidden=16, peaked=3.0, tokenizer=tiny_tokenizer())
    return str(folder)


@pytest.fixture(scope="session")
def second_served(ray_cluster, second):
    """A client of the second teacher, which runs as Serve application `another`."""
    with serve_teacher(teacher_config("another", second)) as teacher:
        yield teacher
