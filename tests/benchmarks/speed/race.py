"""Throughput of off-policy logit KD against TRL's GKDTrainer on the same rows, and against the machine's limit.

    python -m tests.benchmarks.speed.race --data train.jsonl --trl-python VENV/bin/python [--rounds 3]

`--data`: JSONL rows with `question` and `answer` (GSM8K). `--trl-python`: a Python that has `trl==1.16.0` and the same
torch. Teacher: llama of 40M parameters, student: 11M, V=32,000, batches of 8 rows, one machine for everything. Both
sides count tokens per second without padding over the steps after the first ten; the sides take turns, medians are
printed. How to read it: "ratio" is rayk's throughput divided by TRL's; the machine's limit is the necessary arithmetic
at the speed of large matrix products.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

from jobs.train_tokenizer import main as train_tokenizer  # noqa: E402
from rayk.config import parse_config  # noqa: E402
from rayk.run import distill  # noqa: E402
from rayk.serving.cluster import start_ray  # noqa: E402
from tests.benchmarks.machine import machine, median_seconds  # noqa: E402
from tests.runs import metrics  # noqa: E402

VOCAB, K, BATCH, WARM_STEPS = 32_000, 64, 8, 10
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SIZES: dict[str, dict[str, int]] = {
    "teacher": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "student": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8},
}
# race: (teacher's dtype, student's precision)
RACES = {
    "float32": ("float32", "float32"),
    "bfloat16 teacher": ("bfloat16", "float32"),
    "bfloat16 throughout": ("bfloat16", "bfloat16"),
    "cached": ("float32", "float32"),  # a second epoch: rayk reads signals from the cache, TRL has no cache
}


def make_models(folder: Path, data: Path) -> None:
    """Write the rows of `data` as conversations, a tokenizer trained on them, and both models."""
    rows = [json.loads(line) for line in data.open(encoding="utf-8")]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            turns = [("user", row["question"]), ("assistant", row["answer"])]
            file.write(json.dumps({"messages": [{"role": who, "content": text} for who, text in turns]}) + "\n")
    train_tokenizer(str(folder / "teacher"), str(VOCAB), str(data))
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.chat_template = TEMPLATE
    save_models(folder, tokenizer)


def save_models(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save teacher and student with random weights, which are as fast as trained ones."""
    for name, size in SIZES.items():
        settings = AutoConfig.for_model(
            "llama", vocab_size=VOCAB, tie_word_embeddings=True, max_position_embeddings=1024, pad_token_id=0,
            eos_token_id=1, **size,
        )  # fmt: skip
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{name}: {model.num_parameters() / 1e6:.1f}M parameters")


def train(
    folder: Path, run: str, rows: int, steps: int, threads: tuple[int, int], *, teacher_dtype: str = "float32",
    precision: str = "float32", cache: Path | None = None, method: dict[str, Any] | None = None,
    rollouts: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train for `steps` steps with `method` (default: top-64 logit KD) on the first `rows` rows of `folder`.

    Returns:
        the run's metrics, one entry per step.
    """
    config = {
        "output": str(folder / run),
        "teachers": [
            {"name": "teacher", "model": str(folder / "teacher"),
             "engine": {"dtype": teacher_dtype, "threads": threads[0]}, "resources": {"num_cpus": 1}},
        ],
        "student": {"model": str(folder / "student")},
        "data": {"train": {"path": str(folder / "rows.jsonl"), "rows": rows}},
        "method": {"kind": "logit_kd", "support": {"kind": "topk", "k": K}} | (method or {}),
        "rollouts": rollouts,
        "training": {
            "workers": 1, "steps": steps, "batch_size": BATCH, "learning_rate": 1e-4, "schedule": "constant",
            "precision": precision, "threads": threads[1], "checkpoint_every_steps": 10_000, "prefetch": 3,
        },
        "tracking": {"tensorboard": False},
        "cache": {"path": str(cache)} if cache else None,
    }  # fmt: skip
    distill(parse_config(config))
    return metrics(folder / run)


def tokens_per_second(steps: list[dict[str, Any]]) -> float:
    """Return the tokens per second, without padding, over `steps`."""
    return sum(step["tokens"] for step in steps) / sum(step["step_seconds"] for step in steps)


def run_rayk(folder: Path, number: int, race: str, steps: int, threads: tuple[int, int]) -> dict[str, float]:
    """Run rayk once; return its tokens per second in steady state and the seconds outside of steps."""
    teacher_dtype, precision = RACES[race]
    cache = folder / "cache" if race == "cached" else None
    began = time.time()
    rows = train(
        folder, f"ours-{number}", steps * BATCH, steps, threads, teacher_dtype=teacher_dtype, precision=precision,
        cache=cache,
    )  # fmt: skip
    steady = rows[WARM_STEPS:]
    return {
        "tokens_per_second": tokens_per_second(steady),
        "wait": sum(row["teacher_wait_seconds"] for row in steady) / sum(row["step_seconds"] for row in steady),
        "counted": sum(row["counted_tokens"] for row in steady) / sum(row["tokens"] for row in steady),
        "started": time.time() - began - sum(row["step_seconds"] for row in rows),
    }


def run_trl(
    folder: Path, python: str, race: str, steps: int, threads: int, script: str = "race_trl", **more: float
) -> float:
    """Run TRL once by `script`, a file of this folder; return its tokens per second in steady state. `more`: settings
    of the script."""
    teacher_dtype, precision = RACES[race]
    given = {
        "teacher": str(folder / "teacher"), "student": str(folder / "student"), "rows": str(folder / "rows.jsonl"),
        "teacher_dtype": teacher_dtype, "precision": precision, "steps": steps, "batch_size": BATCH, "threads": threads,
        "output": str(folder / "theirs"), "lmbda": 0.0, "max_new_tokens": 128, **more,
    }  # fmt: skip
    (folder / "given.json").write_text(json.dumps(given))
    command = [python, str(Path(__file__).with_name(f"{script}.py")), str(folder / "given.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    *_, parts, timed = map(json.loads, done.stdout.splitlines()[-2:])
    listed = ", ".join(f"{name} {seconds / parts['all']:.0%}" for name, seconds in parts.items() if name != "all")
    print(f"  TRL's steps: {listed}", flush=True)
    timed = timed[WARM_STEPS:]
    return sum(tokens for tokens, _ in timed) / sum(seconds for _, seconds in timed)


def machine_limit(race: str, counted: float, rates: dict[str, float]) -> float:
    """Return the tokens per second if the machine did only the necessary arithmetic, at the speed of large products.

    That is bodies on all tokens, heads on counted tokens, and a backward pass of twice the forward's cost, each in its
    model's dtype.
    """
    seconds = 0.0
    for name, passes, dtype in zip(("teacher", "student"), (int(race != "cached"), 3), RACES[race], strict=True):
        size = SIZES[name]
        width, layers = size["hidden_size"], size["num_hidden_layers"]
        body = layers * (4 * width * width + 3 * width * size["intermediate_size"])
        seconds += passes * 2 * (body + counted * width * VOCAB) / rates[dtype]
    return 1 / seconds


def gemm_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of large matrix products in this process."""
    a, b = torch.randn(1600, 1024, dtype=torch.float32).to(dtype), torch.randn(1024, 4096).to(dtype)
    [seconds] = median_seconds(lambda: a @ b, runs=9)
    return 2 * 1600 * 1024 * 4096 / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trl-python", help="leave out to run rayk only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", default="2,2", help="of teacher and student; TRL's one process has all cores")
    parser.add_argument("--races", default=",".join(RACES))
    given = parser.parse_args()
    threads = tuple(int(count) for count in given.threads.split(","))
    torch.set_num_threads(os.cpu_count() or 1)
    print(f"{machine()}, load before {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, given.data)
        # bfloat16 only where it is used: CPUs without instructions for it need minutes to be measured.
        dtypes = sorted({dtype for race in given.races.split(",") for dtype in RACES[race]}, reverse=True)
        rates = {dtype: gemm_rate(getattr(torch, dtype)) for dtype in dtypes}
        print(", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in rates.items()))
        number = 0
        measured: dict[tuple[str, str], list[float]] = {}
        for race in given.races.split(","):
            runs, peers = [], list(measured.get(RACES[race], []))  # TRL runs `cached` as it does `float32`
            if race == "cached":
                number += 1
                run_rayk(folder, number, race, given.steps, threads)  # fills the cache
            for _ in range(given.rounds):
                number += 1
                runs.append(run_rayk(folder, number, race, given.steps, threads))
                if given.trl_python and len(peers) < given.rounds:
                    peers.append(run_trl(folder, given.trl_python, race, given.steps, os.cpu_count() or 1))
            measured[RACES[race]] = peers
            speed = statistics.median(run["tokens_per_second"] for run in runs)
            last = runs[-1]
            limit = machine_limit(race, last["counted"], rates)
            text = (
                f"{race}: rayk {speed:,.0f} tokens/s, {speed / limit:.2f} of the machine's limit ({limit:,.0f}); waits "
                f"{last['wait']:.0%}, up in {last['started']:.0f} s"
            )
            if peers:
                peer = statistics.median(peers)
                text += f", TRL {peer:,.0f}: ratio {speed / peer:.2f}"
            print(text, flush=True)


if __name__ == "__main__":
    start_ray(4)
    main()
