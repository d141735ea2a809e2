"""Reading recipes: YAML and `key=value` overrides → a checked `Recipe`.

    load_recipe("cpu-default", ["data.source=photos", "training.steps=100"])

The dataclasses in `recipe.py` and `config.py` are the schema: every dotted field is a key, its annotation the type.
What a recipe trains follows from `trains`, `distill.teacher` and `training.train_encoder`. jsonargparse checks and
converts values; a key that this kind does not have is an error that names the nearest one that it has.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from .. import resources
from ..autoencoders import as_encoder
from ..config import SHARED, TokenizerConfig
from ..decoders import KINDS, decoder_config
from ..errors import UserError
from ..tokenizer import Tokenizer
from .config import DistillConfig, LossConfig, ScalesConfig
from .recipe import DecoderRecipe, DistillationRecipe, Recipe, TokenizerRecipe


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that cannot be, brackets without end
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{path} is {found}: a recipe is a mapping such as 'training: {{steps: 1000}}'")
    overrides = _without_kl_decoder(content, overrides)
    kind = _kind(content, overrides)
    schema = _schema(kind)  # type: ignore[arg-type]  # a class has a hash, if its instances have none
    values: dict[str, Any] = {}
    for key, value in schema.flatten(_own(content, kind), f" in {path}"):
        values[key] = schema.convert(key, value, f" in {path}")
    for override in overrides:
        key, separator, given = override.removeprefix("--").partition("=")
        if key == "trains":
            continue
        if key not in schema.types:
            raise schema.unknown(key)
        if not separator:
            raise UserError(f"{key} has no value: write {key}=VALUE")
        values[key] = schema.parse(key, given)
    if "model" in schema.sections:
        values = _inherited(values) | _of_encoder(values) | values
    for key, (value, reason) in kind.fixed.items():
        if key not in values or not reason:
            values[key] = value
    return _build(kind, values)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def _without_kl_decoder(content: dict[Any, Any], overrides: Sequence[str]) -> list[str]:
    """`model.kl_decoder`, as recipes and commands wrote it before decoders had kinds, becomes `model.decoder`."""
    model, kept_overrides = content.setdefault("model", {}), []
    for override in overrides:
        key, _, value = override.removeprefix("--").partition("=")
        if key == "model.kl_decoder" and isinstance(model, dict):
            try:
                model["kl_decoder"] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise UserError(f"{key} is {value!r}: expected a list of int, such as [1, 2]") from None
        else:
            kept_overrides.append(override)
    if isinstance(model, dict) and (channels := model.pop("kl_decoder", None)):
        kept = {name: value for name, value in (model.get("decoder") or {}).items() if name in SHARED}
        model["decoder"] = {"kind": "kl", "channels": channels} | kept
    return kept_overrides


def _kind(content: dict[Any, Any], overrides: Sequence[str]) -> type[Recipe]:
    """What a recipe trains. Older ones say "tokenizer" of all but generators, and list every section."""
    given = dict(override.removeprefix("--").partition("=")[::2] for override in overrides)

    def said(section: str, name: str, default: str) -> str:
        part = content.get(section) if section else content
        key = f"{section}.{name}" if section else name
        return str(given.get(key, part.get(name, default) if isinstance(part, dict) else default))

    trains, distill = said("", "trains", "tokenizer"), content.get("distill")
    if trains == "generator":
        from .generation import GeneratorRecipe

        return GeneratorRecipe
    if trains not in _WITH_TOKENIZER:
        raise UserError(
            f"trains is {trains!r}: expected one of {', '.join(map(repr, (*_WITH_TOKENIZER, 'generator')))}"
        )
    named_later = isinstance(distill, dict) and distill and "teacher" not in distill
    if trains == "distillation" or named_later or said("distill", "teacher", ""):
        return DistillationRecipe
    learns = said("training", "train_encoder", str(trains != "decoder")).lower()
    return DecoderRecipe if learns in ("false", "no", "off") else TokenizerRecipe


_WITH_TOKENIZER = ("tokenizer", "decoder", "distillation")


def _own(content: dict[Any, Any], kind: type[Recipe]) -> dict[Any, Any]:
    """A recipe without `trains`, and without sections of other kinds that say nothing: older recipes list all."""
    own = {field.name for field in dataclasses.fields(kind)}
    return {k: v for k, v in content.items() if k != "trains" and (k in own or not _idle(k, v))}


def _idle(name: Any, value: Any) -> bool:
    """Whether a section has its defaults only."""
    if name in ("init", "init_encoder"):
        return not value
    if name == "generator":
        from .generation import GenerationConfig

        section: Any = GenerationConfig
    elif name in _SECTIONS:
        section = _SECTIONS[name]
    else:
        return False
    return isinstance(value, dict) and _build(section, dict(_flat(value))) == section()


_SECTIONS: dict[Any, Any] = {
    "model": TokenizerConfig, "loss": LossConfig, "distill": DistillConfig, "scales": ScalesConfig
}  # fmt: skip


def _read(name: str) -> tuple[Path, str]:
    path = resources.recipe_path(name)
    try:
        return path, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): a recipe is a YAML file in UTF-8") from None


def _inherited(values: dict[str, Any]) -> dict[str, Any]:
    """Shapes that the recipe leaves to the model it starts from: whole parts (encoder, decoder, sampler) only."""
    source = values.get("init") or values.get("init_encoder") or values.get("distill.teacher")
    if not source:
        return {}
    parts = ("encoder",) if values.get("init_encoder") else ("encoder", "decoder", "sampler")
    missing = [part for part in parts if not any(f"{key}.".startswith(f"model.{part}.") for key in values)]
    if not {"encoder", "decoder"} & set(missing):
        return {}
    model = Tokenizer.config_of(source)
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
    """The dotted keys of a kind of recipe, and their types."""

    def __init__(self, kind: type[Recipe]) -> None:
        self.types = dict(_leaves(kind))
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
        if value is None and type(None) in typing.get_args(self.types[key]):
            return None
        if type(value) is self.types[key] and not isinstance(value, float):
            return value  # most are, and the parser is slow
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


_schema = functools.cache(_Schema)


def _sections(kind: type) -> Iterator[tuple[str, Any, list[type]]]:
    """(name, annotation, the dataclasses that it may be) of each field; none for a plain value."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        kinds = [one for one in (typing.get_args(hint) or (hint,)) if isinstance(one, type)]
        yield field.name, hint, [one for one in kinds if dataclasses.is_dataclass(one)]


def _leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint, kinds in _sections(kind):
        for section in reversed(kinds):  # of a field that several of them have, the first one's type counts
            yield from _leaves(section, f"{prefix}{name}.")
        if len(kinds) > 1:
            yield f"{prefix}{name}.kind", Literal[KINDS]
        if not kinds:
            yield f"{prefix}{name}", hint


def _build(kind: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Only the given keys reach the dataclasses, so that theirs alone decide what is left open."""
    given: dict[str, Any] = {}
    for name, _, kinds in _sections(kind):
        key = f"{prefix}{name}"
        if kinds and any(k.startswith(f"{key}.") for k in values):
            own = {k.removeprefix(f"{key}."): value for k, value in values.items() if k.startswith(f"{key}.")}
            given[name] = decoder_config(own) if len(kinds) > 1 else _build(kinds[0], values, f"{key}.")
        elif key in values:
            given[name] = values[key]
    return kind(**given)


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return f"a list of {inner.__name__}, such as " + ("[a, b]" if inner is str else "[1, 2]")
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(kind, str(kind))
