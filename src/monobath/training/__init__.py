"""Training: a recipe says what and how, a run does it.

from monobath.training import Run, load_recipe, train

train(load_recipe("cpu-default", ["data.source=photos"]))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe import Recipe
    from .recipes import dump_recipe, load_recipe
    from .run import Interrupted, Run, train

__all__ = ["Interrupted", "Recipe", "Run", "dump_recipe", "load_recipe", "train"]

_WHERE = {"Recipe": "recipe", "load_recipe": "recipes", "dump_recipe": "recipes"}


def __getattr__(name: str) -> Any:
    """Imported when used: reading a recipe needs no loop."""
    if name in __all__:
        return getattr(importlib.import_module(f".{_WHERE.get(name, 'run')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
