"""The command line: one verb = one plain function, whose signature and docstring are the help.

Nothing heavy is imported until a verb runs. A mistake that the user can mend is one line on stderr and exit code 2;
Ctrl-C is one line and 130; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from ._version import __version__
from .errors import UserError

if TYPE_CHECKING:
    import torch
    from jsonargparse import ArgumentParser

    from .tokenizer import Tokenizer

DType = Literal["float32", "bfloat16", "float16"]
MAX_PIXELS = 64_000_000  # images.MAX_PIXELS, which costs an import of torch (a test compares them)


# ---- verbs ------------------------------------------------------------------------------------------------------


def train(
    recipe: str,
    *,
    data: list[str] | None = None,
    run: str | None = None,
    print_config: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Train a tokenizer; the same command goes on where it stopped.

    Any value of the recipe can be set by its dotted name: --training.steps 1000 --data.scale "[64, 128]".
    --print_config shows all of them. On several GPUs: accelerate launch -m monobath train RECIPE …

    Args:
        recipe: Name of a packaged recipe (cpu-preview), or a YAML file.
        data: Folders of pictures, .tar shards or shard URLs; instead of the recipe's data.source.
        run: Run folder; default: runs/NAME.
        print_config: Print the resolved recipe as YAML and exit.
    """
    import json

    from .training.recipes import dump_recipe, load_recipe

    overrides = list(overrides)
    if data:
        overrides.append(f"data.source={json.dumps(data, ensure_ascii=False)}")
    if run is not None:
        overrides.append(f"run={run}")
    resolved = load_recipe(recipe, overrides)
    if print_config:
        _write(dump_recipe(resolved))
        return
    if not resolved.data.source:
        raise UserError(f"recipe {recipe} names no pictures: add --data FOLDER, or data.source in the file")
    from .training.loop import Interrupted
    from .training.loop import train as run_training

    try:
        folder = run_training(resolved)
    except Interrupted as stopped:
        raise KeyboardInterrupt(str(stopped)) from None
    if os.environ.get("RANK", "0") == "0":
        _write(f"model: {folder}\n")


def reconstruct(
    photo: list[str],
    *,
    out: str,
    model: str = "default",
    size: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    noise: Literal["gaussian", "zero"] | None = None,
    max_pixels: int = MAX_PIXELS,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Encode and decode pictures: writes OUT/NAME.png for each, and prints their figures.

    Args:
        photo: Pictures, or folders of pictures.
        out: Folder for the results.
        model: Packaged name, folder, or Hugging Face Hub id.
        size: Resize the short side to this many pixels and crop the centre square; default: the whole picture.
        steps: Sampler steps; default: what the model was made for.
        seed: Noise seed, the same for every picture.
        noise: What decoding starts from; default: what the model was made for.
        max_pixels: Largest accepted picture, in pixels.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic.
    """
    pictures = _pictures(photo)
    targets = _targets(out, pictures, ".png")
    from rich.table import Table

    from .evaluation import report
    from .files import write_file
    from .images import tensor_to_pil

    tokenizer = _load(model, device, dtype)
    table = Table("picture", "size", "PSNR", "encode ms", "decode ms")
    for column in table.columns[1:]:
        column.justify = "right"
    try:
        for picture, target in zip(pictures, targets, strict=True):
            pixels = _open(picture, size, max_pixels)
            with _explained(picture):
                row = report.reconstruct(
                    tokenizer, pixels, target.name, steps=steps, seed=seed, noise=noise, max_pixels=max_pixels
                )
            write_file(target, tensor_to_pil(row.output).save)
            h, w = row.size
            figures = (f"{w}×{h}", report.decibels(row.psnr), f"{row.encode_ms:.1f}", f"{row.decode_ms:.1f}")
            table.add_row(_plain(target.name), *figures)
    finally:
        if table.row_count:
            _show(table)
            _write(f"{_count(table.row_count, 'picture')} in {out}\n")


def encode(
    photo: list[str],
    *,
    out: str,
    model: str = "default",
    size: int | None = None,
    sample: bool = False,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Turn pictures into latents: writes OUT/NAME.safetensors for each, which `monobath decode` reads.

    A file holds `latent` (c, h, w), raw, and as metadata: size "HxW", factor, model and format.

    Args:
        photo: Pictures, or folders of pictures.
        out: Folder for the results.
        model: Packaged name, folder, or Hugging Face Hub id.
        size: Resize the short side to this many pixels and crop the centre square; default: the whole picture.
        sample: Draw from the posterior instead of taking its mode.
        seed: Seed of that draw, the same for every picture.
        max_pixels: Largest accepted picture, in pixels.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic.
    """
    pictures = _pictures(photo)
    targets = _targets(out, pictures, ".safetensors")
    import torch

    tokenizer = _load(model, device, dtype)
    for picture, target in zip(pictures, targets, strict=True):
        pixels = _open(picture, size, max_pixels)
        with _explained(picture):
            posterior = tokenizer.encode(pixels, max_pixels=max_pixels)
        generator = torch.Generator().manual_seed(seed)
        latent = posterior.sample(generator) if sample else posterior.mode()
        h, w = posterior.size
        facts = {"size": f"{h}x{w}", "factor": str(tokenizer.factor), "model": _lasting_name(model)}
        _write_latent(target, latent[0], facts)
    _write(f"{_count(len(targets), 'latent')} in {out}\n")


def decode(
    latent: list[str],
    *,
    out: str,
    model: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    noise: Literal["gaussian", "zero"] | None = None,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Turn latents that `monobath encode` wrote into pictures: OUT/NAME.png for each.

    Args:
        latent: Files, or folders of .safetensors files.
        out: Folder for the results.
        model: Packaged name, folder, or Hugging Face Hub id; default: the one that the file names.
        steps: Sampler steps; default: what the model was made for.
        seed: Noise seed, the same for every picture.
        noise: What decoding starts from; default: what the model was made for.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic.
    """
    sources = _files(latent, (".safetensors",), "latents", "monobath encode writes them")
    targets = _targets(out, sources, ".png")
    from .files import write_file

    tokenizers: dict[str, Tokenizer] = {}
    for source, target in zip(sources, targets, strict=True):
        z, size, factor, made_by = _read_latent(source)
        name = model or made_by
        if name not in tokenizers:
            tokenizers[name] = _load(name, device, dtype)
        tokenizer = tokenizers[name]
        if tokenizer.factor != factor:
            raise UserError(f"{source} has factor {factor}, but {name} has {tokenizer.factor}: choose its own model")
        with _explained(source):
            (picture,) = tokenizer.decode(
                z[None], size=size, steps=steps, seed=[seed], noise=noise, output="pil"
            )  # fmt: skip
        write_file(target, picture.save)
    _write(f"{_count(len(targets), 'picture')} in {out}\n")


def info(model: str | None = None, *, json: bool = False) -> None:
    """Say what a model is: networks, sampler, latents, training. Without MODEL: the default, and what is packaged.

    Args:
        model: Packaged name, folder, or Hugging Face Hub id.
        json: Print JSON.
    """
    from json import dumps

    from . import resources
    from .evaluation.report import describe

    name = model or "default"
    facts = describe(_load(name, "cpu", "float32"), name)
    if model is None:
        facts["packaged"] = resources.weights_names()
    if json:
        _write(dumps(facts, indent=2) + "\n")
        return
    from rich.table import Table

    table = Table(show_header=False)
    for key, value in facts.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for part, single in rows:
            table.add_row(_plain(f"{key} {part}".strip().replace("_", " ")), _plain(_in_words(single)))
    _show(table)


def demo(*, out: str = "runs/demo", model: str = "default") -> None:
    """Run a model on the packaged sample photos: writes pictures, figures and report.html to OUT.

    Args:
        out: Folder for the results.
        model: Packaged name, folder, or Hugging Face Hub id.
    """
    folder = _folder(out)
    from rich.table import Table

    from .evaluation import demo as demonstration
    from .evaluation.report import decibels

    result = demonstration.run_demo(folder, model)
    table = Table(*demonstration.HEAD, show_footer=True)
    table.columns[0].footer, table.columns[2].footer = "mean", decibels(demonstration.mean_psnr(result.rows))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result.rows:
        table.add_row(*map(_plain, demonstration.cells(row)))
    _show(table)
    if result.preview:
        _write(demonstration.PREVIEW + "\n")
    _write("".join(f"{file}\n" for file in result.files) + f"{result.seconds:.1f} s in all\n")


VERBS: dict[str, Callable[..., None]] = {f.__name__: f for f in (train, reconstruct, encode, decode, info, demo)}


# ---- the entry point ----------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code.

    Args:
        argv: without the program's name; default: the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((a for a in arguments[:1] if a in VERBS), "")
    _configure_logging(verb)
    try:
        if verb:
            _run(verb, arguments[1:])
        else:
            _top(arguments)
    except UserError as error:
        return _fail(verb, str(error), 2)
    except argparse.ArgumentError as error:
        return _fail(verb, _in_one_sentence(str(error)), 2)
    except KeyboardInterrupt as error:
        return _fail(verb, str(error) or "interrupted", 130)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    return 0


def _run(verb: str, arguments: list[str]) -> None:
    function = VERBS[verb]
    parser = _parser(function)
    extra: dict[str, Any] = {}
    if "overrides" in inspect.signature(function).parameters:
        arguments, extra["overrides"] = _split_overrides(parser, arguments)
    given = parser.parse_args(arguments)
    function(**vars(given), **extra)


def _top(arguments: list[str]) -> None:
    """What is not a verb: --help, --version, a mistake."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="monobath",
        description="Turn image latents into pictures in one step. monobath VERB --help says more.",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    verbs = parser.add_subcommands(
        dest="verb", metavar="VERB", title="verbs", description="monobath VERB --help says more"
    )
    for name, function in VERBS.items():
        verbs.add_subcommand(name, _parser(function), help=(function.__doc__ or "").partition("\n")[0])
    known = ", ".join(VERBS)
    if not arguments:
        raise UserError(f"no verb given: choose from {known}; monobath --help says more")
    if arguments[0].startswith("-"):
        parser.parse_args(arguments)
    near = difflib.get_close_matches(arguments[0], VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {known}"
    raise UserError(f"unknown verb {arguments[0]!r}: {hint}")


def _parser(function: Callable[..., None]) -> ArgumentParser:
    """A parser from a signature and its docstring. Lists take several values, booleans are flags."""
    import docstring_parser
    from jsonargparse import ArgumentParser

    text = docstring_parser.parse(inspect.getdoc(function) or "")
    helps = {parameter.arg_name: parameter.description for parameter in text.params}
    description = "\n\n".join(filter(None, [text.short_description, text.long_description]))
    parser = ArgumentParser(
        prog=f"monobath {function.__name__}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,  # jsonargparse's own; ours resolves the recipe
    )
    hints, shown = typing.get_type_hints(function), [parser.prog]
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "overrides":
            continue
        kind, default = _without_none(hints[name]), parameter.default
        options: dict[str, Any] = {"help": helps.get(name)}
        if kind is bool:
            options |= {"action": "store_true"}
        elif typing.get_origin(kind) is list:
            options |= {"nargs": "+", "type": typing.get_args(kind)[0]}
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
        parser.add_argument(f"--{name}", **options)
    parser.usage = " ".join([*shown, "[options]"])
    return parser


def _split_overrides(parser: ArgumentParser, arguments: list[str]) -> tuple[list[str], list[str]]:
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


def _fail(verb: str, message: str, code: int) -> int:
    sys.stderr.write(" ".join(["monobath", *([verb] if verb else [])]) + ": " + " ".join(message.split()) + "\n")
    return code


def _in_one_sentence(message: str) -> str:
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


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the time, so that lines and a progress bar do not overwrite one another."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass


def _configure_logging(verb: str) -> None:
    if not logging.getLogger().handlers:  # a program that calls main() may have its own
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_Stderr()])
    logging.getLogger("monobath").setLevel(logging.INFO if verb == "train" else logging.WARNING)


# ---- shared by verbs ----------------------------------------------------------------------------------------------


def _load(name: str, device: str, dtype: str) -> Tokenizer:
    import torch

    from .tokenizer import Tokenizer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {device} cannot be used here ({reason}): choose cpu, or leave it out") from None
    return Tokenizer.from_pretrained(name, device=device, dtype=getattr(torch, dtype))


@contextmanager
def _explained(source: Path) -> Iterator[None]:
    """Within: mistakes name the file, and too little memory is a mistake that can be mended."""
    import torch

    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError(f"{source}: out of memory; use a smaller picture, --size, or --dtype bfloat16") from None


def _pictures(given: Iterable[str]) -> list[Path]:
    from .data.sources import IMAGE_EXTENSIONS

    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    return _files(given, suffixes, "pictures", "such as .jpg, .png, .webp")


def _files(given: Iterable[str], suffixes: tuple[str, ...], what: str, hint: str) -> list[Path]:
    """Files as they are; folders, searched for such suffixes at any depth, without hidden files."""
    found: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            inside = [
                p
                for p in sorted(path.rglob("*"))
                if p.suffix.lower() in suffixes
                and p.is_file()
                and not any(part.startswith(".") for part in p.relative_to(path).parts)
            ]
            if not inside:
                raise UserError(f"no {what} in {path}: give files or a folder that holds some ({hint})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist: give files or folders of {what}")
    return found


def _folder(out: str) -> Path:
    folder = Path(out)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {out} cannot be a folder: {path} is a file; choose another")
    return folder


def _targets(out: str, sources: Sequence[Path], suffix: str) -> list[Path]:
    """OUT/STEM.suffix for each source: equal stems get -2, -3 …; no source is ever overwritten."""
    folder, used, targets = _folder(out), set(), []
    inputs = {source.resolve() for source in sources}
    for source in sources:
        name, number = source.stem, 1
        while name.casefold() in used:  # some file systems do not tell A from a
            number += 1
            name = f"{source.stem}-{number}"
        used.add(name.casefold())
        target = folder / f"{name}{suffix}"
        if target.resolve() in inputs:
            raise UserError(f"{target} would overwrite an input file: choose another --out")
        targets.append(target)
    return targets


def _open(path: Path, size: int | None, max_pixels: int) -> torch.Tensor:
    """A picture as a uint8 tensor (3, H, W), cropped if a size is given."""
    from .data.transforms import center_crop
    from .images import check_pixels, open_image, pil_to_tensor

    if size is not None and size < 1:
        raise UserError(f"--size is {size}: it must be at least 1 pixel")
    image = open_image(path, max_pixels=max_pixels)
    if size is None:
        return pil_to_tensor(image)
    check_pixels(size, size, max_pixels, f"--size {size}")
    return center_crop(image, size=size)


LATENT_FORMAT = "monobath-latent-1"


def _write_latent(path: Path, latent: torch.Tensor, facts: dict[str, str]) -> None:
    from safetensors.torch import save

    from .files import write_file

    data = save({"latent": latent.cpu().contiguous()}, metadata={"format": LATENT_FORMAT, **facts})
    write_file(path, lambda partial: partial.write_bytes(data))


def _read_latent(path: Path) -> tuple[torch.Tensor, tuple[int, int], int, str]:
    """(latent (c, h, w), (H, W), factor, model)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            facts = opened.metadata() or {}
            if facts.get("format") != LATENT_FORMAT or "latent" not in opened.keys():  # noqa: SIM118
                raise UserError(
                    f"{path} is not a latent file (format {facts.get('format')!r}, expected {LATENT_FORMAT!r})"
                )
            latent = opened.get_tensor("latent")
        height, width = map(int, facts["size"].split("x"))
        factor, model = int(facts["factor"]), facts["model"]
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} lacks the metadata {error}: write it again with monobath encode") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable latent file ({error}): write it again with monobath encode"
        ) from None
    if latent.ndim != 3 or not latent.is_floating_point():
        raise UserError(f"{path} holds {latent.dtype} {tuple(latent.shape)}: expected a float latent (c, h, w)")
    return latent, (height, width), factor, model


def _lasting_name(model: str) -> str:
    """A model's name that means the same tomorrow and elsewhere on this machine."""
    from . import resources

    packaged = resources.weights_path(model)
    if packaged is not None:
        return packaged.name
    return str(Path(model).resolve()) if Path(model).exists() else model


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return (" × " if all(isinstance(v, int) for v in value) else ", ").join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plain(text: str) -> Any:
    """Text for a table, safe from markup: a file may be called [bold].png."""
    from rich.text import Text

    return Text(text, overflow="fold")


def _show(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def _write(text: str) -> None:
    sys.stdout.write(text)
