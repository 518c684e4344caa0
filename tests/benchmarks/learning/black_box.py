"""Black-box and in-context distillation compared with training without a teacher, on tasks with a known truth.

    python -m tests.benchmarks.learning.black_box --output black_box.jsonl [--seeds 3] [--parts cot,responses]

Teachers run on Ray Serve, and every student is trained through `rayk.distill`.

Parts `cot` and `responses` use the task `purse`. Their teacher (64×2) has seen sound workings of 2,500 purses and was
stopped while it still made mistakes. Students (32×2, random weights) learn about other purses, 400 of which are held
out.

- `cot`: 200 questions with their answers. Training rows are the answers alone, or 1, 4 or 8 rationales per question of
  `chain_of_thought` (two calls, temperature 0.7, kept if right), or 8 without that check.
- `responses`: 600 questions with their right answers. Training rows are workings by people who make a mistake at every
  tenth step and continue from it, those of them with the right answer, the teacher's (`responses`, temperature 0.7),
  the one of four that the teacher finds most likely, or the first right one of four.

Part `in_context` uses the tasks of `signs`. Its teacher (64×2) has read 19,200 conversations, each about one task.
Students (32×2) all start from the same model, stopped after 300 steps: the first of 300, 340, … after which it was
right for 70 % on the tuning seed. They then see each of 20 rows of 320 villages once, either alone (`fine_tuned`, plain
fine-tuning) or after 8 solved signs of the village, which are right. They learn the row's word (`labels`, in-context
tuning without a teacher), a target that moves linearly from that word to the teacher's probabilities of both words
(`distilled`), or the teacher's probabilities alone (`distilled_softly`). Each runs once with right rows and once
(`_slips`) with rows of which one in ten has the other word. Evaluation uses 30 new villages with pairs of words that
occur together in no training row: 8 solved signs and 20 questions each. Without the solved signs half of the answers
would be right. There is no loss on the demonstrations (Meta-ICT).

Pilots with another training loop, on seed 1000: models of this size learn to read such conversations within 300 steps
at a rate of 5e-3; with wrong words in the demonstrations, or with twice as many words, they did not within 600 and 700
steps, so demonstrations are right and words few. Students as large as the teacher that saw 800 rows with wrong words
eight times memorized them and became worse than before with every method. One word in ten is wrong because with a
quarter wrong `labels` fell below the start, and with none both methods learned equally much.

Parts `adversarial` and `preferences` are described in their modules; the following also holds for them.

Settled before the runs: every student of a part makes the same number of updates of the same number of rows (600 of 64;
`in_context` 200 of 32), with AdamW and a cosine schedule to zero after a warm-up. A rationale has more tokens than an
answer, and a row with demonstrations more than one without; this is not compensated. Only the learning rate is tuned:
of three (1e-3, 3e-3, 1e-2) the one with the best accuracy on seed 1000, which is used for nothing else; the same three
and the same criterion for each method. A seed determines the questions (or villages), the held-out ones, the student's
weights (except for `in_context`) and the order.

Finished runs are lines of OUTPUT and are not repeated. Measured are the share of right answers with greedy generation,
the share with a sound working, and statistics of the training rows, such as the share of right rows that are right for
wrong reasons. How to read it: Markdown tables with means, and paired differences with their 95 % confidence intervals
(Student's t, not corrected for the number of pairs), `undecided` if 0 is inside.
"""

import os
from dataclasses import replace

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("RAY_worker_niceness", "0")  # the default of 15 would slow down the teacher

import torch  # noqa: E402

from rayk.config import Resources, TeacherConfig  # noqa: E402
from rayk.serving.cluster import start_ray  # noqa: E402
from rayk.teachers import serve_teacher  # noqa: E402
from tests.benchmarks.learning.adversarial import ADVERSARIAL_PART  # noqa: E402
from tests.benchmarks.learning.harness import Part, Runs, parse_arguments  # noqa: E402
from tests.benchmarks.learning.in_context import IN_CONTEXT_PART  # noqa: E402
from tests.benchmarks.learning.preferences import PREFERENCES_PART  # noqa: E402
from tests.benchmarks.learning.reasoning import COT_PART, RESPONSES_PART  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

PARTS: dict[str, Part] = {
    "cot": COT_PART, "responses": RESPONSES_PART, "in_context": IN_CONTEXT_PART,
    "adversarial": ADVERSARIAL_PART, "preferences": PREFERENCES_PART,
}  # fmt: skip


def main() -> None:
    given = parse_arguments(__doc__, "parts", PARTS)
    torch.set_num_threads(1)
    print(machine(), flush=True)
    start_ray(num_cpus=2)
    runs, seeds = Runs(given.output), range(given.seeds)
    for name in given.parts:
        part = PARTS[name]
        comparison = replace(part.comparison, known={**part.comparison.known, **given.rates})
        model = part.make_teacher()
        teacher = part.measure_teacher(model)
        print(f"\n## {name}: the teacher has {teacher}", flush=True)
        if not given.print:
            served = TeacherConfig(name=part.application, model=str(model), resources=Resources(num_cpus=0.5))
            with part.serve(model) if part.serve else serve_teacher(served):
                runs.add(comparison, seeds, part.run)
        runs.print(comparison, seeds, teacher)


if __name__ == "__main__":
    main()
