"""Black-box distillation compared with what could be done without: tasks whose truth is known, real teachers on Ray
Serve, everything through `rayk.distill`.

    python -m tests.benchmarks.black_box --output black_box.jsonl [--seeds 3] [--parts cot,responses]

`cot` and `responses` are about the world of `purse`. Its teacher (64×2) was shown sound workings of 2,500 purses and
stopped while it still made mistakes; students (32×2, random weights) are asked about other purses, 400 of them
held out.

- `cot`: 200 questions with their answers. Learned from are the answers alone, or 1, 4 or 8 rationales a question of
  `chain_of_thought` (two calls, temperature 0.7, kept if right); and 8 of which nothing was left out.
- `responses`: 600 questions with workings by people who slip at every tenth step and go on from there, and with the
  right answers. Learned from are those workings, those of them that end right, the teacher's (`responses`, temperature
  0.7), the one of four that it finds likeliest, or the first of four that ends right.

`in_context` is about the tasks of `signs`. Its teacher has read conversations for 600 steps, each of a task of its own;
students are as large (64×2), but stopped at 360. From there they learn from 20 rows each of 40 tasks, one word in ten
wrong, each row after 12 others of its task: the row's word alone (no teacher), that moving to the teacher's
probabilities of both words in a straight line, or the teacher's alone. Measured on 20 new tasks, of each of which they
are shown 12 solved signs and asked 20. No text is learned from beside (Meta-ICT). On pilots models of these sizes did
not learn within 1,500 steps to read which shapes, or whether colours, decide; and where two words came in one order
only, all students learned the words' order by heart instead of reading, and did worse than before.

`adversarial` and `preferences` state theirs in `black_box_rounds` and `black_box_preferring`; what follows holds for
them, too.

Settled before the runs. Every student of a part makes as many updates of as many rows (600 of 64; `in_context` 200 of
32) with AdamW and a cosine to zero after a warm-up; that a rationale has more tokens than an answer is not made up
for. The one thing tuned is the learning rate: of three (1e-3, 3e-3, 1e-2; `in_context` 1e-4, 3e-4, 1e-3) the one whose
student has the best accuracy on seed 1000, which is used for nothing else; the same three and the same criterion for
each method. A seed draws the questions (or tasks and rows), those held out, the student's weights and the order.

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

from rayk.cluster import start_ray  # noqa: E402
from rayk.config import Resources, TeacherConfig  # noqa: E402
from rayk.teachers import serve_teacher  # noqa: E402
from tests.benchmarks.black_box_preferring import PREFERENCES_PART  # noqa: E402
from tests.benchmarks.black_box_reading import IN_CONTEXT_PART  # noqa: E402
from tests.benchmarks.black_box_reckoning import COT_PART, RESPONSES_PART  # noqa: E402
from tests.benchmarks.black_box_rounds import ADVERSARIAL_PART  # noqa: E402
from tests.benchmarks.comparing import Part, Runs, arguments  # noqa: E402
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
        comparison = replace(part.comparison, known=given.rates)
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
