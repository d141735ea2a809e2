"""Windowed self-attention with a relative-position bias, at a cost linear in pixels.

The decoder's transformer (SSDD, arXiv 2510.04961) lets a token attend only to tokens whose row *and*
column offsets are within a reach r, and adds to each logit a learned bias per head and offset:

    logit(i, j) = q_i·k_j / √d + bias[row_i − row_j + r, col_i − col_j + r, head],   |offsets| ≤ r

Three backends compute this, and agree (tests/test_attention.py):

- `dense`: every pair, mask and bias as one (heads, N, N) tensor. The reference, and fastest for small N.
- `blocked`: the grid is cut into blocks of queries; a block attends to itself and a halo of r tokens.
  Relative to its block, every block sees the same offsets, so one (heads, block, block + halo) bias
  serves all of them. Keys outside the grid are struck out by one more channel (see `_blocked`).
  Time and memory are O(N · window).
- `flex`: FlexAttention, compiled, with a block mask. Its backward exists on CUDA only.

What we changed from the published code: that one builds the dense bias for every call and image, knows
square grids only, and none smaller than the window.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BACKENDS = ("auto", "dense", "blocked", "flex")

_FLEX_BLOCK = 128  # tokens a side of FlexAttention's mask tiles (its default)
_FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int], *, backend: str = "auto"
) -> Tensor:
    """Attend within a window of a 2-D grid.

    Args:
        q, k, v: (B, heads, H·W, d), tokens in row-major order.
        bias: (2r+1, 2r+1, heads), indexed by query minus key, shifted by the reach r.
        grid: (H, W), any sides ≥ 1, also smaller than the window.
        backend: `auto` (dense on small grids, else blocked), `dense`, `blocked` or `flex`. While a graph is exported
            it is `blocked`, whatever is asked: the graph must serve any grid.

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
        # FlexAttention is left out on purpose: we have not measured it against `blocked` on a GPU.
        backend = "dense" if _dense_is_faster(grid, reach(bias)) else "blocked"
    return {"dense": _dense, "blocked": _blocked, "flex": _flex}[backend](q, k, v, bias, grid)


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """The explicit backends that can run forward on `device` (flex compiles on the CPU and on CUDA)."""
    flex = torch.device(device).type in ("cpu", "cuda")
    return ("dense", "blocked", "flex") if flex else ("dense", "blocked")


def reach(bias: Tensor) -> int:
    """The largest offset r that a (2r+1, 2r+1, heads) table covers."""
    return (bias.shape[0] - 1) // 2


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int], backend: str) -> None:
    if backend not in BACKENDS:
        raise UserError(f"unknown attention backend {backend!r}: choose one of {', '.join(BACKENDS)}")
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


# --- flex ----------------------------------------------------------------------------------------------


def _flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    if q.device.type not in ("cpu", "cuda"):
        raise UserError(f"backend 'flex' runs on cpu and cuda, not on {q.device.type}: use 'blocked'")
    if q.dtype not in _FLEX_DTYPES:
        raise UserError(f"backend 'flex' has no kernels for {q.dtype}: use 'blocked' or 'dense'")
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias))
    if wants_grad and q.device.type == "cpu":
        raise UserError("backend 'flex' has no backward on the CPU: use 'blocked', or torch.no_grad()")

    r, width = reach(bias), grid[1]

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # Clamped because tiles at the window's edge also score pairs that the mask then drops.
        row = (i // width - j // width + r).clamp(0, 2 * r)
        col = (i % width - j % width + r).clamp(0, 2 * r)
        return score + bias[row, col, h]

    if torch.compiler.is_compiling():  # inside a caller's torch.compile: nothing of ours to cache
        from torch.nn.attention.flex_attention import flex_attention

        mask = _flex_mask.__wrapped__(grid, r, q.device)
        return flex_attention(q, k, v, score_mod=add_bias, block_mask=mask)
    kernel, limit_hit = _flex_kernel()
    try:
        return kernel(q, k, v, score_mod=add_bias, block_mask=_flex_mask(grid, r, q.device))
    except limit_hit as error:
        raise UserError(
            "backend 'flex' compiles once per grid size, and torch._dynamo.config.recompile_limit is "
            "reached: raise it, or use 'blocked'"
        ) from error


@cache
def _flex_kernel() -> tuple[Callable[..., Any], type[Exception]]:
    """FlexAttention, compiled (without compilation it computes all N² scores), and its limit's error.

    Compiled anew for every shape, as its CPU template does not build with symbolic sizes (torch 2.14).
    `fullgraph` makes the recompilation limit an error instead of a silent return to N².
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True), FailOnRecompileLimitHit


@lru_cache(maxsize=32)
def _flex_mask(grid: tuple[int, int], r: int, device: torch.device) -> "BlockMask":
    """Which tiles of tokens hold pairs within the window. Depends on the geometry alone.

    Built from the extent of each tile, (N/128)² entries; `create_block_mask` would test all N² pairs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    height, width = grid

    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((i // width - j // width).abs() <= r) & ((i % width - j % width).abs() <= r)

    with torch.inference_mode(False):  # the mask outlives this call and may meet a backward pass later
        first = torch.arange(0, height * width, _FLEX_BLOCK, device=device)
        last = (first + _FLEX_BLOCK - 1).clamp(max=height * width - 1)
        top, bottom = first // width, last // width
        one_row = top == bottom  # otherwise a tile may hold any column
        left, right = torch.where(one_row, first % width, 0), torch.where(one_row, last % width, width - 1)

        def near(low: Tensor, high: Tensor) -> Tensor:
            return (low[None, :] - high[:, None] <= r) & (low[:, None] - high[None, :] <= r)

        tiles = near(top, bottom) & near(left, right)
        count = tiles.sum(1, dtype=torch.int32)
        order = tiles.int().argsort(dim=1, descending=True, stable=True).int()
        return BlockMask.from_kv_blocks(
            count[None, None], order[None, None], BLOCK_SIZE=_FLEX_BLOCK, mask_mod=within,
            seq_lengths=(height * width, height * width),
        )  # fmt: skip
