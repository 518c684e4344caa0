"""`python -m tests.gpu`: check on one device what the other tests check on CPUs, and print the figures.

Needs torch and transformers, neither Ray nor vLLM. Exit status 1: a check failed.
"""

import argparse
import sys
import time
import traceback

import torch

from tests.gpu import layers, losses, models, steps
from tests.gpu.scale import Scale, Skip

CHECKS = [
    *layers.CHECKS, *losses.CHECKS, *models.CHECKS, *steps.CHECKS,
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="", help="run the checks whose name contains this text")
    arguments = parser.parse_args()
    scale = Scale.of(arguments.device)
    name = torch.cuda.get_device_name(0) if scale.is_gpu else "CPU"
    print(f"torch {torch.__version__}, {name}, {scale}\n")
    failed = 0
    for check in CHECKS:
        label = check.__name__.replace("_", " ")
        if arguments.only not in label:
            continue
        started, state = time.perf_counter(), "pass"
        try:
            figures = check(scale)
        except Skip as reason:
            state, figures = "skip", str(reason)
        except Exception as error:
            state, figures = "FAIL", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            failed += 1
            traceback.print_exc()
        print(f"{state}  {label:<48}{time.perf_counter() - started:>7.1f} s  {figures}", flush=True)
    print(f"\n{failed} failed" if failed else "\nall passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
