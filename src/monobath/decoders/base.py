"""What every decoder is: features of a latent, once a picture, and a prediction from them, once a step, tile and stage.

SSDD (arXiv 2510.04961), section 3: a decoder is a function of a noisy image x_t, a time t and a latent z that predicts
the velocity or the clean image. What does not depend on x_t and t is computed once, by `features`, and may look at the
whole picture. What is repeated is `predict`; where it looks no further than `reach`, tiles are equal to the whole.

Here is also what any network can be wrapped in: layers of a foreign latent's own decoder before it (`trunk`), constants
that standardise a foreign latent, a linear map from the latent to the picture beside it (`linear_skip`), and a mixture
of its output with the noisy image (`mixed`). Networks know nothing of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, check_choices, check_least
from ..flow import Prediction
from ..models.blocks import Checkpointed, Conv2d, Padding, cosine_basis, resample_to, zero_init
from ..models.taesd import CHANNELS as TRUNK_CHANNELS
from ..models.taesd import FACTOR as TRUNK_FACTOR
from ..models.taesd import TRUNKS, Trunk
from ..sampling import Noise
from ..scales import ScaleSchedule, Stage, down, up

Interval = tuple[int, int]
"""First and last pixel, both included."""


@dataclass(kw_only=True)
class DecoderShape:
    """What the configurations of all kinds of decoders have."""

    kind: str
    """Which decoder it is."""
    latent_channels: int = 4
    """c: channels of the latent."""
    factor: int = 8
    """Side of the pixel square behind one latent position."""

    # What the kinds below may replace by a field.
    stages = 1
    null_latent = False
    trunk = 0
    standardise = False
    linear_skip = False
    residual = 0.0
    residual_shares = "flow"
    context = 0
    prediction = "x"
    padding = "zeros"

    def __post_init__(self) -> None:
        if self.factor < 1 or self.factor & (self.factor - 1):
            raise UserError(f"decoder.factor is {self.factor}: it must be a power of two")
        check_least(1, {"decoder.latent_channels": self.latent_channels})
        check_choices("decoder", self)
        if self.trunk and (self.trunk not in TRUNKS or self.factor != TRUNK_FACTOR):
            raise UserError(
                f"decoder.trunk is {self.trunk} at factor {self.factor}: choose of {', '.join(map(str, TRUNKS))} "
                f"for TAEF2's latents, of factor {TRUNK_FACTOR}, or 0"
            )
        if self.trunk and self.latent_channels == TRUNK_CHANNELS:
            raise UserError(f"decoder.trunk needs latents of other than {TRUNK_CHANNELS} channels: set it to 0")

    @property
    def title(self) -> str:
        """The shape in a few words."""
        return self.kind

    @property
    def token_side(self) -> int:
        """Side, in pixels, of what the network cannot divide: image sides must be divisible by it."""
        return 1

    @property
    def read_channels(self) -> int:
        """Channels of what the network reads: the latent, or the features that the trunk makes of it."""
        return TRUNK_CHANNELS if self.trunk else self.latent_channels

    @property
    def known_channels(self) -> int:
        """Channels of what it knows of a picture: what it reads, and the context beside it."""
        return self.read_channels + self.context

    @property
    def read_factor(self) -> int:
        """Side of the pixel square behind one position of that."""
        return self.factor // TRUNKS[self.trunk] if self.trunk else self.factor


@dataclass(kw_only=True)
class WrappedShape(DecoderShape):
    """The same of networks that can be wrapped and can have several stages."""

    padding: Padding = "zeros"
    """What convolutions read beyond the edge of the picture. zeros: the published networks; trained on small crops they
    are off by a constant on large pictures. replicate: the nearest value; right at any size."""
    linear_skip: bool = False
    """Add a learned linear map of the latent's 3×3 neighbourhood to the clean image (needs prediction x)."""
    residual: float = 0.0
    """σᵣ, the standard deviation of what the latent leaves open, in image units (about 0.12 at 24 dB). Above 0, the
    clean image is mixed from the network's output and the noisy image as the best linear estimate is (`mixed`; needs
    prediction x): for decoders of several steps. It changes nothing at t = 1."""
    residual_shares: Literal["flow", "stage"] = "flow"
    """The picture's share in the noisy image, for that. stage: each stage's own, which is right. flow: 1 − t always,
    too much of the fine detail after the first stage; what models saved without the entry learned."""
    standardise: bool = False
    """Bring each channel of the latent to mean 0 and standard deviation ½ by constants, for foreign encoders. They are
    measured, and `linear_skip` is fitted, before training (`training/retrofit.py`); the weights keep them."""
    trunk: int = 0
    """Layers of the latents' own decoder, TAEF2's, that run before ours, frozen: ours decodes their features instead of
    the latent (`models/taesd.py`). 6: up to the last one with statistics over the picture; 11 and 16: up to the last
    one at twice and at four times the latent's resolution. 0: none."""
    stages: int = 1
    """Stages of multi-scale decoding (`monobath.scales`), each with an embedding of its own; 1: none."""
    null_latent: bool = False
    """Learn a latent that stands for no latent at all, for classifier-free guidance (needs stages above 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.linear_skip and self.prediction != "x":
            raise UserError('decoder.linear_skip needs decoder.prediction "x"')
        if self.residual < 0 or (self.residual and self.prediction != "x"):
            raise UserError(f'decoder.residual is {self.residual}: give at least 0, and decoder.prediction "x" with it')
        check_least(1, {"decoder.stages": self.stages})
        if self.stages > 16:  # each doubles the sides
            raise UserError(f"decoder.stages is {self.stages}: it must be at most 16")
        if self.null_latent and self.stages == 1:
            raise UserError("decoder.null_latent needs decoder.stages above 1: guidance is for multi-scale decoding")


@dataclass(frozen=True)
class Features:
    """What a decoder knows of a picture before it has seen any noise."""

    z: Tensor
    """`(B, C, h, w)`: what the network reads, the latent or what stands before the network made of it."""
    factor: int
    """Side of the pixel square behind one position, at full resolution."""
    context: Tensor | None = None
    """`(B, D, h, w)`, what modulates the network; None: nothing does."""

    def crop(self, rows: slice, cols: slice) -> Features:
        """The part behind a rectangle of the picture, in pixels at full resolution, multiples of `factor`."""
        f = self.factor
        h, w = (slice(side.start // f, side.stop // f) for side in (rows, cols))
        context = None if self.context is None else self.context[..., h, w].contiguous()
        return Features(self.z[..., h, w].contiguous(), f, context)


class PixelDecoder(Checkpointed):
    """`decoder(x_t (B, 3, H, W), t (B,) in [0, 1], z (B, c, H/f, W/f))` → raw prediction `(B, 3, H, W)`.

    The prediction is the velocity or the clean image, as `prediction` says; `monobath.flow` converts. H and W must be
    divisible by `unit`. The latent may have another resolution than H/f (stages of lower resolution). A decoder of
    several stages also takes the number of the stage, 0 … `stages` − 1, which all samples share; without one, x_t is on
    the path of one scale (`flow.py`), and the network is told the last stage, which is at full resolution.

    A decoder defines `output`, and `context` if something is to be computed once a picture.

    Attributes:
        config: its shape.
        fixed: the noise of a decoder that takes one step from it and nothing else (a KL-VAE's, a folded one); None: it
            takes any number of steps from any noise.
        trains: whether it can be trained and saved.
        prediction: v or x, what `predict` returns.
        stages: of multi-scale decoding; 1: it has one scale.
        unit: sides of x_t must be divisible by this, in pixels.
        feature_side: side of the pixel square behind one position of the features.
    """

    fixed: Noise | None = None
    trains = True
    latent_shift: Tensor
    latent_scale: Tensor
    trunk: Trunk | None
    linear_skip: nn.Conv2d | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.prediction: Prediction = config.prediction
        self.stages: int = config.stages
        self.unit: int = config.token_side
        self.feature_side: int = config.read_factor
        self.trunk = self.linear_skip = None

    def add_trunk(self) -> None:
        """Put the trunk before the network, if the shape has one."""
        if self.config.trunk:
            self.trunk = Trunk(self.config.latent_channels, self.config.trunk)

    def wrap(self) -> None:
        """Add what stands around the network, once that has its weights."""
        config = self.config
        if config.linear_skip:
            self.linear_skip = zero_init(Conv2d(config.known_channels, 3 * config.read_factor**2, config.padding))
            if not (config.standardise or config.trunk):
                # Starts as the inverse of our encoder's shortcut: the latents' low frequencies as an image.
                basis = cosine_basis(config.latent_channels, config.factor) * config.factor
                with torch.no_grad():
                    self.linear_skip.weight[:, : config.latent_channels, 1, 1] = basis.T
        if config.standardise:
            self.register_buffer("latent_shift", torch.zeros(config.read_channels, 1, 1))
            self.register_buffer("latent_scale", torch.ones(config.read_channels, 1, 1))

    # ---- the contract -------------------------------------------------------------------------------

    def receptive_field(self, output: Interval, factor: int | None = None) -> tuple[Interval, Interval] | None:
        """Rows (or columns) of x_t and of the features that rows `output` of a prediction depend on, both in pixels.

        Args:
            factor: side of the pixel square behind one position of the features; default: at full resolution.

        Returns:
            Exactly those; None: all of them, whatever the output.
        """
        return None

    def reach(self, factor: int | None = None) -> int | None:
        """How many pixels around a square of max(unit, factor) a prediction depends on, at most; None: on all of them.

        Args:
            factor: see `receptive_field`.
        """
        side = max(self.unit, factor or self.feature_side)
        fields = self.receptive_field((0, side - 1), factor)
        return None if fields is None else max(max(-first, last + 1 - side) for first, last in fields)

    def features(self, z: Tensor) -> Features:
        """What a latent `(B, c, h, w)` says, computed once a picture."""
        z = self.read(z)
        if self.config.standardise:
            z = self.standardised(z)
        context = self.context_of(z)
        if self.config.context and context is not None:  # read beside the latent; it modulates nothing
            z, context = torch.cat([z, context], dim=1), None
        return Features(z, self.feature_side, context)

    def predict(self, x_t: Tensor, t: Tensor, features: Features, stage: int | None = None) -> Tensor:
        """Raw prediction `(B, 3, H, W)` at one step; `features` are of the whole picture, or cropped as x_t is."""
        x = self.output(x_t, t, features, stage)
        if self.linear_skip is not None:
            linear = F.pixel_shuffle(self.linear_skip(features.z), self.config.read_factor)
            x = x + resample_to(linear, (x.shape[2], x.shape[3]))
        if not self.config.residual:
            return x
        path = None
        if self.config.residual_shares == "stage" and stage is not None:
            path = ScaleSchedule(self.stages)[stage]
        return mixed(x, x_t, t, self.config.residual, path)

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor, stage: int | None = None) -> Tensor:
        """See the class.

        Raises:
            ValueError: shapes that do not go together, or a stage that is not there.
        """
        self._check(x_t, t, z, stage)
        return self.predict(x_t, t, self.features(z), stage)

    # ---- what a decoder defines ---------------------------------------------------------------------

    def context_of(self, z: Tensor) -> Tensor | None:
        """What modulates the network, or is read beside the latent: `(B, C, h, w)`, which is read, → `(B, D, h, w)`."""
        return None

    def output(self, x_t: Tensor, t: Tensor, features: Features, stage: int | None) -> Tensor:
        """What the network makes of it: `(B, 3, H, W)`."""
        raise NotImplementedError

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer that makes the pixels, where the adversarial loss is weighed."""
        return self.conv_out  # type: ignore[return-value]

    def set_checkpointing(self, enabled: bool) -> None:
        """Activation checkpointing: less memory in training, one more forward pass. Same results."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.checkpointing = enabled

    # ---- pieces -------------------------------------------------------------------------------------

    def read(self, z: Tensor) -> Tensor:
        """What the trunk makes of the latent: `(B, 64, …)`, in the weights' own type; without one, the latent.

        Features of the trunk are left as they are.
        """
        if self.trunk is None or not torch.is_autocast_enabled(z.device.type):
            return z if self.trunk is None else self.trunk(z)
        with torch.autocast(z.device.type, enabled=False):
            return self.trunk(z)

    def standardised(self, z: Tensor) -> Tensor:
        """The latent, or the trunk's features, as the network takes it; see `WrappedShape.standardise`."""
        return (z - self.latent_shift) * self.latent_scale

    def _check(self, x_t: Tensor, t: Tensor, z: Tensor, stage: int | None) -> None:
        side, c = self.unit, self.config.latent_channels
        if stage is not None and not 0 <= stage < self.stages:
            raise ValueError(f"stage is {stage}: this decoder has {self.stages}, counted from 0")
        if x_t.ndim != 4 or x_t.shape[1] != 3 or x_t.shape[2] % side or x_t.shape[3] % side:
            raise ValueError(f"x_t is {tuple(x_t.shape)}: expected (B, 3, H, W) with sides divisible by {side}")
        if z.ndim != 4 or z.shape[1] not in {c, self.config.read_channels} or z.shape[0] != x_t.shape[0]:
            raise ValueError(f"z is {tuple(z.shape)}: expected ({x_t.shape[0]}, {c}, h, w)")
        if t.shape != (x_t.shape[0],):
            raise ValueError(f"t is {tuple(t.shape)}: expected ({x_t.shape[0]},), one time a sample")


def mixed(output: Tensor, x_t: Tensor, t: Tensor, residual: float, stage: Stage | None = None) -> Tensor:
    """Clean image `(B, 3, H, W)` from the network's output and the noisy image x_t, `t` `(B,)` in [0, 1].

    If the output were what the latent says of the image, E[x | z], with an error of standard deviation σᵣ = `residual`
    in every pixel, this is the best linear unbiased estimate from it and from x_t/(1 − t), whose error is t/(1 − t):
    with little noise left the image is nearly there, and the network has little to add. At t = 1 it is the output
    itself. (The preconditioning of EDM, arXiv 2206.00364, section 5, around a conditional mean instead of 0.)

    Args:
        stage: whose path x_t is on: it holds less of the fine detail, what 2×2 means leave; default: that of `flow.py`.
    """

    def weights(share: Tensor) -> tuple[Tensor, Tensor]:
        """Of the output and of x_t, which holds that much of the image."""
        total = t.square() + (residual * share).square()
        return t.square() / total, residual**2 * share / total

    residual = float(residual)  # a file may hold a whole number, whose square no tensor takes
    t = t.to(output.dtype)[:, None, None, None]
    said, seen = weights(1 - t)
    if stage is None or stage.start == 1:
        return said * output + seen * x_t
    fine_said, fine_seen = weights(stage.detail_share(t))
    coarse = (said - fine_said) * down(output) + (seen - fine_seen) * down(x_t)
    return fine_said * output + fine_seen * x_t + up(coarse)
