"""Files of single latents: what `monobath encode` writes and `monobath decode` reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import store
from ..errors import UserError
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
        try:
            with safe_open(path, framework="pt") as opened:
                facts = opened.metadata() or {}
                if facts.get("format") != FORMAT or "latent" not in opened.keys():  # noqa: SIM118
                    raise UserError(
                        f"{path} is not a latent file (format {facts.get('format')!r}, expected {FORMAT!r})"
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
        return cls(latent=latent, size=(height, width), factor=factor, model=model)
