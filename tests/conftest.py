"""What the whole suite shares: tiny models, and one Ray cluster with one served teacher, started when first needed."""

import asyncio
import os
import signal

from rayk.environment import set_threading

set_threading()  # before torch
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = (
    "disabled"  # else a local cluster writes ~/.ray/auth_token, which later clusters stumble over
)
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # no Ray but those that are asked for; Serve's threads would start one
# Train's controller looks at its workers five times a second instead of every other one.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # vLLM would compile for a quarter of a minute before its first log-probs
# On the CPU vLLM would give its one worker a process of its own, which imports all of vLLM once more (12 s of a core).
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# A shell that starts something in the background has it ignore Ctrl-C, and all that it starts in turn.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from tests.tiny import tiny_model, tiny_tokenizer  # noqa: E402

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    """Files that start Ray or vLLM first: processes that share the tests take whole files from the top, and what is
    short fills up the end. A file's tests stay together and in order."""
    slow = {item.path for item in items if item.get_closest_marker("cluster") or "ray_cluster" in item.fixturenames}
    items.sort(key=lambda item: item.path not in slow)


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
    """Runs coroutines on the one event loop that an engine's tasks live on."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for the session, with more logical CPUs than the machine has."""
    import ray
    from ray import serve
    from ray.serve._private import client

    from rayk.serving.cluster import start_ray

    client.CLIENT_POLLING_INTERVAL_S = 0.1  # how often it looks whether an application is up, or gone; else each second
    start_ray(num_cpus=8)
    yield
    serve.shutdown()  # also this process's handles, which go on reporting to a controller that is no more
    ray.shutdown()


@pytest.fixture(scope="session")
def served(ray_cluster, tiny_teacher):
    """The tiny teacher as Serve application `served`, two replicas; its asker."""
    from rayk.config import TeacherConfig
    from rayk.teachers import serve_teacher

    config = TeacherConfig(name="served", model=tiny_teacher, replicas=2, resources={"num_cpus": 0.25})
    with serve_teacher(config) as teacher:
        yield teacher
