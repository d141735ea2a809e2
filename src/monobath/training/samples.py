"""Teacher samples on disk, so that a second student on the same images, draws and teacher finds them there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError, explained_as
from ..files import write_file, write_json


class SampleCache:
    """Teacher samples on disk, a file for each batch, float16: what is there is not sampled again.

    Args:
        folder: made if missing.
        facts: everything that decides the samples; a folder made with other facts is refused.

    Raises:
        UserError: the folder holds other samples, or cannot be written.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        file = folder / "samples.json"
        facts = json.loads(json.dumps(facts))
        if file.is_file():
            with explained_as(f"{file} is corrupt", "choose another distill.cache"):
                before = json.loads(file.read_text(encoding="utf-8"))
            differing = sorted(key for key in facts.keys() | before.keys() if facts.get(key) != before.get(key))
            if differing:
                made = f"{folder} holds samples made with another {', '.join(differing)}"
                raise UserError(f"distill.cache {made}: choose another folder, or delete that one")
        else:
            write_json(file, facts)

    def path(self, position: int, rank: int) -> Path:
        """File of a process' batch."""
        return self.folder / f"{position // 1000:05d}" / f"{position:08d}-{rank}.safetensors"

    def read(self, position: int, rank: int) -> Tensor | None:
        """Samples of a batch, float32; None if they are not there, or not whole."""
        try:
            return load_file(self.path(position, rank))["samples"].float()
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, position: int, rank: int, samples: Tensor) -> None:
        """Keep the samples of a batch."""
        kept = {"samples": samples.half().cpu().contiguous()}
        write_file(self.path(position, rank), lambda partial: save_file(kept, partial))
