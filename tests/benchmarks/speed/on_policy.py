"""Throughput of on-policy training: with and without overlap, with teacher-mixed sampling, and against TRL.

    python -m tests.benchmarks.speed.on_policy --data train.jsonl [--trl-python VENV/bin/python] [--rounds 3]

The models and rows of `race`, in float32. Completions are sampled at temperature 1 up to 64 tokens. Tokens per second
count prompts and completions over the steps after the first five; the sides take turns, medians are printed. How to
read it: each line ends with its throughput relative to TRL's `GKDTrainer` with `lmbda=1`.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rayk.serving.cluster import start_ray
from tests.benchmarks.machine import machine
from tests.benchmarks.speed.race import BATCH, K, make_models, run_trl, tokens_per_second, train

NEW_TOKENS, WARM_STEPS = 64, 5
TOP: dict[str, Any] = {"support": {"kind": "topk", "k": K}}
SIDES: dict[str, tuple[dict[str, Any], int]] = {
    # printed name: method, max_staleness
    "on_policy, no overlap": ({"kind": "on_policy"} | TOP, 0),
    "on_policy, one step stale": ({"kind": "on_policy"} | TOP, 1),
    "on_policy, policy form": ({"kind": "on_policy", "form": "policy", "support": {"kind": "logprob"}}, 0),
    "minillm, student alone": ({"kind": "minillm", "teacher_share": 0.0} | TOP, 0),
    "minillm, teacher mixed in": ({"kind": "minillm"} | TOP, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trl-python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--sides", default=";".join(SIDES))
    given = parser.parse_args()
    print(f"{machine()}, load before {os.getloadavg()[0]:.1f}")
    speeds: dict[str, list[float]] = {}
    last: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, given.data)
        for number in range(given.rounds):
            for side in given.sides.split(";"):
                method, staleness = SIDES[side]
                rollouts = {"max_new_tokens": NEW_TOKENS, "max_staleness": staleness}
                run = f"{side.replace(' ', '-').replace(',', '')}-{number}"
                rows = train(
                    folder, run, given.steps * BATCH, given.steps, (2, 2), method=method, rollouts=rollouts
                )[WARM_STEPS:]  # fmt: skip
                speeds.setdefault(side, []).append(tokens_per_second(rows))
                last[side] = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
            if given.trl_python:
                speed = run_trl(
                    folder, given.trl_python, "float32", given.steps, os.cpu_count() or 1, lmbda=1.0,
                    max_new_tokens=NEW_TOKENS,
                )  # fmt: skip
                speeds.setdefault("TRL", []).append(speed)
    peer = statistics.median(speeds.pop("TRL")) if "TRL" in speeds else None
    for side, found in speeds.items():
        speed, row = statistics.median(found), last[side]
        text = (
            f"{side}: {speed:,.0f} tokens/s; of a step's {row['step_seconds']:.2f} s: waiting "
            f"{row['teacher_wait_seconds']:.2f}; ahead of it: writing {row['generate_seconds']:.2f}, scoring "
            f"{row['score_seconds']:.2f}; teacher calls a token "
            f"{row['rollout_teacher_calls'] / row['rollout_tokens']:.3f}"
        )
        print(text + (f"; {speed / peer:.2f} times TRL's {peer:,.0f}" if peer else ""), flush=True)


if __name__ == "__main__":
    start_ray(4)
    main()
