"""Run an encoder or a decoder over a picture of any size: whole, or in overlapping tiles with bounded memory.

Tiles are squares on the grid of latent positions and transformer tokens. Neighbours overlap; the middle half of an
overlap is a linear ramp from one to the other, and the outer quarters, where a tile's own border is near, are dropped.
All tiles of a picture start from one noise field, so that they draw the same texture where they overlap. A tile that
covers the picture is the untiled picture, bit for bit.

A decoder without statistics over the picture (`norm: local`) sees only so far: `receptive_field` says how far, to the
pixel. Where half of the overlap covers that, nothing is blended: the overlap is cut through the middle, and the tiles
are equal to the untiled picture up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from .decoders.folded import OneStep, OneStepDecoder
from .decoders.kl import KLDecoder
from .decoders.uvit import Decoder, DecoderConfig
from .flow import Prediction
from .sampling import Noise, draw_noise, euler, time_grid
from .scales import Predict, ScaleSchedule, noise_pyramid
from .scales import sample as sample_stages
from .tiles import assembled, pad_to_multiple, plan

Interval = tuple[int, int]
"""First and last pixel, both included."""


def sample(
    decoder: Decoder | OneStep,
    z: Tensor,
    seeds: Sequence[int],
    *,
    steps: int = 1,
    power: float = 2.0,
    noise: Noise = "gaussian",
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    finish: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Latents → pictures, from noise that is drawn per sample on the CPU.

    Args:
        decoder: with `OneStep`, steps and noise must be those it was folded for.
        z: `(B, c, h, w)`, raw, on the decoder's device and of its type.
        seeds: one a sample.
        size: (H, W) to crop to; default h·f, w·f.
        tile: side of the squares to decode one at a time, in pixels, rounded down to whole tokens; default: one go.
        overlap: pixels that neighbouring tiles share, rounded up to whole tokens; default: what makes the tiles exact,
            if there is such a number and it is at most half a tile, else 64 or an eighth of the tile, whichever is
            more, up to a quarter.
        finish: applied to each finished part (float, not clipped), such as clipping or rounding to 8 bit: in tiles
            only its results are kept for the whole picture. Must work pixel by pixel.

    Returns:
        `(B, 3, H, W)`, of the type that `finish` returns.

    Raises:
        UserError: a tile or an overlap that cannot be.
        ValueError: see `euler` and `draw_noise`.
    """
    config = decoder.config
    f, reach = config.factor, None if isinstance(decoder, KLDecoder) else decoder_reach(config, steps)
    if config.trunk and isinstance(decoder, Decoder | OneStepDecoder):
        z, f = decoder.features(z), config.read_factor  # of the whole picture, once
    elif config.trunk:  # an exported program, whose trunk takes its statistics over a tile
        reach = None
    size = size or (z.shape[2] * f, z.shape[3] * f)
    unit = max(f, config.token_side)
    # A token may be larger than a latent position: then whole tokens are decoded and the excess cropped.
    z = pad_to_multiple(z, unit // f, mode="replicate")
    full = (z.shape[2] * f, z.shape[3] * f)
    needs_start = not (isinstance(decoder, OneStep) and noise == "zero")

    def run(z: Tensor, start: Tensor | None) -> Tensor:
        if isinstance(decoder, OneStep):
            return decoder(z, start)
        assert start is not None
        kind = config.prediction
        return euler(lambda x_t, t: decoder(x_t, t, z), start, kind=kind, steps=steps, power=power)  # type: ignore[arg-type]

    layout = None if tile is None else plan(full, tile, overlap, unit, reach)
    if layout is None:
        start = draw_noise((3, *full), seeds, noise).to(z) if needs_start else None
        return finish(run(z, start)[:, :, : size[0], : size[1]])

    def picture(i: int) -> Callable[[slice, slice], Tensor]:
        field = draw_noise((3, *full), seeds[i : i + 1], noise) if needs_start and noise != "zero" else None

        def part(rows: slice, cols: slice) -> Tensor:
            piece = z[i : i + 1, :, rows.start // f : rows.stop // f, cols.start // f : cols.stop // f].contiguous()
            if field is not None:
                return run(piece, field[:, :, rows, cols].contiguous().to(z))
            shape = (3, rows.stop - rows.start, cols.stop - cols.start)
            return run(piece, draw_noise(shape, seeds[i : i + 1], noise).to(z) if needs_start else None)

        return part

    return assembled(picture, len(z), layout, size, finish)


def encode(
    encoder: Callable[[Tensor], Tensor], x: Tensor, factor: int, *, tile: int | None = None, overlap: int | None = None
) -> Tensor:
    """Images → moments.

    Args:
        encoder: `(B, 3, H, W)` with sides divisible by `factor` → `(B, 2c, H/f, W/f)`. It is given one tile at a time,
            so that a large picture can stay on the CPU.
        x: `(B, 3, H, W)` in [-1, 1], any H and W; padded to multiples of `factor`.
        tile: side of the squares to encode one at a time, in pixels, rounded down to whole latent positions.
        overlap: pixels that neighbouring tiles share, rounded up likewise; default: as for `sample`.

    Returns:
        `(B, 2c, ceil(H/f), ceil(W/f))`, of the encoder's type, float32 in tiles.

    Raises:
        UserError: a tile or an overlap that cannot be.
    """
    f = factor
    x = pad_to_multiple(x, f)
    layout = None if tile is None else plan((x.shape[2], x.shape[3]), tile, overlap, f, None)
    if layout is None:
        return encoder(x)

    def picture(i: int) -> Callable[[slice, slice], Tensor]:
        def part(rows: slice, cols: slice) -> Tensor:
            piece = x[i : i + 1, :, rows.start * f : rows.stop * f, cols.start * f : cols.stop * f]
            return encoder(piece.contiguous())

        return part

    cells = layout.divided(f)
    return assembled(picture, len(x), cells, (cells.rows[-1].stop, cells.cols[-1].stop), lambda moments: moments)


# ---- how far a pixel sees ---------------------------------------------------------------------------


def decoder_reach(config: DecoderConfig, steps: int = 1) -> int | None:
    """How many pixels around a token's square its picture depends on, at most; None: on all of them (GroupNorm)."""
    if config.norm != "local":
        return None
    unit = max(config.read_factor, config.token_side)
    return max(max(-first, last + 1 - unit) for first, last in receptive_field(config, (0, unit - 1), steps))


def receptive_field(config: DecoderConfig, output: Interval, steps: int = 1) -> tuple[Interval, Interval]:
    """Rows (or columns) of noise and of latents that rows `output` of a `norm: local` decoder's picture depend on.

    Both in pixels; with a trunk, of its features instead of latents. Exact: the walk back through `Decoder.forward`,
    and `steps` times through the sampler.
    """
    pixels, latents = output, (output[0] // config.read_factor * config.read_factor, output[1])
    for _ in range(steps):
        pixels, read = _one_pass(config, pixels)
        latents = (min(latents[0], read[0]), max(latents[1], read[1]))
    return pixels, latents


def _one_pass(config: DecoderConfig, output: Interval) -> tuple[Interval, Interval]:
    f, deepest = config.read_factor, len(config.channels) - 1
    if config.slim:  # four 3×3 convolutions, behind a transposed one of 4×4
        a, b = -((6 - output[0]) // 2), (output[1] + 5) // 2
        return output, (a * f, (b + 1) * f - 1)
    reads = []  # what is read of z, in pixels

    def read(first: int, last: int, side: int, around: int) -> None:
        """Cells of `side` pixels read z through 3×3 convolutions that reach `around` latent positions."""
        low, high = first * side // f - around, ((last + 1) * side - 1) // f + around
        reads.append((low * f, (high + 1) * f - 1))

    if config.linear_skip:
        read(*output, 1, 1)
    a, b = (n // config.patch for n in output)
    a, b = a - 1, b + 1  # conv_out
    for i in range(deepest + 1):
        side = config.patch << i
        a, b = a - 2 * config.up[i], b + 2 * config.up[i]  # two 3×3 convolutions a block
        if config.modulation:
            read(a, b, side, 2)
        if i < deepest and config.upsampling == "shuffle":
            a, b = a // 2 - 1, b // 2 + 1  # a convolution before the doubling
        elif i < deepest:
            a, b = (a - 1) // 2, (b + 1) // 2  # and after it
    a, b = a - config.middle_blocks * config.reach, b + config.middle_blocks * config.reach
    if config.middle_blocks:
        read(a, b, config.token_side, 2)
    # Skips need no more than the way through the deeper levels.
    for i in range(deepest, -1, -1):
        if i < deepest:
            a, b = 2 * a - 1, 2 * b + 1  # a convolution of stride 2
        a, b = a - 2 * config.down[i], b + 2 * config.down[i]
        if config.modulation and config.down[i]:
            read(a, b, config.patch << i, 2)
    a, b = a - 1, b + 1  # conv_in
    read(a, b, config.patch, 0)
    pixels = (a * config.patch, (b + 1) * config.patch - 1)
    return pixels, (min(first for first, _ in reads), max(last for _, last in reads))


# ---- coarse to fine ----


def predictor(decoder: Decoder, z: Tensor, guidance: float = 1.0) -> Predict:
    """A decoder's prediction for the latents z `(B, c, h, w)`.

    Args:
        guidance: scale of classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): 1 is none; another needs
            `DecoderConfig.null_latent` and a second call of the network a step.
    """
    single = decoder.config.stages == 1

    def predict(state: Tensor, level: Tensor, stage: int) -> Tensor:
        number = None if single else stage
        given = decoder(state, level, z, number)
        if guidance == 1:
            return given
        absent = decoder(state, level, decoder.without(z), number)
        return absent + guidance * (given - absent)

    return predict


def previews(
    decoder: Decoder,
    z: Tensor,
    seeds: Sequence[int],
    *,
    steps: int = 1,
    power: float = 2.0,
    noise: Noise = "gaussian",
    guidance: float = 1.0,
    size: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """Latents → each stage's picture, from noise that is drawn per sample on the CPU.

    Args:
        z: `(B, c, h, w)`, raw, on the decoder's device and of its type; sides are padded as the stages need.
        seeds: one a sample.
        steps: Euler steps a stage.
        guidance: see `predictor`.
        size: (H, W) of the finished picture; default h·f, w·f. Previews have `ScaleSchedule.size` of it.

    Returns:
        An iterator over `(B, 3, h, w)`, not clipped.

    Raises:
        ValueError: see `time_grid` and `draw_noise`; at once, not at the first picture.
    """
    config = decoder.config
    schedule, f = ScaleSchedule(config.stages), config.factor
    size = size or (z.shape[2] * f, z.shape[3] * f)
    time_grid(steps, power)
    z = pad_to_multiple(z, schedule.unit(f, config.token_side), mode="replicate")
    white = draw_noise((3, z.shape[2] * f, z.shape[3] * f), seeds, noise)
    fields = [field.to(z) for field in noise_pyramid(white, len(schedule))]
    kind: Prediction = config.prediction  # type: ignore[assignment]
    images = sample_stages(predictor(decoder, z, guidance), fields, schedule, kind=kind, steps=steps, power=power)

    def cropped() -> Iterator[Tensor]:
        for s, image in enumerate(images):
            h, w = schedule.size(s, size)
            yield image[:, :, :h, :w]

    return cropped()
