"""Published-style SSDD decoders load by their names, and the function behind them stays what it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import randn
from safetensors.torch import load_file
from torch import Tensor

from monobath.decoders import decoder_config, make_decoder
from monobath.errors import UserError
from monobath.integrations.ssdd import decoder_from_ssdd, published_name

GOLDEN = Path(__file__).parent / "golden" / "ssdd_decoder.safetensors"
CONFIG = {"size": "custom", "patch": 1, "channels": [16, 32, 48], "middle_blocks": 2, "heads": 4, "reach": 3}


def published(name: str) -> str:
    return published_name(f"decoder.{name}").removeprefix("decoder.")


def formula(shape: torch.Size, number: int) -> Tensor:
    """Numbers in [-1, 1] from a formula, the same on every machine and in every version."""
    i = torch.arange(shape.numel(), dtype=torch.float64)
    return (((i * 0.6180339887498949 + number * 0.41421356 + (i * i) * 1e-3) % 1) * 2 - 1).float().reshape(shape)


def state_dict(prefix: str = "") -> dict[str, Tensor]:
    """A published-style state dict with weights by formula."""
    state = {}
    for number, (name, tensor) in enumerate(sorted(make_decoder(decoder_config(CONFIG)).state_dict().items())):
        fan_in = tensor[0].numel() if tensor.ndim in (2, 4) else 4
        weights = formula(tensor.shape, number) * (3 / fan_in) ** 0.5
        if re.search(r"norm.*\.weight$", name):
            weights = 1 + 0.2 * weights
        state[prefix + published(name)] = weights
    return state


def cases():
    for number, (height, width) in enumerate([(16, 16), (20, 36)]):
        x_t = 1.7 * formula(torch.Size((2, 3, height, width)), 100 + number)
        z = 1.7 * formula(torch.Size((2, 4, -(-height // 8), -(-width // 8))), 200 + number)
        yield f"case{number}", x_t, torch.tensor([0.25, 1.0]), z


def test_every_entry_has_a_published_name_of_its_own():
    for size in ("S/1", "B/1"):
        with torch.device("meta"):
            ours = list(make_decoder(decoder_config({"size": size})).state_dict())
        assert len({published(name) for name in ours}) == len(ours)


def test_golden_outputs():
    """Stored by `python tests/test_ssdd.py` after benchmarks/parity.py had passed (relative error 7e-7)."""
    decoder, golden = decoder_from_ssdd(state_dict()), load_file(GOLDEN)
    for name, x_t, t, z in cases():
        with torch.no_grad():
            error = (decoder(x_t, t, z) - golden[name]).norm() / golden[name].norm()
        assert error < 1e-5


def test_every_size_is_read_from_the_shapes():
    decoder = decoder_from_ssdd({k: v.half() for k, v in state_dict("decoder.").items()}, prefix="decoder.")
    config = decoder.config
    assert (config.channels, config.middle_blocks, config.heads, config.reach) == ([16, 32, 48], 2, 4, 3)
    assert config.prediction == "v"
    assert not decoder.training
    assert decoder.conv_in.weight.dtype == torch.float32


def test_other_entries_are_left_out_and_wrong_ones_named():
    state = state_dict("decoder.")
    decoder_from_ssdd(state | {"encoder.conv_in.weight": torch.zeros(1)}, prefix="decoder.")
    with pytest.raises(UserError, match=r"unexpected: surprise"):
        decoder_from_ssdd(state | {"decoder.surprise": torch.zeros(1)}, prefix="decoder.")
    with pytest.raises(UserError, match=r"misshapen: conv_out\.weight \(1, 16, 3, 3\) instead of \(3, 16, 3, 3\)"):
        decoder_from_ssdd(state | {"decoder.conv_out.weight": torch.zeros(1, 16, 3, 3)}, prefix="decoder.")
    state.pop("decoder.conv_out.bias")
    with pytest.raises(UserError, match=r"missing: conv_out\.bias"):
        decoder_from_ssdd(state, prefix="decoder.")
    for wrong in ({}, {"weight": randn(2)}):
        with pytest.raises(UserError, match="not a published SSDD decoder"):
            decoder_from_ssdd(wrong)


def write_golden() -> None:
    from safetensors.torch import save_file

    decoder = decoder_from_ssdd(state_dict())
    GOLDEN.parent.mkdir(exist_ok=True)
    with torch.no_grad():
        save_file({name: decoder(x_t, t, z) for name, x_t, t, z in cases()}, GOLDEN)


if __name__ == "__main__":
    write_golden()
