"""What a tokenizer knows before it has seen a step: random weights, another model's, or a fit to third-party latents.

Our own encoders make latents of standard deviation near ½, whose low frequencies a cosine basis turns into a picture;
first weights rely on both. Foreign latents have any scale (Stable Diffusion's about 5, FLUX.2's about 1) and any basis.
So the run's first crops are encoded, `standardise` gets each channel's mean and standard deviation, and `linear_skip`
the map from 3×3 latent positions to the pixels of the middle one that has the least squared error: decoding starts
with a blurred picture instead of a grey one.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoders import read_taesd
from ..data import LatentDataset, PhotoDataset, StreamDataset, make_loader
from ..data.cache import stored_moments
from ..data.statistics import LatentMoments
from ..decoders import PixelDecoder
from ..decoders.taef2 import Taef2Decoder
from ..errors import UserError
from ..images import to_float
from ..models.blocks import Padding
from ..models.encoder import FAMILIES, Posterior
from ..models.frozen import without_spread
from ..models.loading import load_strictly
from ..tokenizer import Tokenizer
from . import checkpoints
from .recipe import TokenizerRecipe

log = logging.getLogger(__name__)

AnyDataset = PhotoDataset | StreamDataset | LatentDataset

CROPS, POSITIONS = 32, 4096
"""Of the run's first crops, at least so many are looked at, and so many latent positions."""
BATCH = 16
RIDGE = 1e-3
"""Weight decay of the linear map, relative to the mean square of what it reads."""


def make_tokenizer(recipe: TokenizerRecipe, dataset: AnyDataset | None = None, *, quiet: bool = False) -> Tokenizer:
    """The tokenizer to train, in training mode: random weights, or another model's (see `start_from`).

    Args:
        dataset: to train on: what a new decoder with `standardise` is fitted to first (see `fit_to_latents`). A run
            that goes on has that from its checkpoint.
        quiet: log nothing, as all processes but one should.

    Raises:
        UserError: the recipe's parts do not go together, or name what cannot be read.
    """
    _check_latents(recipe)
    tokenizer = Tokenizer(recipe.model)
    taken = False
    if recipe.model.encoder.source:
        tokenizer.attach_encoder(f"{recipe.model.encoder.family}={recipe.model.encoder.source}")
    if recipe.first_weights == "published":
        published_weights(tokenizer.decoder)
    if recipe.source:
        taken = start_from(tokenizer, recipe)
        if recipe.init and not taken and not quiet:
            log.info("init: the encoder comes from %s; its decoder has another shape, so ours starts anew", recipe.init)
    elif not recipe.training.train_encoder and not recipe.model.encoder.family and not quiet:
        log.warning("training.train_encoder is false without init: the decoder learns a random encoder's latents")
    own = _add_trunk(tokenizer, recipe, dataset, taken) if recipe.model.decoder.trunk else None
    fits = not taken and checkpoints.latest(Path(recipe.run)) is None
    if fits and dataset is not None and isinstance(tokenizer.decoder, Taef2Decoder) and own is not None:
        slim_to_latents(tokenizer, own, dataset, seed=recipe.training.seed)
    elif fits and dataset is not None and recipe.model.decoder.standardise:
        fit_to_latents(tokenizer, dataset, seed=recipe.training.seed)
    return tokenizer.train()


def _add_trunk(
    tokenizer: Tokenizer, recipe: TokenizerRecipe, dataset: AnyDataset | None, taken: bool
) -> nn.Sequential | None:
    """The weights of the trunk, from the files of the family's decoder unless they are there; cached latents go through
    it when they are read, before they are cut to windows. Returns that decoder, if it was read."""
    encoder, decoder = recipe.model.encoder, tokenizer.decoder
    assert decoder.trunk is not None
    own = None
    if not taken:
        if encoder.family != "taef2" or not encoder.source:
            given = f"{encoder.family or 'ours'}={encoder.source}" if encoder.source else encoder.family or "ours"
            raise UserError(
                f"model.decoder.trunk is {decoder.config.trunk} with the encoder {given}: its layers are read from "
                "TAEF2's files; add --encoder taef2=FOLDER, or set it to 0"
            )
        own = read_taesd(encoder.family, encoder.source, "decoder")
        load_strictly(decoder.trunk.layers, own[: decoder.config.trunk].state_dict(), encoder.source)
    if isinstance(dataset, LatentDataset):
        dataset.through = copy.deepcopy(decoder.trunk)
    return own


def _check_latents(recipe: TokenizerRecipe) -> None:
    """Whether there are latents, and they stay what they are."""
    encoder, training = recipe.model.encoder, recipe.training
    if encoder.family and training.train_encoder:
        raise UserError("training.train_encoder is true: a foreign encoder stays as it is; set it to false")
    if encoder.source and not encoder.family:
        raise UserError(f"model.encoder.source is {encoder.source!r} without model.encoder.family: give both")
    if encoder.family and not encoder.source and not (recipe.data.latents and not training.sample_every):
        raise UserError(
            f"the encoder of these latents ({FAMILIES[encoder.family]}) is not named: add --encoder "
            f"{encoder.family}=WHERE. Only training from cached latents (data.latents) without sample grids "
            "(training.sample_every 0) needs none"
        )
    if recipe.model.decoder.standardise and (training.train_encoder or not (encoder.family or recipe.source)):
        raise UserError(
            "model.decoder.standardise fits a decoder to the latents of a frozen encoder: add --encoder KIND=WHERE, or "
            "init, and set training.train_encoder to false"
        )


def start_from(tokenizer: Tokenizer, recipe: TokenizerRecipe) -> bool:
    """Take encoder and decoder from the model `recipe.init`, or the encoder alone from `recipe.init_encoder`. A decoder
    of another shape than `init`'s keeps its random weights.

    The encoder must fit: it decides the latent space, which is why one starts from another model. What trains may be
    padded otherwise than it was: it adapts in a few thousand crops. A multi-scale
    decoder may start from a single-scale one: all of its weights, beside embeddings of the stages that are zero. A
    single-scale one may start from a multi-scale one: it becomes the last stage, which is at full resolution.

    Returns:
        Whether the decoder was taken, too.

    Raises:
        UserError: there is no such model, or its encoder has another shape.
    """
    source = Tokenizer.from_pretrained(recipe.source)
    given = source.config.encoder
    if recipe.training.train_encoder:
        given = dataclasses.replace(given, padding=recipe.model.encoder.padding)
    if given != recipe.model.encoder:
        held = f"the encoder of {recipe.source} is {source.config.encoder}"
        raise UserError(f"init: {held}, but the recipe says {recipe.model.encoder}")
    tokenizer.encoder.load_state_dict(source.encoder.state_dict())
    if not recipe.training.train_encoder:
        names = {field.name for field in dataclasses.fields(source.config)} - {"encoder", "decoder", "sampler"}
        kept = {name: getattr(source.config, name) for name in names}
        tokenizer.config = dataclasses.replace(tokenizer.config, **kept)
    ours, theirs = tokenizer.decoder, source.decoder
    if recipe.init_encoder or not same_network(ours, theirs):
        return False
    own, weights = ours.state_dict(), theirs.state_dict()
    own.update({name: value for name, value in weights.items() if name in own})
    if ours.stages == 1 < theirs.stages:  # the stage's embedding is added to the time's
        own["time.2.bias"] = own["time.2.bias"] + weights["stage_embedding"][-1]
    tokenizer.decoder.load_state_dict(own)
    return True


def published_weights(decoder: PixelDecoder) -> None:
    """First weights of SSDD's published decoders: Xavier's for linear maps, N(0, 0.02²) for convolutions, zero biases.
    What starts at zero stays there."""
    for module in decoder.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or not module.weight.any():
            continue
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def same_network(ours: PixelDecoder, theirs: PixelDecoder) -> bool:
    """Whether weights of one mean the same in the other; stages and a null latent add some that are zero at first."""
    comparable = ours.stages == theirs.stages or 1 in (ours.stages, theirs.stages)
    added = ("stage_embedding", "null_latent") if comparable else ()
    free = {"size", "attention", "dropout", "residual", "residual_shares", "padding", "stages", "null_latent"}
    shapes, fields = [], []
    for decoder in (ours, theirs):
        shapes.append({name: value.shape for name, value in decoder.state_dict().items() if name not in added})
        fields.append({name: value for name, value in dataclasses.asdict(decoder.config).items() if name not in free})
    return shapes[0] == shapes[1] and fields[0] == fields[1]


@torch.no_grad()
def fit_to_latents(tokenizer: Tokenizer, dataset: AnyDataset, *, seed: int) -> None:
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
        assert decoder.linear_skip.bias is not None
        decoder.linear_skip.bias.copy_(bias)
        decoder.linear_skip.weight[:, : weight.shape[1]] = weight  # the context's weights stay at zero


@torch.no_grad()
def slim_to_latents(tokenizer: Tokenizer, own: nn.Sequential, dataset: AnyDataset, *, seed: int) -> None:
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


def _encoded(tokenizer: Tokenizer, dataset: AnyDataset, seed: int) -> Iterator[tuple[Tensor, Posterior]]:
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
