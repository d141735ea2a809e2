"""Strict loading: a checkpoint either fits exactly or the error says what does not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ..errors import UserError, explained_as

M = TypeVar("M", bound=nn.Module)
SPARE = 4_000_000
"""Parameters that a model may have beyond what its file holds while it is built."""


def built(make: Callable[[], M], state: Mapping[str, Tensor], what: str) -> M:
    """What `make` builds, with `state` in it.

    It is built without memory first, as far as the numbers in `state` go: a file cannot claim more than it holds.

    Raises:
        UserError: it cannot be built, or `state` does not fit.
    """
    with explained_as(f"{what} describes no model that can be built"):
        with torch.device("meta"), _NoFirstWeights(), _at_most(sum(v.numel() for v in state.values()), what):
            check_fit(make().state_dict(), state, what)
        model = make()
    load_strictly(model, state, what)
    return model


class _NoFirstWeights(TorchFunctionMode):
    """Within, `nn.init` does nothing: drawing on the meta device imports torch.compile's machinery, two seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (*args, *(kwargs or {}).values())[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _at_most(numbers: int, what: str) -> Iterator[None]:
    """Within, modules with more parameters than so many in all raise `UserError`."""
    found = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal found
        found += parameter.numel() if parameter is not None else 0
        # Some modules are made twice, and one is dropped; a trunk is cut from the whole of a small decoder.
        if found > 2 * numbers + SPARE:
            raise UserError(f"{what} does not fit the model: it holds {numbers:,} numbers, which are too few")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy `state` into `model` (cast to the model's dtype); raises as `check_fit`."""
    check_fit(model.state_dict(), state, what)
    model.load_state_dict(dict(state))


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raise unless `state` has what is expected.

    Raises:
        UserError: names are missing, unexpected or misshapen; the message starts with `what` and lists them.
    """
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "misshapen": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_list(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{what} does not fit the model: {listed}")


def _list(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
