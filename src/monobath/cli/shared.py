"""What several verbs need: finding files, loading models, writing latents and tables. Imports stay lazy."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError

if TYPE_CHECKING:
    import torch

    from ..models.frozen import ForeignEncoder
    from ..tokenizer import Tokenizer

DType = Literal["float32", "bfloat16", "float16"]
MAX_PIXELS = 64_000_000  # images.MAX_PIXELS, which costs an import of torch (a test compares them)


def load_tokenizer(name: str, device: str, dtype: str, encoder: str | None = None) -> Tokenizer:
    """A model on a checked device; `encoder`, KIND=WHERE, is for a model of foreign latents."""
    import torch

    from ..tokenizer import Tokenizer

    device = checked_device(device)
    return Tokenizer.from_pretrained(name, encoder=encoder, device=device, dtype=getattr(torch, dtype))


def read_encoder(encoder: str, device: str) -> ForeignEncoder:
    """A foreign encoder, KIND=WHERE, alone."""
    from ..autoencoders import as_encoder

    return as_encoder(encoder).to(checked_device(device))


def checked_device(device: str) -> str:
    """What --device means here; a mistake of the user's where it cannot be used."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {device} cannot be used here ({reason}): choose cpu, or leave it out") from None
    return device


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


def open_pixels(path: Path, size: int | None, max_pixels: int) -> torch.Tensor:
    """A picture as a uint8 tensor (3, H, W), cropped if a size is given."""
    from ..data.transforms import center_crop
    from ..images import check_pixels, open_image, pil_to_tensor

    if size is not None and size < 1:
        raise UserError(f"--size is {size}: it must be at least 1 pixel")
    image = open_image(path, max_pixels=max_pixels)
    if size is None:
        return pil_to_tensor(image)
    check_pixels(size, size, max_pixels, f"--size {size}")
    return center_crop(image, size=size)


LATENT_FORMAT = "monobath-latent-1"


def write_latent(path: Path, latent: torch.Tensor, facts: dict[str, str]) -> None:
    from safetensors.torch import save

    from ..files import write_file

    data = save({"latent": latent.cpu().contiguous()}, metadata={"format": LATENT_FORMAT, **facts})
    write_file(path, lambda partial: partial.write_bytes(data))


def read_latent(path: Path) -> tuple[torch.Tensor, tuple[int, int], int, str]:
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


def lasting_name(model: str) -> str:
    """A model's name that means the same tomorrow and elsewhere on this machine."""
    from .. import resources

    packaged = resources.weights_path(model)
    if packaged is not None:
        return packaged.name
    return str(Path(model).resolve()) if Path(model).exists() else model


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def in_words(value: Any) -> str:
    if isinstance(value, list):
        return (" × " if all(isinstance(v, int) for v in value) else ", ").join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def plain(text: str) -> Any:
    """Text for a table, safe from markup: a file may be called [bold].png."""
    from rich.text import Text

    return Text(text, overflow="fold")


def show(table: Any, *, width: int | None = None) -> None:
    """Print a table; `width`, in columns, holds where stdout is not a terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else width).print(table)


def write(text: str) -> None:
    sys.stdout.write(text)
