"""What a recipe trains, before the loop has seen a step: the tokenizer, the objective, the cache of teacher samples."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path

from torch import nn

from ..autoencoders import read_taesd
from ..data import LatentDataset, PhotoDataset, StreamDataset
from ..decoders import PixelDecoder
from ..decoders.taef2 import Taef2Decoder
from ..errors import UserError
from ..models.encoder import FAMILIES
from ..models.identity import weights_sha256
from ..models.loading import load_strictly
from ..tokenizer import Tokenizer
from . import checkpoints
from .config import Recipe
from .distillation import DistillationObjective, SampleCache
from .objectives import AutoencoderObjective
from .retrofit import fit_to_latents, slim_to_latents
from .scales import ScaleDistillation, ScalesObjective, UnionObjective

log = logging.getLogger(__name__)


def make_tokenizer(
    recipe: Recipe, dataset: PhotoDataset | StreamDataset | LatentDataset | None = None, *, quiet: bool = False
) -> Tokenizer:
    """The tokenizer to train, in training mode: random weights, or those of `recipe.init` (see `start_from`).

    Args:
        dataset: to train on: what a new decoder with `standardise` is fitted to first (see `retrofit.py`). A run that
            goes on has that from its checkpoint.
        quiet: log nothing, as all processes but one should.

    Raises:
        UserError: the recipe's parts do not go together, or name what cannot be read.
    """
    _check_latents(recipe)
    tokenizer = Tokenizer(recipe.model)
    taken = False
    if recipe.model.encoder.source:
        tokenizer.attach_encoder(f"{recipe.model.encoder.family}={recipe.model.encoder.source}")
    if recipe.init:
        taken = start_from(tokenizer, recipe)
        if not taken and not quiet:
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
    tokenizer: Tokenizer, recipe: Recipe, dataset: PhotoDataset | StreamDataset | LatentDataset | None, taken: bool
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


def _check_latents(recipe: Recipe) -> None:
    """Whether there are latents, and they stay what they are."""
    encoder, training = recipe.model.encoder, recipe.training
    if encoder.family and training.train_encoder:
        raise UserError(
            f"model.encoder.family is {encoder.family}, but training.train_encoder is true: a foreign encoder stays as "
            "it is; set it to false"
        )
    if encoder.source and not encoder.family:
        raise UserError(f"model.encoder.source is {encoder.source!r} without model.encoder.family: give both")
    if encoder.family and not encoder.source and not (recipe.data.latents and not training.sample_every):
        raise UserError(
            f"the encoder of these latents ({FAMILIES[encoder.family]}) is not named: add --encoder "
            f"{encoder.family}=WHERE. Only training from cached latents (data.latents) without sample grids "
            "(training.sample_every 0) needs none"
        )
    if recipe.model.decoder.standardise and (training.train_encoder or not (encoder.family or recipe.init)):
        raise UserError(
            "model.decoder.standardise fits a decoder to the latents of a frozen encoder: add --encoder KIND=WHERE, or "
            "init, and set training.train_encoder to false"
        )


def start_from(tokenizer: Tokenizer, recipe: Recipe) -> bool:
    """Take encoder and decoder from the model `recipe.init`; a decoder of another shape keeps its random weights.

    The encoder must fit: it decides the latent space, which is why one starts from another model. What trains may be
    padded otherwise than it was: it adapts in a few thousand crops. A multi-scale
    decoder may start from a single-scale one: all of its weights, beside embeddings of the stages that are zero. A
    single-scale one may start from a multi-scale one: it becomes the last stage, which is at full resolution.

    Returns:
        Whether the decoder was taken, too.

    Raises:
        UserError: there is no such model, or its encoder has another shape.
    """
    source = Tokenizer.from_pretrained(recipe.init)
    given = source.config.encoder
    if recipe.training.train_encoder:
        given = dataclasses.replace(given, padding=recipe.model.encoder.padding)
    if given != recipe.model.encoder:
        raise UserError(
            f"init: the encoder of {recipe.init} is {source.config.encoder}, but the recipe says {recipe.model.encoder}"
        )
    tokenizer.encoder.load_state_dict(source.encoder.state_dict())
    if not recipe.training.train_encoder:
        names = ("scaling_factor", "shift_factor", "latent_mean", "latent_std")
        kept = {name: getattr(source.config, name) for name in names}
        tokenizer.config = dataclasses.replace(tokenizer.config, **kept)
    ours, theirs = tokenizer.decoder, source.decoder
    if not same_network(ours, theirs):
        return False
    own, weights = ours.state_dict(), theirs.state_dict()
    own.update({name: value for name, value in weights.items() if name in own})
    if ours.stages == 1 < theirs.stages:  # the stage's embedding is added to the time's
        own["time.2.bias"] = own["time.2.bias"] + weights["stage_embedding"][-1]
    tokenizer.decoder.load_state_dict(own)
    return True


def same_network(ours: PixelDecoder, theirs: PixelDecoder) -> bool:
    """Whether weights of one mean the same in the other; stages and a null latent add some that are zero at first."""
    extra = (
        {"stage_embedding", "null_latent"}
        if ours.stages == theirs.stages or 1 in (ours.stages, theirs.stages)
        else set()
    )
    free = {"size", "attention", "dropout", "residual", "padding", "stages", "null_latent"}
    shapes, fields = [], []
    for decoder in (ours, theirs):
        shapes.append({name: value.shape for name, value in decoder.state_dict().items() if name not in extra})
        fields.append({name: value for name, value in dataclasses.asdict(decoder.config).items() if name not in free})
    return shapes[0] == shapes[1] and fields[0] == fields[1]


def make_objective(recipe: Recipe, tokenizer: Tokenizer, *, batch: int) -> AutoencoderObjective:
    """What is minimised: the autoencoder's objective or a distillation's, of one scale or several.

    Args:
        tokenizer: what trains.
        batch: images of a forward pass.

    Raises:
        UserError: the batch cannot be shared among the stages, or the teacher does not fit.
    """
    config, stages = recipe.distill, recipe.model.decoder.stages
    if recipe.scales.union and batch < 2:
        raise UserError(f"training.batch_size gives {batch} images a pass: scales.union needs at least 2")
    if stages > 1 and not recipe.scales.union and batch % stages and batch < 2 * stages - 1:
        raise UserError(
            f"training.batch_size gives {batch} images a pass: {stages} stages need a multiple of {stages}, "
            f"or at least {2 * stages - 1}"
        )
    if not config.teacher:
        train_encoder = recipe.training.train_encoder
        if recipe.scales.union:
            return UnionObjective(tokenizer, recipe.loss, recipe.scales, train_encoder=train_encoder)
        if stages > 1:
            return ScalesObjective(tokenizer, recipe.loss, recipe.scales, train_encoder=train_encoder)
        return AutoencoderObjective(tokenizer, recipe.loss, train_encoder=train_encoder)
    teacher = Tokenizer.from_pretrained(config.teacher)
    if teacher.config.decoder.stages != stages:
        raise UserError(
            f"distill.teacher {config.teacher} has {teacher.config.decoder.stages} stages, the student {stages}: "
            "they must be equal"
        )
    if stages > 1:
        return ScaleDistillation(tokenizer, teacher, recipe.loss, config, recipe.scales)
    return DistillationObjective(tokenizer, teacher, recipe.loss, config)


def make_samples(
    recipe: Recipe, objective: AutoencoderObjective, *, pictures: int | None, batch: tuple[int, int]
) -> SampleCache | None:
    """The cache of teacher samples that a distillation asks for; None where there is none.

    Args:
        pictures: of the data set, where they can be counted.
        batch: processes, and images of a forward pass of one.

    Raises:
        UserError: the folder holds other samples, or cannot be written.
    """
    if not recipe.distill.cache or not isinstance(objective, DistillationObjective):
        return None
    facts = {
        "teacher": weights_sha256(objective.teacher),
        "teacher_steps": objective.steps,
        "power": objective.power,
        "grid": objective.grid,
        "noise": dataclasses.asdict(recipe.times),
        "data": dataclasses.asdict(recipe.data),
        "pictures": pictures,
        "batch": list(batch),
        "seed": recipe.training.seed,
        "precision": recipe.training.precision,
    }
    return SampleCache(Path(recipe.distill.cache), facts)
