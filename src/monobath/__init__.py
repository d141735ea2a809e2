"""monobath: turn image latents into pictures in one step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import UserError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

__all__ = ["Tokenizer", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `monobath --help` does not wait for torch.
    if name == "Tokenizer":
        from .tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module 'monobath' has no attribute {name!r}")
