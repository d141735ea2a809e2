"""Parsers built from the verbs' signatures and docstrings."""

from __future__ import annotations

import argparse
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


ADDED = ("overrides", "command")
"""Parameters that are no options: what is left of the command line, and the command line itself."""


def verb_name(function: Callable[..., None]) -> str:
    """What the user types: the function's name, with dashes, less the underscore that keeps a builtin's name free."""
    return function.__name__.rstrip("_").replace("_", "-")


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
