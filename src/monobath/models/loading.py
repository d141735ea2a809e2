"""Strict loading: a checkpoint either fits exactly or the error says what does not."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import UserError


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Copy `state` into `model` (cast to the model's dtype).

    Raises:
        UserError: names are missing, unexpected or misshapen; the message starts with `what` and lists them.
    """
    expected = model.state_dict()
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
    model.load_state_dict(dict(state))


def _list(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
