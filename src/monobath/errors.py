"""The one exception class for mistakes that the user can mend, and the commonest checks."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints


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


def check_choice(name: str, value: object, kinds: Any) -> None:
    """Raise `UserError` unless the named value is one of a `Literal`'s."""
    if value not in get_args(kinds):
        choices = " or ".join(f'"{kind}"' for kind in get_args(kinds))
        raise UserError(f"{name} is {value!r}: choose {choices}")


def check_choices(section: str, config: object) -> None:
    """The same of all fields of a dataclass that are `Literal`s."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal:
            check_choice(f"{section}.{name}", getattr(config, name), kind)


@contextlib.contextmanager
def explained_as(
    text: str, remedy: str = "", errors: type[BaseException] | tuple[type[BaseException], ...] = Exception
) -> Iterator[None]:
    """Within, any error but a `UserError` becomes one: `text`, the reason in brackets and the remedy, on one line.

    For reading files: a damaged or hostile one makes libraries raise nearly anything.

    Args:
        errors: those that are explained; default: all.
    """
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(f"{text} ({reason(error)})" + (f": {remedy}" if remedy else "")) from None


def reason(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def imported(package: str, lacking: str) -> Any:
    """The package of that name.

    Raises:
        UserError: it is not installed; `lacking` is the message.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(lacking) from None
