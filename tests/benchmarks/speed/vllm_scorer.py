"""Signals computed in vLLM's workers against vLLM's `prompt_logprobs`: tokens/s, bytes and log-probs, side by side.

    python -m tests.benchmarks.speed.vllm_scorer [--k 16,64] [--counted 1,0.5] [--rounds 3]

Both sides use one engine, the same rows and all rows at once. `prompt_logprobs` computes all positions and returns
(k + 1) ids and log-probs of each to the process that asks; here its tensors are read as they arrive, before vLLM turns
them into Python numbers, and the counted positions are selected then. How to read it: the ratio is the scorer's speed
over that of `prompt_logprobs`; bytes are those that reach the asking process, per token of a row.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import uuid
from typing import Any

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # vLLM's own log-probs would be compiled for 15 s

import torch  # noqa: E402

from rayk.config import VLLMEngineConfig  # noqa: E402
from rayk.config.support import Hidden, TopK  # noqa: E402
from rayk.engines.packed_columns import row_bytes  # noqa: E402
from rayk.engines.vllm import VLLMEngine  # noqa: E402
from rayk.signals.sequence import TokenSequence  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402
from tests.benchmarks.speed.service import make_rows  # noqa: E402
from tests.benchmarks.speed.vllm_server import VOCAB, make_teacher  # noqa: E402


def keep_tensors(engine: Any) -> None:
    """Let vLLM's front end return prompt log-probs as the tensors that it receives."""
    processor = engine.output_processor
    process_outputs = processor.process_outputs

    def process_tensors(outputs: list[Any], *arguments: Any, **options: Any) -> Any:
        for output in outputs:
            part, request = output.new_prompt_logprobs_tensors, processor.request_states.get(output.request_id)
            if part is not None and request is not None:
                output.new_prompt_logprobs_tensors = None
                request.logprobs_processor.prompt_logprobs = part
        return process_outputs(outputs, *arguments, **options)

    processor.process_outputs = process_tensors


async def ask_prompt_logprobs(engine: Any, row: TokenSequence, k: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return ids and log-probs [counted tokens, k + 1], that of the actual token first, and the bytes received."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    parameters = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=k, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    async for output in engine.generate({"prompt_token_ids": row.input_ids.tolist()}, parameters, uuid.uuid4().hex):
        tensors = output.prompt_logprobs
    at = torch.from_numpy(row.counted).nonzero()[:, 0] - 1
    size = tensors.logprob_token_ids.nbytes + tensors.logprobs.nbytes + tensors.selected_token_ranks.nbytes
    return tensors.logprob_token_ids[at], tensors.logprobs[at], size


async def measure(engine: VLLMEngine, rows: list[TokenSequence], k: int, rounds: int) -> None:
    await engine.warm_up()
    tokens, counted = sum(map(len, rows)), sum(row.counted_tokens for row in rows)
    seconds: dict[str, list[float]] = {"prompt_logprobs": [], "topk": [], "hidden": []}
    for number in range(rounds + 1):
        began = time.perf_counter()
        old = await asyncio.gather(*(ask_prompt_logprobs(engine._engine, row, k) for row in rows))
        took = {"prompt_logprobs": time.perf_counter() - began}
        for name, support in (("topk", TopK(k)), ("hidden", Hidden())):
            began = time.perf_counter()
            signals = await engine.score(rows, support)
            took[name] = time.perf_counter() - began
            if isinstance(support, TopK):
                new = signals
        if number:
            for name, value in took.items():
                seconds[name].append(value)
    assert new.logprobs is not None and new.ids is not None
    ids, logprobs = (torch.cat([part[i] for part in old]) for i in (0, 1))
    same = ids[:, 1:] == new.ids
    speeds = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    base, base_bytes = speeds["prompt_logprobs"], sum(size for *_, size in old) / tokens
    sizes = {"topk": row_bytes(TopK(k), VOCAB), "hidden": row_bytes(Hidden(), VOCAB, 0, engine.info.hidden_size)}
    results = [
        f"  k={k:2}, {counted / tokens:4.0%} counted: prompt_logprobs {base:7,.0f} tokens/s, {base_bytes:5,.0f} bytes",
        *(
            f"{name} {speeds[name]:7,.0f} ({speeds[name] / base:.2f} times), {size * counted / tokens:4,.0f} bytes"
            for name, size in sizes.items()
        ),
        f"largest difference of the actual tokens' log-probs {(logprobs[:, 0] - new.target_logprobs).abs().max():.1g}, "
        f"of the top k (float16) {(logprobs[:, 1:] - new.logprobs)[same].abs().max():.1g}",
        f"equal ids {same.float().mean():.2%}",
    ]
    print("; ".join(results), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", default="16,64")
    parser.add_argument("--counted", default="1,0.5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        make_teacher(folder)
        arguments = {"enforce_eager": True, "max_logprobs": -1}
        engine = VLLMEngine(folder, VLLMEngineConfig(dtype="float32", arguments=arguments))
        keep_tensors(engine._engine)
        print(f"{machine()}, load before {os.getloadavg()[0]:.1f}; V={VOCAB:,}; medians of {given.rounds}", flush=True)
        for share in map(float, given.counted.split(",")):
            rows = make_rows(given.rows, share)
            rows = [TokenSequence(row.input_ids % VOCAB, row.counted) for row in rows]
            for k in map(int, given.k.split(",")):
                runner.run(measure(engine, rows, k, given.rounds))
        engine.close()


if __name__ == "__main__":
    main()
