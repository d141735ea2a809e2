"""The verbs `encode-dataset` and `decode-dataset`: whole data sets, shard by shard, on many processes and machines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from ..words import count
from . import shared
from .shared import MAX_PIXELS, DType

if TYPE_CHECKING:
    from ..data.bulk import Report, Work
    from ..models.frozen import ForeignEncoder
    from ..tokenizer import Tokenizer

Layout = Literal["tar", "parquet"]


def encode_dataset(
    source: list[str],
    *,
    out: str,
    model: str | None = None,
    encoder: str | None = None,
    size: int | None = None,
    scale: list[int] | None = None,
    copies: int = 1,
    seed: int = 0,
    no_flip: bool = False,
    labels: bool = False,
    format: Layout = "tar",
    batch: int = 32,
    threads: int = 1,
    workers: int | None = None,
    address: str | None = None,
    shard_pictures: int = 1000,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 16,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Encode data sets of any size on many processes and machines, with Ray; the same command goes on after any kill.

    Every input shard becomes an output shard, OUT/latents-000000.tar …, whose samples have the pictures' keys, their
    moments in half precision and facts (height, width). Without --size, whole pictures are encoded, of any height and
    width. With it, training crops are, and kept: monobath train RECIPE --data OUT --data.latents true
    --training.train_encoder false --init MODEL reads them. What is written depends on neither the number of workers nor
    the order nor an interruption. Pictures that cannot be used are listed in OUT/skipped.jsonl.

    Args:
        source: Folders of pictures, .tar shards of webdataset, Parquet files with picture bytes, patterns, or URLs of
            these, as fsspec opens them (s3://, gs://, hf://, https://).
        out: Folder for the shards, which all machines must see, or a URL that fsspec can write to (s3://, gs://).
        model: Packaged name, folder, or Hugging Face Hub id: whose encoder; default: default.
        encoder: A foreign encoder instead, KIND=WHERE, as for train; with --model too, whether they fit is checked.
        size: Side of the crops, in pixels: the recipe's data.size; default: whole pictures.
        scale: LOW HIGH: the short side is resized to a random length in between before cropping, in pixels: the
            recipe's data.scale; default: SIZE and twice SIZE.
        copies: Crops of each picture: one per epoch, repeating after this many.
        seed: Seed of the crops; the recipe's training.seed gives the crops of that run.
        no_flip: Mirror none of the crops; default: half of them.
        labels: Keep each picture's label too, as for cache-latents; in Parquet, the column label or cls.
        format: Format of the output shards.
        batch: Pictures at once; fewer where they are larger than 512².
        threads: Threads of each worker; the last bits of the results depend on it. With a GPU, they read pictures.
        workers: Processes in all; default: one for each GPU, or as many as the CPUs have threads for.
        address: Address of a running Ray cluster (auto: this machine's); default: one of its own.
        shard_pictures: Pictures in an output shard, of those that lie in folders.
        max_pixels: Larger pictures are skipped, in pixels.
        min_side: Pictures with a shorter side are skipped, in pixels.
        device: cpu, cuda; auto: GPUs if there are any.
        dtype: Arithmetic of the encoder.
    """
    shared.check_options(1, copies=copies, batch=batch, threads=threads, workers=workers, shard_pictures=shard_pictures)
    if scale is not None and (len(scale) != 2 or size is None):
        raise UserError(f"--scale is {' '.join(map(str, scale))}: give two lengths, LOW HIGH, and --size with them")
    folder = out if "://" in out else str(shared.out_folder(out))
    _need_ray()
    import torch

    from ..autoencoders import as_encoder
    from ..data import Crops
    from ..data.bulk_encoding import BulkEncoding, EncodingWork

    network: Tokenizer | ForeignEncoder
    if encoder is not None and model is None:
        network, name = as_encoder(encoder), encoder
    else:
        name = model or "default"
        network = shared.load_tokenizer(name, "cpu", "float32", encoder)
    crops = None
    if size is not None:
        crops = Crops(size=size, scale=None if scale is None else (scale[0], scale[1]), flip=not no_flip, seed=seed)
    how = BulkEncoding(
        crops=crops, copies=copies, labels=labels, layout=format, model=shared.lasting_name(name), batch=batch,
        threads=threads, pictures_a_shard=shard_pictures, max_pixels=max_pixels, min_side=min_side,
        dtype=getattr(torch, dtype), device=_kind_of_device(device),
    )  # fmt: skip
    _run(EncodingWork(network, source, folder, how), workers, address)


def decode_dataset(
    source: str,
    *,
    out: str,
    model: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    noise: Literal["gaussian", "zero"] | None = None,
    format: Layout = "tar",
    batch: int = 8,
    threads: int = 1,
    workers: int | None = None,
    address: str | None = None,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Decode what `monobath encode-dataset` wrote, with Ray; the same command goes on after any kill.

    Every shard of latents becomes one of pictures, OUT/pictures-000000.tar …, with the keys, PNG files of the size that
    was encoded, and facts. What is written depends on neither the number of workers nor the order nor an interruption.

    Args:
        source: The folder of latents, or a URL.
        out: Folder for the shards, which all machines must see, or a URL that fsspec can write to (s3://, gs://).
        model: Packaged name, folder, or Hugging Face Hub id; default: the one that the latents name.
        steps: Sampler steps; default: what the model was made for.
        seed: Noise seed, the same for every picture.
        noise: What decoding starts from; default: what the model was made for.
        format: Format of the output shards.
        batch: Pictures at once; fewer where they are larger than 512².
        threads: Threads of each worker; the last bits of the results depend on it.
        workers: Processes in all; default: one for each GPU, or as many as the CPUs have threads for.
        address: Address of a running Ray cluster (auto: this machine's); default: one of its own.
        device: cpu, cuda; auto: GPUs if there are any.
        dtype: Arithmetic.
    """
    shared.check_options(1, batch=batch, threads=threads, workers=workers)
    folder = out if "://" in out else str(shared.out_folder(out))
    _need_ray()
    import torch

    from ..data.bulk_decoding import BulkDecoding, DecodingWork
    from ..data.cache_facts import FACTS_FILE, parse_facts
    from ..data.folders import open_folder

    latents = open_folder(source)
    (content,) = latents.read([FACTS_FILE])
    facts = None if content is None else parse_facts(content, latents.join(FACTS_FILE))
    name = model or (facts.model if facts else "") or "default"
    how = BulkDecoding(
        layout=format, model=shared.lasting_name(name), steps=steps, seed=seed, noise=noise, batch=batch,
        threads=threads, dtype=getattr(torch, dtype), device=_kind_of_device(device),
    )  # fmt: skip
    _run(DecodingWork(shared.load_tokenizer(name, "cpu", "float32"), source, folder, how), workers, address)


def _need_ray() -> None:
    from importlib.util import find_spec

    for package in ("ray", "pyarrow", "fsspec"):
        if find_spec(package) is None:
            raise UserError(f"this verb needs the package {package}: pip install 'monobath[ray]'")


def _kind_of_device(device: str) -> str:
    """What the workers have: cpu or cuda. On a cluster, what this machine has decides unless it is said."""
    from ..devices import usable_device

    kind = device if device in ("cpu", "cuda") else usable_device(device)
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: workers have GPUs of their own; choose cpu, cuda or auto")
    return kind


def _run(work: Work, workers: int | None, address: str | None) -> None:
    from ..integrations.ray import Cluster, run

    done: list[Report] = []
    start = time.monotonic()
    with shared.progress() as update:

        def tell(report: Report, total: int) -> None:
            done.append(report)
            update(description="shards", completed=len(done), total=total)

        reports = run(work, Cluster(workers=workers, address=address, gpus=_wants_gpus(work)), tell)
    if not reports:
        shared.write(f"finished before: {work.folder}\n")
        return
    seconds = time.monotonic() - start
    new = sum(report.pictures for report in done)
    skipped: dict[str, int] = {}
    for row in (row for report in reports for row in report.skipped):
        skipped[row["reason"]] = skipped.get(row["reason"], 0) + 1
    why = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items())) or "0"
    figures = (
        f"{sum(r.pictures for r in reports):,}",
        why,
        f"{new / seconds:.1f}",
        f"{sum(r.bytes for r in reports):,}",
    )
    shared.print_table(("pictures", "skipped", "pictures/s", "bytes"), [figures])
    spent: dict[str, Any] = {}
    for report in done:
        for what, value in report.seconds.items():
            spent[what] = spent.get(what, 0.0) + value
    parts = ", ".join(f"{what} {value:.1f} s" for what, value in spent.items())
    shared.write(f"{count(len(reports), 'shard')} in {work.folder}; workers' time: {parts}\n")


def _wants_gpus(work: Any) -> bool:
    return work.how.device == "cuda"
