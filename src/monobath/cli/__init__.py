"""The command line: one verb = one plain function, whose signature and docstring are the help.

Nothing heavy is imported until a verb runs. A mistake that the user can mend is one line on stderr and exit code 2;
Ctrl-C is one line and 130; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import inspect
import keyword
import logging
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from .._version import __version__
from ..errors import UserError
from ..words import did_you_mean
from .bulk import decode_dataset, encode_dataset
from .comparing import bench, eval_
from .preparing import cache_latents, import_ssdd, stats
from .using import export, generate, serve
from .verbs import decode, demo, distill, encode, info, reconstruct, train

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def verb_name(function: Callable[..., None]) -> str:
    """What the user types: the function's name, with dashes, less the underscore that keeps a builtin's name free."""
    return function.__name__.rstrip("_").replace("_", "-")


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

    stream = property(lambda self: sys.stderr, lambda self, value: None)


def _configure_logging(verb: str) -> None:
    if not logging.getLogger().handlers:  # a program that calls main() may have its own
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Stderr()])
    logging.getLogger("monobath").setLevel(logging.INFO if verb in ("train", "distill") else logging.WARNING)


# ---- parsers, from the verbs' signatures and docstrings -----------------------------------------------------------


ADDED = ("overrides", "command")
"""Parameters that are no options: what is left of the command line, and the command line itself."""


def parser_of(function: Callable[..., None]) -> ArgumentParser:
    """A parser from a signature and its docstring. Lists take several values, booleans are flags."""
    import docstring_parser
    from jsonargparse import ArgumentParser

    text = docstring_parser.parse(inspect.getdoc(function) or "")
    helps = {parameter.arg_name: parameter.description for parameter in text.params}
    description = "\n\n".join(filter(None, [text.short_description, text.long_description]))
    parser = ArgumentParser(
        prog=f"monobath {verb_name(function)}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,  # jsonargparse's own; ours resolves the recipe
    )
    hints, shown = typing.get_type_hints(function), [parser.prog]
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ADDED:
            continue
        kind, default = _without_none(hints[name]), parameter.default
        options: dict[str, Any] = {"help": helps.get(name)}
        if kind is bool:
            options |= {"action": "store_true"}
        elif typing.get_origin(kind) is list:
            item = typing.get_args(kind)[0]
            named = typing.get_origin(item) is typing.Literal  # which argparse checks as choices
            options |= {"nargs": "+"} | ({"choices": typing.get_args(item)} if named else {"type": item})
        else:
            options |= {"type": kind}
        if default is not parameter.empty and default is not False:
            options["default"] = argparse.SUPPRESS if default is None else default
        if parameter.kind is not parameter.KEYWORD_ONLY:
            optional = default is not parameter.empty
            options |= {"nargs": "?"} if optional else {}
            parser.add_argument(name, metavar=name.upper(), **options)
            several = f" [{name.upper()} …]" if "nargs" in options and not optional else ""
            shown.append(f"[{name.upper()}]" if optional else name.upper() + several)
            continue
        if default is parameter.empty:
            options["required"] = True
            shown.append(f"--{name} {name.upper()}")
        if options.get("nargs") == "+":
            options["action"] = "extend"
        parser.add_argument(f"--{name.rstrip('_')}", **options)  # for_ is --for, which Python keeps for itself
    parser.usage = " ".join([*shown, "[options]"])
    return parser


def split_overrides(parser: ArgumentParser, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options that the parser does not know are recipe keys: (the others, `KEY=VALUE` strings)."""
    known = {option for action in parser._actions for option in action.option_strings}
    others, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        option, separator, value = argument.partition("=")
        if not option.startswith("--") or option in known:
            others.append(argument)
            continue
        if not separator:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise UserError(f"{option} has no value: write {option} VALUE")
            value = following
        overrides.append(f"{option[2:]}={value}")
    return others, overrides


def spelled_alike(argument: str) -> str:
    """Options may be typed with dashes (--in-place): as parsers and recipes spell them (--in_place)."""
    option, separator, value = argument.partition("=")
    return "--" + option[2:].replace("-", "_") + separator + value if option.startswith("--") else argument


def in_one_sentence(message: str) -> str:
    """jsonargparse's account of a wrong value, shortened."""
    found = re.search(r'Parser key "([^"]+)":\s+Expected a (.+?)\. Got value: (.*)', message, re.DOTALL)
    if not found:
        return message
    key, kind, value = found.groups()
    kind = re.sub(r"<class '(\w+)'>", r"\1", kind).removeprefix("typing.Literal")
    return f"--{key} is {value!r}: expected {kind}"


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = [k for k in typing.get_args(kind) if k is not type(None)]
    return kind
