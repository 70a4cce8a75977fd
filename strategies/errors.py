"""The one exception family: what was wrong, what to do, and the exit code that says it."""


class ParallelTuneError(Exception):
    """A run that cannot go on.

    Attributes:
        message: what is wrong, with the value seen.
        hint: what the user can do about it.
        exit_code: the process's exit status.
        trace: the traceback of the process that it happened in, if that was another one.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.trace = ""

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class RunFailed(ParallelTuneError):
    """Training began and did not reach its end."""

    exit_code = 1


class ConfigError(ParallelTuneError):
    """Bad input or configuration."""

    exit_code = 2


class NoStrategyFits(ParallelTuneError):
    """No strategy, or not the one the user named, fits the devices."""

    exit_code = 3


class StrategiesCombined(ParallelTuneError):
    """Replication and splitting were asked for together."""

    exit_code = 4


class Stopped(ParallelTuneError):
    """A signal ended the run; a checkpoint is on disk and the run can be resumed."""

    exit_code = 75
