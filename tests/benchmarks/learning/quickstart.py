"""The quickstart's comparison over several seeds.

    python -m tests.benchmarks.learning.quickstart [--seeds 3]

Each seed draws new student weights, rows and order, the same for both methods; the teacher, the task and every setting
(those of `rayk quickstart`, whose learning rate was chosen for the supervised student) stay. How to read it: means,
standard deviations and paired differences with their 95 % confidence intervals.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from rayk.commands.quickstart import METHODS, student_config, task_folder, teacher_config, teacher_model
from rayk.environment import set_threading
from rayk.run import ProgressListener, distill
from rayk.serving.cluster import start_ray
from rayk.teachers import serve_teacher
from tests.benchmarks.learning.harness import paired_difference
from tests.benchmarks.machine import machine

MEASURES = ("accuracy", "loss", "forward_kl", "reverse_kl", "agreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    set_threading()
    print(machine())
    home = task_folder()
    model = teacher_model(home, ProgressListener())
    start_ray(num_cpus=4)
    results: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    with serve_teacher(teacher_config(model)), tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for method in METHODS:
                config = student_config(home, Path(folder) / str(seed), method, seed)
                student = distill(config).summary["student"]
                results[method].append(student)
                print(f"seed {seed} {method:12}", {name: round(student[name], 4) for name in MEASURES}, flush=True)
    for name in MEASURES:
        values = {method: [result[name] for result in results[method]] for method in METHODS}
        mean, half = paired_difference(values["logit_kd"], values["supervised"])
        spread = "  ".join(f"{m} {statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for m, v in values.items())
        print(f"{name:12} {spread}  paired difference {mean:+.4f} ± {half:.4f} (95 %)")


if __name__ == "__main__":
    main()
