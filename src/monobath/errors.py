"""The one exception class for mistakes that the user can mend, and the commonest checks."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


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


def imported(package: str, lacking: str) -> Any:
    """The package of that name.

    Raises:
        UserError: it is not installed; `lacking` is the message.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(lacking) from None
