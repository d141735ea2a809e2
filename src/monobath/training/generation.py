"""Training of a latent generator: its recipe, and its data, which are normalised cached latents.

Clean is the latent, (z − mean) / std with z drawn from the posterior; classifier-free guidance (arXiv 2207.12598) needs
a fraction of the samples to have the null class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchvision.utils import make_grid

from ..data import LatentDataset
from ..data.cache import NO_LABELS, check_encoder, open_cache
from ..data.statistics import LatentMoments
from ..errors import UserError
from ..generation import GenerationSampler, Generator, GeneratorConfig
from ..generation.rendering import in_turn
from ..models.dit import DiTConfig
from ..models.encoder import Posterior
from ..tokenizer import Tokenizer
from .config import fractions
from .objectives.base import Batch, Draws
from .objectives.generator import GenerationObjective
from .recipe import Recipe
from .tasks import Place, Task, crops_of

_DROPPING = 1 << 31
"""Turns the seed of a batch into that of the classes that are dropped."""
MEASURED = 10_000
"""Pictures that the statistics are measured on, at most."""


@dataclass(kw_only=True)
class GenerationConfig:
    """Training of a latent generator (`trains: generator`), from what `monobath cache-latents` wrote: `data.source`.
    It learns by flow matching alone, at the times of `times`."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    sampler: GenerationSampler = field(default_factory=GenerationSampler)
    conditional: bool = True
    """The labels of the cache (`cache-latents --labels`) are its classes. False: it has none."""
    classes: list[int] = field(default_factory=list)
    """Train on the pictures with these labels only; empty: on all."""
    drop: float = 0.1
    """Fraction of the samples whose class is the null class, for guidance."""
    statistics: Literal["channel", "overall", "published"] = "channel"
    """What normalises the latents: mean and standard deviation of each channel over the cache, or over all channels, or
    what the tokenizer publishes (`monobath stats`)."""
    tokenizer: str = ""
    """Draws the sample grids, and `monobath generate`'s pictures unless told otherwise; default: the tokenizer that the
    cache was made with. Its encoder must be that of the cache."""

    def __post_init__(self) -> None:
        fractions("generator", self, "drop", below_one=True)
        if self.dit.classes:
            raise UserError(f"generator.dit.classes is {self.dit.classes}: leave it out, the labels of the data decide")


@dataclass(kw_only=True)
class GeneratorRecipe(Recipe):
    """A latent generator learns from a frozen tokenizer's cached latents."""

    trains = "generator"
    fixed: ClassVar[dict[str, tuple[Any, str]]] = {
        "data.latents": (
            True,
            "a generator learns from what monobath cache-latents wrote; set data.latents to true, or leave it out",
        ),
        "data.validation": ([], "it is for tokenizers, but trains is generator; leave it out"),
        "times.zero_noise": (0.0, "it is for tokenizers, but trains is generator; leave it out"),
        "training.train_encoder": (True, ""),
    }

    generator: GenerationConfig = field(default_factory=GenerationConfig)


class GenerationTask(Task):
    """A generator learns from what `monobath cache-latents` wrote."""

    dataset: LatentDataset
    model: Generator
    objective: GenerationObjective

    def __init__(self, recipe: GeneratorRecipe, place: Place) -> None:
        self.recipe, self.place = recipe, place
        ours, folder = recipe.generator, recipe.data.source[0]
        cache = open_cache(recipe.data.source, crops_of(recipe), memory=bool(recipe.data.cache))
        if ours.conditional and not cache.labels:
            raise UserError(f"{folder} has no labels: {NO_LABELS}; or set generator.conditional to false")
        self.dataset = cache.for_generation(ours.classes)
        channels, factor = cache.facts.encoder["latent_channels"], cache.facts.factor
        if ours.dit.latent_channels != channels:
            given = f"generator.dit.latent_channels is {ours.dit.latent_channels}"
            raise UserError(f"{given}, but the latents of {folder} have {channels} channels: set it to that")
        self.side = cache.facts.size // factor
        if self.side % ours.dit.patch:
            given = f"generator.dit.patch is {ours.dit.patch}"
            raise UserError(f"{given}, which does not divide latents of {self.side}×{self.side}: choose another")
        self.tokenizer_name = ours.tokenizer or cache.facts.model
        self.tokenizer = None
        drawing = place.main and recipe.training.sample_every
        if drawing or ours.statistics == "published":
            self.tokenizer = self._tokenizer()

    def build(self) -> None:
        ours = self.recipe.generator
        labels = (sorted(ours.classes) or self.dataset.labels) if ours.conditional else []
        mean, std = self._statistics()
        config = GeneratorConfig(
            dit=dataclasses.replace(ours.dit, classes=len(labels)),
            sampler=ours.sampler,
            size=[self.side, self.side],
            latent_mean=mean,
            latent_std=std,
            labels=labels,
            tokenizer=self.tokenizer_name,
            encoder_sha256=self.dataset.facts.encoder_sha256,
        )
        self.model = Generator(config).train()
        self.model.dit.checkpointing = self.recipe.training.checkpointing
        self.objective = GenerationObjective(self.model)

    def batch(self, loaded: dict[str, Tensor], seed: int, position: int) -> Batch:
        place = self.place
        moments = loaded["moments"].to(place.device, non_blocking=True)
        shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
        draws = Draws.make(
            seed, shape, shape, self.recipe.times, rank=place.rank, world=place.world, device=place.device
        )
        numbers = self._numbers(loaded["label"].tolist(), seed) if self.model.config.labels else None
        return Batch(draws=draws, moments=moments, classes=numbers)

    def _numbers(self, labels: list[int], seed: int) -> Tensor | None:
        """Each sample's class as the network counts it, or the null class."""
        generator = torch.Generator().manual_seed(seed ^ _DROPPING)
        first = self.place.rank * len(labels)
        dropped = torch.rand(self.place.world * len(labels), generator=generator) < self.recipe.generator.drop
        known = [None if gone else label for label, gone in zip(labels, dropped[first:].tolist(), strict=False)]
        return self.model.class_numbers(known)

    def compile(self) -> None:
        self.model.dit.compile()

    def has_model(self, before: Mapping[str, Any]) -> bool:
        ours, theirs = self.recipe.generator, before["generator"]
        same_classes = (theirs["conditional"], theirs["classes"]) == (ours.conditional, ours.classes)
        return before["trains"] == "generator" and same_classes and DiTConfig(**theirs["dit"]) == ours.dit

    def show(self, model: Generator) -> tuple[Tensor, dict[str, float]] | None:
        """Samples of the classes in turn, from seeds that are always the same."""
        if self.tokenizer is None:
            return None
        count = self.recipe.training.samples
        labels = in_turn(model, model.config.labels[:count], count)
        pictures = self.tokenizer.to(self.place.device).decode(model.sample(labels), output="uint8").cpu()
        return make_grid(pictures, nrow=min(count, max(8, len(set(labels)))), padding=2), {}

    def _statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, as `generator.statistics` says."""
        kind, channels = self.recipe.generator.statistics, self.recipe.generator.dit.latent_channels
        if kind == "published":
            assert self.tokenizer is not None
            config = self.tokenizer.config
            if config.latent_mean:
                return config.latent_mean, config.latent_std
            if (config.scaling_factor, config.shift_factor) == (1.0, 0.0):
                raise UserError(
                    f"generator.statistics is published, but {self.tokenizer_name} publishes none: measure them with "
                    'monobath stats, or set it to "channel"'
                )
            return [config.shift_factor] * channels, [1 / config.scaling_factor] * channels
        sums, step = LatentMoments(), -(-len(self.dataset) // MEASURED)
        pixels = (self.dataset.facts.size, self.dataset.facts.size)
        for start in range(0, len(self.dataset), 256 * step):
            part = range(start, min(len(self.dataset), start + 256 * step), step)
            sums.add(Posterior(torch.stack([self.dataset[0, index]["moments"] for index in part]).float(), pixels))
        found = sums.result()
        if kind == "overall":
            return [found.overall_mean] * channels, [found.overall_std] * channels
        return found.mean, found.std

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer that draws the sample grids, or publishes the statistics."""
        try:
            tokenizer = Tokenizer.from_pretrained(self.tokenizer_name)
        except UserError as error:
            raise UserError(
                f"the tokenizer of these latents cannot be loaded ({error}): name one with generator.tokenizer, or "
                'do without it (training.sample_every 0, generator.statistics "channel")'
            ) from None
        try:
            check_encoder(self.dataset, tokenizer.encoder)
        except UserError:
            raise UserError(
                f"{self.dataset.folders[0]} holds latents of another encoder than {self.tokenizer_name}'s: name its "
                "own model with generator.tokenizer"
            ) from None
        return tokenizer
