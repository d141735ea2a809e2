"""The verbs that measure: `eval` compares quality, speed and size; `bench` times decoders."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from ..export import Engine as EngineName
from .shared import DType, check_options, out_folder, print_table, progress, write_lines

if TYPE_CHECKING:
    import torch

    from ..evaluation.compare import Engine
    from ..evaluation.results import Evaluation
    from ..evaluation.system import System


def eval_(
    *,
    data: list[str],
    model: list[str] | None = None,
    encoder: str | None = None,
    peer: list[str] | None = None,
    size: int | None = None,
    sizes: list[int] | None = None,
    steps: list[int] | None = None,
    limit: int | None = None,
    metrics: list[str] | None = None,
    no_baselines: bool = False,
    bits_per_pixel: float | None = None,
    rates: list[float] | None = None,
    batch: int = 8,
    workers: int = 0,
    seed: int = 0,
    repeats: int = 5,
    speed_batches: list[int] | None = None,
    engine: Literal["ray"] | None = None,
    gallery: bool = False,
    out: str = "runs/eval",
    device: str = "auto",
    dtype: DType = "float32",
    command: str = "",
) -> None:
    """Compare tokenizers on pictures: writes results.json, comparison.png and report.html to OUT, prints a table.

    Everything is measured side by side in one run; differences are to the first model. Bicubic scaling and JPEG,
    WebP and AVIF at the first model's bits are measured too. With --sizes, all that is done at every size, for the
    same photos' centres; plots and pictures are of the largest. Several GPUs: torchrun -m monobath eval …

    Args:
        data: Folders of pictures, .tar shards or shard URLs.
        model: Packaged names, folders, or Hugging Face Hub ids; default: default.
        encoder: What makes the latents of models that were fitted to a foreign encoder's, KIND=WHERE, as for train.
        peer: Others to compare with, as KIND=WHERE: taef2=FOLDER, kl=FOLDER or kl=HUB-ID, tiny=…, jpeg=BITS, …
        size: The short side is resized to this many pixels and the centre square cropped; default: 256.
        sizes: Instead of --size: the short side is resized to the largest of these, and of that square, the centre
            of each size is encoded and decoded on its own.
        steps: Sampler steps of the models, each count a system of its own; default: what each was made for.
        limit: At most so many pictures.
        metrics: Names such as psnr ssim mean_error grid4 grid8 efflite fd_efflite lpips lpips_alex rfid dreamsim;
            default: all that need no download.
        no_baselines: Leave out bicubic, JPEG, WebP and AVIF.
        bits_per_pixel: Rate of those codecs; default: the first model's latents at 16 bit a value.
        rates: More rates of those codecs, in bits a pixel, for the plot of quality against bits.
        batch: Pictures at once.
        workers: Processes that read pictures; 0: none besides this one.
        seed: Seed of noise, crops and resampling.
        repeats: Timed rounds; 0: no times.
        speed_batches: Pictures a call when speed is measured; default: 1. The tables show the smallest.
        engine: ray: measure on so many --workers of an embedded Ray (0: one a CPU), one thread each; the figures are
            the same. For CPUs.
        gallery: Also write OUT/gallery/index.html: up to 24 pictures, a slider over the original for each system.
        out: Folder for the results.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic of the networks.
    """
    folder = out_folder(out)
    if size is not None and sizes:
        raise UserError(f"--size {size} and --sizes {' '.join(map(str, sizes))} contradict one another: give one")
    sides = sorted(set(sizes or [256 if size is None else size]))
    check_options(8, **{"sizes" if sizes else "size": sides[0]})
    check_options(1, batch=batch, speed_batches=min(speed_batches or [1]))
    check_options(0, workers=workers, repeats=repeats)
    import torch

    from ..devices import usable_device
    from ..evaluation import processes
    from ..evaluation.closeups import PICTURES, shown_systems, write_gallery
    from ..evaluation.compare import Settings, evaluate
    from ..evaluation.peers import make_baselines, make_peer
    from ..evaluation.report import write_evaluation
    from ..evaluation.speed import add_speeds
    from ..evaluation.system import make_models

    kind = getattr(torch, dtype)
    with progress() as update:

        def counted(system: str, done: int, total: int | None) -> None:
            update(description=system, completed=done, total=total)

        with processes.group(torch.device(usable_device(device))) as place:
            systems: list[System] = [*make_models(model or ["default"], steps, place, kind, encoder)]
            systems += [make_peer(spec, place, kind) for spec in peer or []]
            if not no_baselines:
                systems += make_baselines(systems, sides[-1], bits_per_pixel, rates or [])
            settings = Settings(
                size=sides[-1], short_side=sides[-1], metrics=metrics, limit=limit, batch_size=batch,
                num_workers=workers, seed=seed, keep=PICTURES if gallery else Settings.keep, progress=counted,
                command=command,
            )  # fmt: skip
            with _engine(engine, workers, place) as measure:
                found = [evaluate(systems, data, replace(settings, size=side, engine=measure)) for side in sides]
            rank = processes.rank()
        if rank:
            return
        evaluations = [evaluation for evaluation, _ in found]
        if repeats:
            batches = sorted(set(speed_batches or [1]))
            add_speeds(evaluations, systems, batches, repeats=repeats, progress=lambda text: update(description=text))
    files = write_evaluation(folder, evaluations, found[-1][1], by_size=bool(sizes))
    if gallery:
        files.append(write_gallery(folder / "gallery", *found[-1], shown_systems(evaluations[-1])))
    _print_tables(evaluations)
    write_lines(files)


def bench(
    *,
    cpu: bool = False,
    sizes: list[int] | None = None,
    decoders: list[str] | None = None,
    model: list[str] | None = None,
    engine: list[EngineName] | None = None,
    repeats: int = 5,
    batch: int = 1,
    out: str = "runs/bench",
    device: str = "auto",
    dtype: DType = "float32",
    command: str = "",
) -> None:
    """Time decoders beside diffusers' AutoencoderKL and AutoencoderTiny: tables, results.json, report.html, bench.md.

    Random weights, so only speed is measured, all in one process and in turns.

    Args:
        cpu: Use the CPU even where there is a GPU.
        sizes: Sides of the decoded squares, in pixels; default: 256 512.
        decoders: Such as XS/1 S/2; default: XS, S, B and M, each with patch 1, 2 and 4, and
            CS/4, CM/4, CL/4.
        model: Packaged names, folders or Hugging Face Hub ids, whose decoders are timed too.
        engine: Time these models and decoders (from zero noise), and AutoencoderTiny, under these engines too: torch
            (folded), compile, torch-export, aotinductor, onnxruntime, openvino, openvino-bf16, openvino-int8.
        repeats: Timed rounds.
        batch: Pictures a call.
        out: Folder for the results.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic.
    """
    if cpu and device not in ("auto", "cpu"):
        raise UserError(f"--cpu and --device {device} contradict one another: give one of them")
    if engine and not (cpu or device == "cpu"):
        raise UserError(f"--engine {' '.join(engine)} is timed on the CPU: add --cpu")
    folder = out_folder(out)

    from ..devices import usable_device
    from ..evaluation.bench import HEAD, Plan, run_bench
    from ..evaluation.report import write_bench

    plan = Plan(
        device=usable_device("cpu" if cpu else device), dtype=dtype, repeats=repeats, batch=batch,
        sizes=sizes or Plan.sizes, decoders=decoders or Plan.decoders, models=model or Plan.models,
    )  # fmt: skip
    with progress() as update:
        extra = None
        if engine:
            from ..export.running import engine_networks

            extra = engine_networks(model or [], engine, decoders or [])
        result = run_bench(plan, extra=extra, progress=lambda text: update(description=text), command=command)
    files = write_bench(folder, result)
    for size, rows in result.rows().items():
        print_table(HEAD, rows, title=f"{size} × {size}")
    write_lines([*result.notes, *files])


def _engine(name: str | None, workers: int, device: torch.device) -> AbstractContextManager[Engine | None]:
    """Within: what measures batches elsewhere."""
    if name is None:
        return nullcontext()
    from ..evaluation import processes
    from ..integrations.ray import Cluster
    from ..integrations.ray import engine as ray_engine

    if device.type != "cpu" or processes.world_size() > 1:
        raise UserError(f"--engine {name} measures on CPUs, from one process: add --device cpu, or use torchrun alone")
    return ray_engine(Cluster(workers=workers or None))


# ---- what is printed ----------------------------------------------------------------------------------------------


def _print_tables(evaluations: Sequence[Evaluation]) -> None:
    from ..evaluation import tables

    def text(lines: Sequence[Sequence[tuple[str, ...]]]) -> list[list[str]]:
        return [["\n".join(filter(None, cell[:2])) for cell in line] for line in lines]

    joined = tables.side_by_side(evaluations)
    print_table(tables.head(joined), text(tables.rows(joined)))
    said: list[str] = []
    for evaluation in evaluations:
        at = f"at {evaluation.size}²" if len(evaluations) > 1 else ""
        if len(evaluation.systems) > 1:
            head = ["system", *(metric.label for metric in tables.measured(evaluation))]
            title = ", ".join(filter(None, [f"differences to {evaluation.systems[0].name}", "paired", at]))
            print_table(head, text(tables.difference_rows(evaluation)), title=title)
        said += [f"{at.capitalize()}: {line}" if at else line for line in tables.verdict(evaluation)]
    write_lines([*said, *tables.absent(joined), *tables.footnotes(evaluations)])
