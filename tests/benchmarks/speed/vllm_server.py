"""rayk's service against vLLM's OpenAI server and `ray.serve.llm` with `prompt_logprobs`: tokens/s and bytes per token.

    python -m tests.benchmarks.speed.vllm_server [--k 1,16,64] [--rounds 3]

Same model, rows and cores; every position counts; both sides unpack the reply into arrays. Server and service receive
requests of several rows, a few of them in flight. `ray.serve.llm` is measured if `httpx` and `python-multipart`, which
nothing else here needs, are installed. How to read it: speed and bytes are relative to vLLM's server.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")

import httpx2  # noqa: E402
import numpy as np  # noqa: E402
from ray import serve  # noqa: E402

from rayk.config import TeacherConfig  # noqa: E402
from rayk.config.support import Logprob, TopK  # noqa: E402
from rayk.serving.cluster import start_ray  # noqa: E402
from rayk.signals.sequence import TokenSequence  # noqa: E402
from rayk.teachers import Teacher, serve_teacher  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402
from tests.benchmarks.speed.service import make_rows  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402

VOCAB, PORT, SERVE_PORT, ROWS_A_REQUEST, IN_FLIGHT = 8_192, 18765, 18766, 4, 4


def make_teacher(folder: str) -> None:
    """Save a llama of width 128 with 4 layers, V=8,192 (3M parameters)."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t0")
    tiny_model(folder, vocab_size=VOCAB, hidden=128, layers=4, peaked=3.0, tokenizer=tokenizer)


@contextlib.contextmanager
def run_vllm_server(folder: str) -> Iterator[str]:
    """Run vLLM's OpenAI server on this machine; yield its address."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "teacher",
        "--port", str(PORT), "--dtype", "float32", "--enforce-eager", "--max-logprobs", "-1", "--disable-log-stats",
        "--no-enable-log-requests", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        address = f"http://127.0.0.1:{PORT}"
        for _ in range(240):
            if process.poll() is not None:
                raise SystemExit(f"vLLM's server ended with {process.returncode}.")
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{address}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@contextlib.contextmanager
def run_serve_llm(folder: str) -> Iterator[str]:
    """Run the same vLLM behind `ray.serve.llm` on the running Ray cluster; yield its address."""
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": "teacher", "model_source": folder},
        accelerator_config={"kind": "cpu"}, log_engine_metrics=False,
        engine_kwargs={
            "dtype": "float32", "enforce_eager": True, "max_logprobs": -1, "disable_log_stats": True,
            "enable_chunked_prefill": False, "kv_cache_memory_bytes": 1 << 30,
        },
        deployment_config={"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.2}},
        runtime_env={"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
    )  # fmt: skip
    serve.run(build_openai_app({"llm_configs": [config]}), name="serve.llm")
    try:
        yield f"http://127.0.0.1:{SERVE_PORT}"
    finally:
        serve.delete("serve.llm")


async def query_server(address: str, rows: list[TokenSequence], k: int) -> int:
    """Request all rows' log-probs by HTTP and unpack them; return the bytes received."""
    received = 0
    places = asyncio.Semaphore(IN_FLIGHT)

    async def request(client: httpx2.AsyncClient, group: list[TokenSequence]) -> None:
        nonlocal received
        async with places:
            body = {
                "model": "teacher", "prompt": [row.input_ids.tolist() for row in group], "max_tokens": 1,
                "temperature": 0, "prompt_logprobs": k, "return_tokens_as_token_ids": True,
            }  # fmt: skip
            response = await client.post(f"{address}/v1/completions", json=body)
        response.raise_for_status()
        received += len(response.content)
        for choice in response.json()["choices"]:
            unpack(choice["prompt_logprobs"], k)

    async with httpx2.AsyncClient(timeout=600) as client:
        groups = [rows[i : i + ROWS_A_REQUEST] for i in range(0, len(rows), ROWS_A_REQUEST)]
        await asyncio.gather(*(request(client, group) for group in groups))
    return received


def unpack(listed: list[dict[str, dict] | None], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and log-probs [positions, k] of one prompt."""
    ids, logprobs = np.zeros((len(listed) - 1, k), np.int64), np.zeros((len(listed) - 1, k), np.float32)
    for position, entries in enumerate(listed[1:]):
        for token, entry in (entries or {}).items():
            if entry["rank"] <= k:
                ids[position, entry["rank"] - 1] = int(token)
                logprobs[position, entry["rank"] - 1] = entry["logprob"]
    return ids, logprobs


def query_service(teacher: Teacher, rows: list[TokenSequence], k: int) -> int:
    before = teacher.statistics.bytes
    batches = [rows[i : i + ROWS_A_REQUEST] for i in range(0, len(rows), ROWS_A_REQUEST)]
    support = TopK(k) if k > 1 else Logprob()
    for _ in teacher.stream(batches, support, prefetch=IN_FLIGHT):
        pass
    return teacher.statistics.bytes - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", default="1,16,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default="vllm,transformers")
    given = parser.parse_args()
    rows = make_rows(64, 1.0)
    rows = [TokenSequence(row.input_ids % VOCAB, row.counted) for row in rows]
    tokens = sum(map(len, rows))
    print(f"{machine()}, load before {os.getloadavg()[0]:.1f}")
    print(
        f"64 rows, {tokens:,} tokens, all counted, V={VOCAB:,}; medians of {given.rounds}; at k=1 `logprob` on our side"
    )
    sizes = [int(k) for k in given.k.split(",")]
    speeds: dict[tuple[str, int], list[float]] = {}
    weights: dict[tuple[str, int], float] = {}

    def note(side: str, k: int, began: float, size: int) -> None:
        speeds.setdefault((side, k), []).append(tokens / (time.perf_counter() - began))
        weights[side, k] = size / tokens

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        make_teacher(folder)
        start_ray(4)
        serve.start(proxy_location="HeadOnly", http_options={"port": SERVE_PORT})
        teachers = {}
        for engine in given.engines.split(","):
            # The transformers engine gets both cores, since vLLM uses both.
            settings = {"kind": engine, "dtype": "float32"} | ({"threads": 2} if engine == "transformers" else {})
            config = TeacherConfig(name=engine, model=folder, engine=settings, resources={"num_cpus": 0.5})
            teachers[engine] = stack.enter_context(serve_teacher(config))
        servers = {"server": stack.enter_context(run_vllm_server(folder))}
        if importlib.util.find_spec("httpx") and importlib.util.find_spec("python_multipart"):
            servers["serve.llm"] = stack.enter_context(run_serve_llm(folder))
        for k in sizes:
            for number in range(given.rounds + 1):
                for server, address in servers.items():
                    began = time.perf_counter()
                    size = asyncio.run(query_server(address, rows, k))
                    if number:
                        note(server, k, began, size)
                for engine, teacher in teachers.items():
                    began = time.perf_counter()
                    size = query_service(teacher, rows, k)
                    if number:
                        note(engine, k, began, size)
            base, base_bytes = statistics.median(speeds["server", k]), weights["server", k]
            text = f"  k={k:2}: vLLM's server {base:6,.0f} tokens/s, {base_bytes:5,.0f} bytes a token"
            if "serve.llm" in servers:
                speed = statistics.median(speeds["serve.llm", k])
                text += f"; ray.serve.llm {speed:6,.0f}, {weights['serve.llm', k]:5,.0f}"
            for engine in teachers:
                speed, size = statistics.median(speeds[engine, k]), weights[engine, k]
                text += (
                    f"; service ({engine}) {speed:6,.0f}, {size:3,.0f}: {speed / base:.1f} times the speed, "
                    f"1/{base_bytes / size:.0f} of the bytes"
                )
            print(text, flush=True)


if __name__ == "__main__":
    main()
