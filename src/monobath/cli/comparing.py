"""The verbs that measure: `eval` compares quality, speed and size; `bench` times decoders."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from .exporting import EngineName, engine_networks
from .shared import DType, checked_device, out_folder, plain, show, write

if TYPE_CHECKING:
    from ..evaluation.results import Evaluation
    from ..evaluation.system import System

DECODERS = [f"{size}/{patch}" for size in ("XS", "S", "B", "M") for patch in (1, 2, 4)] + ["CS/4", "CM/4", "CL/4"]


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
        metrics: Names such as psnr ssim mean_error grid4 grid8 efflite fd_efflite lpips rfid dreamsim; default: all
            that need no download.
        no_baselines: Leave out bicubic, JPEG, WebP and AVIF.
        bits_per_pixel: Rate of those codecs; default: the first model's latents at 16 bit a value.
        rates: More rates of those codecs, in bits a pixel, for the plot of quality against bits.
        batch: Pictures at once.
        workers: Processes that read pictures; 0: none besides this one.
        seed: Seed of noise, crops and resampling.
        repeats: Timed rounds; 0: no times.
        speed_batches: Pictures a call when speed is measured; default: 1. The tables show the smallest.
        out: Folder for the results.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic of the networks.
    """
    folder = out_folder(out)
    if size is not None and sizes:
        raise UserError(f"--size {size} and --sizes {' '.join(map(str, sizes))} contradict one another: give one")
    sides = sorted(set(sizes or [256 if size is None else size]))
    for name, value, least in (
        *(("sizes" if sizes else "size", side, 8) for side in sides),
        ("batch", batch, 1),
        ("workers", workers, 0),
        ("repeats", repeats, 0),
        *(("speed_batches", number, 1) for number in speed_batches or []),
    ):
        if value < least:
            raise UserError(f"--{name} is {value}: it must be at least {least}")
    import torch

    from ..evaluation import closeups, eval_report, processes
    from ..evaluation.evaluate import evaluate
    from ..evaluation.throughput import system_speeds
    from ..files import write_file, write_text

    kind = getattr(torch, dtype)
    with _Progress() as progress:
        with processes.group(torch.device(checked_device(device))) as place:
            systems = _models(model or ["default"], steps, str(place), kind, encoder)
            systems += _peers(peer or [], str(place), kind)
            if not no_baselines:
                systems += _baselines(systems, sides[-1], bits_per_pixel, rates or [], str(place), kind)
            found = [
                evaluate(
                    systems,
                    data,
                    size=side,
                    short_side=sides[-1],
                    metrics=metrics,
                    limit=limit,
                    batch_size=batch,
                    num_workers=workers,
                    seed=seed,
                    progress=progress.pictures,
                    command=command,
                )
                for side in sides
            ]
            is_main = processes.is_main()
        if not is_main:
            return
        evaluations = [evaluation for evaluation, _ in found]
        for evaluation in evaluations if repeats else []:
            side = evaluation.size
            speeds = system_speeds(
                systems, (side, side), sorted(set(speed_batches or [1])), repeats=repeats, progress=progress.words
            )
            for result in evaluation.systems:
                result.speed = speeds[result.name]
    evaluation, kept = found[-1]
    chosen = closeups.choose(kept.names, kept.originals, kept.outputs, closeups.shown_systems(evaluation))
    files = [folder / "results.json", folder / "comparison.png", folder / "report.html"]
    page = eval_report.eval_page(evaluations, chosen)
    results = {"sizes": {str(e.size): e.as_dict() for e in evaluations}} if sizes else evaluation.as_dict()
    write_text(files[0], json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_file(files[1], closeups.comparison_sheet(chosen).save)
    write_text(files[2], page)
    _print_tables(evaluations)
    write("".join(f"{file}\n" for file in files))


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
    from ..evaluation.bench import run_bench
    from ..evaluation.eval_report import bench_page
    from ..files import write_text

    with _Progress() as progress:
        result = run_bench(
            device=checked_device("cpu" if cpu else device),
            dtype=dtype,
            sizes=sizes or [256, 512],
            decoders=DECODERS if decoders is None else decoders,
            models=model or [],
            extra=engine_networks(model or [], engine, decoders or []) if engine else None,
            repeats=repeats,
            batch=batch,
            progress=progress.words,
            command=command,
        )
    files = [folder / "results.json", folder / "bench.md", folder / "report.html"]
    page = bench_page(result)
    write_text(files[0], json.dumps(result.as_dict(), indent=2, ensure_ascii=False) + "\n")
    write_text(files[1], result.markdown())
    write_text(files[2], page)
    for size, rows in result.rows().items():
        _print_table(result.head, rows, f"{size} × {size}")
    write("".join(f"{note}\n" for note in result.notes))
    write("".join(f"{file}\n" for file in files))


# ---- systems ----------------------------------------------------------------------------------------------------


def _models(
    names: Sequence[str], steps: Sequence[int] | None, device: str, dtype: Any, encoder: str | None
) -> list[System]:
    from ..autoencoders import as_encoder
    from ..evaluation.systems import make_model

    labels = [_label(name) for name in names]
    shared, used = None if encoder is None else as_encoder(encoder), False
    systems: list[System] = []
    for name, label in zip(names, labels, strict=True):
        for count in dict.fromkeys(steps) if steps else [None]:
            system = make_model(name, count, device, dtype)
            if shared is not None and system.tokenizer.config.encoder.family:
                system.attach_encoder(shared)
                used = True
            if labels.count(label) == 1:
                system.name = system.name.replace(name, label, 1)
                system.family = system.family.replace(name, label, 1)
            systems.append(system)
    if shared is not None and not used:
        raise UserError(f"--encoder {encoder}: {', '.join(names)} has an encoder of its own; leave it out")
    return systems


def _label(name: str) -> str:
    """What tables call a model: a folder's own name, or its run's if that says more."""
    path = Path(name)
    if not path.exists():
        return name
    path = path.resolve()
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _peers(specs: Sequence[str], device: str, dtype: Any) -> list[System]:
    from ..evaluation.systems import make_peer

    return [make_peer(spec, device, dtype) for spec in specs]


def _baselines(
    systems: Sequence[System], size: int, bits: float | None, rates: Sequence[float], device: str, dtype: Any
) -> list[System]:
    """Bicubic, and the codecs at the first system's bits a pixel and at further rates; none that is there already."""
    import torch
    from PIL import features

    if bits is None:
        with torch.no_grad():
            code = systems[0].encode(torch.zeros(1, 3, size, size, device=systems[0].device))
        bits = code.bits[0] / size**2
    codecs = [codec for codec in ("jpeg", "webp", "avif") if features.check({"jpeg": "jpg"}.get(codec, codec))]
    specs = ["bicubic=8"] + [f"{codec}={rate:g}" for codec in codecs for rate in dict.fromkeys([bits, *rates])]
    found = {system.name: system for system in _peers(specs, device, dtype)}
    return [found[name] for name in found if name not in {system.name for system in systems}]


# ---- what is printed ----------------------------------------------------------------------------------------------


class _Progress:
    """One line on stderr that says what is being done; nothing where stderr is not a terminal."""

    def __enter__(self) -> _Progress:
        from rich.console import Console

        self.status = Console(stderr=True).status("")
        if sys.stderr.isatty():
            self.status.start()
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.status.stop()
        return False

    def words(self, text: str) -> None:
        self.status.update(plain(text))

    def pictures(self, system: str, done: int, total: int | None) -> None:
        self.words(f"{system}: {done}{'' if total is None else f' of {total}'} pictures")


def _print_tables(evaluations: Sequence[Evaluation]) -> None:
    from ..evaluation import tables

    def text(lines: list[list[tuple[str, str]]]) -> list[list[str]]:
        return [["\n".join(filter(None, cell)) for cell in line] for line in lines]

    joined = tables.side_by_side(evaluations)
    _print_table(tables.head(joined), text(tables.rows(joined)))
    said: list[str] = []
    for evaluation in evaluations:
        at = f"at {evaluation.size}²" if len(evaluations) > 1 else ""
        if len(evaluation.systems) > 1:
            labels = [metric.label for metric in tables.measured(evaluation)]
            title = ", ".join(filter(None, [f"differences to {evaluation.systems[0].name}", "paired", at]))
            _print_table(["system", *labels], text(tables.difference_rows(evaluation)), title)
        said += [f"{at.capitalize()}: {line}" if at else line for line in tables.verdict(evaluation)]
    lines = [*said, *tables.absent(joined), *tables.footnotes(evaluations)]
    write("".join(f"{line}\n" for line in lines))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    from rich.table import Table

    table = Table(title=title and plain(title))
    for number, words in enumerate(head):
        table.add_column(plain(words), justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(plain, row))
    show(table, width=140)
