"""Mean and standard deviation of latents over pictures: measured, and stored with a model.

    statistics = latent_statistics(tokenizer, "photos", size=256)
    store_statistics("runs/cpu-default/model", statistics, Path("model"))

Generators of latents need them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import resources, store
from ..errors import UserError, check_least
from ..images import MAX_PIXELS
from ..models.encoder import Posterior
from ..tokenizer import FORMAT, Tokenizer
from .loader import iterate_eval
from .pictures import Crops, PhotoDataset, make_dataset
from .sources import Source

Progress = Callable[[int, int | None], None]
"""Called with (done, in all, if known)."""


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Mean and standard deviation of posterior samples z over a data set.

    With means μ and variances σ² of the posteriors, E[z] = E[μ] and Var[z] = Var[μ] + E[σ²], over pictures and
    positions; overall, over channels too. Nothing is drawn.
    """

    pictures: int
    mean: list[float]
    """Of each channel."""
    std: list[float]
    """Of each channel."""
    overall_mean: float
    overall_std: float


class LatentMoments:
    """Sums up posteriors, in float64, in one pass and without keeping them."""

    def __init__(self) -> None:
        self.pictures, self.count = 0, 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)  # Σ (μ − mean)², by channel
        self.variances = torch.zeros((), dtype=torch.float64)  # Σ σ², by channel

    def add(self, posterior: Posterior) -> None:
        """Take in a batch of posteriors over latents `(B, c, h, w)`."""
        means = posterior.mean.double().transpose(0, 1).flatten(1)  # (c, B·h·w)
        variances = posterior.logvar.double().exp().transpose(0, 1).flatten(1)
        count = means.shape[1]
        mean = means.mean(1)
        squares = (means - mean[:, None]).square().sum(1)
        # Chan, Golub and LeVeque 1979: no difference of large numbers.
        gap, total = mean - self.mean, self.count + count
        self.squares = self.squares + squares + gap.square() * self.count * count / total
        self.mean = self.mean + gap * count / total
        self.variances = self.variances + variances.sum(1)
        self.count = total
        self.pictures += len(posterior.mean)

    def result(self) -> LatentStatistics:
        """The statistics so far.

        Raises:
            UserError: nothing was added, or the latents are not finite or all the same.
        """
        if not self.count:
            raise UserError("no picture, so no statistics: raise the limit above 0")
        variance = (self.squares + self.variances) / self.count
        # All channels have as many values: the variance of all is that within channels plus that between them.
        overall = variance.mean() + self.mean.var(correction=0)
        if not (torch.isfinite(overall) and overall > 0):
            raise UserError(f"the variance of the latents is {overall.item()}: this encoder cannot be scaled")
        return LatentStatistics(
            pictures=self.pictures,
            mean=self.mean.tolist(),
            std=variance.sqrt().tolist(),
            overall_mean=self.mean.mean().item(),
            overall_std=overall.sqrt().item(),
        )


@torch.no_grad()
def latent_statistics(
    tokenizer: Tokenizer,
    source: Source,
    *,
    size: int = 256,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> LatentStatistics:
    """Statistics of the latents of pictures, each resized to `size` on its short side and cropped to the centre.

    Args:
        tokenizer: the encoder decides; any device.
        source: folders, shards, shard URLs, patterns, or a list of them.
        size: in pixels; sides that the factor does not divide are padded, as always.
        limit: at most so many pictures.
        batch_size: pictures at once.
        workers: processes that read pictures.
        max_pixels: larger pictures are left out.

    Raises:
        UserError: no usable picture, or latents that are not finite or all the same.
    """
    check_least(1, {"limit": limit})
    dataset = make_dataset(source, Crops(size=size, augment=False, max_pixels=max_pixels))
    total = min(len(dataset), limit or len(dataset)) if isinstance(dataset, PhotoDataset) else limit
    sums = LatentMoments()
    for batch in iterate_eval(dataset, batch_size=batch_size, num_workers=workers, limit=limit):
        sums.add(tokenizer.encode(batch["image"]))
        if progress:
            progress(sums.pictures, total)
    return sums.result()


def check_writable(name: str) -> Path:
    """The folder of a model that may be changed in place.

    Raises:
        UserError: it is packaged, or not a model folder on this machine.
    """
    if resources.weights_path(name) is not None:
        raise UserError(f"{name} is packaged and cannot be changed in place: give a new folder to write to")
    folder = Path(name)
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{name} is not a model folder on this machine, so it cannot be changed in place")
    return folder


def store_statistics(name: str, statistics: LatentStatistics, out: Path, **facts: Any) -> None:
    """Write a model with the statistics in its config; weights and their type stay what they are.

    `shift_factor` becomes the overall mean and `scaling_factor` one over the overall standard deviation; but a model of
    foreign latents keeps its family's, which that family's generators expect.

    Args:
        name: of the model, as `Tokenizer.from_pretrained` takes it.
        out: folder for the model, written atomically; the model's own folder changes it in place.
        facts: plain values to be kept with the config, such as the data.

    Raises:
        UserError: the folder cannot be written.
    """
    folder, _ = store.locate(name, local_files_only=True)
    config, (_, state) = store.stored(folder, FORMAT, "tokenizer"), store.read(folder, FORMAT, "tokenizer")
    config |= {"latent_mean": statistics.mean, "latent_std": statistics.std}
    if not config["encoder"].get("family"):
        config |= {"scaling_factor": 1 / statistics.overall_std, "shift_factor": statistics.overall_mean}
    config["training"] = (config.get("training") or {}) | {
        "latent_statistics": {"pictures": statistics.pictures, **facts}
    }
    store.write_files(out, config, state)
