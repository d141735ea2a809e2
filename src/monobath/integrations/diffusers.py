"""The bridge to diffusers: `AutoencoderMonobath`, `LatentPreviews`, and encoders of `AutoencoderKL` → our `Encoder`.

A latent space that already exists keeps its encoder: only the decoder is replaced. State dicts are accepted
under diffusers' names (`encoder.down_blocks.0.resnets.0.…` with `quant_conv`; attention new and old style) and
under those of latent diffusion, which the published SSDD checkpoints use (`encoder.down.0.block.0.…` with
`quant_conv` or `encoder.out_proj`). diffusers itself is imported for `AutoencoderMonobath` only.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.blocks import norm_groups
from ..models.encoder import Encoder, EncoderConfig
from ..models.loading import load_strictly

if TYPE_CHECKING:
    from .autoencoder import AutoencoderMonobath as AutoencoderMonobath
    from .previews import LatentPreviews as LatentPreviews

# (foreign name, our name), applied in order; diffusers' | latent diffusion's
_ENCODER_NAMES: list[tuple[str, str]] = [
    (r"^(?:down_blocks\.(\d+)\.resnets|down\.(\d+)\.block)\.", r"levels.\1\2.blocks."),
    (r"^(?:down_blocks\.(\d+)\.downsamplers\.0|down\.(\d+)\.downsample)\.", r"levels.\1\2.down."),
    (r"^(?:mid_block\.resnets\.0|mid\.block_1)\.", "middle_in."),
    (r"^(?:mid_block\.resnets\.1|mid\.block_2)\.", "middle_out."),
    (r"^(?:mid_block\.attentions\.0|mid\.attn_1)\.", "middle_attention."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^out_proj\.", "moments."),
    (r"\.(?:conv_shortcut|nin_shortcut)\.", ".shortcut."),
    (r"^middle_attention\.group_norm\.", "middle_attention.norm."),
    (r"^middle_attention\.(?:to_q|query)\.", "middle_attention.q."),
    (r"^middle_attention\.(?:to_k|key)\.", "middle_attention.k."),
    (r"^middle_attention\.(?:to_v|value)\.", "middle_attention.v."),
    (r"^middle_attention\.(?:to_out\.0|proj_attn|proj_out)\.", "middle_attention.out."),
]
_NOT_OURS = "not an AutoencoderKL encoder"


def __getattr__(name: str) -> Any:
    modules = {"AutoencoderMonobath": ".autoencoder", "LatentPreviews": ".previews"}  # diffusers is an extra
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name], __package__), name)


def encoder_from_diffusers(source: nn.Module | Mapping[str, Tensor]) -> Encoder:
    """Build the encoder of an `AutoencoderKL`; every size is read from the weights.

    Args:
        source: the `AutoencoderKL`, or its state dict (only `encoder.` and `quant_conv.` entries are read).

    Returns:
        A float32 `Encoder` in evaluation mode, whose moments are the source's.

    Raises:
        UserError: another architecture; the message says what does not fit.
    """
    state = _renamed(source)
    encoder = Encoder(_config(state))
    load_encoder(encoder, source)
    return encoder.eval()


def load_encoder(encoder: Encoder, source: nn.Module | Mapping[str, Tensor]) -> None:
    """Copy the encoder of an `AutoencoderKL`, or of its state dict, into an existing encoder.

    Raises:
        UserError: another architecture or another shape than `encoder`'s; the message says what does not fit.
    """
    _check_config(getattr(source, "config", None), encoder.config)
    state = _renamed(source)
    load_strictly(encoder, state, f"{_NOT_OURS}: the state dict")


def _renamed(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's entries under our names, float32; an absent 1×1 convolution is the identity."""
    state = source.state_dict() if isinstance(source, nn.Module) else source
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("quant_conv."):
            name = name.replace("quant_conv.", "moments.", 1)
        elif name.startswith("encoder."):
            name = name.removeprefix("encoder.")
            for pattern, replacement in _ENCODER_NAMES:
                name = re.sub(pattern, replacement, name)
        else:
            continue
        if name.startswith("middle_attention.") and tensor.ndim == 4:
            tensor = tensor.flatten(1)  # a 1×1 convolution is our linear map
        ours[name] = tensor.detach().float()
    if "moments.weight" not in ours and "conv_out.weight" in ours:
        channels = ours["conv_out.weight"].shape[0]
        ours["moments.weight"] = torch.eye(channels)[:, :, None, None]
        ours["moments.bias"] = torch.zeros(channels)
    return ours


def _config(state: Mapping[str, Tensor]) -> EncoderConfig:
    try:
        levels = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("levels."))
        widths = [state[f"levels.{i}.blocks.0.conv1.weight"].shape[0] for i in range(levels)]
        blocks = 1 + max(int(k.split(".")[3]) for k in state if k.startswith("levels.0.blocks."))
        latent_channels = state["moments.weight"].shape[0] // 2
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{_NOT_OURS}: {error} is missing from the state dict") from None
    base = math.gcd(*widths)
    return EncoderConfig(
        factor=2 ** (levels - 1),
        latent_channels=latent_channels,
        base=base,
        multipliers=[width // base for width in widths],
        blocks=blocks,
        middle_attention=any(k.startswith("middle_attention.") for k in state),
    )


def _check_config(theirs: Any, ours: EncoderConfig) -> None:
    """What weights cannot tell: activation, kinds of blocks, groups; a state dict is taken to have the usual ones."""
    activation = getattr(theirs, "act_fn", "silu")
    if activation not in ("silu", "swish"):
        raise UserError(f"{_NOT_OURS}: act_fn is {activation!r}, and ours is silu")
    kinds = set(getattr(theirs, "down_block_types", ())) - {"DownEncoderBlock2D"}
    if kinds:
        raise UserError(f"{_NOT_OURS}: it has blocks of type {', '.join(sorted(kinds))}")
    groups = getattr(theirs, "norm_num_groups", 32)
    for width in (ours.base * m for m in ours.multipliers):
        if norm_groups(width) != groups:
            raise UserError(
                f"{_NOT_OURS}: normalisation over {width} channels in {groups} groups, where ours uses "
                f"{norm_groups(width)}"
            )
