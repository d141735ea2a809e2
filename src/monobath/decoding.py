"""From latents to pictures, the one way: features once a picture, then stages, steps and tiles, coarse to fine.

    how = Decoding(size=(H, W), tile=512).checked(decoder, sampler, z)
    for picture in pictures(decoder, z, how): ...        # the last one is the full size

A decoder of one scale has one stage, which is the flow of `flow.py` to the last bit; of several stages see `scales.py`
(MSD, arXiv 2603.19570). Every step of every stage can be taken in tiles (`tiles.py`), all cut from one noise field and
from the features of the whole picture: where a decoder's `reach` is bounded and the overlap covers it, tiles are equal
to the whole, else they are blended after each step. A tile that covers the picture is the whole, bit for bit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from . import resources
from .decoders import Features, PixelDecoder
from .errors import UserError, check_choice, check_choices
from .sampling import Noise, draw_noise, seeds_for, time_grid
from .scales import ScaleSchedule, Stage, noise_pyramid
from .tiles import Layout, assembled, pad_to_multiple, plan

Output = Literal["tensor", "pil", "uint8"]
Part = tuple[int, slice, slice]
"""A sample, and rows and columns of its full picture."""
Predict = Callable[..., Tensor]
"""`(state (B, 3, h, w), noise level (B,), stage or None[, the Part that the state is of]) → raw prediction`."""


@dataclass(kw_only=True)
class SamplerConfig:
    """How a checkpoint is meant to be decoded."""

    steps: int = 1
    """Euler steps; of a multi-scale checkpoint, at each stage."""
    power: float = 2.0
    """Exponent of the time grid: above 1 puts more steps near the image."""
    noise: Noise = "gaussian"
    """Where sampling starts: a seeded random image, or all zeros (deterministic, higher PSNR)."""
    stages: int = 1
    """Scales that `decode` goes through, coarse to fine (`monobath.scales`): all of the decoder's, or 1, the full
    resolution at once."""
    guidance: float = 1.0
    """Scale of classifier-free guidance on the latent; 1: none. Another needs `decoder.null_latent`."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.power <= 0:
            raise UserError(f"sampler: steps={self.steps} must be at least 1 and power={self.power} above 0")
        check_choices("sampler", self)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How one batch of latents is decoded; `None` is what the checkpoint was made for."""

    size: tuple[int, int] | None = None
    """(H, W) to crop to; default h·f, w·f. Previews have `ScaleSchedule.size` of it."""
    steps: int | None = None
    """Euler steps, of each stage."""
    power: float | None = None
    """Exponent of the time grid."""
    seed: int | Sequence[int] = 0
    """One int a sample, or an int s meaning s, s + 1, …: noise is drawn per sample on the CPU."""
    noise: Noise | None = None
    """Where sampling starts."""
    guidance: float | None = None
    """Scale of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); 1: none. Another takes a second call of
    the network a step."""
    stages: int | None = None
    """All of the decoder's, or 1: the full resolution at once."""
    tile: int | None = None
    """Side of the squares to decode one at a time, in pixels, rounded down to whole tokens; None: one go."""
    overlap: int | None = None
    """Pixels that neighbouring tiles share, rounded up to whole tokens; None: what makes the tiles exact, if there is
    such a number, at most half a tile, else 64 or an eighth of the tile, whichever is more, up to a quarter."""
    output: Output = "tensor"
    """tensor: float32 `(B, 3, H, W)`, clipped to [-1, 1]; uint8: the same in 0…255; pil: a list."""

    def checked(self, decoder: PixelDecoder, sampler: SamplerConfig, z: Tensor, latents: str = "") -> Decoding:
        """The same with every choice made.

        Args:
            sampler: what decides what was left open.
            z: latents, raw.
            latents: their name, such as f8c4, for messages.

        Raises:
            UserError: latents of another shape or not finite, a size that does not fit, or options that the decoder or
                its checkpoint cannot follow. A tile that cannot be says so when decoding begins.
        """
        config = decoder.config
        c, f = config.latent_channels, config.factor
        if not isinstance(z, Tensor) or z.ndim != 4 or z.shape[1] != c or 0 in z.shape:
            shape = tuple(z.shape) if hasattr(z, "shape") else type(z).__name__
            other = isinstance(z, Tensor) and z.ndim == 4 and z.shape[1] != c
            raise UserError(
                f"latents are {shape}: this tokenizer ({latents or f'f{f}c{c}'}) needs (B, {c}, h, w)"
                + (resources.hint_for_channels(z.shape[1]) if other else "")
            )
        if not torch.isfinite(z).all():
            raise UserError("latents contain NaN or infinity: check what produced them")
        full = (z.shape[2] * f, z.shape[3] * f)
        size = self.size or full
        if not all(0 < s <= limit for s, limit in zip(size, full, strict=True)):
            raise UserError(f"size={tuple(size)} does not fit latents of {tuple(z.shape)}: at most {full}")
        if self.overlap is not None and self.tile is None:
            raise UserError(f"overlap={self.overlap} without tile: give the side of the tiles too")
        check_choice("output", self.output, Output)
        made = {name: getattr(sampler, name) for name in ("steps", "power", "noise", "guidance", "stages")}
        made |= {name: value for name in made if (value := getattr(self, name)) is not None}
        check_choice("noise", made["noise"], Noise)
        if decoder.fixed is not None:
            if (made["steps"], made["noise"]) != (1, decoder.fixed):
                remedy = "leave steps and noise out" if decoder.trains else "use the original one"
                raise UserError(
                    f"this tokenizer {'takes' if decoder.trains else 'was optimized for'} 1 step from {decoder.fixed} "
                    f"noise, not {made['steps']} from {made['noise']}: {remedy}"
                )
            made["stages"] = 1
        if made["guidance"] != 1 and not config.null_latent:
            raise UserError(
                f"guidance={made['guidance']}: this tokenizer was trained without a null latent "
                "(decoder.null_latent), so leave it out"
            )
        if made["guidance"] != 1 and made["stages"] == 1:
            raise UserError(f"guidance={made['guidance']}: this decodes at full resolution at once, without guidance")
        time_grid(made["steps"], made["power"])
        return dataclasses.replace(self, size=size, seed=seeds_for(self.seed, len(z)), **made)


def predictor(decoder: PixelDecoder, z: Tensor, guidance: float = 1.0, *, apart: bool = False) -> Predict:
    """A decoder's prediction for the latents z `(B, c, h, w)`, whose features are computed here, once.

    Args:
        guidance: see `Decoding`; another than 1 needs a null latent.
        apart: every sample by itself, for tiles.
    """

    def features(z: Tensor) -> list[Features]:
        absent = [] if guidance == 1 else [decoder.features(decoder.without(z))]  # type: ignore[operator]
        return [decoder.features(z), *absent]

    known = [features(part) for part in (z.split(1) if apart else [z])]

    def predict(state: Tensor, level: Tensor, stage: int | None, where: Part | None = None) -> Tensor:
        parts = known[0] if where is None else [part.crop(*where[1:]) for part in known[where[0]]]
        given, *absent = (decoder.predict(state, level, part, stage) for part in parts)
        return absent[0] + guidance * (given - absent[0]) if absent else given

    return predict


def pictures(
    decoder: PixelDecoder, z: Tensor, how: Decoding, finish: Callable[[Tensor], Tensor] = lambda x: x
) -> Iterator[Tensor]:
    """Each stage's picture as soon as it exists, `(B, 3, h, w)`, coarse to fine; the last one has the full size.

    Args:
        z: `(B, c, h, w)`, raw, on the decoder's device and of its type.
        how: as `Decoding.checked` returned it.
        finish: applied to each finished picture (float, not clipped), such as clipping or rounding to 8 bit; in tiles
            only its results are kept for the whole picture. Must work pixel by pixel.

    Raises:
        UserError: a tile or an overlap that cannot be; at once, not at the first picture.
    """
    assert how.stages
    assert how.size
    assert how.steps
    assert how.power
    assert how.guidance is not None
    schedule, factor = ScaleSchedule(how.stages), decoder.config.factor
    full, guidance, grid = how.size, how.guidance, time_grid(how.steps, how.power).float().to(z.device)
    # A token may be larger than a latent position: then whole tokens are decoded and the excess cropped.
    z = pad_to_multiple(z, schedule.unit(factor, decoder.unit), mode="replicate")
    shrinks = range(how.stages - 1, -1, -1)
    sides = [(z.shape[2] * factor >> shrink, z.shape[3] * factor >> shrink) for shrink in shrinks]
    layouts: list[Layout | None] = [None] * how.stages
    if how.tile is not None:
        for s, shrink in enumerate(shrinks):
            position = max(1, decoder.feature_side >> shrink)  # of the features, in this stage's pixels
            unit = max(position, decoder.unit, 2 if s else 1)  # later stages pair their pixels
            layouts[s] = plan(sides[s], how.tile, how.overlap, unit, decoder.reach(position))

    def found() -> Iterator[Tensor]:
        predict = {apart: predictor(decoder, z, guidance, apart=apart) for apart in {x is not None for x in layouts}}
        fields = _noise(z, how, sides)
        state = fields[0]
        for stage, side, layout, shrink in zip(schedule, sides, layouts, shrinks, strict=True):
            size = schedule.size(stage.index, full)
            for number, (tau, after) in enumerate(itertools.pairwise(grid), start=1):
                ends = number == how.steps
                step = _Step(decoder, predict[layout is not None], stage, tau, after, shrink, ends)
                keep, kept = (lambda x: x.to(z.dtype), side) if shrink or not ends else (finish, size)
                if layout is None:
                    state = keep(step(state)[:, :, : kept[0], : kept[1]])
                else:
                    state = assembled(partial(step.tile, state), len(z), layout, kept, keep)
            if shrink:
                state, preview = state.chunk(2, dim=1)
                yield finish(preview[:, :, : size[0], : size[1]])
                state = schedule.hand_over(state, stage.index, fields[stage.index + 1])
        yield state

    return found()


@dataclass(frozen=True)
class _Step:
    """One Euler step of one stage, from local time tau to the one after it."""

    decoder: PixelDecoder
    predict: Predict
    stage: Stage
    tau: Tensor
    after: Tensor
    shrink: int
    """Times that the full size is halved."""
    ends: bool
    """The stage's last step: behind the next state comes the stage's preview, unless the state is the picture."""

    @property
    def number(self) -> int | None:
        """Of the stage; None: it is all of the path, which is that of one scale."""
        return None if (self.stage.start, self.stage.end) == (1, 0) else self.stage.index

    def __call__(self, state: Tensor, where: Part | None = None) -> Tensor:
        """A state `(B, 3, h, w)`, or a part of it → the next one."""
        kind = self.decoder.prediction
        if self.decoder.fixed != "zero":  # else nothing reads it
            state = state.contiguous()
        tau, after = (t.expand(len(state)) for t in (self.tau, self.after))
        prediction = self.predict(state, self.stage.level(tau), self.number, where)
        if self.shrink == 0 and self.ends and kind == "x":
            return prediction  # nothing is left of the state
        moved = self.stage.step(prediction, state, tau, after, kind)
        if self.shrink == 0 or not self.ends:
            return moved
        return torch.cat([moved, self.stage.clean(prediction, state, tau, kind)], dim=1)

    def tile(self, state: Tensor, i: int, rows: slice, cols: slice) -> Tensor:
        """The same for a tile of sample i, in pixels of the stage."""
        full_rows, full_cols = (slice(s.start << self.shrink, s.stop << self.shrink) for s in (rows, cols))
        return self(state[i : i + 1, :, rows, cols], (i, full_rows, full_cols))


def _noise(z: Tensor, how: Decoding, sides: list[tuple[int, int]]) -> list[Tensor]:
    """White noise of each stage's size, all from one field; zeros take no memory."""
    if how.noise == "zero":
        return [z.new_zeros(1, 1, 1, 1).expand(len(z), 3, *side) for side in sides]
    assert how.noise
    white = draw_noise((3, *sides[-1]), cast(Sequence[int], how.seed), how.noise)
    return [field.to(z) for field in noise_pyramid(white, len(sides))]
