"""TAEF2's own file format, which ComfyUI and stable-diffusion.cpp read, from a model of its shape.

A decoder of kind `taef2` with all channels is TAEF2's, trained on; but unless it is `unfolded`, its last enlargement
and the convolution behind that are one transposed convolution (`models/taesd.py`). What that has learned beyond the
two is left out, by least squares, as long as the pictures stay the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..decoders.taef2 import Taef2Config, Taef2Decoder
from ..errors import UserError
from ..files import write_file
from ..models import taesd
from ..tokenizer import Tokenizer

Program = Literal["comfyui", "sdcpp"]
FILES: dict[str, str] = {"comfyui": "taef2_decoder.safetensors", "sdcpp": "taef2-sdcpp.safetensors"}
"""comfyui: for `models/vae_approx/`, which finds it by this name. sdcpp: for `--tae FILE --taesd-preview-only`."""
LEAST_PSNR = 45.0
"""In dB: pictures of the file and of the model may differ by 1/255 of mean error, not by more."""


def write_for(tokenizer: Tokenizer, program: Program, folder: Path) -> tuple[Path, float]:
    """Write a model's decoder as another program loads it, atomically.

    Returns:
        The file; and the PSNR between the pictures of the file and the model's, in dB, infinite where they are equal.

    Raises:
        UserError: the decoder is not of that shape, and the message says why; or the folder cannot be written.
    """
    state, fidelity = taef2_state(tokenizer, program)
    if program == "sdcpp":
        split = {name: name.partition(".") for name in state}
        state = {f"decoder.layers.{int(n) - 1}.{rest}": state[name] for name, (n, _, rest) in split.items()}
    path = folder / FILES[program]
    write_file(path, lambda partial: save_file(state, partial, metadata={"format": "pt"}))
    return path, fidelity


def taef2_state(tokenizer: Tokenizer, what: str = "that program") -> tuple[dict[str, Tensor], float]:
    """Weights under the names of TAEF2's decoder, `1.weight` … `19.bias`; and the PSNR as of `write_for`.

    Args:
        what: the program, for messages.
    """
    decoder, config = tokenizer.decoder, tokenizer.config.decoder
    why = ""
    if not isinstance(config, Taef2Config):
        why = f"this decoder is {config.title}"
    elif config.slim != taesd.CHANNELS:
        why = f"this one's last block has {config.slim} channels, not {taesd.CHANNELS}"
    elif not tokenizer.config.takes_normalised:
        why = "this one takes raw latents, not normalised ones"
    elif not isinstance(decoder, Taef2Decoder):
        why = "this one is optimized: give the original"
    if why or not isinstance(decoder, Taef2Decoder):
        raise UserError(
            f"{what} loads TAEF2's decoder and nothing else, and {why}: export a model of the recipe "
            "flux2-slim with decoder.slim 64"
        )
    assert decoder.trunk is not None
    own = taesd.taesd_decoder(config.latent_channels).to(tokenizer.dtype)
    up = decoder.tail.up
    state = dict(decoder.trunk.layers.state_dict())
    state["17.weight"] = (
        cast(Tensor, up[1].weight) if isinstance(up, nn.Sequential) else convolution_of(cast(Tensor, up.weight))
    )
    state |= {f"18.conv.{name}": value for name, value in decoder.tail.conv.state_dict().items()}
    state |= {f"19.{name}": value for name, value in decoder.conv_out.state_dict().items()}
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    own.load_state_dict(state)
    fidelity = _psnr(own, tokenizer)
    if fidelity < LEAST_PSNR:
        raise UserError(
            f"{what} cannot show this model's pictures: its last enlargement has learned what TAEF2's form cannot say "
            f"({fidelity:.1f} dB between the two, at least {LEAST_PSNR:.0f} are needed): train one with "
            "decoder.unfolded true"
        )
    return state, fidelity


def convolution_of(weight: Tensor) -> Tensor:
    """The 3×3 convolution behind a nearest-neighbour ×2 that is nearest to a transposed 4×4 one.

    Args:
        weight: `(in, out, 4, 4)`, of stride 2, padding 1.

    Returns:
        `(out, in, 3, 3)`: the least squares solution, exact where there is an exact one.
    """
    # along one axis: each of the four places sees those of the three weights that fall on the same pixel before ×2
    spread = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    inverse = torch.linalg.pinv(torch.kron(spread, spread)).to(weight.device)
    flat = weight.detach().double().transpose(0, 1).flatten(2)
    return (flat @ inverse.T).unflatten(2, (3, 3)).to(weight.dtype)


@torch.no_grad()
def _psnr(own: nn.Module, tokenizer: Tokenizer) -> float:
    """Between both decoders' pictures of latents like those of photos: smooth, with unit variance; values in [0, 1]."""
    generator, c = torch.Generator().manual_seed(0), tokenizer.config.decoder.latent_channels
    z = F.interpolate(torch.randn(2, c, 3, 4, generator=generator), scale_factor=4.0, mode="bilinear")
    z = z / z.std()
    pictures = (tokenizer.decode(z) + 1) / 2
    error = (own(z.to(tokenizer.dtype)).float().clamp(0, 1) - pictures.cpu()).square().mean()
    return float(-10 * error.log10())
