"""Run a target on random inputs and count refusals, accepted inputs and misses."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.limits import TookTooLong, bounded_memory, bounded_time
from tests.fuzz.targets import Target, opened


@dataclass(frozen=True)
class Count:
    """Counts of the outcomes; `misses` has one line each."""

    refused: int = 0
    accepted: int = 0
    misses: tuple[str, ...] = ()

    def __add__(self, other: "Count") -> "Count":
        return Count(self.refused + other.refused, self.accepted + other.accepted, self.misses + other.misses)

    def __str__(self) -> str:
        inputs = self.refused + self.accepted + len(self.misses)
        text = f"{inputs:,} inputs: {self.refused:,} refused, {self.accepted:,} accepted, {len(self.misses)} misses"
        return "\n".join([text, *self.misses[:50]])


def run_target(kind: type[Target], folder: Path, inputs: int, seed: int = 0, *, watch_time: bool = False) -> Count:
    """Give inputs 0, 1, … to a target.

    Args:
        folder: the target gets a folder of its own in it.
        watch_time: also stop inputs that take too long, which uses SIGALRM.
    """
    refused, accepted, misses = 0, 0, []
    with opened(kind, folder / kind.name) as target, bounded_memory():
        for number in range(inputs):
            given = target.make(_random(target, number, seed))
            try:
                with bounded_time() if watch_time else nullcontext():
                    target.read(given)
                accepted += 1
            except target.refusals:
                refused += 1
            except (Exception, TookTooLong) as error:
                misses.append(f"  {kind.name}:{number} {type(error).__name__}: {str(error)[:200]}")
    return Count(refused, accepted, tuple(misses))


def only(kind: type[Target], folder: Path, number: int, seed: int = 0) -> None:
    """Make one input again, print it, and read it; the reader's error is raised."""
    with opened(kind, folder / kind.name) as target, bounded_memory(), bounded_time():
        given = target.make(_random(target, number, seed))
        print(repr(given)[:5000], flush=True)
        target.read(given)


def _random(target: Target, number: int, seed: int) -> Random:
    return Random(f"{target.name}:{number}:{seed}")
