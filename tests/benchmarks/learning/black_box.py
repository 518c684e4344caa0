"""Black-box distillation compared with what could be done without: tasks whose truth is known, real teachers on Ray
Serve, everything through `rayk.distill`.

    python -m tests.benchmarks.learning.black_box --output black_box.jsonl [--seeds 3] [--parts cot,responses]

`cot` and `responses` are about the world of `purse`. Its teacher (64×2) was shown sound workings of 2,500 purses and
stopped while it still made mistakes; students (32×2, random weights) are asked about other purses, 400 of them
held out.

- `cot`: 200 questions with their answers. Learned from are the answers alone, or 1, 4 or 8 rationales a question of
  `chain_of_thought` (two calls, temperature 0.7, kept if right); and 8 of which nothing was left out.
- `responses`: 600 questions with workings by people who slip at every tenth step and go on from there, and with the
  right answers. Learned from are those workings, those of them that end right, the teacher's (`responses`, temperature
  0.7), the one of four that it finds likeliest, or the first of four that ends right.

`in_context` is about the tasks of `signs`. Its teacher (64×2) has read 19,200 conversations, each about one task; the
students are smaller (32×2) and start, all methods and seeds alike, from one that was stopped after 300 steps, the first
of 300, 340, … after which it had 70 % right on the tuning seed. From there they see each of 20 rows of 320 villages
once: alone (`fine_tuned`, plain fine-tuning), or after 8 solved signs of the village, which are right. Learned is the
row's word (`labels`, in-context tuning, no teacher), that moving to the teacher's probabilities of both words in a
straight line (`distilled`), or the teacher's alone (`distilled_softly`). All of it once with rows that are right, and
once (`_slips`) with rows of which one in ten has the other word. Measured on 30 new villages, with pairs of words that
nobody has read together: of each they are shown 8 solved signs and asked 20. Without these half the answers would be
right. No text is learned from beside (Meta-ICT).

On pilots with a loop of their own, seed 1000: models this small learn to read such conversations from 300 steps on at a
rate of 5e-3; with slips in what they read, or with twice as many words, they did not within 600 and 700, so
demonstrations are right and words few. Students as large as the teacher that saw 800 rows with slips eight times
learned those by heart and did worse than before, whatever they were trained with. One word in ten is wrong because with
a quarter wrong `labels` fell below the start there, and with none both learned as much.

`adversarial` and `preferences` state theirs in `black_box_rounds` and `black_box_preferring`; what follows holds for
them, too.

Settled before the runs. Every student of a part makes as many updates of as many rows (600 of 64; `in_context` 200 of
32) with AdamW and a cosine to zero after a warm-up; that a rationale has more tokens than an answer, and a row more
with demonstrations, is not made up for. The one thing tuned is the learning rate: of three (1e-3, 3e-3, 1e-2) the one
whose student has the best accuracy on seed 1000, which is used for nothing else; the same three and the same criterion
for each method. A seed draws the questions (or villages), those held out, the student's weights (but for `in_context`)
and the order.

Every finished run is a line of OUTPUT and is not run again. Measured: the share of right answers, written greedily;
how many of all come with a sound working; and what is known of the training rows, such as how many of those with the
right answer have it for wrong reasons. Printed as Markdown, with paired differences and their 95 % intervals (Student's
t, none of them corrected for the number of pairs), `undecided` where 0 is inside.
"""

import os
from dataclasses import replace

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("RAY_worker_niceness", "0")  # the teacher is not to wait longer than those who ask it

import torch  # noqa: E402

from rayk.config import Resources, TeacherConfig  # noqa: E402
from rayk.serving.cluster import start_ray  # noqa: E402
from rayk.teachers import serve_teacher  # noqa: E402
from tests.benchmarks.learning.adversarial import ADVERSARIAL_PART  # noqa: E402
from tests.benchmarks.learning.harness import Part, Runs, arguments  # noqa: E402
from tests.benchmarks.learning.in_context import IN_CONTEXT_PART  # noqa: E402
from tests.benchmarks.learning.preferences import PREFERENCES_PART  # noqa: E402
from tests.benchmarks.learning.reasoning import COT_PART, RESPONSES_PART  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

PARTS: dict[str, Part] = {
    "cot": COT_PART, "responses": RESPONSES_PART, "in_context": IN_CONTEXT_PART,
    "adversarial": ADVERSARIAL_PART, "preferences": PREFERENCES_PART,
}  # fmt: skip


def main() -> None:
    given = arguments(__doc__, "parts", PARTS)
    torch.set_num_threads(1)
    print(machine(), flush=True)
    start_ray(num_cpus=2)
    runs, seeds = Runs(given.output), range(given.seeds)
    for name in given.parts:
        part = PARTS[name]
        comparison = replace(part.comparison, known={**part.comparison.known, **given.rates})
        model = part.teacher()
        teacher = part.measured(model)
        print(f"\n## {name}: the teacher has {teacher}", flush=True)
        if not given.print:
            served = TeacherConfig(name=part.application, model=str(model), resources=Resources(num_cpus=0.5))
            with part.serving(model) if part.serving else serve_teacher(served):
                runs.add(comparison, seeds, part.run)
        runs.print(comparison, seeds, teacher)


if __name__ == "__main__":
    main()
