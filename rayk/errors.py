"""The errors that rayk raises. Each message is a sentence that names the setting or file and says what to do."""


class RaykError(Exception):
    """Base class of rayk's errors."""


class InputError(RaykError, ValueError):
    """A setting, file, row or model that the user gave is wrong; the command line exits with code 2."""


class SettingsError(InputError):
    """Settings are wrong. The message has one line per wrong setting.

    Args:
        where: the file of the settings, or "The config".
        sentences: one per wrong setting.
    """

    def __init__(self, where: str, sentences: list[str]):
        super().__init__(where, sentences)
        self.where, self.sentences = where, sentences

    def __str__(self) -> str:
        if len(self.sentences) == 1:
            return f"{self.where}: {self.sentences[0]}"
        return "\n".join([f"{self.where}: {len(self.sentences)} settings are wrong.", *self.sentences])


class EngineDied(RaykError):
    """An engine's process has died. Ray Serve replaces its replica, so the request should be retried."""


class TeacherUnavailable(RaykError):
    """No replica of a teacher answered before the deadline."""


class PolicyUnavailable(RaykError):
    """No replica of the served policy answered before the deadline."""


class UnusableSignal(RaykError):
    """A teacher's signals contain NaN or infinities for some rows; `rows` are their indices in the batch."""

    def __init__(self, message: str, rows: list[int]):
        super().__init__(message, rows)
        self.rows = rows

    def __str__(self) -> str:
        return self.args[0]


class Interrupted(RaykError):
    """A command was interrupted by Ctrl-C or SIGTERM; the command line exits with code 130."""


class RunFailed(RaykError):
    """A run failed after it had started; the last step was checkpointed if possible."""


class Overtaken(RunFailed):
    """Another process has continued the run, so this one has stopped and must not be resumed."""
