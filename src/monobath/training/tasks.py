"""What a run trains, between the loop, which knows steps, and the networks, which know tensors.

`TokenizerTask` is here; `GenerationTask`, of latent generators, is in `generation.py`. Both import the objective that
they need when they need it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from ..config import TokenizerConfig
from ..data import Crops, LatentDataset, PhotoDataset, StreamDataset, iterate_eval, make_dataset
from ..data.cache import check_encoder, open_cache, stored_moments
from ..data.resident import ResidentPictures
from ..errors import UserError
from ..images import to_float
from ..models.identity import weights_sha256
from ..sampling import time_grid
from ..tokenizer import Tokenizer
from .initialise import AnyDataset, make_tokenizer
from .objectives.base import AutoencoderObjective, Batch, Draws, Losses
from .recipe import DistillationRecipe, Recipe, TokenizerRecipe, only_times
from .samples import SampleCache


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands among those of a run."""

    device: torch.device
    rank: int
    world: int
    micro: int
    """Samples of a forward pass."""

    @property
    def main(self) -> bool:
        """The process that writes and tells."""
        return self.rank == 0


class Task(abc.ABC):
    """Data, networks and objective of a run.

    Making one opens the data: a wrong path says so at once, and leaves nothing behind. `build` makes the networks, with
    weights from the global generator.

    Attributes:
        dataset: what `make_loader` takes.
        model: what is trained, averaged and saved; has `save_pretrained`.
        objective: what is minimised, a module that holds the model: `Batch` → `Losses`.
    """

    dataset: AnyDataset
    model: Any
    objective: Any

    @abc.abstractmethod
    def build(self) -> None:
        """Make `model` and `objective`, on the CPU."""

    @abc.abstractmethod
    def batch(self, loaded: dict[str, Tensor], seed: int, position: int) -> Batch:
        """What the objective is called with. All random numbers come from `seed`, which all processes share.

        Args:
            loaded: this process' samples, from the loader.
            seed: of this batch.
            position: number of this forward pass in the run.
        """

    @abc.abstractmethod
    def compile(self) -> None:
        """`torch.compile` the networks."""

    @abc.abstractmethod
    def has_model(self, before: Mapping[str, Any]) -> bool:
        """Whether a stored recipe has this one's model; a field that came after it has its default."""

    def resumed(self) -> None:  # noqa: B027  (nothing to check is a fine default)
        """Called once the weights are those to go on from.

        Raises:
            UserError: they do not go with the data.
        """

    def learned(self, batch: Batch, losses: Losses, position: int) -> None:  # noqa: B027
        """Called after the backward pass of `batch(…, position)`."""

    def show(self, model: Any) -> tuple[Tensor, dict[str, float]] | None:
        """A picture of what `model`, the averaged one, does: uint8 `(3, H, W)`, and figures; None: there is none."""
        return None


def task_of(recipe: Recipe, place: Place) -> Task:
    """The task of a recipe's kind."""
    if isinstance(recipe, TokenizerRecipe):
        return TokenizerTask(recipe, place)
    from .generation import GenerationTask, GeneratorRecipe

    assert isinstance(recipe, GeneratorRecipe)
    return GenerationTask(recipe, place)


class TokenizerTask(Task):
    """A tokenizer, or its decoder alone, learns from pictures or from cached latents."""

    samples: SampleCache | None = None
    resident: ResidentPictures | None = None

    def __init__(self, recipe: TokenizerRecipe, place: Place) -> None:
        self.recipe, self.place = recipe, place
        data, training = recipe.data, recipe.training
        if data.latents:
            if training.train_encoder:
                raise UserError(
                    "data.latents is true with training.train_encoder true: cached latents are those of a frozen "
                    "encoder; set training.train_encoder to false, or data.latents to false"
                )
            whole = bool(recipe.model.decoder.context)  # a window's statistics are not those of the picture
            self.dataset = open_cache(data.source, crops_of(recipe), memory=bool(data.cache), windows=not whole)
        else:
            self.dataset = make_dataset(data.source, crops_of(recipe), cache=bool(data.cache))
        self.examples = self._examples() if place.main and training.sample_every else None

    def build(self) -> None:
        training = self.recipe.training
        self.model = make_tokenizer(self.recipe, self.dataset, quiet=not self.place.main)
        self.objective = self._objective()
        self.model.encoder.checkpointing = training.checkpointing
        self.model.decoder.set_checkpointing(training.checkpointing)

    def _objective(self) -> AutoencoderObjective:
        """Of one scale or several; a distillation's has a teacher, and maybe its samples."""
        recipe, scales, batch = self.recipe, self.recipe.scales, self.place.micro
        if scales is not None and scales.union and batch < 2:
            raise UserError(f"training.batch_size gives {batch} images a pass: scales.union needs at least 2")
        stages = recipe.model.decoder.stages
        if scales is not None and not scales.union and batch % stages and batch < 2 * stages - 1:
            needed = f"{stages} stages need a multiple of {stages}, or at least {2 * stages - 1}"
            raise UserError(f"training.batch_size gives {batch} images a pass: {needed}")
        train_encoder = recipe.training.train_encoder
        if isinstance(recipe, DistillationRecipe):
            return self._distillation(recipe)
        if scales is None:
            return AutoencoderObjective(self.model, recipe.loss, train_encoder=train_encoder)
        from .objectives.staged import StagedObjective, UnionObjective

        objective = UnionObjective if scales.union else StagedObjective
        return objective(self.model, recipe.loss, scales, train_encoder=train_encoder)

    def _distillation(self, recipe: DistillationRecipe) -> AutoencoderObjective:
        from .objectives.distilled import DistillationObjective, StagedDistillation

        if not recipe.distill.teacher:
            raise UserError(f"recipe {recipe.name} names no teacher: add distill.teacher")
        teacher = Tokenizer.from_pretrained(recipe.distill.teacher)
        _check_times(recipe, teacher)
        if recipe.scales is not None:
            return StagedDistillation(self.model, teacher, recipe.loss, recipe.distill, recipe.scales)
        objective = DistillationObjective(self.model, teacher, recipe.loss, recipe.distill)
        if recipe.distill.cache:
            facts = {
                "teacher": weights_sha256(teacher),
                "teacher_steps": objective.steps,
                "power": objective.power,
                "grid": objective.grid,
                "noise": dataclasses.asdict(recipe.times),
                "data": dataclasses.asdict(recipe.data),
                "pictures": None if isinstance(self.dataset, StreamDataset) else len(self.dataset),
                "batch": [self.place.world, self.place.micro],
                "seed": recipe.training.seed,
                "precision": recipe.training.precision,
            }
            self.samples = SampleCache(Path(recipe.distill.cache), facts)
        return objective

    def batch(self, loaded: dict[str, Tensor], seed: int, position: int) -> Batch:
        place = self.place
        pixels = loaded["image"] if self.resident is None else self.resident.crops(loaded["place"])
        x = to_float(pixels.to(place.device, non_blocking=True))
        moments = stored_moments(loaded)
        moments = None if moments is None else moments.to(place.device, non_blocking=True)
        if self.recipe.training.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        draws = Draws.make(
            seed, tuple(x.shape), self._latent_shape(x, moments), self.recipe.times, grid=self.objective.grid,
            rank=place.rank, world=place.world, device=place.device,
        )  # fmt: skip
        self.objective.draw(draws, seed, place.rank, place.world)
        target = None if self.samples is None else self.samples.read(position, place.rank)
        return Batch(draws=draws, images=x, moments=moments, target=None if target is None else target.to(place.device))

    def learned(self, batch: Batch, losses: Losses, position: int) -> None:
        """Keep what the teacher sampled for this batch, if it did."""
        if self.samples is not None and batch.target is None:
            assert losses.target is not None
            self.samples.write(position, self.place.rank, losses.target)

    def compile(self) -> None:
        self.model.encoder.compile()
        self.model.decoder.compile()

    def resumed(self) -> None:
        if isinstance(self.dataset, LatentDataset):
            check_encoder(self.dataset, self.model.encoder)
        elif self.recipe.data.cache == "device" and isinstance(self.dataset, PhotoDataset):
            self.resident = ResidentPictures(self.dataset, self.place.device)

    def has_model(self, before: Mapping[str, Any]) -> bool:
        same_kind = before.get("trains") != "generator"
        return same_kind and TokenizerConfig.from_dict(before["model"]) == self.recipe.model

    def show(self, model: nn.Module) -> tuple[Tensor, dict[str, float]] | None:
        """Pictures above, their reconstructions below, and the latters' mean PSNR."""
        if self.examples is None:
            return None
        posterior = model.encode(self.examples.to(self.place.device))  # type: ignore[operator]
        output = model.decode(posterior.mode(), output="uint8").cpu()  # type: ignore[operator]
        error = (output.float() - self.examples.float()).div(255).square().mean((1, 2, 3))
        psnr = (-10 * error.clamp_min(1e-10).log10()).mean().item()
        return make_grid(torch.cat([self.examples, output]), nrow=len(output), padding=2), {"sample_psnr": psnr}

    def _examples(self) -> Tensor:
        """uint8 `(n, 3, size, size)`: what the sample grids show."""
        data = self.recipe.data
        if isinstance(self.dataset, LatentDataset) and self.dataset.facts.layout == "parquet" and not data.validation:
            count = min(self.recipe.training.samples, len(self.dataset))
            return torch.stack([self.dataset[0, index]["image"] for index in range(count)])
        fixed = make_dataset(data.validation or data.source, crops_of(self.recipe).centred())
        parts = iterate_eval(fixed, batch_size=8, limit=self.recipe.training.samples)
        return torch.cat([part["image"] for part in parts])

    def _latent_shape(self, x: Tensor, moments: Tensor | None) -> tuple[int, ...]:
        if moments is not None:
            return (len(x), moments.shape[1] // 2, *moments.shape[2:])
        encoder = self.recipe.model.encoder
        return (len(x), encoder.latent_channels, x.shape[2] // encoder.factor, x.shape[3] // encoder.factor)


def crops_of(recipe: Recipe) -> Crops:
    """The crops that a recipe trains on."""
    data = recipe.data
    return Crops(
        size=data.size, scale=(data.scale[0], data.scale[1]), flip=data.flip, seed=recipe.training.seed,
        max_pixels=data.max_pixels, min_side=data.min_side,
    )  # fmt: skip


def _check_times(recipe: DistillationRecipe, teacher: Tokenizer) -> None:
    """Raises `UserError` where the teacher would be sampled at other times than it has learned at."""
    distill, anywhere = recipe.distill, recipe.scales is not None and recipe.scales.renoise
    known = only_times(Tokenizer.training_of(distill.teacher).get("recipe") or {})
    asked = time_grid(distill.steps, distill.power or teacher.config.sampler.power)[:-1].tolist()
    if known and (anywhere or not set(asked) <= set(known)):
        times = " and ".join(f"{time:g}" for time in known)
        raise UserError(
            f"distill.teacher {distill.teacher} was trained at t = {times} alone, and cannot be sampled "
            + ("from any other (scales.renoise)" if anywhere else f"in {distill.steps} steps")
            + ": name one that was trained at all times (times.ones below 1)"
            + ("" if anywhere else ", or set distill.steps to 1")
        )
