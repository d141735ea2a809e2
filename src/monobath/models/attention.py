"""Windowed self-attention with a relative-position bias, at a cost linear in pixels.

The decoder's transformer (SSDD, arXiv 2510.04961) lets a token attend only to tokens whose row *and*
column offsets are within a reach r, and adds to each logit a learned bias per head and offset:

    logit(i, j) = q_i·k_j / √d + bias[row_i − row_j + r, col_i − col_j + r, head],   |offsets| ≤ r

Two backends compute this, and agree (tests/test_attention.py):

- `dense`: every pair, mask and bias as one (heads, N, N) tensor. The reference, and fastest for small N.
- `blocked`: the grid is cut into blocks of queries; a block attends to itself and a halo of r tokens.
  Relative to its block, every block sees the same offsets, so one (heads, block, block + halo) bias
  serves all of them. Keys outside the grid are struck out by one more channel (see `_blocked`).
  Time and memory are O(N · window).

What we changed from the published code: that one builds the dense bias for every call and image, knows
square grids only, and none smaller than the window.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

Backend = Literal["auto", "dense", "blocked"]


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int], *, backend: Backend = "auto"
) -> Tensor:
    """Attend within a window of a 2-D grid.

    Args:
        q, k, v: (B, heads, H·W, d), tokens in row-major order.
        bias: (2r+1, 2r+1, heads), indexed by query minus key, shifted by the reach r.
        grid: (H, W), any sides ≥ 1, also smaller than the window.
        backend: `auto` (dense on small grids, else blocked), `dense` or `blocked`. While a graph is exported it is
            `blocked`, whatever is asked: the graph must serve any grid.

    Returns:
        (B, heads, H·W, d), in autocast's dtype where autocast is on.
    """
    _check(q, k, v, bias, grid, backend)
    if _autocasts(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)  # before the halo copies, not after
    if torch.compiler.is_exporting():
        backend = "blocked"  # the one whose graph serves any grid
    if backend == "auto":
        backend = "dense" if _dense_is_faster(grid, reach(bias)) else "blocked"
    return {"dense": _dense, "blocked": _blocked}[backend](q, k, v, bias, grid)


def reach(bias: Tensor) -> int:
    """The largest offset r that a (2r+1, 2r+1, heads) table covers."""
    return (bias.shape[0] - 1) // 2


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int], backend: str) -> None:
    if backend not in get_args(Backend):
        raise UserError(f"unknown attention backend {backend!r}: choose one of {', '.join(get_args(Backend))}")
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise UserError(
            f"q, k and v must share one shape (B, heads, H·W, d); got {_sizes(q)}, {_sizes(k)}, {_sizes(v)}"
        )
    height, width = grid
    if height < 1 or width < 1 or q.shape[2] != height * width:
        raise UserError(f"a {height}×{width} grid has {height * width} tokens, but q is {_sizes(q)}")
    if bias.ndim != 3 or bias.shape[0] != bias.shape[1] or bias.shape[0] % 2 == 0:
        raise UserError(f"bias must be (2r+1, 2r+1, heads), square with odd sides; got {_sizes(bias)}")
    if bias.shape[2] != q.shape[1]:
        raise UserError(f"bias {_sizes(bias)} is for {bias.shape[2]} heads, but q {_sizes(q)} has {q.shape[1]}")


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # asking such a device raises
        return False
    return torch.is_autocast_enabled(device) and x.dtype != torch.float64  # which autocast leaves alone


def _sizes(x: Tensor) -> str:
    return str(tuple(x.shape))


def _bias_mask(
    bias: Tensor, dtype: torch.dtype, q_rows: Tensor, q_cols: Tensor, k_rows: Tensor, k_cols: Tensor
) -> Tensor:
    """The bias of every (query, key) pair of two grids, −∞ outside the window: (1, heads, Q, K).

    Two gathers of whole slices, columns then rows, from the table with a border of −∞ that stands for
    "too far": cheap to differentiate, unlike a gather of single entries.
    """
    r = reach(bias)
    table = F.pad(bias.to(dtype), (0, 0, 0, 1, 0, 1), value=-math.inf)  # (2r+2, 2r+2, heads)

    def entry(queries: Tensor, keys: Tensor) -> Tensor:
        shifted = queries[:, None] - keys[None, :] + r  # query minus key
        return torch.where((shifted >= 0) & (shifted <= 2 * r), shifted, 2 * r + 1).flatten()

    pairs = table.index_select(1, entry(q_cols, k_cols)).index_select(0, entry(q_rows, k_rows))
    qr, kr, qc, kc = len(q_rows), len(k_rows), len(q_cols), len(k_cols)
    pairs = pairs.view(qr, kr, qc, kc, -1).permute(4, 0, 2, 1, 3)  # heads, qr, qc, kr, kc
    return pairs.reshape(1, -1, qr * qc, kr * kc)


# --- dense ---------------------------------------------------------------------------------------------


def _dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    rows, cols = (torch.arange(n, device=q.device) for n in grid)
    mask = _bias_mask(bias, q.dtype, rows, cols, rows, cols)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _dense_is_faster(grid: tuple[int, int], r: int) -> bool:
    """Measured on two CPU cores (heads 4, d 24 and 40, r 1…15, float32, forward and backward).

    `blocked` scores `keys` keys a query where `dense` scores N; the two meet at about N = 1.25·keys,
    (24² tokens at r = 7), and below 16² tokens the fixed cost of `blocked` decides.
    """
    _, keys = _blocking(grid, r)
    return math.prod(grid) <= max(256, 1.25 * math.prod(keys))


# --- blocked -------------------------------------------------------------------------------------------

# Added to the logits of keys outside the grid. Representable in every float dtype, finite (a block of
# padding has no valid key at all, and −∞ there would be NaN), and enough that exp() is exactly 0.
_OUTSIDE = -(2.0**14)


def _blocking(grid: tuple[int, int], r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sides of a block of queries, and of its keys with their halo.

    Of blocks 4, 8 and 16 a side, 8 was fastest or equal at every grid from 16² to 128² for r ≤ 7, and 16
    on large grids at r = 15. No side or halo needs to be larger than the grid; an exported graph does not
    know the grid.
    """
    side = 8 if r < 12 else 16
    if torch.compiler.is_exporting():
        return (side, side), (side + 2 * r, side + 2 * r)
    block_h, block_w = (min(side, n) for n in grid)
    halo_h, halo_w = (min(r, n - 1) for n in grid)
    return (block_h, block_w), (block_h + 2 * halo_h, block_w + 2 * halo_w)


def _blocked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """One SDPA call over (B · blocks), all with the same mask.

    Only blocks at the border see keys outside the grid. Rather than a mask per block, q and k get one
    more channel, √d in q and 0 (inside) or `_OUTSIDE` (outside) in k: after scaling by 1/√d this adds
    exactly 0 or `_OUTSIDE` to the logit. Channels are then padded to a multiple of 8, for GPU kernels.
    """
    B, heads, N, d = q.shape
    H, W = grid
    (bh, bw), (kh, kw) = _blocking(grid, reach(bias))
    halo_h, halo_w = (kh - bh) // 2, (kw - bw) // 2
    rows, cols = (H + bh - 1) // bh, (W + bw - 1) // bw  # blocks; ONNX divides towards zero, so nothing negative
    fill_h, fill_w = rows * bh - H, cols * bw - W  # padding to whole blocks, below and to the right
    around = (0, 0, 0, 0, halo_w, halo_w + fill_w, halo_h, halo_h + fill_h)
    channels = -(-(d + 1) // 8) * 8

    def on_grid(x: Tensor) -> Tensor:  # (B, heads, N, d) -> (B, H, W, heads, d), a view
        return x.transpose(1, 2).unflatten(1, (H, W))

    def widen(x: Tensor, extra: Tensor) -> Tensor:  # (…, d) + extra channel + zeros -> (…, channels)
        zeros = x.new_zeros(()).expand(*x.shape[:-1], channels - d - 1)
        return torch.cat([x, extra.expand(*x.shape[:-1], 1), zeros], dim=-1)

    inside = q.new_zeros(1, H, W, 1, 1)
    queries = widen(F.pad(on_grid(q), (0, 0, 0, 0, 0, fill_w, 0, fill_h)), q.new_full((), math.sqrt(d)))
    keys = widen(F.pad(on_grid(k), around), F.pad(inside, around, value=_OUTSIDE))
    values = widen(F.pad(on_grid(v), around), q.new_zeros(()))

    def blocks(x: Tensor, h: int, w: int) -> Tensor:  # (B, rows, cols, heads, h, w, channels), a view
        if torch.compiler.is_exporting():  # the same by index, with numbers of rows and columns that stay free
            x = x.index_select(1, _windows(rows, bh, h, x)).unflatten(1, (rows, h))
            x = x.index_select(3, _windows(cols, bw, w, x)).unflatten(3, (cols, w))
            return x.permute(0, 1, 3, 5, 2, 4, 6)
        return x.unfold(1, h, bh).unfold(2, w, bw).permute(0, 1, 2, 3, 5, 6, 4)

    q_blocks, k_blocks, v_blocks = blocks(queries, bh, bw), blocks(keys, kh, kw), blocks(values, kh, kw)
    mask = _bias_mask(
        bias, q.dtype,
        q_rows=torch.arange(bh, device=q.device), q_cols=torch.arange(bw, device=q.device),
        k_rows=torch.arange(-halo_h, bh + halo_h, device=q.device),
        k_cols=torch.arange(-halo_w, bw + halo_w, device=q.device),
    )  # fmt: skip

    def flat(x: Tensor) -> Tensor:  # (B, rows, cols, heads, h, w, channels) -> (B·rows·cols, heads, h·w, …)
        return x.reshape(-1, heads, x.shape[4] * x.shape[5], channels)

    def attend(some: slice) -> Tensor:  # rows of blocks -> (B, some rows, cols, heads, bh, bw, d)
        out = F.scaled_dot_product_attention(
            flat(q_blocks[:, some]), flat(k_blocks[:, some]), flat(v_blocks[:, some]),
            attn_mask=mask, scale=1 / math.sqrt(d),
        )  # fmt: skip
        return out[..., :d].reshape(B, -1, cols, heads, bh, bw, d)

    if torch.compiler.is_exporting():  # where a loop would be written out
        out = attend(slice(None))
    else:
        strip = _strip(q, rows, row_numel=B * cols * heads * kh * kw * channels)
        out = torch.cat([attend(slice(i, i + strip)) for i in range(0, rows, strip)], dim=1)
    out = out.permute(0, 3, 1, 4, 2, 5, 6).reshape(B, heads, rows * bh, cols * bw, d)
    return out[:, :, :H, :W].reshape(B, heads, N, d)


def _windows(count: int, stride: int, length: int, like: Tensor) -> Tensor:
    """Indices of `count` overlapping windows, one after the other."""
    first = torch.arange(count, device=like.device) * stride
    return (first[:, None] + torch.arange(length, device=like.device)).flatten()


def _strip(x: Tensor, rows: int, *, row_numel: int) -> int:
    """Rows of blocks to treat at once, so that the copies of overlapping halos stay small.

    Without gradients only: with them, everything is kept for the backward pass anyway.
    """
    if torch.is_grad_enabled():
        return rows
    numel = 2**20 if x.device.type == "cpu" else 2**24  # a CPU's cache; enough work for a GPU
    return max(1, min(rows, numel // row_numel))
