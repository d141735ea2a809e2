"""Representation alignment: a decoder's hidden tokens are drawn towards a frozen network's features of the clean image.

REPA (Yu et al. 2024, arXiv 2410.06940), as SSDD uses it (arXiv 2510.04961, section 4): the output of one transformer
block goes through a small MLP; the loss is one minus its cosine similarity to the features, token by token. What we
add: features that need no download (EfficientNet-Lite0), and decoders without a transformer.

    with alignment.tap(decoder):
        prediction = decoder(x_t, t, z)
    loss = alignment(images).mean()

The tap is a forward hook that is there during that call only, and the MLP belongs to the loss: inference and the saved
model know of neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoders import PixelDecoder
from ..decoders.unet import UNet
from ..decoders.uvit import Middle
from ..errors import UserError, explained_as, imported
from .perceptual import EffLiteDistance, Frozen


class Features(Frozen):
    """A frozen network that describes an image on a grid: `features(images, (h, w))` → `(B, width, h, w)`.

    The image is resized so that the network yields one feature a grid cell; features are never resampled.

    Attributes:
        width: channels of a feature.
        side: pixels of the network's input behind one feature.
    """

    width: int
    side: int

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] → features `(B, width, h, w)`, without gradients."""
        size = (grid[0] * self.side, grid[1] * self.side)
        resized = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        features = self.describe(resized)
        assert features.shape[2:] == grid, f"features {tuple(features.shape)} for a grid of {grid}"
        return features

    def describe(self, images: Tensor) -> Tensor:
        """Images `(B, 3, h·side, w·side)` in [-1, 1] → features `(B, width, h, w)`."""
        raise NotImplementedError


class EffLiteFeatures(Features):
    """EfficientNet-Lite0 after the last block at stride 16: ImageNet-trained, offline.

    Raises:
        UserError: the package with the network's weights is not installed.
    """

    side = 16

    def __init__(self) -> None:
        super().__init__()
        self.network = EffLiteDistance("lite0")
        with torch.no_grad():
            self.width = self.network.features(torch.zeros(1, 3, 16, 16))[-1].shape[1]
        self.freeze()

    def describe(self, images: Tensor) -> Tensor:
        return self.network.features(images)[-1]


class DinoFeatures(Features):
    """DINOv2's patch tokens, through transformers. SSDD aligns to DINOv2-B.

    Args:
        name: Hub id, or a local folder as `save_pretrained` writes it (safetensors).

    Raises:
        UserError: transformers is not installed, the weights can be neither found nor downloaded, or they are not
            those of a vision transformer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str = "facebook/dinov2-base") -> None:
        super().__init__()
        otherwise = "or use loss.repa_features efflite"
        transformers = imported(
            "transformers", f"DINOv2 features need transformers: pip install 'monobath[repa]', {otherwise}"
        )
        remedy = f"set loss.repa_model to a local folder that holds it, {otherwise}, which works offline"
        with explained_as(f"DINOv2 {name!r} could not be loaded", remedy, (OSError, ValueError)):
            self.model: Any = transformers.AutoModel.from_pretrained(name, use_safetensors=True).float()
        config = self.model.config
        if not isinstance(getattr(config, "patch_size", None), int):
            kind = f"a {config.model_type} model without image patches"
            raise UserError(f"loss.repa_model {name!r} is {kind}: give a DINOv2 one")
        self.width, self.side = config.hidden_size, config.patch_size
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.freeze()

    def describe(self, images: Tensor) -> Tensor:
        h, w = images.shape[2] // self.side, images.shape[3] // self.side
        tokens = self.model((images * 0.5 + 0.5 - self.mean) / self.std).last_hidden_state
        # Class and register tokens come first.
        return tokens[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))


def alignment_features(name: str, model: str = "facebook/dinov2-base") -> Features:
    """The frozen network of that name: `efflite` (Lite0, offline) or `dinov2` (SSDD's), loaded from `model`.

    Raises:
        UserError: the name is unknown, or what it needs is not there.
    """
    if name == "efflite":
        return EffLiteFeatures()
    if name == "dinov2":
        return DinoFeatures(model)
    raise UserError(f"loss.repa_features {name!r} is unknown: choose efflite or dinov2")


def tapped_block(decoder: PixelDecoder, number: int = 0) -> nn.Module:
    """The block whose output is aligned; that output has `config.channels[-1]` channels.

    Args:
        number: a transformer block, counted from 1; 0 is SSDD's choice: block 5 of more than eight, else block 4, or
            the middle one of fewer than four. A decoder without a transformer gives its last residual block before the
            way up, or the first one on it.

    Raises:
        UserError: the decoder has no block of that number.
    """
    assert isinstance(decoder, UNet)
    blocks = decoder.middle.blocks if isinstance(decoder.middle, Middle) else nn.ModuleList()
    count = len(blocks)
    if number and not 1 <= number <= count:
        remedy = f"give a number from 1 to {count}, or 0 for the default" if count else "leave it at 0"
        raise UserError(f"loss.repa_block is {number}, but the decoder has {count} transformer blocks: {remedy}")
    if count:
        number = number or (5 if count > 8 else 4 if count >= 4 else (count + 1) // 2)
        return blocks[number - 1]
    return decoder.hidden_block


class Tap:
    """Keeps what a block puts out, from the call until it is taken."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, tuple[int, int] | None] | None = None

    def keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """The hook: tokens `(B, N, D)` with the grid the block was called with, or a feature map `(B, D, h, w)`."""
        # Nothing but an assignment: this runs inside compiled decoders, too.
        self._kept = (output, args[2] if output.ndim == 3 else None)

    def take(self) -> Tensor:
        """What was kept, as a feature map `(B, D, h, w)`; forgotten afterwards."""
        assert self._kept is not None, "nothing was tapped: call the decoder within `with alignment.tap(decoder)`"
        (output, grid), self._kept = self._kept, None
        return output if grid is None else output.transpose(1, 2).unflatten(2, grid)


class Alignment(nn.Module):
    """Cosine distance between a decoder's projected hidden tokens and frozen features of the clean image.

    Networks follow the autocast state, the cosine is float32 always. Gradients reach the tokens and the projector.

    Args:
        decoder: what will be tapped. It is not kept: its parameters are not those of the loss.
        features: the frozen network.
        block: see `tapped_block`.
        hidden: width of the projector's hidden layer (REPA's); 0: as wide as the tokens (SSDD's).

    Raises:
        UserError: the decoder has no such block.
    """

    def __init__(self, decoder: PixelDecoder, features: Features, block: int = 0, hidden: int = 2048) -> None:
        super().__init__()
        tapped_block(decoder, block)  # a wrong number says so now
        self.features, self.block, self.tapped = features, block, Tap()
        width = decoder.config.channels[-1]
        hidden = hidden or width
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, features.width))

    @contextlib.contextmanager
    def tap(self, decoder: PixelDecoder) -> Iterator[None]:
        """Within: a call of `decoder` leaves what `forward` needs, that of the last call if there are several.

        Activation checkpointing runs the block once more in the backward pass, when the hook is long gone.
        """
        handle = tapped_block(decoder, self.block).register_forward_hook(self.tapped.keep)
        try:
            yield
        finally:
            handle.remove()

    def forward(self, images: Tensor) -> Tensor:
        """Distance of each sample of the tapped call: `(B,)` float32 in [0, 2].

        Args:
            images: the clean images `(B, 3, H, W)` in [-1, 1], of any size.
        """
        hidden = self.tapped.take()
        if len(hidden) != len(images):
            raise ValueError(f"{len(images)} images for {len(hidden)} samples of the decoder")
        target = self.features(images, (hidden.shape[2], hidden.shape[3])).flatten(2).transpose(1, 2)
        projected = self.projector(hidden.flatten(2).transpose(1, 2))
        with torch.autocast(images.device.type, enabled=False):
            return 1 - F.cosine_similarity(projected.float(), target.float(), dim=-1).mean(1)
