"""What a run trains, between the loop, which knows steps, and the networks, which know tensors.

`TokenizerTask` is here; `GenerationTask`, of latent generators, is in `generation.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from ..data import Crops, LatentDataset, PhotoDataset, StreamDataset, iterate_eval, make_dataset
from ..data.cache import check_encoder, open_cache, stored_moments
from ..errors import UserError
from ..images import to_float
from ..tokenizer import TokenizerConfig
from .building import make_objective, make_samples, make_tokenizer
from .config import Recipe
from .objectives import Draws


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
        objective: what is minimised, a module that holds the model: `objective(*inputs)` gives float32 scalars, of
            which `loss` is the sum.
    """

    dataset: PhotoDataset | StreamDataset | LatentDataset
    model: Any
    objective: Any

    def __init__(self, recipe: Recipe, place: Place) -> None:
        self.recipe, self.place = recipe, place

    @abc.abstractmethod
    def build(self) -> None:
        """Make `model` and `objective`, on the CPU."""

    @abc.abstractmethod
    def inputs(self, batch: dict[str, Tensor], seed: int, position: int) -> tuple[Any, ...]:
        """What the objective is called with. All random numbers come from `seed`, which all processes share.

        Args:
            batch: this process', from the loader.
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

    def learned(self, position: int) -> None:  # noqa: B027
        """Called after the backward pass of `inputs(…, position)`."""

    def show(self, model: Any) -> tuple[Tensor, dict[str, float]] | None:
        """A picture of what `model`, the averaged one, does: uint8 `(3, H, W)`, and figures; None: there is none."""
        return None


class TokenizerTask(Task):
    """A tokenizer, or its decoder alone, learns from pictures or from cached latents."""

    def __init__(self, recipe: Recipe, place: Place) -> None:
        super().__init__(recipe, place)
        data, training = recipe.data, recipe.training
        if data.latents:
            if training.train_encoder:
                raise UserError(
                    "data.latents is true with training.train_encoder true: cached latents are those of a frozen "
                    "encoder; set training.train_encoder to false, or data.latents to false"
                )
            self.dataset = open_cache(data.source, crops_of(recipe), memory=data.cache, windows=True)
        else:
            self.dataset = make_dataset(data.source, crops_of(recipe), cache=data.cache)
        self.examples = self._examples() if place.main and training.sample_every else None

    def build(self) -> None:
        training, place = self.recipe.training, self.place
        self.model = make_tokenizer(self.recipe, self.dataset, quiet=not place.main)
        self.objective = make_objective(self.recipe, self.model, batch=place.micro)
        pictures = None if isinstance(self.dataset, StreamDataset) else len(self.dataset)
        self.samples = make_samples(self.recipe, self.objective, pictures=pictures, batch=(place.world, place.micro))
        self.model.encoder.checkpointing = training.checkpointing
        self.model.decoder.set_checkpointing(training.checkpointing)

    def inputs(self, batch: dict[str, Tensor], seed: int, position: int) -> tuple[Any, ...]:
        place = self.place
        x = to_float(batch["image"].to(place.device, non_blocking=True))
        moments = stored_moments(batch)
        moments = None if moments is None else moments.to(place.device, non_blocking=True)
        if self.recipe.training.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        draws = Draws.make(
            seed, tuple(x.shape), self._latent_shape(x, moments), self.recipe.times, grid=self.objective.grid,
            rank=place.rank, world=place.world, device=place.device,
        )  # fmt: skip
        target = self.samples.read(position, place.rank) if self.samples is not None else None
        self._sampled = target is not None
        target = None if target is None else target.to(place.device)
        more = self.objective.more_draws(seed, len(x), place.rank, place.world)
        return x, draws.t, draws.noise, draws.latent_noise, moments, target, *more

    def learned(self, position: int) -> None:
        """Keep what the teacher sampled for this batch, if it did."""
        if self.samples is not None and not self._sampled:
            self.samples.write(position, self.place.rank, self.objective.target)

    def compile(self) -> None:
        self.model.encoder.compile()
        self.model.decoder.compile()

    def resumed(self) -> None:
        if isinstance(self.dataset, LatentDataset):
            check_encoder(self.dataset, self.model.encoder)

    def has_model(self, before: Mapping[str, Any]) -> bool:
        return TokenizerConfig.from_dict(before["model"]) == self.recipe.model

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


def same_model(task: Task, before: Any) -> bool:
    """`task.has_model` of whatever a `config.yaml` may hold; a recipe that trains something else has another."""
    try:
        return before.get("trains", "tokenizer") == task.recipe.trains and task.has_model(before)
    except (UserError, TypeError, KeyError, AttributeError):
        return False
