"""How often teacher-mixed sampling calls the teacher: calls a generated token, where both models in step take 1.

    python -m tests.benchmarks.teacher_mixed

The student is the teacher with noise on its head, as much as makes the mean total variation that is printed. Nothing is
timed: how many calls it takes depends on the models and α alone. The limit is that of endless drafts, α·TV.
"""

import argparse
import asyncio
import copy
import tempfile

from rayk.environment import set_threading

set_threading()

import torch  # noqa: E402

from rayk.engines.transformers import TransformersEngine  # noqa: E402
from rayk.rollouts.teacher_mixed import sample_teacher_mixed  # noqa: E402
from rayk.speculative import MixedSampling  # noqa: E402
from tests.engines.reference import prompts_of  # noqa: E402
from tests.tiny import tiny_model, tiny_tokenizer  # noqa: E402

ALPHA = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    sequences = parser.parse_args().sequences
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(folder, seed=1, peaked=3.0, tokenizer=tiny_tokenizer())
        teacher = TransformersEngine(folder)
    print(f"{sequences} sequences of 200 tokens at most, alpha {ALPHA}; goal at a TV of 0.2 to 0.4: 0.15 calls a token")
    for noise in (0.1, 0.2, 0.3, 0.45):
        student = copy.deepcopy(model)
        with torch.no_grad():
            head = student.lm_head.weight
            head += noise * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
        rollouts = asyncio.run(
            sample_teacher_mixed(
                student, teacher.verify, prompts_of(*[20] * sequences), range(sequences), MixedSampling(ALPHA, 200),
                vocab_size=teacher.info.vocab_size, ends=[1],
            )
        )  # fmt: skip
        tokens = sum(len(one.token_ids) for one in rollouts)
        calls, kept, rejected, capped = (
            sum(getattr(one, name) for one in rollouts) for name in ("calls", "kept", "rejected", "capped")
        )
        rate = rejected / (kept + rejected)
        print(
            f"  TV {rate / ALPHA:.2f}: {calls / tokens:.3f} calls a token (limit {rate:.3f}) over {tokens:,} tokens, "
            f"{capped} capped"
        )


if __name__ == "__main__":
    main()
