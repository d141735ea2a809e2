"""Bulk work on Ray Data: many processes, many machines (pip install 'monobath[ray]').

    photos = ray.data.read_images("photos")
    latents = photos.map_batches(EncodeImages, fn_constructor_kwargs={"model": "default"}, concurrency=4)
    reports = run(EncodingWork(…), Cluster(workers=8))       # what `encode-dataset` does

`EncodeImages`, `DecodeLatents` and `Measure` are callable classes for `Dataset.map_batches` with actor pools: pass the
class, and its arguments as `fn_constructor_kwargs`. Rows of one batch may have any sizes: they are gathered by padded
size, and come out in their order.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
import torch
from PIL import Image
from torch import Tensor

from ..data.bulk import Report, Work, claimed, finish, in_buckets, run_shard
from ..data.encoding import encode_images
from ..errors import UserError
from ..evaluation.metrics import PictureMetric, SetMetric, load_metrics
from ..images import images_to_tensor, pil_to_tensor, to_rgb
from ..tiles import pad_to_multiple
from ..tokenizer import Tokenizer

T = TypeVar("T")
Rows = dict[str, Any]
"""Columns of a batch, as Ray Data gives and takes them: arrays, of objects where sizes differ."""


# ---- for Dataset.map_batches ------------------------------------------------------------------------------------


class EncodeImages:
    """Pictures → latents: `image` (picture files as bytes, or uint8 arrays `(H, W, 3)`) becomes `latent`, float16
    `(c, ceil(H/f), ceil(W/f))`, the posterior's mode, with `height` and `width`; other columns, such as a key, stay.

    Args:
        model: packaged name, folder or Hub id, or a tokenizer.
        column: of the pictures.
        batch: pictures at once in the network.
        device: cpu or cuda.
        threads: of the network, on a CPU.
    """

    def __init__(
        self,
        model: str | Tokenizer = "default",
        *,
        column: str = "image",
        batch: int = 32,
        device: str = "cpu",
        threads: int = 1,
    ) -> None:
        self.tokenizer, self.column, self.batch = _tokenizer(model, device, threads), column, batch

    def __call__(self, rows: Rows) -> Rows:
        factor = self.tokenizer.factor
        _need(rows, self.column)
        pictures = [images_to_tensor(_pixels(rows, self.column, i)) for i in range(len(rows[self.column]))]
        padded = [pad_to_multiple(picture, factor) for picture in pictures]
        found: dict[int, np.ndarray] = {}
        for batch in in_buckets(padded, lambda x: (x.shape[2], x.shape[3]), self.batch):
            moments = encode_images(self.tokenizer.encoder, torch.cat([x for _, x in batch]), self.tokenizer.dtype)
            means = moments.chunk(2, dim=1)[0].half().numpy()
            found |= {number: mean for (number, _), mean in zip(batch, means, strict=True)}
        return _without(rows, self.column) | {
            "latent": _ragged([found[i] for i in range(len(found))]),
            "height": np.array([picture.shape[2] for picture in pictures]),
            "width": np.array([picture.shape[3] for picture in pictures]),
        }


class DecodeLatents:
    """Latents → pictures: `latent` `(c, h, w)`, with `height` and `width`, becomes `image`, uint8 `(H, W, 3)`.

    In place of `latent`, `moments`, as `monobath encode-dataset` writes them to Parquet, will do.

    Args:
        model: packaged name, folder or Hub id, or a tokenizer.
        seed: of the noise, the same for every picture.
        batch: pictures at once in the network.
        device: cpu or cuda.
        threads: of the network, on a CPU.
    """

    def __init__(
        self, model: str | Tokenizer = "default", *, seed: int = 0, batch: int = 8, device: str = "cpu",
        threads: int = 1,
    ) -> None:  # fmt: skip
        self.tokenizer, self.seed, self.batch = _tokenizer(model, device, threads), seed, batch

    def __call__(self, rows: Rows) -> Rows:
        factor = self.tokenizer.factor
        if "latent" not in rows and "moments" in rows:  # Parquet of `encode-dataset`
            moments = [np.load(io.BytesIO(value)) for value in rows["moments"]]
            rows = _without(rows, "moments") | {"latent": [value[: len(value) // 2] for value in moments]}
        _need(rows, "latent", "height", "width")
        latents = [torch.from_numpy(np.array(value, dtype=np.float32)) for value in rows["latent"]]
        found: dict[int, np.ndarray] = {}
        for batch in in_buckets(latents, lambda z: (z.shape[1] * factor, z.shape[2] * factor), self.batch):
            z = torch.stack([z for _, z in batch])
            pixels = self.tokenizer.decode(z, seed=[self.seed] * len(z), output="uint8").permute(0, 2, 3, 1).cpu()
            for (number, _), picture in zip(batch, pixels.numpy(), strict=True):
                found[number] = picture[: rows["height"][number], : rows["width"][number]]
        return _without(rows, "latent") | {"image": _ragged([found[i] for i in range(len(found))])}


class Measure:
    """Pairs of pictures → figures: `output` and `original`, uint8 `(H, W, 3)` or picture files, become a column for
    each metric of pictures, and for each of sets the features of both: KEY_output and KEY_original, float32 `(n, dim)`.

    `evaluation.frechet.HalfSampled.update` sums those up in constant memory; `monobath eval --engine ray` does.

    Args:
        metrics: keys of `evaluation.metrics.METRICS`.
        device: cpu or cuda.
        threads: of the networks, on a CPU.
        index: column of the pictures' numbers, which seed the crops of FD-EffLite.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("psnr", "efflite"),
        *,
        device: str = "cpu",
        threads: int = 1,
        index: str = "index",
    ) -> None:
        torch.set_num_threads(threads)
        _, self.metrics = load_metrics(list(metrics), device=torch.device(device))
        self.device, self.index = device, index

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Rows:
        _need(rows, "output", "original")
        count = len(rows["output"])
        numbers = rows.get(self.index, np.zeros(count, dtype=np.int64)).tolist()
        found: dict[str, list[Any]] = {}
        for i in range(count):
            output, original = (_pixels(rows, name, i).to(self.device) for name in ("output", "original"))
            for metric in self.metrics:
                key = metric.info.key
                if isinstance(metric, PictureMetric):
                    found.setdefault(key, []).append(metric.measure(output, original)[0].cpu().numpy())
                    continue
                assert isinstance(metric, SetMetric)
                for name, image in (("output", output), ("original", original)):
                    features = metric.features(image, [numbers[i]])[0].cpu().numpy()
                    found.setdefault(f"{key}_{name}", []).append(features)
        return _without(rows, "output", "original") | {key: np.stack(values) for key, values in found.items()}


def _tokenizer(model: str | Tokenizer, device: str, threads: int) -> Tokenizer:
    torch.set_num_threads(threads)
    return Tokenizer.from_pretrained(model, device=device) if isinstance(model, str) else model.to(device)


def _need(rows: Rows, *columns: str) -> None:
    for name in columns:
        if name not in rows:
            raise UserError(f"there is no column {name}, but {', '.join(rows)}: rename one with Dataset.rename_columns")


def _pixels(rows: Rows, column: str, place: int) -> Tensor:
    """uint8 `(1, 3, H, W)`; grey and transparent arrays become RGB, as files do.

    Raises:
        UserError: no picture; the message names its row.
    """
    value = rows[column][place]
    try:
        if isinstance(value, dict):  # as `datasets` stores pictures
            value = value["bytes"]
        if value is None:
            raise ValueError("there are no bytes; `datasets` keeps paths alone unless files are embedded")
        if isinstance(value, bytes):
            picture: Image.Image = Image.open(io.BytesIO(value))
        else:
            array = np.asarray(value)
            if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
                raise ValueError(f"an array {array.shape} of {array.dtype}, not uint8 (H, W, 3), (H, W) or (H, W, 4)")
            picture = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        return pil_to_tensor(to_rgb(picture))[None]
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        key = next((f", {name} {rows[name][place]}" for name in ("key", "__key__", "id") if name in rows), "")
        raise UserError(
            f"row {place} of a batch{key}: {column} is no picture ({error}); filter such rows out first, or use "
            "monobath encode-dataset, which lists them"
        ) from None


def _ragged(values: list[np.ndarray]) -> np.ndarray:
    """One array where all shapes are equal, else an array of arrays."""
    if len({value.shape for value in values}) == 1:
        return np.stack(values)
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def _without(rows: Rows, *columns: str) -> Rows:
    return {name: value for name, value in rows.items() if name not in columns}


# ---- running work on a cluster ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where work runs."""

    workers: int | None = None
    """Actors; default: one for each GPU, or as many as the CPUs have threads for."""
    gpus: bool = False
    """Each actor has one."""
    address: str | None = None
    """Address of a running Ray cluster, "auto" for the one of this machine; default: one of its own."""


@contextmanager
def connected(cluster: Cluster, threads: int) -> Iterator[int]:
    """Within: Ray is there. Yields the number of workers.

    A program that has called `ray.init` itself keeps its cluster.

    Raises:
        UserError: no cluster at the address, or no GPU in it.
    """
    own = not ray.is_initialized()
    if own:
        # Its C++ part calls it an error that actors are given their networks; what fails is raised.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        options: dict[str, Any] = {"address": cluster.address}
        if cluster.address is None:  # "local" never joins a cluster that happens to run
            cores = max(os.cpu_count() or 1, (cluster.workers or 1) * threads)
            options = {"address": "local", "num_cpus": cores, "include_dashboard": False}
            # Nothing is sent anywhere; and these workers are this command's own work, not to give way to any other.
            for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_worker_niceness", "0")):
                os.environ.setdefault(name, value)
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"--address {cluster.address}: no Ray cluster answers there ({reason})") from None
    try:
        there = ray.cluster_resources()
        fitting = int(there.get("GPU", 0)) if cluster.gpus else max(1, int(there.get("CPU", 1)) // threads)
        if not fitting:
            raise UserError("the Ray cluster has no GPU: add --device cpu")
        yield cluster.workers or fitting
    finally:
        if own:
            ray.shutdown()


def run(
    work: Work, cluster: Cluster | None = None, progress: Callable[[Report, int], None] | None = None
) -> list[Report]:
    """Do the shards of `work` that are missing, each by one actor, and finish its folder; see `data.bulk`.

    A worker or machine that is lost is replaced, and its shards are done again; the folder is the same to the byte.

    Args:
        progress: called with each report and the number of shards in all.

    Returns:
        The reports of all shards, in order; none where the folder was finished before.

    Raises:
        UserError: the folder is another command's, or a shard cannot be done: the others are done first.
    """
    with claimed(work) as missing:
        errors: list[str] = []
        if missing:
            cluster = cluster or Cluster()
            with connected(cluster, work.threads) as workers:
                for report in _reports(work, missing, min(workers, len(missing)), cluster.gpus):
                    errors += [report.error] if report.error else []
                    if progress:
                        progress(report, len(work.shards))
        if errors:
            more = f"; so are {len(errors) - 1} other shards" if len(errors) > 1 else ""
            raise UserError(f"{errors[0]}{more}: the finished shards are kept, the same command goes on")
        return finish(work)


class _Worker:
    """Does shards with a copy of the networks; two threads call it, of which one reads while the other computes."""

    def __init__(self, work: list[Any], gpu: bool) -> None:
        self.work: Work = ray.get(work[0])
        self.turn = threading.Lock()
        torch.set_num_threads(self.work.threads)
        if gpu:
            self.work.to("cuda")

    def __call__(self, rows: Rows) -> Rows:
        found = [json.dumps(vars(run_shard(self.work, int(number), self.turn))) for number in rows["number"]]
        return {"report": np.array(found, dtype=object)}


def _reports(work: Work, missing: Sequence[int], workers: int, gpu: bool) -> Iterator[Report]:
    shared = [ray.put(work)]  # in a list: each actor fetches it, also one that takes another's place
    rows = [{"number": number} for number in missing]
    for row in mapped(rows, _Worker, (shared, gpu), workers, work.threads, gpu, at_once=2):
        yield Report(**json.loads(row["report"]))


def mapped(
    rows: list[Rows], worker: Callable[..., Any], arguments: tuple[Any, ...], workers: int, threads: int, gpu: bool,
    *, in_order: bool = False, at_once: int = 1,
) -> Iterator[Rows]:  # fmt: skip
    """`map_batches` over an actor pool, one row a batch, results as they come.

    Args:
        rows: a batch, and a block, each.
        worker, arguments: the callable class and what it is made with.
        in_order: results in the order of the rows.
        at_once: threads that call a worker.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = in_order
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=1,
        # From one to so many: an actor that has nothing to do makes room for one whose machine was lost.
        # Each has one row at work and one waiting: more would wait for it while others are idle.
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=at_once, enable_true_multi_threading=at_once > 1,
        ),
        num_cpus=threads,
        num_gpus=1 if gpu else 0,
    )  # fmt: skip
    for name in ("ray", "ray.data"):  # whose set-up of their loggers comes late
        logging.getLogger(name).setLevel(logging.ERROR)
    yield from data.iter_rows()


@contextmanager
def engine(cluster: Cluster, threads: int = 1) -> Iterator[Callable[[Callable[[Any], T], Sequence[Any]], Iterator[T]]]:
    """Within: what is yielded is `map`, by actors; for `evaluation.compare.Settings`."""
    with connected(cluster, threads) as workers:

        def mapping(function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
            arguments = ([ray.put(function)], threads)
            rows = [{"item": pickle.dumps(item)} for item in items]
            many = min(workers, len(rows))
            for row in mapped(rows, _Caller, arguments, many, threads, False, in_order=True):
                yield pickle.loads(row["result"])

        yield mapping


class _Caller:
    """Calls a function that the driver has put into the object store."""

    def __init__(self, function: list[Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self.function = ray.get(function[0])

    def __call__(self, rows: Rows) -> Rows:
        found = [pickle.dumps(self.function(pickle.loads(item))) for item in rows["item"]]
        return {"result": np.array(found, dtype=object)}
