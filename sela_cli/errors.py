"""Errors a user can mend; each kind has the exit code that sysexits.h gives it."""

from __future__ import annotations


class SelaError(Exception):
    """What was wrong and where; `mend` is the command or the change that mends it."""

    exit_code = 1

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message)
        self.mend = mend

    def __str__(self) -> str:
        message = self.args[0]
        return f"{message}; {self.mend}" if self.mend else message


class UsageError(SelaError):
    """Options that contradict each other or that no such command has."""

    exit_code = 2


class BadData(SelaError):
    """Input that is there and can't be used."""

    exit_code = 65


class NoInput(SelaError):
    """Input that is not there."""

    exit_code = 66


class MissingExtra(SelaError):
    """An optional package that this needs is not installed."""

    exit_code = 69


class CannotCreate(SelaError):
    """Output that can't be written, or must not be overwritten."""

    exit_code = 73


class StoppedEarly(SelaError):
    """Stopped by a signal or an iteration cap, state saved: the same command goes on."""

    exit_code = 75
