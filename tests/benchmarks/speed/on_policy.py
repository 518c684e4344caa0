"""Throughput of on-policy training: with and without overlap, with teacher-mixed sampling, and against TRL.

    python -m tests.benchmarks.speed.on_policy --data train.jsonl [--trl-python VENV/bin/python] [--rounds 3]
        [--race "bfloat16 throughout"] [--sides "exact, no overlap;exact, one step stale"]

The models, rows and types (`--race`) of `race`. Completions are sampled at temperature 1 up to 64 tokens. Tokens per
second count prompts and completions over the steps after the first ten; the sides take turns, medians are printed. How
to read it: each line ends with its throughput relative to TRL's `DistillationTrainer`, which learns the reverse KL over
the whole vocabulary like the sides "exact", and to TRL's `GKDTrainer` with `lmbda=1`.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rayk.serving.cluster import start_ray
from tests.benchmarks.machine import machine
from tests.benchmarks.speed.race import (
    BATCH,
    RACES,
    WARM_STEPS,
    K,
    make_models,
    run_trl,
    tokens_per_second,
    train,
)

NEW_TOKENS = 64
TOP: dict[str, Any] = {"support": {"kind": "topk", "k": K}}
EXACT: dict[str, Any] = {"kind": "on_policy", "support": {"kind": "hidden"}}
PEERS = {"DistillationTrainer": "distillation_trl", "GKDTrainer": "race_trl"}
SIDES: dict[str, tuple[dict[str, Any], int]] = {
    # printed name: method, max_staleness
    "exact, no overlap": (EXACT, 0),
    "exact, one step stale": (EXACT, 1),
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
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--race", choices=RACES, default="float32")
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
                teacher_dtype, precision = RACES[given.race]
                rows = train(
                    folder, run, given.steps * BATCH, given.steps, (2, 2), method=method, rollouts=rollouts,
                    teacher_dtype=teacher_dtype, precision=precision,
                )[WARM_STEPS:]  # fmt: skip
                speeds.setdefault(side, []).append(tokens_per_second(rows))
                last[side] = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
            for peer, script in PEERS.items() if given.trl_python else ():
                speed = run_trl(
                    folder, given.trl_python, given.race, given.steps, os.cpu_count() or 1, script, lmbda=1.0,
                    max_new_tokens=NEW_TOKENS,
                )  # fmt: skip
                speeds.setdefault(peer, []).append(speed)
            print(json.dumps({side: [round(speed) for speed in found] for side, found in speeds.items()}), flush=True)
    peers = {peer: statistics.median(speeds.pop(peer)) for peer in PEERS if peer in speeds}
    for side, found in speeds.items():
        speed, row = statistics.median(found), last[side]
        text = (
            f"{side}: {speed:,.0f} tokens/s; of a step's {row['step_seconds']:.2f} s: waiting "
            f"{row['teacher_wait_seconds']:.2f}; ahead of it: writing {row['generate_seconds']:.2f}, scoring "
            f"{row['score_seconds']:.2f}; teacher calls a token "
            f"{row['rollout_teacher_calls'] / row['rollout_tokens']:.3f}"
        )
        ratios = "".join(f"; {speed / theirs:.2f} times {peer}'s {theirs:,.0f}" for peer, theirs in peers.items())
        print(text + ratios, flush=True)


if __name__ == "__main__":
    start_ray(4)
    main()
