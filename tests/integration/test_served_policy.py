"""The kind of policy, and killed processes, do not change the results of a run."""

import pytest
import ray
from ray import serve

from rayk.config import parse_config
from rayk.errors import PolicyUnavailable, RunFailed
from rayk.run import distill, policy_application
from rayk.serving import application
from rayk.serving.weight_store import NAMESPACE
from rayk.training.checkpoint import CheckpointStore
from tests.integration.test_deaths import Striking
from tests.runs import actor_processes, assert_same_learning, curve, settings, wait_until
from tests.teachers.helpers import vllm_processes
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cluster

METHOD = {"kind": "on_policy", "support": {"kind": "requested", "k": 8}, "requested_ids": 4}
SERVED = {"kind": "served", "replicas": 2, "resources": {"num_cpus": 0.25}}


def prepared(folder, student, rollouts, lora=None, **training):
    folder.mkdir(exist_ok=True)
    values = settings(folder, student, METHOD, **{"learning_rate": 1e-3, **training})
    values["student"]["lora"] = lora
    values["rollouts"] |= rollouts
    return parse_config(values)


@pytest.fixture
def nothing_left(ray_cluster):
    yield
    assert not [name for name in serve.status().applications if name.startswith("_policy-")]
    wait_until(lambda: not named_actors(), "the end of the weight store")


def named_actors():
    found = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]


@pytest.mark.parametrize(
    ("max_staleness", "replicas", "lora"), [(0, 2, None), (1, 1, {"r": 4, "dropout": 0.2})], ids=["whole", "adapter"]
)
def test_served_policy_trains_like_the_worker_policy(
    max_staleness, replicas, lora, tmp_path, tiny_student, served, nothing_left
):
    rollouts = {"max_staleness": max_staleness}
    distill(prepared(tmp_path / "worker", tiny_student, rollouts, lora))
    distill(prepared(tmp_path / "served", tiny_student, SERVED | rollouts | {"replicas": replicas}, lora))
    assert_same_learning(tmp_path / "worker" / "run", tmp_path / "served" / "run")
    ages = [min(step, max_staleness) for step in range(6)]
    assert curve(tmp_path / "served" / "run", "rollout_staleness") == ages


@pytest.mark.nightly
def test_killed_replica_and_worker_change_no_result(tmp_path, tiny_student, served, nothing_left):
    training = {"steps": 40, "checkpoint_every_steps": 5}
    distill(prepared(tmp_path / "whole", tiny_student, {"max_staleness": 1}, **training))
    disturbed = prepared(tmp_path / "hurt", tiny_student, SERVED | {"max_staleness": 1}, workers=1, **training)

    def strike():
        actor_processes(f"ServeReplica:{policy_application(disturbed)}:")[0].kill()
        actor_processes("RayTrainWorker")[-1].kill()

    listener = Striking(12, strike)
    distill(disturbed, listener=listener)
    assert listener.struck.is_set()
    assert_same_learning(tmp_path / "whole" / "run", disturbed.output_path, 1e-3)
    assert curve(disturbed.output_path, "rollout_staleness") == [0, *[1] * 39]


@pytest.mark.nightly
def test_vllm_policy_trains_like_the_worker_policy_despite_a_kill(tmp_path, served, nothing_left, monkeypatch):
    """Sampling is greedy, so both policies generate the same with the same weights: those of a merged adapter."""
    monkeypatch.setattr(application, "_HEALTH_CHECK_SECONDS", 1.0)
    student = str(tmp_path / "student")
    tiny_model(student, seed=2, hidden=128, layers=1, peaked=4.0, tokenizer=tiny_tokenizer())
    rollouts = {"max_staleness": 1, "temperature": 0.0, "max_new_tokens": 8}
    vllm = {"kind": "vllm", "arguments": {"enforce_eager": True}, "batch_tokens": 256}
    training, lora = {"steps": 24, "learning_rate": 3e-3}, {"r": 8}
    distill(prepared(tmp_path / "worker", student, rollouts, lora, **training))
    run = prepared(tmp_path / "vllm", student, SERVED | {"replicas": 1, "engine": vllm} | rollouts, lora, **training)

    def strike():
        _, core = vllm_processes(policy_application(run), "VLLM::EngineCore")
        core.kill()

    listener = Striking(6, strike)
    distill(run, listener=listener)
    assert listener.struck.is_set()
    assert_same_learning(tmp_path / "worker" / "run", run.output_path, 1e-3)
    assert len(set(curve(run.output_path, "rollout_repetition"))) > 6, "the rollouts hardly change"


def test_run_without_its_policy_stops_and_continues_in_the_worker(tmp_path, tiny_student, served, nothing_left):
    training = {"steps": 40}
    distill(prepared(tmp_path / "whole", tiny_student, {}, **training))
    stopped = prepared(
        tmp_path / "stopped", tiny_student, SERVED | {"deadline_seconds": 3, "replicas": 1}, workers=2, **training
    )
    listener = Striking(12, lambda: serve.delete(policy_application(stopped)))
    with pytest.raises(PolicyUnavailable, match="The served policy did not answer within 3 s"):
        distill(stopped, listener=listener)
    reached = curve(stopped.output_path, "step")[-1]
    assert 12 <= reached < 40
    assert CheckpointStore(f"{stopped.output_path}/checkpoints").steps()[-1] == reached
    distill(prepared(tmp_path / "stopped", tiny_student, {"kind": "worker"}, **training), resume=True)
    assert_same_learning(tmp_path / "whole" / "run", stopped.output_path, 1e-3)


def test_rollout_timeout_is_one_sentence(tmp_path, tiny_student, served):
    rollouts = {"timeout_seconds": 0.05, "max_new_tokens": 400}
    with pytest.raises(RunFailed, match=r"completions of step 1 took longer than rollouts.timeout_seconds \(0.05 s\)"):
        distill(prepared(tmp_path, tiny_student, rollouts))
