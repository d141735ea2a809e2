"""Files of single latents: what `monobath encode` writes and `monobath decode` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .. import store
from ..errors import UserError, explained_as
from ..files import write_file

FORMAT = "monobath-latent-1"


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """A latent, and what is needed to decode it."""

    latent: Tensor
    """Raw `(c, h, w)`."""
    size: tuple[int, int]
    """(H, W) of the picture, in pixels."""
    factor: int
    """Side of the pixel square behind one latent position."""
    model: str
    """What encoded it."""

    def write(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        facts = {"size": f"{self.size[0]}x{self.size[1]}", "factor": str(self.factor), "model": self.model}
        state, metadata = {"latent": self.latent.cpu().contiguous()}, {"format": FORMAT, **facts}
        write_file(path, lambda partial: store.save_tensors(partial, state, metadata))

    @classmethod
    def read(cls, path: Path) -> LatentFile:
        """Read what `write` wrote.

        Raises:
            UserError: not such a file, or a corrupt one.
        """
        remedy = "write it again with monobath encode"
        with explained_as(f"{path} is not a readable latent file", remedy):
            with safe_open(path, framework="pt") as opened:
                facts = opened.metadata() or {}
                if facts.get("format") != FORMAT or "latent" not in opened.keys():  # noqa: SIM118
                    found = f"format {facts.get('format')!r}, expected {FORMAT!r}"
                    raise UserError(f"{path} is not a latent file ({found})")
                latent = opened.get_tensor("latent")
            for name in ("size", "factor", "model"):
                if name not in facts:
                    raise UserError(f"{path} lacks the metadata {name!r}: {remedy}")
            height, width = map(int, facts["size"].split("x"))
            factor, model = int(facts["factor"]), facts["model"]
        if latent.ndim != 3 or not latent.is_floating_point():
            raise UserError(f"{path} holds {latent.dtype} {tuple(latent.shape)}: expected a float latent (c, h, w)")
        return cls(latent=latent, size=(height, width), factor=factor, model=model)
