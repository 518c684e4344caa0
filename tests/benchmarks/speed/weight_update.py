"""The cost of new weights in a served policy's replicas, and served rollouts against those in the training worker.

    python -m tests.benchmarks.speed.weight_update [--rounds 5] [--engine vllm]

The training worker publishes weights: a checksum and a copy into the object store, for which the step waits. A replica
loads them before its first batch of a version: look-up, checksum and copy. The loading time is the difference between a
short request with a new version and one with a version that the replica already has. Weights are float32. How to read
it: lower milliseconds are better; "times as many" compares served rollouts with those of the worker.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from rayk.config import ServedRollouts, parse_config
from rayk.data.examples import Example
from rayk.environment import set_threading
from rayk.serving.cluster import start_ray

set_threading()

import torch  # noqa: E402

from rayk.models import load_model, load_tokenizer  # noqa: E402
from rayk.rollouts import Policy, ServedPolicy, WorkerPolicy, serve_policy  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402
from tests.tiny import tiny_model, tiny_tokenizer  # noqa: E402

SIZES = ((256, 4), (512, 8), (1024, 8))
ROWS, PROMPT, NEW_TOKENS = 64, 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    options = parser.parse_args()
    rounds = options.rounds
    engine = {"kind": options.engine, **({"arguments": {"enforce_eager": True}} if options.engine == "vllm" else {})}
    torch.set_num_threads(1)
    print(f"{machine()}; each replica and the worker on one thread")
    start_ray(4)
    with tempfile.TemporaryDirectory() as folder:
        for hidden, layers in SIZES:
            model = f"{folder}/{hidden}"
            tiny_model(model, hidden=hidden, layers=layers, tokenizer=tiny_tokenizer())
            measure_new_weights(model, engine, rounds)
        for replicas in (1, 2):
            compare_with_worker(f"{folder}/{SIZES[0][0]}", engine, replicas, rounds)


def measure_new_weights(model: str, engine: dict, rounds: int) -> None:
    learner = load_model(model)
    size = sum(parameter.numel() for parameter in learner.parameters())
    publish, first, again = [], [], []
    config = make_config(model, engine, 1)
    with serve_policy(config, "_policy-benchmark", model) as address:
        assert address is not None and isinstance(config.rollouts, ServedRollouts)
        policy = ServedPolicy(learner, config.rollouts, address, publishes=True)
        policy.begin("benchmark")
        for version in range(rounds + 1):
            publish.append(seconds(lambda version=version: policy.update(version)))
            first.append(seconds(lambda: send_short_request(policy)))
            again.append(seconds(lambda: send_short_request(policy)))
    published = statistics.median(publish[1:])
    taken = statistics.median(new - known for new, known in zip(first[1:], again[1:], strict=True))
    print(
        f"{size / 1e6:.1f} million parameters, {4 * size / 1e6:.0f} MB: published in {1e3 * published:.0f} ms "
        f"({4 * size / published / 1e9:.2f} GB/s), taken over in {1e3 * taken:.0f} ms",
        flush=True,
    )


def compare_with_worker(model: str, engine: dict, replicas: int, rounds: int) -> None:
    learner = load_model(model)
    config = make_config(model, engine, replicas)
    with serve_policy(config, "_policy-benchmark", model) as address:
        assert address is not None and isinstance(config.rollouts, ServedRollouts)
        served = ServedPolicy(learner, config.rollouts, address, publishes=True)
        served.begin("benchmark")
        served.update(0)
        worker = WorkerPolicy(learner, load_tokenizer(model), config.rollouts, batch_tokens=8192)
        speeds: dict[str, list[float]] = {"worker": [], "served": []}
        for number in range(rounds + 1):
            for name, policy in (("worker", worker), ("served", served)):
                speed = tokens_per_second(policy)
                if number:
                    speeds[name].append(speed)
    local, served = (statistics.median(values) for values in speeds.values())
    print(
        f"{ROWS} rollouts of {NEW_TOKENS} tokens at most: {local:,.0f} tokens/s in the worker, {served:,.0f} by "
        f"{replicas} replica{'s' if replicas > 1 else ''}, {served / local:.2f} times as many",
        flush=True,
    )


def make_config(model: str, engine: dict, replicas: int):
    return parse_config(
        {
            "teachers": [{"name": "none", "attach": True}], "student": {"model": model},
            "data": {"train": {"path": "none"}}, "method": {"kind": "on_policy"},
            "rollouts": {"kind": "served", "engine": engine, "replicas": replicas, "max_new_tokens": NEW_TOKENS},
        }
    )  # fmt: skip


def make_prompts(rows: int) -> list[Example]:
    random = np.random.default_rng(0)
    ids = random.integers(4, 300, (rows, PROMPT)).astype(np.int32)
    return [Example(row, np.arange(PROMPT) > PROMPT // 2, None, PROMPT) for row in ids]


def send_short_request(policy: Policy) -> None:
    asyncio.run(policy.logprobs(make_prompts(1)))


def tokens_per_second(policy: Policy) -> float:
    rows = make_prompts(ROWS)
    began = time.perf_counter()
    rollouts = asyncio.run(policy.generate(rows, policy.parameters, range(ROWS)))
    return sum(len(rollout.completion_ids) for rollout in rollouts) / (time.perf_counter() - began)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
