"""What several verbs need: finding files, loading models, printing. Imports stay lazy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import UserError, check_least
from ..words import numbered

if TYPE_CHECKING:
    import torch

    from ..tokenizer import Tokenizer

WIDTH = 140
"""Of tables, in columns, where stdout is not a terminal."""
DType = Literal["float32", "bfloat16", "float16"]
MAX_PIXELS = 64_000_000  # images.MAX_PIXELS, which costs an import of torch (a test compares them)


def load_tokenizer(name: str, device: str, dtype: str, encoder: str | None = None) -> Tokenizer:
    """A model on a checked device; `encoder`, KIND=WHERE, is for a model of foreign latents."""
    import torch

    from ..devices import usable_device
    from ..tokenizer import Tokenizer

    place = usable_device(device)
    return Tokenizer.from_pretrained(name, encoder=encoder, device=place, dtype=getattr(torch, dtype))


@contextmanager
def explained(source: Path) -> Iterator[None]:
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


def find_pictures(given: Iterable[str]) -> list[Path]:
    from ..data.sources import IMAGE_EXTENSIONS

    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    return find_files(given, suffixes, "pictures", "such as .jpg, .png, .webp")


def find_files(given: Iterable[str], suffixes: tuple[str, ...], what: str, hint: str) -> list[Path]:
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


def out_folder(out: str) -> Path:
    folder = Path(out)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {out} cannot be a folder: {path} is a file; choose another")
    return folder


def target_paths(out: str, sources: Sequence[Path], suffix: str) -> list[Path]:
    """OUT/STEM.suffix for each source: equal stems get -2, -3 …; no source is ever overwritten."""
    folder, used, targets = out_folder(out), set(), []
    inputs = {source.resolve() for source in sources}
    for source in sources:
        # some file systems do not tell A from a
        name = next(name for name in numbered(source.stem) if name.casefold() not in used)
        used.add(name.casefold())
        target = folder / f"{name}{suffix}"
        if target.resolve() in inputs:
            raise UserError(f"{target} would overwrite an input file: choose another --out")
        targets.append(target)
    return targets


def open_pixels(path: Path, size: int | None, max_pixels: int) -> torch.Tensor:
    """A picture as a uint8 tensor (3, H, W), cropped if a size is given."""
    from ..data.transforms import center_crop
    from ..images import check_pixels, open_image, pil_to_tensor

    check_options(1, size=size)
    image = open_image(path, max_pixels=max_pixels)
    if size is None:
        return pil_to_tensor(image)
    check_pixels(size, size, max_pixels, f"--size {size}")
    return center_crop(image, size=size)


def lasting_name(model: str) -> str:
    """A model's name that means the same tomorrow and elsewhere on this machine."""
    from .. import resources

    packaged = resources.versioned_name(model)
    return packaged or (str(Path(model).resolve()) if Path(model).exists() else model)


def print_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    foot: Sequence[str] = (),
) -> None:
    """Print a table, its first column left-aligned text, the others figures.

    Args:
        head: headings; none: columns of text without.
        rows: cells.
        title: above the table.
        foot: cells of a last line.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=bool(head), show_footer=bool(foot))
    for number, words in enumerate(head):
        footer = foot[number] if foot else ""
        table.add_column(words, footer, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    for column in table.columns:
        column.overflow = "fold"
    # No markup: a file may be called [bold].png.
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False, highlight=False)
    console.print(table)


@contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """Within: a bar on stderr where that is a terminal; what is yielded takes description, completed and total."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not sys.stderr.isatty()) as shown:
        yield partial(shown.update, shown.add_task("", total=None))


def write(text: str) -> None:
    sys.stdout.write(text)


def write_lines(lines: Iterable[object]) -> None:
    """A line on stdout for each."""
    write("".join(f"{line}\n" for line in lines))


def check_options(least: int, **options: int | None) -> None:
    """A mistake of the user's for the first option that is below `least`."""
    check_least(least, {f"--{name}": value for name, value in options.items()})
