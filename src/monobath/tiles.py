"""Overlapping tiles of a picture: where they lie, and how their results become one, strip by strip.

Tiles are squares. Neighbours overlap; the middle half of an overlap is a linear ramp from one to the other, and the
outer quarters, where a tile's own border is near, are dropped. Where a pixel sees no further than half of the overlap,
nothing is blended: the overlap is cut through the middle, and the tiles are the whole, up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError


def pad_to_multiple(x: Tensor, multiple: int, mode: Literal["reflect", "replicate"] = "reflect") -> Tensor:
    """Pad right and bottom so that both sides are multiples; replicate where a side is too short to reflect."""
    for dim in (2, 3):
        pad = -x.shape[dim] % multiple
        if pad:
            way = mode if pad < x.shape[dim] else "replicate"
            x = F.pad(x, (0, 0, 0, pad) if dim == 2 else (0, pad, 0, 0), mode=way)
    return x


@dataclass(frozen=True)
class Layout:
    """Where the tiles are; every tile is `rows[i]` × `cols[j]`."""

    rows: list[slice]
    cols: list[slice]
    cut: int = 0
    """0: overlaps are ramps. Else they are cut in the middle, at a multiple of this."""

    def divided(self, by: int) -> Layout:
        """The same on a grid whose positions are `by` pixels."""
        rows, cols = ([slice(s.start // by, s.stop // by) for s in spans] for spans in (self.rows, self.cols))
        return Layout(rows, cols, self.cut // by)


def plan(size: tuple[int, int], tile: int, overlap: int | None, unit: int, reach: int | None) -> Layout | None:
    """Tiles for a picture of `size`, whose sides are multiples of `unit`; None if one tile covers it.

    Args:
        tile: side of the squares, in pixels, rounded down to whole units.
        overlap: pixels that neighbours share, rounded up likewise; None: what makes the tiles exact, if there is such a
            number and it is at most half a tile, else 64 or an eighth of the tile, whichever is more, up to a quarter.
        unit: every tile begins and ends at a multiple of this.
        reach: how far a unit square sees, in pixels; None: everywhere.

    Raises:
        UserError: a tile below two units, or an overlap that is negative or leaves no step.
    """
    for name, value in (("tile", tile), ("overlap", overlap)):
        if not isinstance(value, int) and not (name == "overlap" and value is None):
            raise UserError(f"{name}={value!r}: give a whole number of pixels")
    side = tile // unit * unit
    if side < 2 * unit:
        raise UserError(f"tile={tile}: this model needs tiles of at least {2 * unit} pixels")
    exact = None if reach is None else 2 * (-(-reach // unit) * unit)
    if overlap is None:
        overlap = exact if exact is not None and exact <= side // 2 else min(side // 4, max(64, side // 8))
    shared = -(-overlap // unit) * unit
    if overlap < 0 or shared >= side:
        raise UserError(f"overlap={overlap} with tile={tile}: it must be at least 0 and at most {side - unit}")
    if size[0] <= side and size[1] <= side:
        return None
    rows, cols = (_spans(length, side, shared, unit) for length in size)
    return Layout(rows, cols, unit if exact is not None and shared >= exact else 0)


def _spans(length: int, side: int, overlap: int, unit: int) -> list[slice]:
    """Equal spans that cover `length`, evenly spread at multiples of `unit`; neighbours share `overlap` or more."""
    side = min(side, length)
    gaps = -(-(length - side) // (side - overlap)) if length > side else 0
    first = [(length - side) // unit * i // max(1, gaps) * unit for i in range(gaps + 1)]
    return [slice(a, a + side) for a in first]


def assembled(
    part: Callable[[int, slice, slice], Tensor],
    batch: int,
    layout: Layout,
    size: tuple[int, int],
    finish: Callable[[Tensor], Tensor],
) -> Tensor:
    """All samples, one after the other, strip by strip into one tensor `(batch, C, *size)`.

    Args:
        part: sample, rows, columns → `(1, C, h, w)`.
        size: to crop to.
        finish: applied to each strip once it is complete; only its results are kept.
    """
    out = None
    for i in range(batch):
        for top, strip in _strips(partial(part, i), layout):
            strip = finish(strip[:, :, : max(0, size[0] - top), : size[1]])
            if out is None:
                out = strip.new_empty(batch, strip.shape[1], *size)
            out[i : i + 1, :, top : top + strip.shape[2]] = strip
    assert out is not None
    return out


def _strips(part: Callable[[slice, slice], Tensor], layout: Layout) -> Iterator[tuple[int, Tensor]]:
    """(first row, finished rows `(1, C, n, W)`), from the top down. Only one row of tiles is held, in float32."""
    above = None  # rows of the tiles above that this row of tiles shares
    for i, rows in enumerate(layout.rows):
        strip = None
        for j, cols in enumerate(layout.cols):
            tile = part(rows, cols).float()
            if strip is None:
                strip = tile.new_empty(*tile.shape[:3], layout.cols[-1].stop)
            shared = layout.cols[j - 1].stop - cols.start if j else 0
            ramp = _ramp(shared, layout.cut).to(tile)
            both = slice(cols.start, cols.start + shared)
            strip[..., both] = torch.lerp(strip[..., both], tile[..., :shared], ramp)
            strip[..., both.stop : cols.stop] = tile[..., shared:]
        assert strip is not None
        if above is not None:
            shared = above.shape[2]
            strip[:, :, :shared] = torch.lerp(above, strip[:, :, :shared], _ramp(shared, layout.cut).to(above)[:, None])
        stop = layout.rows[i + 1].start if i + 1 < len(layout.rows) else rows.stop
        above = strip[:, :, stop - rows.start :].clone()
        yield rows.start, strip[:, :, : stop - rows.start]


def _ramp(length: int, cut: int) -> Tensor:
    """Weights `(length,)` of the later of two tiles over what they share: from 0 to 1."""
    position = torch.arange(length, dtype=torch.float32)
    if cut:
        return (position >= length // 2 // cut * cut).float()
    return ((position + 0.5 - length / 4) / max(length / 2, 1)).clamp(0, 1)


def encode(
    encoder: Callable[[Tensor], Tensor], x: Tensor, factor: int, *, tile: int | None = None, overlap: int | None = None
) -> Tensor:
    """Images → moments.

    Args:
        encoder: `(B, 3, H, W)` with sides divisible by `factor` → `(B, 2c, H/f, W/f)`. It is given one tile at a time,
            so that a large picture can stay on the CPU.
        x: `(B, 3, H, W)` in [-1, 1], any H and W; padded to multiples of `factor`.
        tile: side of the squares to encode one at a time, in pixels, rounded down to whole latent positions.
        overlap: pixels that neighbouring tiles share, rounded up likewise; default: see `plan`.

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

    def part(i: int, rows: slice, cols: slice) -> Tensor:
        piece = x[i : i + 1, :, rows.start * f : rows.stop * f, cols.start * f : cols.stop * f]
        return encoder(piece.contiguous())

    cells = layout.divided(f)
    return assembled(part, len(x), cells, (cells.rows[-1].stop, cells.cols[-1].stop), lambda moments: moments)
