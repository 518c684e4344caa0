"""Teachers whose completions a test decides: an endpoint behind real Ray Serve."""

import pytest

from rayk.config import TeacherConfig
from rayk.synthesis import CompletionStore
from rayk.teachers import serve_teacher
from tests.engines.endpoint import Endpoint
from tests.synthesis.helpers import engine_of


@pytest.fixture(scope="session")
def _endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="session")
def chat_teacher(ray_cluster, _endpoint):
    """Teacher 'parrot', which returns its endpoint's completions and is queried for chat completions."""
    config = TeacherConfig(
        name="parrot", model="parrot-1", engine=engine_of(_endpoint), resources={"num_cpus": 0.25}
    )  # fmt: skip
    with serve_teacher(config) as teacher:
        yield teacher


@pytest.fixture(scope="session")
def plain_teacher(ray_cluster, _endpoint):
    """Teacher 'scribbler' on the same endpoint, queried for plain completions."""
    config = TeacherConfig(
        name="scribbler", model="scribbler-1", engine=engine_of(_endpoint, chat=False), resources={"num_cpus": 0.25}
    )  # fmt: skip
    with serve_teacher(config) as teacher:
        yield teacher


@pytest.fixture
def endpoint(_endpoint):
    _endpoint.reset()
    return _endpoint


@pytest.fixture
def store(tmp_path):
    with CompletionStore(tmp_path / "synthesis") as opened:
        opened.claim({}, set(), set())
        yield opened
