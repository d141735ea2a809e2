"""Multi-scale sampling: S stages, each at twice the resolution of the one before, each ending in a preview.

MSD (arXiv 2603.19570). Stage s = 0 … S−1 works at the full size divided by 2^(S−1−s). Let x_s be the image averaged to
that size, P x = up(down(x)) its coarser half, n white noise. A stage runs, with local time τ from 1 to 0, along

    X_τ = m_τ(x_s) + ν_τ·n,   m_τ(x) = (1−τ)(1−e)·x + τ(1−σ)·P x,   ν_τ = (1−τ)·e + τ·σ,

from noise level σ (its `start`; 1 for the first stage) to e = 1 − (s+1)/S (its `end`; 0 for the last). The network is
told the noise level ν_τ, which is what a single-scale checkpoint understands by t, and the stage's number. With S = 1
this is the path of `flow.py`, to the last bit.

Between two stages the picture is enlarged, and block noise makes the enlarged noise white again (`hand_over`). What we
changed: all noise comes from one white field of the full size. Its block means, doubled, are the next coarser white
field, and what is left of it is block noise, independent of them. So every stage sees the noise that it would have in
training, and a sample's noise is the same for any S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .flow import Prediction, _over

Predict = Callable[[Tensor, Tensor, int], Tensor]
"""`(state (B, 3, h, w), noise level (B,), stage) → raw prediction (B, 3, h, w)`."""


def down(x: Tensor) -> Tensor:
    """Half the height and width, which must be even, by averaging 2×2 blocks."""
    return F.avg_pool2d(x, 2)


def up(x: Tensor) -> Tensor:
    """Twice the height and width: every pixel becomes a 2×2 block."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def block_noise(white: Tensor) -> Tensor:
    """White noise `(B, C, H, W)` of even sides → noise of unit variance and covariance −1/3 inside each 2×2 block.

    n_b = √(4/3)·(w − blockmean(w)): every block sums to zero, and it is independent of the blocks' means.
    """
    return math.sqrt(4 / 3) * (white - up(down(white)))


def noise_pyramid(white: Tensor, stages: int) -> list[Tensor]:
    """White noise `(B, C, H, W)` of the full size → white noise of each stage's size, coarsest first.

    H and W must be divisible by 2^(stages − 1). Twice a block's mean is again N(0, 1).
    """
    fields = [white]
    for _ in range(stages - 1):
        fields.append(2 * down(fields[-1]))
    return fields[::-1]


def image_pyramid(x: Tensor, stages: int) -> list[Tensor]:
    """Images `(B, 3, H, W)` → each stage's x_s, coarsest first."""
    images = [x]
    for _ in range(stages - 1):
        images.append(down(images[-1]))
    return images[::-1]


@dataclass(frozen=True)
class Stage:
    """One stage's path. Images and noise are `(B, 3, h, w)` of its size, times τ are `(B,)` in [0, 1]."""

    index: int
    start: float
    """σ: noise level at τ = 1."""
    end: float
    """e: noise level at τ = 0."""

    def level(self, tau: Tensor) -> Tensor:
        """ν_τ, the noise level at local time τ: `(B,)`, float32."""
        return (1 - tau) * self.end + tau * self.start

    def mean(self, x: Tensor, tau: Tensor) -> Tensor:
        """m_τ(x): what the state is without noise."""
        fine, coarse = self._shares(tau)
        m = _over(fine, x) * x
        return m if coarse is None else m + _over(coarse, x) * up(down(x))

    def state(self, x: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
        """X_τ = m_τ(x) + ν_τ·n."""
        return self.mean(x, tau) + _over(self.level(tau), x) * noise

    def velocity(self, x: Tensor, noise: Tensor) -> Tensor:
        """v = end − start = −dX/dτ, the target of a v-prediction."""
        end = (1 - self.end) * x + self.end * noise
        start = self.start * noise
        if self.start < 1:
            start = start + (1 - self.start) * up(down(x))
        return end - start

    def clean(self, prediction: Tensor, state: Tensor, tau: Tensor, kind: Prediction) -> Tensor:
        """The clean image x̂ that a raw prediction of `kind` at X_τ means: the preview."""
        if kind == "x":
            return prediction
        if self.start == 1:  # nothing of P x in the start: R is a multiple of x̂ itself
            return state + _over(self.level(tau), state) * (prediction / (1 - self.end))
        a = state + _over(tau, state) * prediction  # the end point
        b = state - _over(1 - tau, state) * prediction  # and the start
        r = self.start * a - self.end * b  # free of noise: σ(1−e)·x̂ − e(1−σ)·P x̂
        coarse = up(down(r))
        return coarse / (self.start - self.end) + (r - coarse) / (self.start * (1 - self.end))

    def step(self, prediction: Tensor, state: Tensor, tau: Tensor, tau_next: Tensor, kind: Prediction) -> Tensor:
        """From τ to τ' < τ.

        A v-prediction adds (τ − τ')·v. An x-prediction says n̂ = (X_τ − m_τ(x̂)) / ν_τ and goes to m_τ'(x̂) + ν_τ'·n̂.
        """
        if kind == "v":
            return state + _over(tau - tau_next, state) * prediction
        ratio = self.level(tau_next) / self.level(tau)
        if self.start == 1:
            kept = _over(ratio, state)
            return kept * state + (1 - kept) * prediction
        (fine, coarse), (fine_next, coarse_next) = self._shares(tau), self._shares(tau_next)
        assert coarse is not None
        assert coarse_next is not None
        moved = _over(fine_next - ratio * fine, state) * prediction
        moved = moved + _over(coarse_next - ratio * coarse, state) * up(down(prediction))
        return _over(ratio, state) * state + moved

    def detail_share(self, level: Tensor) -> Tensor:
        """(1−τ)(1−e), the share of x − P x in the state at noise level ν_τ; that of P x is 1 − ν_τ."""
        if self.start == 1:
            return 1 - level
        return (self.start - level) / (self.start - self.end) * (1 - self.end)

    def _shares(self, tau: Tensor) -> tuple[Tensor, Tensor | None]:
        """Factors of x and of P x in m_τ; None where the latter is 0 throughout."""
        return (1 - tau) * (1 - self.end), tau * (1 - self.start) if self.start < 1 else None


class ScaleSchedule(tuple[Stage, ...]):
    """The stages, `schedule[0]` … `schedule[S − 1]`, and what happens between them.

    The time axis is cut into equal windows, e_s = 1 − (s+1)/S; σ_0 = 1 and σ_{s+1} = 2·e_s / (1 + e_s), the noise level
    after the hand-over.

    Raises:
        ValueError: fewer than one stage.
    """

    def __new__(cls, stages: int) -> ScaleSchedule:
        if stages < 1:
            raise ValueError(f"stages={stages}: there is at least one")
        ends = [1 - (s + 1) / stages for s in range(stages)]
        starts = [1.0, *(2 * e / (1 + e) for e in ends[:-1])]
        return super().__new__(cls, map(Stage, range(stages), starts, ends))

    def hand_over(self, state: Tensor, s: int, white: Tensor) -> Tensor:
        """End of stage s, `(B, 3, h, w)` → start of stage s + 1, `(B, 3, 2h, 2w)`.

        x ← α·up(x) + β·n_b with α = 1/(1+e), β = √3·e/(1+e). Enlarged noise is equal inside a block; noise that sums to
        zero in each block makes the sum white, with standard deviation σ_{s+1}, and the picture's share 1 − σ_{s+1}.

        Args:
            white: white noise of the next stage's size, of which the block noise is made.
        """
        e = self[s].end
        return up(state) / (1 + e) + math.sqrt(3) * e / (1 + e) * block_noise(white)

    def size(self, s: int, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of stage s for a picture of `size` = (H, W), rounded up."""
        divisor = 2 ** (len(self) - 1 - s)
        return -(-size[0] // divisor), -(-size[1] // divisor)

    def unit(self, factor: int, token_side: int) -> int:
        """Latent sides must be multiples of this: at every stage they are whole, and so are the decoder's tokens.

        Args:
            factor: pixels a latent position, a power of two.
            token_side: pixels a token, a power of two.
        """
        return 2 ** (len(self) - 1) * max(1, token_side // factor)
