"""Model folders: `config.json` beside `model.safetensors`, which holds the same configuration; never pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import resources
from ._version import __version__
from .errors import UserError, explained_as
from .files import write_folder

DIGEST = "model_sha256"
"""What `config.json` calls the hash of the file of weights beside it; older folders have none."""


def locate(name: str | os.PathLike[str], **hub: Any) -> tuple[Path, int]:
    """Where a model is: packaged by that name, else an existing folder or file, else a Hub repository, fetched.

    Args:
        hub: `revision`, `token`, `cache_dir`, `local_files_only` of huggingface_hub.

    Returns:
        Its folder or file; and how many stages that name decodes through, 0 for as many as its files say.

    Raises:
        UserError: nothing of that name.
    """
    packaged = resources.weights_path(str(name))
    if packaged is not None or Path(name).exists():
        return packaged or Path(name), resources.weights_stages(str(name))
    missing = (
        f"it is not packaged ({', '.join(resources.weights_names())}), not an existing path, and could not be fetched"
    )
    with explained_as(f"no tokenizer {str(name)!r}: {missing} from the Hub"):
        folder = snapshot_download(
            str(name),
            allow_patterns=["config.json", "model.safetensors"],
            library_name="monobath",
            library_version=__version__,
            **hub,
        )
    return Path(folder), 0


def write(
    folder: Path,
    model: nn.Module,
    format: str,
    config: dict[str, Any],
    extra: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model folder, atomically.

    Args:
        format: what kind of model, and which version of its files.
        config: plain values.
        extra: plain values kept in the config under "training".
        dtype: type of the stored weights; default: what they are.

    Raises:
        UserError: the folder cannot be written; what was there stays as it was.
    """
    config = {"format": format, "monobath_version": __version__, **config} | ({"training": extra} if extra else {})
    write_files(folder, config, {k: v.detach().to("cpu", dtype).contiguous() for k, v in model.state_dict().items()})


def write_files(folder: Path, config: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    """The same of a whole configuration and tensors, as `stored` and `read` give them."""

    config = {name: value for name, value in config.items() if name != DIGEST}  # of the file that was there before

    def files(partial: Path) -> None:
        file = partial / "model.safetensors"
        save_tensors(file, state, {"config": json.dumps(config), "format": "pt"})
        beside = config | {DIGEST: _sha256(file)}
        (partial / "config.json").write_text(json.dumps(beside, indent=2) + "\n", encoding="utf-8")

    write_folder(folder, files)


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, the same to the byte for the same tensors and metadata, whose order safetensors draws
    by lot."""
    save_file(dict(state), path, metadata=dict(metadata))
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length, (len(text), length)
        file.seek(8)
        file.write(text)


def read(path: Path, format: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a folder or a `.safetensors` file.

    Args:
        format: what `write` was given.
        what: kind of model, for messages.

    Raises:
        UserError: no such file, a corrupt one, one of another kind or version, or weights that are not those that
            `config.json` was written with.
    """
    config, said = read_config(path, format, what), stored(path, format, what).get(DIGEST)
    with _reading(path):
        if said is not None and said != _sha256(_weights_of(path)):
            raise UserError(
                f"{path}: model.safetensors is not the file that config.json was written with: fetch or save both "
                f"again, or, if you trust it, delete {DIGEST} from config.json"
            )
        with safe_open(_weights_of(path), framework="pt") as opened:
            return config, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def read_config(path: Path, format: str, what: str) -> dict[str, Any]:
    """The configuration alone; arguments and errors are those of `read`."""
    config = stored(path, format, what)
    return {k: v for k, v in config.items() if k not in ("format", "monobath_version", "training", DIGEST)}


def stored(path: Path, format: str, what: str) -> dict[str, Any]:
    """All that `config.json` says, such as what `write` was given as `extra`, under "training"; likewise."""
    with _reading(path):
        with safe_open(_weights_of(path), framework="pt") as opened:
            inside = (opened.metadata() or {}).get("config")
        beside = path / "config.json"
        text = beside.read_text(encoding="utf-8") if path.is_dir() and beside.is_file() else inside
        config = json.loads(text) if text else None
    if not isinstance(config, dict) or config.get("format") != format:
        found = config.get("format") if isinstance(config, dict) else None
        raise UserError(f"{path} is not a monobath {what} (format {found!r}, expected {format!r})")
    return config


def _weights_of(path: Path) -> Path:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} holds no model.safetensors: give the folder that save_pretrained wrote")
    return file


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _reading(path: Path) -> AbstractContextManager[None]:
    return explained_as(f"{path} is corrupt or not a monobath checkpoint", "fetch or save it again")
