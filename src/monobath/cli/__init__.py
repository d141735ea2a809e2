"""The command line: one verb = one plain function, whose signature and docstring are the help.

Nothing heavy is imported until a verb runs. A mistake that the user can mend is one line on stderr and exit code 2;
Ctrl-C is one line and 130; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import inspect
import keyword
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from .._version import __version__
from ..errors import UserError
from ..words import did_you_mean
from .arguments import in_one_sentence, parser_of, spelled_alike, split_overrides, verb_name
from .bulk import decode_dataset, encode_dataset
from .comparing import bench, eval_
from .preparing import cache_latents, import_ssdd, stats
from .using import export, generate, serve
from .verbs import decode, demo, distill, encode, info, reconstruct, train

VERBS: dict[str, Callable[..., None]] = {
    verb_name(function): function
    for function in (
        train, distill, reconstruct, encode, decode, generate, info, demo, eval_, bench, export, import_ssdd, stats,
        cache_latents, serve, encode_dataset, decode_dataset,
    )
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code.

    Args:
        argv: without the program's name; default: the process's own.
    """
    arguments = [spelled_alike(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    verb = next((a for a in arguments[:1] if a in VERBS), "")
    _configure_logging(verb)
    try:
        if verb:
            _run(verb, arguments[1:])
        else:
            _top(arguments)
    except (UserError, argparse.ArgumentError) as error:
        return _fail(verb, in_one_sentence(str(error)), 2)
    except OSError as error:  # the disk is full, read-only or gone
        if error.errno is None:
            raise
        return _fail(verb, f"{error}: free some space, or choose another folder", 2)
    except KeyboardInterrupt as error:
        return _fail(verb, str(error) or "interrupted", 130)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    return 0


def _run(verb: str, arguments: list[str]) -> None:
    function = VERBS[verb]
    parser = parser_of(function)
    extra: dict[str, Any] = {}
    parameters = inspect.signature(function).parameters
    if "command" in parameters:
        extra["command"] = shlex.join(["monobath", verb, *arguments])
    if "overrides" in parameters:
        arguments, extra["overrides"] = split_overrides(parser, arguments)
    given = vars(parser.parse_args(arguments))
    function(**{f"{name}_" if keyword.iskeyword(name) else name: value for name, value in given.items()}, **extra)


def _top(arguments: list[str]) -> None:
    """What is not a verb: --help, --version, a mistake."""
    parser = argparse.ArgumentParser(
        prog="monobath",
        description="Turn image latents into pictures in one step. monobath VERB --help says more.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"monobath {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", title="verbs", description="monobath VERB --help says more")
    for name, function in VERBS.items():
        verbs.add_parser(name, help=(function.__doc__ or "").partition("\n")[0])
    known = ", ".join(VERBS)
    if not arguments:
        raise UserError(f"no verb given: choose from {known}; monobath --help says more")
    if arguments[0].startswith("-"):
        parser.parse_known_args(arguments)
    hint = did_you_mean(arguments[0], VERBS, f"choose from {known}")
    raise UserError(f"unknown verb {arguments[0]!r}: {hint}")


def _fail(verb: str, message: str, code: int) -> int:
    sys.stderr.write(" ".join(["monobath", *([verb] if verb else [])]) + ": " + " ".join(message.split()) + "\n")
    return code


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the time, so that lines and a progress bar do not overwrite one another."""

    stream = property(lambda self: sys.stderr, lambda self, value: None)  # type: ignore[assignment]


def _configure_logging(verb: str) -> None:
    if not logging.getLogger().handlers:  # a program that calls main() may have its own
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Stderr()])
    logging.getLogger("monobath").setLevel(logging.INFO if verb in ("train", "distill") else logging.WARNING)
