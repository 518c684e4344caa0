"""Time of each part of a student's step, with padded and with packed rows.

    python -m tests.benchmarks.speed.step [--precision bfloat16]

One process with a student and rows like those of `race`. The parts that the training loop runs together are run one by
one; padded and packed steps take turns. How to read it: milliseconds of each part, medians.
"""

import argparse
import os
import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayk.data.batches import collate
from rayk.losses import linear_divergence, token_mean
from rayk.models.packing import enable_packing
from rayk.signals.sequence import TokenSequence
from rayk.training.student import Student
from tests.benchmarks.machine import machine
from tests.benchmarks.speed.loss import make_inputs
from tests.benchmarks.speed.race import BATCH, SIZES, VOCAB
from tests.benchmarks.speed.service import make_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--steps", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    shape = SIZES["student"] | {"vocab_size": VOCAB, "tie_word_embeddings": True, "max_position_embeddings": 1024}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).train()
    student = Student(model, given.precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    # Half as long, like GSM8K's rows.
    rows = [TokenSequence(row.input_ids[::2] % VOCAB, row.counted[::2]) for row in make_rows(BATCH, 0.55)]
    batch = collate(rows, 0)
    _, _, signals = make_inputs(64 * (batch.counted_tokens // 64 + 1), 8, VOCAB)
    signals = signals.slice_tokens(slice(batch.counted_tokens))
    spent: dict[tuple[str, str], list[float]] = {}

    def step(layout: str) -> None:
        began = time.perf_counter()

        def note(part: str) -> None:
            nonlocal began
            spent.setdefault((layout, part), []).append(time.perf_counter() - began)
            began = time.perf_counter()

        hidden = student.hidden(batch)
        note("body forward")
        states = hidden.detach().requires_grad_()
        with student.autocast():
            loss = token_mean(linear_divergence(states, student.head, signals), batch.counted_tokens)
        note("head and loss forward")
        loss.backward()
        note("head and loss backward")
        hidden.backward(states.grad)
        note("body backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        note("clip and AdamW")

    for number in range(given.steps + 2):
        for layout in ("padded", "packed"):
            model.set_attn_implementation("sdpa")
            if layout == "packed":
                enable_packing(model)
            step(layout)
        if number == 1:
            spent.clear()  # the first steps allocate
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}, {given.precision}; ms, medians of {given.steps}")
    tokens, padded = sum(map(len, rows)), batch.input_ids.numel()
    print(f"{tokens:,} tokens ({padded:,} with padding), {batch.counted_tokens:,} counted")
    for layout in ("padded", "packed"):
        parts = {part: statistics.median(seconds) for (name, part), seconds in spent.items() if name == layout}
        listed = ", ".join(f"{part} {seconds * 1e3:,.0f}" for part, seconds in parts.items())
        print(f"  {layout}: {listed}; {tokens / sum(parts.values()):,.0f} tokens/s")


if __name__ == "__main__":
    main()
