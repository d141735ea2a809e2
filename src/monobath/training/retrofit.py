"""What a decoder of other people's latents is told of them before it learns: their scale, and a linear decoding.

Our own encoders make latents of standard deviation near ½, whose low frequencies a cosine basis turns into a picture;
first weights rely on both. Foreign latents have any scale (Stable Diffusion's about 5, FLUX.2's about 1) and any basis.
So the run's first crops are encoded, `standardise` gets each channel's mean and standard deviation, and `linear_skip`
the map from 3×3 latent positions to the pixels of the middle one that has the least squared error: decoding starts
with a blurred picture instead of a grey one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import LatentDataset, PhotoDataset, StreamDataset, make_loader
from ..data.cache import stored_moments
from ..data.statistics import LatentMoments
from ..decoders.taef2 import Taef2Decoder
from ..images import to_float
from ..models.blocks import Padding
from ..models.encoder import Posterior
from ..models.frozen import without_spread
from ..tokenizer import Tokenizer

CROPS, POSITIONS = 32, 4096
"""Of the run's first crops, at least so many are looked at, and so many latent positions."""
BATCH = 16
RIDGE = 1e-3
"""Weight decay of the linear map, relative to the mean square of what it reads."""


@torch.no_grad()
def fit_to_latents(tokenizer: Tokenizer, dataset: PhotoDataset | StreamDataset | LatentDataset, *, seed: int) -> None:
    """Set the constants of a decoder with `standardise`, and its `linear_skip`, from the first crops of a run.

    Args:
        tokenizer: its encoder makes the latents, unless the data has them.
        dataset: for training.
        seed: of the run's order.

    Raises:
        UserError: latents that are not finite, or all the same.
    """
    decoder = tokenizer.decoder
    assert decoder.config.standardise  # with a trunk, "latents" are its features from here on
    sums, pairs = LatentMoments(), []
    for x, posterior in _encoded(tokenizer, dataset, seed):
        sums.add(posterior)
        pairs.append((x, posterior.mean))
    found = sums.result()
    std = torch.tensor(found.std)
    # A channel that never changes says nothing: it is not blown up.
    std = torch.where(std > 1e-3 * found.overall_std, std, found.overall_std)
    decoder.latent_shift.copy_(torch.tensor(found.mean)[:, None, None])
    decoder.latent_scale.copy_(0.5 / std[:, None, None])
    if decoder.linear_skip is not None:
        weight, bias = least_squares(
            [(x, decoder.standardised(z)) for x, z in pairs], decoder.config.read_factor, decoder.config.padding
        )
        decoder.linear_skip.load_state_dict({"weight": weight, "bias": bias})


@torch.no_grad()
def slim_to_latents(
    tokenizer: Tokenizer, own: nn.Sequential, dataset: PhotoDataset | StreamDataset | LatentDataset, *, seed: int
) -> None:
    """Give a decoder with `slim` the weights of the family's own, chosen over the first crops of a run.

    Args:
        tokenizer: its decoder has its trunk already.
        own: the family's whole decoder.
        dataset, seed: as for `fit_to_latents`.
    """
    decoder = tokenizer.decoder
    assert isinstance(decoder, Taef2Decoder)
    features = torch.cat([posterior.mean for _, posterior in _encoded(tokenizer, dataset, seed)])
    decoder.tail.take(own, features)
    decoder.conv_out.load_state_dict(own[-1].state_dict())


def least_squares(pairs: list[tuple[Tensor, Tensor]], factor: int, padding: Padding) -> tuple[Tensor, Tensor]:
    """Weights of the 3×3 convolution from latents to pixels that has the least squared error.

    Args:
        pairs: images `(B, 3, f·h, f·w)` and their latents `(B, c, h, w)`.
        factor: f.
        padding: of the convolution.

    Returns:
        Weight `(3f², c, 3, 3)` and bias `(3f²,)`: `pixel_shuffle(conv2d(z, weight, bias), f)`, padded, is the image.
    """
    gram, cross = torch.zeros(()), torch.zeros(())
    for x, z in pairs:
        z = F.pad(z, (1, 1, 1, 1), mode="constant" if padding == "zeros" else padding)
        inputs = F.unfold(z, 3).transpose(1, 2).flatten(0, 1).double()  # (B·h·w, 9c)
        inputs = F.pad(inputs, (0, 1), value=1.0)
        pixels = F.pixel_unshuffle(x, factor).flatten(2).transpose(1, 2).flatten(0, 1).double()
        gram, cross = gram + inputs.T @ inputs, cross + inputs.T @ pixels
    decay = RIDGE * gram.diagonal()[:-1].mean() * torch.ones(len(gram), dtype=gram.dtype)
    decay[-1] = 0  # the bias is free
    solved = torch.linalg.solve(gram + torch.diag(decay), cross).T.float()
    return solved[:, :-1].unflatten(1, (-1, 3, 3)), solved[:, -1]


def _encoded(
    tokenizer: Tokenizer, dataset: PhotoDataset | StreamDataset | LatentDataset, seed: int
) -> Iterator[tuple[Tensor, Posterior]]:
    """Batches of images in [-1, 1] and their posteriors: what the run sees first."""
    crops = positions = 0
    for batch in make_loader(dataset, batch_size=BATCH, num_workers=0, seed=seed):
        x = to_float(batch["image"])
        moments = stored_moments(batch)
        if moments is None:
            moments = tokenizer.encoder(x)
        posterior = Posterior(moments, (x.shape[2], x.shape[3]))
        decoder = tokenizer.decoder
        features = decoder.read(posterior.mean)
        if features is not posterior.mean:
            posterior = Posterior(without_spread(features), posterior.size)
        yield x, posterior
        crops, positions = crops + len(x), positions + len(x) * moments[0, 0].numel()
        if crops >= CROPS and positions >= POSITIONS:
            return
