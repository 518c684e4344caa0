"""The seconds of each step of a trainer. Imported by the scripts that run with TRL's Python."""

import time

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Append the seconds of each step to `steps`."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_begin(self, *_, **__):
        self.last = time.perf_counter()

    def on_step_end(self, *_, **__):
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last = now
