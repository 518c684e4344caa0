"""Fixtures of the whole suite: tiny models, and one Ray cluster with one served teacher, started when first used."""

import asyncio
import os
import signal

from rayk.environment import set_threading

set_threading()  # before torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"
# Otherwise a local cluster writes ~/.ray/auth_token, which later clusters of this user then require.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # Serve's threads would start a cluster that no test requests
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # Ray Train polls its workers; by default every 2 s
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM would compile for 15 s before its first log-probs
# vLLM on a CPU would start its worker in a separate process, which imports all of vLLM once more (12 s of a core).
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# A shell that starts the tests in the background makes them and their child processes ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from tests.tiny import tiny_model, tiny_tokenizer  # noqa: E402

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()

CLUSTER_FIXTURES = {"ray_cluster", "vllm"}
"""Fixtures that start Ray or vLLM; a test that uses one of them, directly or not, gets the marker `cluster`."""

SUBPROCESS_CLUSTER_FILES = {"test_torch_trainer.py"}
"""Files whose tests load or start Ray in processes of their own, as those in `tests/integration` do."""


@pytest.hookimpl(tryfirst=True)  # before `-m` selects tests by their markers
def pytest_collection_modifyitems(items):
    """Mark cluster tests and those that take long by their kind, and move their files to the front.

    Test processes take whole files in this order. The files with cluster tests take longest, so the shorter ones at the
    end keep all processes busy. The tests of a file stay together and in order.
    """
    for item in items:
        starts_ray = item.path.parent.name == "integration" or item.path.name in SUBPROCESS_CLUSTER_FILES
        if starts_ray or CLUSTER_FIXTURES & set(item.fixturenames):
            item.add_marker("cluster")
        takes_long = item.path.parent.name == "integration" or "vllm" in item.path.name
        if (takes_long and item.get_closest_marker("cluster")) or item.get_closest_marker("nightly"):
            item.add_marker("long")
    slow = {item.path for item in items if item.get_closest_marker("cluster")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def no_cluster(request, monkeypatch):
    """Let a test fail if it starts Ray in this process and does not have the marker `cluster`."""
    if request.node.get_closest_marker("cluster"):
        return

    def fail(*_, **__):
        pytest.fail("this test starts Ray; mark it with `cluster`, or use the fixture `ray_cluster`")

    monkeypatch.setattr("ray.init", fail)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """The folder of a model with peaked distributions (logits of standard deviation 4) and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    tiny_model(folder, seed=1, peaked=4.0, tokenizer=tiny_tokenizer())
    return str(folder)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory):
    """The folder of a smaller model with the teacher's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "student"
    tiny_model(folder, seed=2, hidden=16, layers=1, tokenizer=tiny_tokenizer())
    return str(folder)


@pytest.fixture(scope="module")
def on_loop():
    """Function that runs coroutines on one event loop, which an engine's background tasks require."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray cluster for the session, with more logical CPUs than the machine has."""
    import ray
    from ray import serve
    from ray.serve._private import client

    from rayk.serving.cluster import start_ray

    client.CLIENT_POLLING_INTERVAL_S = 0.1  # interval of checks whether an application has started or ended; default 1
    start_ray(num_cpus=8)
    yield
    serve.shutdown()  # ends also this process's handles, which would continue to report to a controller that has ended
    ray.shutdown()


@pytest.fixture(scope="session")
def served(ray_cluster, tiny_teacher):
    """A client of the tiny teacher, which runs as Serve application `served` with two replicas."""
    from rayk.config import TeacherConfig
    from rayk.teachers import serve_teacher

    config = TeacherConfig(name="served", model=tiny_teacher, replicas=2, resources={"num_cpus": 0.25})
    with serve_teacher(config) as teacher:
        yield teacher


@pytest.fixture(scope="session")
def s3():
    """A bucket on a local S3 server."""
    from tests.s3 import serve_bucket

    with serve_bucket() as bucket:
        yield bucket
