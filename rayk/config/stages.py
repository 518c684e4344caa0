"""The stages of a method that trains different weights one after the other."""

from typing import NamedTuple


class Stage(NamedTuple):
    """A step's place in its stage, by which the schedule of the learning rate starts anew in each stage."""

    step: int
    """The step's number in the stage, from 0."""
    steps: int
    """Number of steps of the stage."""
    learning_rate: float | None = None
    """Peak learning rate of the stage; None: that of the run."""
