"""Generator = DiT + normalisation of its latents + sampler: sample, save, load.

    generator = Generator.from_pretrained("runs/dit-64/model")
    z = generator.sample([3, 3, 7])                      # raw latents (3, c, h, w) of classes 3, 3 and 7
    pictures = tokenizer.decode(z, output="pil")         # any tokenizer with the encoder it was trained on

The network sees (z − mean) / std. Latents outside are raw, as everywhere in monobath: they go straight into `decode`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import store
from ..config import config_of
from ..errors import UserError
from ..models.dit import DiT, DiTConfig
from ..models.loading import built
from ..sampling import draw_noise, euler, seeds_for
from .guidance import guided

FORMAT = "monobath-generator-1"
MOST_TOKENS = 2**16
"""Of one sample: latents of 512² at patch 2. A file that claims more is damaged."""


@dataclass(kw_only=True)
class GenerationSampler:
    """How latents are sampled unless the caller says otherwise."""

    steps: int = 50
    """Euler steps."""
    power: float = 1.0
    """Exponent of the time grid: above 1 puts more steps near the latent."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: none."""
    interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """[low, high]: guidance acts at times low < t ≤ high only; 1 is pure noise."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.power <= 0:
            raise UserError(f"sampler: steps={self.steps} must be at least 1 and power={self.power} above 0")
        check_interval(self.interval)


def check_interval(interval: Sequence[float], name: str = "sampler.interval") -> None:
    """Raise `UserError` unless it is two times, 0 ≤ low ≤ high ≤ 1."""
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"{name} is {list(interval)}: give two times, 0 ≤ low ≤ high ≤ 1")


def check_size(size: Sequence[int], patch: int) -> None:
    """Raise `UserError` unless `size`, height and width of latents, is a number of whole patches, and not too many."""
    whole = len(size) == 2 and all(side > 0 and side % patch == 0 for side in size)
    if not whole or size[0] * size[1] > MOST_TOKENS * patch**2:
        raise UserError(
            f"size is {list(size)}: give a height and a width, above 0 and divisible by dit.patch={patch}, of at most "
            f"{MOST_TOKENS} patches in all"
        )


@dataclass(kw_only=True)
class GeneratorConfig:
    """Everything needed to build a generator; stored with its weights."""

    dit: DiTConfig = field(default_factory=DiTConfig)
    sampler: GenerationSampler = field(default_factory=GenerationSampler)
    size: list[int] = field(default_factory=lambda: [32, 32])
    """Height and width of the latents that it was trained on."""
    latent_mean: list[float] = field(default_factory=list)
    """Subtracted from the latents: one number a channel."""
    latent_std: list[float] = field(default_factory=list)
    """Then divided by: one number a channel."""
    labels: list[int] = field(default_factory=list)
    """Labels of the classes, in the data that it was trained on; the network counts them from 0."""
    tokenizer: str = ""
    """The tokenizer that made the latents: a packaged name, a path, or a Hub id."""
    encoder_sha256: str = ""
    """Hash of that tokenizer's encoder: other decoders of the same encoder fit, too."""

    def __post_init__(self) -> None:
        channels = self.dit.latent_channels
        for name, neutral in (("latent_mean", 0.0), ("latent_std", 1.0)):
            values = getattr(self, name) or [neutral] * channels
            if len(values) != channels:
                raise UserError(f"{name} is {values}: give one number for each of the {channels} latent channels")
            setattr(self, name, values)
        if min(self.latent_std) <= 0:
            raise UserError(f"latent_std is {self.latent_std}: every channel's must be above 0")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) != self.dit.classes:
            raise UserError(f"labels are {self.labels}: give {self.dit.classes} different ones, for dit.classes")
        check_size(self.size, self.dit.patch)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GeneratorConfig:
        """Build from plain values; an unknown key is a `UserError` that names it."""
        return config_of(cls, values, {"dit": DiTConfig, "sampler": GenerationSampler}, "generator")


class Generator(nn.Module):
    """A latent generator.

    Attributes:
        config: `GeneratorConfig`.
        dit: `(normalised x_t, t, class numbers)` → velocity; `sample` is the friendly form.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.dit = DiT(config.dit)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.dit.out.weight.device

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents `(B, c, h, w)` → what the network sees, about N(0, 1). Inverse of `denormalise`."""
        mean, std = self._statistics(z)
        return (z - mean) / std

    def denormalise(self, z: Tensor) -> Tensor:
        """What the network sees → raw latents. Inverse of `normalise`."""
        mean, std = self._statistics(z)
        return z * std + mean

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each `(c, 1, 1)`."""
        mean, std = self.config.latent_mean, self.config.latent_std
        return z.new_tensor(mean)[:, None, None], z.new_tensor(std)[:, None, None]

    def class_numbers(self, labels: Sequence[int | None]) -> Tensor | None:
        """The network's numbers of labels, int64 `(B,)`, None being the null class; None for a network of no classes.

        Raises:
            UserError: a label that the generator was not trained on.
        """
        known = {label: number for number, label in enumerate(self.config.labels)}
        for label in labels:
            if label is not None and label not in known:
                known_words = f"it knows {', '.join(map(str, known))}" if known else "it was trained without classes"
                raise UserError(f"class {label} is unknown to this generator: {known_words}")
        if not known:
            return None
        numbers = [self.dit.null if label is None else known[label] for label in labels]
        return torch.tensor(numbers, device=self.device)

    @torch.no_grad()
    def sample(
        self,
        labels: Sequence[int | None],
        *,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        interval: Sequence[float] | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """New latents.

        Args:
            labels: the class of each sample, as in the data; None: of no class. So many samples are made at once.
            size: height and width of the latents; default: as in training.
            seed: one int a sample, or an int s meaning s, s + 1, …. Noise is drawn per sample on the CPU in float32,
                so a sample depends on neither its batch nor the device.
            steps: Euler steps; default, as of what follows: what the generator was made for.
            guidance: scale of classifier-free guidance; 1: none.
            interval: (low, high): guidance at times low < t ≤ high only.
            callback: called after each step with (steps done, normalised state).

        Returns:
            Raw latents, float32 `(len(labels), c, h, w)`, for `Tokenizer.decode`.

        Raises:
            UserError: no sample, an unknown class, or a size, number of steps or interval that cannot be.
        """
        sampler, dit = self.config.sampler, self.config.dit
        steps = sampler.steps if steps is None else steps
        guidance = sampler.guidance if guidance is None else guidance
        interval = sampler.interval if interval is None else interval
        check_interval(interval, "interval")
        size = size or (self.config.size[0], self.config.size[1])
        if not labels:
            raise UserError("no samples: give at least one label, or None for a sample of no class")
        check_size(size, dit.patch)
        numbers = self.class_numbers(labels)
        if numbers is None and guidance != 1:
            raise UserError(f"guidance={guidance}: this generator was trained without classes, so leave it at 1")
        dtype = self.dit.out.weight.dtype

        def network(x_t: Tensor, t: Tensor, numbers: Tensor | None) -> Tensor:
            return self.dit(x_t.to(dtype), t, numbers).float()

        velocity = guided(network, numbers, self.dit.null, scale=guidance, interval=interval)
        noise = draw_noise((dit.latent_channels, *size), seeds_for(seed, len(labels))).to(self.device)
        z = euler(velocity, noise, kind="v", steps=steps, power=sampler.power, callback=callback)
        return self.denormalise(z)

    # ---- files ----------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, extra: dict[str, Any] | None = None) -> None:
        """Write `config.json` and `model.safetensors` (config inside) to a folder, atomically; never pickle.

        Args:
            extra: plain values kept in the config under "training", such as the recipe.

        Raises:
            UserError: the folder cannot be written; what was there stays as it was.
        """
        store.write(Path(save_directory), self, FORMAT, dataclasses.asdict(self.config), extra)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Generator:
        """Load a generator from a folder (or its `model.safetensors`), in evaluation mode.

        Args:
            device: where to put it; default: the CPU.
            dtype: of the weights and the arithmetic; default: float32.

        Raises:
            UserError: no such folder, a corrupt file, or one that is no generator.
        """
        if not Path(name).exists():
            remedy = "give the folder that monobath train dit-64 wrote, such as runs/dit-64/model"
            raise UserError(f"no generator {str(name)!r}: {remedy}")
        config, state = store.read(Path(name), FORMAT, "generator")
        how = GeneratorConfig.from_dict(config)
        generator = built(lambda: cls(how), state, str(name))
        return generator.to(device=device, dtype=dtype or torch.float32).eval()
