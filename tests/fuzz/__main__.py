"""Give many damaged and hostile inputs to every reader, and count what happens; exit 1 if there is a miss.

python -m tests.fuzz --inputs 1000000
python -m tests.fuzz --only wire:17
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.run import Count, only, run_target
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="number of inputs of all targets together")
    parser.add_argument("--targets", default=",".join(kind.name for kind in TARGETS), help="names, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="make and read this input, and print the traceback")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # readers warn of what they leave out
    with tempfile.TemporaryDirectory(prefix="rayk-fuzz-") as folder:
        if arguments.only:
            name, _, number = arguments.only.partition(":")
            only(next(kind for kind in TARGETS if kind.name == name), Path(folder), int(number), arguments.seed)
            return 0
        kinds = [kind for kind in TARGETS if kind.name in arguments.targets.split(",")]
        total, counts = sum(kind.share for kind in kinds), []
        for kind in kinds:
            began = time.monotonic()
            inputs = -(-arguments.inputs * kind.share // total)
            counts.append(run_target(kind, Path(folder), inputs, arguments.seed, watch_time=True))
            print(f"{kind.name:9} {time.monotonic() - began:5,.0f} s  {counts[-1]}", flush=True)
    print(f"{'all':9}          {sum(counts, Count())}")
    return int(any(count.misses for count in counts))


if __name__ == "__main__":
    sys.exit(main())
