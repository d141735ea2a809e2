"""Laws of windowed attention: one function, several backends, O(N) outside `dense`."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from monobath.decoders import UViTConfig
from monobath.models import attention
from monobath.models.attention import windowed_attention

# (grid, reach): square, not a multiple of the block, rectangular, below the window, lines, a point
CASES = [
    ((16, 16), 3),
    ((17, 23), 1),
    ((24, 9), 7),
    ((11, 30), 7),
    ((3, 5), 7),
    ((1, 1), 3),
    ((1, 40), 7),
    ((40, 1), 3),
    ((19, 26), 13),
    ((6, 6), 0),
]


def inputs(
    grid: tuple[int, int],
    r: int,
    *,
    heads: int = 2,
    d: int = 12,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(grid[0] * 1000 + grid[1] * 10 + r)
    shapes = [(batch, heads, grid[0] * grid[1], d)] * 3 + [(2 * r + 1, 2 * r + 1, heads)]
    q, k, v, bias = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return q, k, v, bias


def by_loops(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """The definition, token by token."""
    (_, width), r, out = grid, (bias.shape[0] - 1) // 2, torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys, logits = [], []
                for j in range(q.shape[2]):
                    row, col = i // width - j // width, i % width - j % width
                    if abs(row) <= r and abs(col) <= r:
                        keys.append(j)
                        dot = q[b, h, i] @ k[b, h, j] / math.sqrt(q.shape[3])
                        logits.append(dot + bias[row + r, col + r, h])
                out[b, h, i] = torch.stack(logits).softmax(0) @ v[b, h, keys]
    return out


@pytest.mark.parametrize("backend", ["dense", "blocked", "auto"])
@pytest.mark.parametrize(("grid", "r"), [((4, 7), 2), ((11, 3), 1), ((1, 5), 2), ((2, 2), 3)])
def test_every_backend_is_the_definition(backend: str, grid: tuple[int, int], r: int) -> None:
    q, k, v, bias = inputs(grid, r, d=5, dtype=torch.float64)
    out = windowed_attention(q, k, v, bias, grid, backend=backend)
    torch.testing.assert_close(out, by_loops(q, k, v, bias, grid), rtol=1e-10, atol=1e-10)


def test_bias_index_is_query_minus_key() -> None:
    """Two tokens in a row; only the entry (row 0, col +1) is large: token 1 looks left, token 0 does not."""
    q = k = torch.zeros(1, 1, 2, 4)
    v = torch.tensor([[10.0], [20.0]]).expand(2, 4)[None, None]
    bias = torch.zeros(3, 3, 1)
    bias[1, 2] = 50.0
    for backend in ("dense", "blocked"):
        wide = windowed_attention(q, k, v, bias, (1, 2), backend=backend)[0, 0, :, 0]
        torch.testing.assert_close(wide, torch.tensor([15.0, 10.0]))
        tall = windowed_attention(q, k, v, bias.transpose(0, 1), (2, 1), backend=backend)[0, 0, :, 0]
        torch.testing.assert_close(tall, torch.tensor([15.0, 10.0]))


@pytest.mark.parametrize(("grid", "r"), CASES)
@pytest.mark.parametrize(("heads", "d"), [(1, 8), (3, 15)])
def test_blocked_is_dense(grid: tuple[int, int], r: int, heads: int, d: int) -> None:
    q, k, v, bias = inputs(grid, r, heads=heads, d=d)
    dense = windowed_attention(q, k, v, bias, grid, backend="dense")
    with torch.no_grad():  # in strips
        torch.testing.assert_close(
            windowed_attention(q, k, v, bias, grid, backend="blocked"), dense, rtol=1e-5, atol=1e-5
        )
    with torch.enable_grad():  # at once
        blocked = windowed_attention(q, k, v, bias.requires_grad_(), grid, backend="blocked")
    torch.testing.assert_close(blocked, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "r"), CASES)
def test_gradients_of_blocked_are_those_of_dense(grid: tuple[int, int], r: int) -> None:
    grads = []
    for backend in ("dense", "blocked"):
        leaves = [x.requires_grad_() for x in inputs(grid, r)]
        out = windowed_attention(*leaves, grid, backend=backend)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grads.append(torch.autograd.grad((out * weights).sum(), leaves))
    for dense, blocked in zip(*grads, strict=True):
        torch.testing.assert_close(blocked, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gradients_on_a_gpu() -> None:
    grid, grads = (13, 37), []
    for name in ("dense", "blocked"):
        leaves = [x.cuda().requires_grad_() for x in inputs(grid, 7, d=40, heads=4)]
        out = windowed_attention(*leaves, grid, backend=name)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).cuda()
        grads.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for dense, blocked in zip(*grads, strict=True):
        torch.testing.assert_close(blocked, dense, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_a_token_sees_its_window_and_nothing_else(backend: str) -> None:
    grid, r, (row, col) = (12, 18), 3, (5, 9)
    q, k, v, bias = inputs(grid, r)
    query = row * grid[1] + col
    rows, cols = torch.arange(12)[:, None], torch.arange(18)[None, :]
    window = (((rows - row).abs() <= r) & ((cols - col).abs() <= r)).flatten()
    before = windowed_attention(q, k, v, bias, grid, backend=backend)[:, :, query]

    def after(where: Tensor) -> Tensor:
        noise = torch.randn(k.shape, generator=torch.Generator().manual_seed(2)) * where[:, None]
        return windowed_attention(q, k + noise, v - 3 * noise, bias, grid, backend=backend)[:, :, query]

    assert torch.equal(after(~window), before)
    for row_step, col_step in ((-r, -r), (-r, r), (r, -r), (r, r), (0, 0)):  # to the corners, inclusive
        one = torch.zeros_like(window)
        one[(row + row_step) * grid[1] + col + col_step] = True
        assert not torch.equal(after(one), before)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_bias_gets_a_gradient_wherever_an_offset_occurs(backend: str) -> None:
    q, k, v, bias = inputs((5, 20), 7)
    windowed_attention(q, k, v, bias.requires_grad_(), (5, 20), backend=backend).square().sum().backward()
    assert bias.grad is not None
    rows = (torch.arange(15) - 7).abs() <= 4  # five rows: row offsets up to 4
    assert (bias.grad[rows] != 0).all()
    assert (bias.grad[~rows] == 0).all()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements *stored* for the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("train", [False, True])
def test_blocked_memory_is_linear(train: bool) -> None:
    largest, r = {}, 3
    for side in (64, 128):
        q, k, v, bias = inputs((side, side), r, heads=1, d=4, batch=1)
        with LargestTensor() as seen, torch.set_grad_enabled(train):
            out = windowed_attention(q, k, v, bias.requires_grad_(train), (side, side), backend="blocked")
            if train:
                out.sum().backward()
        largest[side] = seen.numel
    assert largest[128] <= 4.2 * largest[64]
    assert largest[128] <= 128**2 * (8 + 2 * r) ** 2  # one logit per query and key of its halo


def test_auto_is_linear_on_large_grids_and_dense_on_small_ones() -> None:
    assert attention._dense_is_faster((16, 16), 7)
    assert not attention._dense_is_faster((32, 32), 7)
    assert attention._dense_is_faster((3, 5), 64)
    assert not attention._dense_is_faster((1, 100_000), 7)
    assert not attention._dense_is_faster((1000, 1000), 15)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_an_image_does_not_depend_on_its_batch(backend: str) -> None:
    q, k, v, bias = inputs((9, 20), 3, batch=3)
    together = windowed_attention(q, k, v, bias, (9, 20), backend=backend)
    alone = windowed_attention(q[1:2], k[1:2], v[1:2], bias, (9, 20), backend=backend)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-6, atol=1e-6)
    changed = windowed_attention(q, k, v + torch.tensor([1e4, 0, 1e4])[:, None, None, None], bias, (9, 20),
                                 backend=backend)  # fmt: skip
    assert torch.equal(changed[1], together[1])


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, bias = inputs((30, 11), 3)
    with torch.no_grad():
        whole = windowed_attention(q, k, v, bias, (30, 11), backend="blocked")
        for rows in (1, 3):
            monkeypatch.setattr(attention, "_strip", lambda *_, rows=rows, **__: rows)
            out = windowed_attention(q, k, v, bias, (30, 11), backend="blocked")
            torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("train", [False, True])
def test_dtypes(backend: str, dtype: torch.dtype, train: bool) -> None:
    grid = (11, 13)  # has blocks with padded queries and keys
    leaves = [x.requires_grad_(train) for x in inputs(grid, 3, dtype=dtype)]
    out = windowed_attention(*leaves, grid, backend=backend)
    assert out.dtype == dtype
    exact = windowed_attention(*inputs(grid, 3, dtype=torch.float64), grid, backend="dense")
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    if train:
        out.sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_large_logits_stay_finite_in_bf16(backend: str) -> None:
    q, k, v, bias = (x * 30 for x in inputs((11, 13), 3, dtype=torch.bfloat16))
    assert windowed_attention(q, k, v, bias, (11, 13), backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", ["dense", "blocked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    q, k, v, bias = inputs((11, 13), 3)
    exact = windowed_attention(q, k, v, bias, (11, 13), backend="dense")
    bias.requires_grad_()
    with torch.autocast("cpu", dtype):  # v as a float32 island might hand it over
        out = windowed_attention(q.to(dtype), k.to(dtype), v, bias, (11, 13), backend=backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, rtol=6e-2, atol=6e-2)
    out.float().sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


def test_checkpointing_changes_nothing() -> None:
    results = []
    for remember in (True, False):
        leaves = [x.requires_grad_() for x in inputs((9, 20), 3)]

        def run(*tensors: Tensor) -> Tensor:
            return windowed_attention(*tensors, (9, 20), backend="blocked")

        out = run(*leaves) if remember else checkpoint(run, *leaves, use_reentrant=False)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_traces_without_breaks(backend: str) -> None:
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in inputs((9, 20), 3)]

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return windowed_attention(q, k, v, bias, (9, 20), backend=backend)

    eager = Attention()(*leaves)
    expected = torch.autograd.grad(eager.square().sum(), leaves)
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(compiled.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        exported = torch.export.export(Attention(), tuple(leaves)).module()(*leaves)
    torch.testing.assert_close(exported, eager, rtol=1e-5, atol=1e-5)


Q = (1, 2, 12, 8)


@pytest.mark.parametrize(
    ("shapes", "grid", "backend", "message"),
    [
        ((Q, Q, Q, (3, 3, 2)), (3, 4), "fast", r"'fast': choose one of auto, dense, blocked$"),
        ((Q, (1, 2, 11, 8), Q, (3, 3, 2)), (3, 4), "auto", r"\(1, 2, 12, 8\), \(1, 2, 11, 8\)"),
        (((2, 12, 8),) * 3 + ((3, 3, 2),), (3, 4), "auto", r"one shape .* got \(2, 12, 8\)"),
        ((Q, Q, Q, (3, 3, 2)), (3, 5), "auto", r"3×5 grid has 15 tokens, but q is \(1, 2, 12, 8\)"),
        ((Q, Q, Q, (3, 3, 2)), (-3, -4), "auto", r"-3×-4 grid"),
        ((Q, Q, Q, (4, 4, 2)), (3, 4), "auto", r"odd sides; got \(4, 4, 2\)"),
        ((Q, Q, Q, (3, 5, 2)), (3, 4), "auto", r"square with odd sides; got \(3, 5, 2\)"),
        ((Q, Q, Q, (3, 3)), (3, 4), "auto", r"heads\), square with odd sides; got \(3, 3\)"),
        ((Q, Q, Q, (3, 3, 4)), (3, 4), "auto", r"for 4 heads, but q \(1, 2, 12, 8\) has 2"),
    ],
)
def test_mistakes_are_named(
    shapes: tuple[tuple[int, ...], ...], grid: tuple[int, int], backend: str, message: str
) -> None:
    q, k, v, bias = (torch.zeros(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        windowed_attention(q, k, v, bias, grid, backend=backend)


def test_an_old_config_of_the_backend_that_is_gone_loads_as_auto() -> None:
    assert UViTConfig(size="XS/4", attention="flex").attention == "auto"
