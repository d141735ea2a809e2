"""The one exception class for mistakes that the user can mend, and the commonest check."""

from __future__ import annotations

from collections.abc import Mapping


class UserError(ValueError):
    """A mistake in what the caller gave: the message names the value and the remedy.

    The command line prints the message on one line and exits with code 2; library callers can catch
    it as a `ValueError`.
    """


def check_least(least: float, values: Mapping[str, float | None]) -> None:
    """Raise `UserError` for the first of the named values that is below `least`; None is never."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}")
