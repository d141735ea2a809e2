"""Latents of a whole data set: their statistics, and a cache of them to train from.

    statistics = latent_statistics(tokenizer, "photos", size=256)
    facts = cache_latents(tokenizer, "photos", Path("cache"), size=64)
    train(recipe with data.source = ["cache"], data.latents = True, training.train_encoder = False)

SSDD (arXiv 2510.04961) shares one frozen encoder between all its decoders, so that its latents can be computed once;
generators of latents need their mean and standard deviation, which are stored with the model.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import resources
from ..data import LatentDataset, PhotoDataset, Source, is_remote, iterate_copies, iterate_eval, make_dataset
from ..data.latents import CacheFacts, read_facts, shard_path, write_facts, write_shard
from ..errors import UserError
from ..files import write_folder
from ..images import MAX_PIXELS, to_float
from ..models.encoder import Encoder, EncoderConfig, Posterior
from ..models.frozen import ForeignEncoder, missing_encoder, without_spread
from ..tokenizer import Tokenizer
from .config import DataConfig

Progress = Callable[[int, int | None], None]
"""Called with (done, in all, if known)."""

HALF_MAX = 65504.0
"""Largest number in half precision."""
TAR_END = 10 * 1024
"""Bytes that tar fills the end of an archive with, at most."""


# ---- statistics -------------------------------------------------------------------------------------------------


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
        self.mean = torch.zeros(0)
        self.squares = torch.zeros(0)  # Σ (μ − mean)², by channel
        self.variances = torch.zeros(0)  # Σ σ², by channel

    def add(self, posterior: Posterior) -> None:
        """Take in a batch of posteriors over latents `(B, c, h, w)`."""
        means = posterior.mean.double().transpose(0, 1).flatten(1)  # (c, B·h·w)
        variances = posterior.logvar.double().exp().transpose(0, 1).flatten(1)
        count = means.shape[1]
        mean = means.mean(1)
        squares = (means - mean[:, None]).square().sum(1)
        if self.count == 0:
            self.mean, self.squares, self.variances = (
                torch.zeros_like(mean),
                torch.zeros_like(mean),
                torch.zeros_like(mean),
            )
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
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: it must be at least 1 picture")
    dataset = make_dataset(source, size=size, augment=False, max_pixels=max_pixels)
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
    file = _weights_file(name)
    with safe_open(file, framework="pt") as opened:
        inside = (opened.metadata() or {}).get("config", "{}")
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    beside = file.parent / "config.json"
    config = json.loads(beside.read_text(encoding="utf-8") if not Path(name).is_file() and beside.is_file() else inside)
    config |= {"latent_mean": statistics.mean, "latent_std": statistics.std}
    if not config["encoder"].get("family"):
        config |= {"scaling_factor": 1 / statistics.overall_std, "shift_factor": statistics.overall_mean}
    config["training"] = (config.get("training") or {}) | {
        "latent_statistics": {"pictures": statistics.pictures, **facts}
    }

    def write(folder: Path) -> None:
        save_file(state, folder / "model.safetensors", metadata={"config": json.dumps(config), "format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    write_folder(out, write)


def _weights_file(name: str) -> Path:
    """`model.safetensors` of a model that `from_pretrained` has loaded, so that a Hub repository is here already."""
    path = resources.weights_path(name) or Path(name)
    if path.is_file():
        return path
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(name, local_files_only=True))
    return path / "model.safetensors"


# ---- a cache ----------------------------------------------------------------------------------------------------


def weights_sha256(module: nn.Module) -> str:
    """Hash of a network's weights: names, shapes and float32 values. What a cache and a run must agree in.

    A foreign encoder's are those of its network; of a callable without weights, where it came from.
    """
    found = hashlib.sha256()
    if isinstance(module, ForeignEncoder):
        if not isinstance(module.network, nn.Module):
            return hashlib.sha256(f"{module.config.family} {module.config.source}".encode()).hexdigest()
        module = module.network
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().float().cpu() + 0.0  # −0 becomes 0: averaging weights may drop the sign of a zero
        found.update(values.contiguous().numpy().tobytes())
    return found.hexdigest()


def cache_latents(
    tokenizer: Tokenizer | ForeignEncoder,
    source: Source,
    out: Path,
    *,
    size: int,
    scale: tuple[int, int] | None = None,
    copies: int = 1,
    seed: int = 0,
    flip: bool = True,
    shard_mb: float = 256,
    batch_size: int = 32,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 16,
    model: str = "",
    dtype: torch.dtype = torch.float32,
    labels: bool = False,
    progress: Progress | None = None,
) -> CacheFacts:
    """Encode augmented crops of every picture once and write them to shards: see `data/latents.py`.

    The same call goes on where it stopped, and writes the same bytes as if it had not: finished shards are kept.

    Args:
        tokenizer: with float32 weights, whose hash identifies the encoder; or a foreign encoder alone.
        source: folders, shards, patterns, or a list of them; no URLs.
        out: folder for the shards and `latents.json`.
        size: side of the crops, in pixels; a multiple of the tokenizer's factor.
        scale: range of the short side before cropping; default (size, 2·size), as in recipes.
        copies: crops of each picture: those of the first `copies` epochs of a run with this seed.
        seed, flip: of the crops, as in training.
        shard_mb: no shard is larger, in MiB (unless one picture's copies are).
        batch_size: crops at once.
        workers: processes that read and crop pictures; they change nothing in what is written.
        max_pixels, min_side: pictures outside are replaced by their neighbours, as in training.
        model: what the user calls the tokenizer, for messages.
        dtype: arithmetic of the encoder.
        labels: also keep every picture's label, for generators of classes: see `data.sources.find_samples`.

    Returns:
        The facts of the finished cache.

    Raises:
        UserError: bad settings, no usable picture, latents that half precision cannot hold, or a folder that holds a
            cache made otherwise.
    """
    encoder = tokenizer.encoder if isinstance(tokenizer, Tokenizer) else tokenizer
    config = encoder.config
    if isinstance(encoder, ForeignEncoder) and encoder.network is None:
        raise UserError(missing_encoder(config))
    for name, value, least in (("copies", copies, 1), ("shard_mb", shard_mb, 0), ("batch_size", batch_size, 1)):
        if value < least or not value:
            raise UserError(f"{name} is {value}: it must be {f'at least {least}' if least else 'above 0'}")
    if size % config.factor:
        raise UserError(f"size={size} must be divisible by the encoder's factor {config.factor}")
    if is_remote(source):
        raise UserError(f"{source}: latents of streamed shards cannot be cached; give local folders or shards")
    low, high = scale or (size, 2 * size)
    dataset = PhotoDataset(
        source, size=size, scale=(low, high), flip=flip, seed=seed, max_pixels=max_pixels, min_side=min_side,
        labels=labels,
    )  # fmt: skip
    found = {sample.label for sample in dataset.samples if sample.label is not None}
    if found and min(found) < 0:
        raise UserError(f"label {min(found)}: labels that are kept must be at least 0")
    values = 2 * config.latent_channels * (size // config.factor) ** 2
    # At most: the crop, its moments in half precision, and what tar and the small files add.
    bytes_a_picture = copies * (3 * size**2 + 2 * values + 6 * 1024)
    facts = CacheFacts(
        encoder=_encoder_facts(config),
        encoder_sha256=weights_sha256(encoder),
        model=model,
        dtype=str(dtype).removeprefix("torch."),
        factor=config.factor,
        size=size,
        scale=[low, high],
        flip=flip,
        seed=seed,
        max_pixels=max_pixels,
        min_side=min_side,
        copies=copies,
        pictures=len(dataset),
        pictures_sha256=hashlib.sha256("\n".join(sample.name for sample in dataset.samples).encode()).hexdigest(),
        pictures_a_shard=max(1, int((shard_mb * 2**20 - TAR_END) / bytes_a_picture)),
        labels=sorted(found),
    )
    before = read_facts(out)
    if before and facts.differences(before):
        raise UserError(f"{out} holds a cache made otherwise ({facts.differences(before)}): choose another folder")
    missing = [shard for shard in range(facts.shards) if not shard_path(out, shard).is_file()]
    _write_shards(encoder, dataset, facts, out, missing, batch_size, workers, dtype, progress)
    facts = replace(facts, complete=True)
    write_facts(out, facts)
    return facts


@torch.no_grad()
def _write_shards(
    encoder: Encoder | ForeignEncoder,
    dataset: PhotoDataset,
    facts: CacheFacts,
    out: Path,
    missing: list[int],
    batch_size: int,
    workers: int,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    encoder = copy.deepcopy(encoder).to(dtype).eval()
    wanted = [picture for shard in missing for picture in facts.pictures_of(shard)]
    pictures = iterate_copies(dataset, wanted, facts.copies, num_workers=workers)
    total = facts.pictures * facts.copies
    done = before = total - len(wanted) * facts.copies

    def samples(shard: int) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Any]]]:
        # A batch never reaches into the next shard: what a shard holds does not depend on where the run began.
        nonlocal done
        own = facts.pictures_of(shard)
        crops = (
            (index, number, item)
            for index, items in zip(own, islice(pictures, len(own)), strict=True)
            for number, item in enumerate(items)
        )
        while batch := list(islice(crops, batch_size)):
            images = torch.stack([item["image"] for _, _, item in batch])
            moments = _moments(encoder, images, dtype)
            if done == before:  # it works: from here on the folder is a cache, finished or not
                write_facts(out, facts)
            for (index, number, item), own_moments in zip(batch, moments, strict=True):
                own_facts = {"picture": dataset.samples[item["index"]].name, "copy": number}
                own_facts |= {"label": item["label"]} if "label" in item else {}
                yield index * facts.copies + number, item["image"], own_moments, own_facts
            done += len(batch)
            if progress:
                progress(done, total)

    for shard in missing:
        write_shard(shard_path(out, shard), samples(shard))


def _encoder_facts(config: EncoderConfig) -> dict[str, Any]:
    """Shape and family; not where it was read from, which may move. The hash tells whether it is the same."""
    facts = asdict(config)
    del facts["source"]
    return facts if config.family else {name: value for name, value in facts.items() if name != "family"}


def _moments(encoder: Encoder | ForeignEncoder, images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 `(B, 3, H, W)` → float32 means and clamped log-variances `(B, 2c, h, w)`, on the CPU."""
    device = encoder.anchor.device
    x = to_float(images.to(device)).to(dtype)
    posterior = Posterior(encoder(x), (x.shape[2], x.shape[3]))
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1).cpu()
    largest = moments.abs().max().item()
    if not largest <= HALF_MAX:  # written so that NaN fails too
        raise UserError(
            f"latents reach {largest:.3g}, which half precision cannot hold: this encoder's cannot be cached"
        )
    return moments


# ---- training from it -------------------------------------------------------------------------------------------


def open_cache(data: DataConfig, *, seed: int, train_encoder: bool, windows: bool = False) -> LatentDataset:
    """The data set of a recipe with `data.latents`.

    Args:
        windows: the cached crops may be larger than `data.size`: then the items are windows of them.

    Raises:
        UserError: the encoder is to be trained, no finished cache, or a recipe that asks for other crops than it holds.
    """
    if train_encoder:
        raise UserError(
            "data.latents is true with training.train_encoder true: cached latents are those of a frozen encoder; "
            "set training.train_encoder to false, or data.latents to false"
        )
    dataset = LatentDataset(data.source, seed=seed, cache=data.cache)
    larger = windows and data.size < dataset.facts.size and data.size % dataset.facts.factor == 0
    if larger:
        dataset.window = data.size
    for name in ("scale", "flip") if larger else ("size", "scale", "flip"):
        ours, theirs = getattr(data, name), getattr(dataset.facts, name)
        if ours != theirs:
            raise UserError(
                f"data.{name} is {ours}, but {dataset.folders[0]} holds crops of {name} {theirs}: "
                f'add --data.{name} "{json.dumps(theirs)}", or cache others'
            )
    return dataset


def stored_moments(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Moments `(B, 2c, h, w)` that a batch of a cache has, or those of its features; None: it is of pictures alone."""
    if "features" in batch:
        return without_spread(batch["features"])
    return batch.get("moments")


def check_encoder(dataset: LatentDataset, encoder: nn.Module) -> None:
    """Refuse latents of another encoder. Without one, training from a cache needs none: then factor and channels count.

    Raises:
        UserError: the hashes differ; the message names both, and the remedy.
    """
    facts = dataset.facts
    if isinstance(encoder, ForeignEncoder) and encoder.network is None:
        cached = EncoderConfig(**facts.encoder)
        if (cached.name, cached.family) != (encoder.config.name, encoder.config.family):
            raise UserError(
                f"{dataset.folders[0]} holds latents of {cached.title}, but this run's are of {encoder.config.title}: "
                "choose another cache"
            )
        return
    own = weights_sha256(encoder)
    if own != facts.encoder_sha256:
        raise UserError(
            f"{dataset.folders[0]} holds latents of the encoder {facts.encoder_sha256[:12]} "
            f"({facts.model or 'of an unnamed model'}), but this run's encoder is {own[:12]}: start from that model "
            "(init), or run monobath cache-latents with the model this run starts from"
        )
