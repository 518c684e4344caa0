"""Black-box distillation compared.

python -m tests.benchmarks.black_box --output black_box.jsonl [--seeds 3] [--parts cot,responses,in_context]
"""

import os

from rayk.environment import set_threading

set_threading()
os.environ.setdefault("RAY_worker_niceness", "0")  # the teacher is not to wait longer than those who ask it

import torch  # noqa: E402

from rayk.cluster import start_ray  # noqa: E402
from rayk.config import Resources, TeacherConfig  # noqa: E402
from rayk.teachers import serve_teacher  # noqa: E402
from tests.benchmarks.black_box_reading import IN_CONTEXT_PART  # noqa: E402
from tests.benchmarks.black_box_reckoning import COT_PART, RESPONSES_PART  # noqa: E402
from tests.benchmarks.comparing import Part, Runs, arguments  # noqa: E402
from tests.benchmarks.machine import machine  # noqa: E402

PARTS: dict[str, Part] = {"cot": COT_PART, "responses": RESPONSES_PART, "in_context": IN_CONTEXT_PART}


def main() -> None:
    given = arguments(__doc__, "parts", PARTS)
    torch.set_num_threads(1)
    print(machine(), flush=True)
    runs, seeds = Runs(given.output), range(given.seeds)
    for name in given.parts.split(","):
        part = PARTS[name]
        model = part.teacher()
        if not given.print:
            start_ray(num_cpus=2)
            served = TeacherConfig(name=part.application, model=str(model), resources=Resources(num_cpus=0.5))
            with serve_teacher(served):
                runs.add(part.comparison, seeds, part.run)
        print(f"\n## {name}")
        runs.print(part.comparison, seeds, part.measured(model))


if __name__ == "__main__":
    main()
