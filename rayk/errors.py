"""The errors rayk raises on purpose. Each message is a sentence that names the field or file and what to do."""


class RaykError(Exception):
    """Base of rayk's own errors."""


class InputError(RaykError, ValueError):
    """What the user gave is wrong (a setting, a file, a row, a model); the command line exits with 2."""


class EngineDied(RaykError):
    """An engine's own process is gone. Its replica is about to be replaced, so asking again helps."""


class TeacherUnavailable(RaykError):
    """No replica of a teacher answered before the deadline."""


class PolicyUnavailable(RaykError):
    """No replica of the served policy answered before the deadline."""


class UnusableSignal(RaykError):
    """A teacher's signals for some rows cannot be learned from (NaN, infinities); `rows`: their places in the batch."""

    def __init__(self, message: str, rows: list[int]):
        super().__init__(message, rows)
        self.rows = rows

    def __str__(self) -> str:
        return self.args[0]


class RunFailed(RaykError):
    """A run stopped after it had started; its last step is checkpointed where that was possible."""
