"""Reading recipes: YAML and `key=value` overrides → a checked `Recipe`.

    load_recipe("cpu-default", ["data.source=photos", "training.steps=100"])

The dataclasses in `config.py` are the schema: every dotted field is a key, its annotation the type. jsonargparse
checks and converts values; a key that does not exist is an error that names the nearest one that does.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from .. import resources
from ..autoencoders import as_encoder
from ..decoders import KINDS, DecoderConfig, decoder_config
from ..errors import UserError
from ..tokenizer import SHARED, Tokenizer
from .config import Recipe


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name: of a packaged recipe, else the path of a YAML file; a run's `config.yaml` gives the run's recipe again.
        overrides: `KEY=VALUE` strings such as "training.steps=100" or "data.scale=[64, 128]"; the value is YAML.
            A list of strings also takes a single plain value: "data.source=photos".

    Raises:
        UserError: no such recipe, not YAML, an unknown key, or a value of another type or outside its range.
    """
    path, text = _read(name)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{path} is {found}: a recipe is a mapping such as 'training: {{steps: 1000}}'")
    schema = _Schema()
    values: dict[str, Any] = {}
    for key, value in schema.flatten(content, f" in {path}"):
        values[key] = schema.convert(key, value, f" in {path}")
    for override in overrides:
        key, separator, given = override.removeprefix("--").partition("=")
        if key not in schema.types:
            raise schema.unknown(key)
        if not separator:
            raise UserError(f"{key} has no value: write {key}=VALUE")
        values[key] = schema.parse(key, given)
    return _build(Recipe, _inherited(values) | _of_encoder(values) | values)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def _read(name: str) -> tuple[Path, str]:
    path = resources.recipe_path(name)
    try:
        return path, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): a recipe is a YAML file in UTF-8") from None


def _inherited(values: dict[str, Any]) -> dict[str, Any]:
    """Shapes that the recipe leaves to the model it starts from: whole parts (encoder, decoder, sampler) only."""
    source = values.get("init") or values.get("distill.teacher")
    if not source:
        return {}
    parts = ("encoder", "decoder", "sampler")
    missing = [part for part in parts if not any(f"{key}.".startswith(f"model.{part}.") for key in values)]
    if not {"encoder", "decoder"} & set(missing):
        return {}
    model = Tokenizer.from_pretrained(source).config
    if "decoder" not in missing:  # another decoder: how the old one is sampled says nothing about it
        missing = ["encoder"]
    found: dict[str, Any] = {}
    for part in missing:
        value = getattr(model, part)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= {f"model.{part}.{name}": inner for name, inner in dataclasses.asdict(value).items()}
        else:
            found[f"model.{part}"] = value
    if "decoder" not in missing:
        found |= {f"model.decoder.{name}": getattr(model.encoder, name) for name in ("factor", "latent_channels")}
    if model.encoder.family == "custom" and "encoder" in missing:
        found["model.encoder.source"] = ""  # names code: the user says what is run, not a model's configuration
    return found


def _of_encoder(values: dict[str, Any]) -> dict[str, Any]:
    """What a foreign encoder says: channels and factor of the latents, the numbers that its family publishes."""
    family, source = (values.get(f"model.encoder.{name}") for name in ("family", "source"))
    known = {f"model.{part}.{name}" for part in ("encoder", "decoder") for name in ("factor", "latent_channels")}
    if not (family and source) or known <= values.keys():  # a run's config.yaml holds all of it
        return {}
    encoder = as_encoder(f"{family}={source}")
    shape = {"factor": encoder.config.factor, "latent_channels": encoder.config.latent_channels}
    found = {f"model.{part}.{name}": value for part in ("encoder", "decoder") for name, value in shape.items()}
    return found | {f"model.{name}": value for name, value in encoder.published.items()}


class _Schema:
    """The dotted keys of `Recipe` and their types."""

    def __init__(self) -> None:
        self.types = dict(_leaves(Recipe)) | {"model.kl_decoder": list[int]}
        parts = [key.split(".") for key in self.types]
        self.sections = {".".join(part[:n]) for part in parts for n in range(1, len(part))}
        self.parser = ArgumentParser(exit_on_error=False)
        for key, kind in self.types.items():
            self.parser.add_argument(f"--{key}", type=kind)

    def flatten(self, content: dict[Any, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """(dotted key, value) of nested mappings; a section left empty gives nothing."""
        for name, value in content.items():
            key = f"{prefix}{name}"
            if key in self.types:
                yield key, value
            elif key not in self.sections:
                raise self.unknown(key, where)
            elif isinstance(value, dict):
                yield from self.flatten(value, where, f"{key}.")
            elif value is not None:
                inside = next(k for k in self.types if k.startswith(f"{key}."))
                raise UserError(f"{key} is {value!r}{where}: expected a mapping with keys such as {inside}")

    def convert(self, key: str, value: Any, where: str = "") -> Any:
        """A value from a file, as the type of `key`."""
        try:
            converted = self.parser.parse_object({key: value}, defaults=False)[key]
        except ArgumentError:
            converted = None
        return self._checked(key, converted, value, where)

    def parse(self, key: str, text: str) -> Any:
        """A value from the command line, as the type of `key`."""
        if self.types[key] == list[str] and not text.startswith("["):
            return [text]
        try:
            converted = self.parser.parse_args([f"--{key}={text}"], defaults=False)[key]
        except ArgumentError:
            converted = None
        return self._checked(key, converted, text, "")

    def _checked(self, key: str, converted: Any, given: Any, where: str) -> Any:
        # jsonargparse lets an empty value and NaN through.
        if converted is None or (isinstance(converted, float) and not math.isfinite(converted)):
            raise UserError(f"{key} is {given!r}{where}: expected {_describe(self.types[key])}")
        return converted

    def unknown(self, key: str, where: str = "") -> UserError:
        if key in self.sections:
            inside = ", ".join(k for k in self.types if k.startswith(f"{key}."))
            return UserError(f"{key}{where} is a section: give one of its keys ({inside})")
        valid = [*self.types, *self.sections]
        # A right name in the wrong section is nearer than any spelling.
        same = [k for k in valid if k.rpartition(".")[2] == key.rpartition(".")[2]]
        near = difflib.get_close_matches(key, same or valid, n=1, cutoff=0.0)[0]
        return UserError(f"unknown key {key}{where}: the nearest valid one is {near}")


def _leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if hint == DecoderConfig:  # one of its kinds, which the values tell: the keys of all of them
            keys = {key: kind for each in reversed(typing.get_args(hint)) for key, kind in _leaves(each)}
            keys["kind"] = Literal[KINDS]
            yield from ((f"{prefix}{field.name}.{key}", kind) for key, kind in keys.items())
        elif dataclasses.is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hint


def _build(kind: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Only the given keys reach the dataclasses, so that theirs alone decide what is left open."""
    hints, given = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        key = f"{prefix}{field.name}"
        if hints[field.name] == DecoderConfig:
            shape = {name.removeprefix(f"{key}."): v for name, v in values.items() if name.startswith(f"{key}.")}
            if channels := values.get(f"{prefix}kl_decoder"):  # as it was written before decoders had kinds
                shape = {"kind": "kl", "channels": channels} | {k: v for k, v in shape.items() if k in SHARED}
            given[field.name] = decoder_config(shape)
        elif dataclasses.is_dataclass(hints[field.name]):
            given[field.name] = _build(typing.cast(type, hints[field.name]), values, f"{key}.")
        elif key in values:
            given[field.name] = values[key]
    return kind(**given)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return f"a list of {inner.__name__}, such as " + ("[a, b]" if inner is str else "[1, 2]")
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(kind, str(kind))
