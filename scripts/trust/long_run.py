"""Hours of one process: memory stays flat, no file handles or threads are left, the speed stays what it was.

    python scripts/trust/long_run.py decode [--minutes 120] [--model default]
    python scripts/trust/long_run.py train [--minutes 120]

`decode` decodes latents of changing sizes (32 to 512 pixels a side), batches, tiles and forms, whole and coarse to
fine. `train` is `monobath train` on the packaged photos, tiny, with logs, sample grids, checkpoints and TensorBoard.
Each process is watched from outside, every ten seconds. The first sixth of the time is warm-up and does not count: 20
minutes of 120.

Speed is processor time of the same work, over that of a yardstick (a convolution outside monobath) that this process
times at the same moment: both feel alike what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from trial import Loss, exit_code, parser_of, rng_of, rows_of

from monobath import Tokenizer
from monobath.resources import sample_paths

GROWTH = 10.0
"""MB an hour: what the upper bound of the slope of memory must stay below."""
SLOWER = 0.10
"""What the last third of the time may be slower than the first."""
BLOCK = 300.0
"""Seconds: samples of memory are averaged over blocks of so many, whose errors are then nearly independent."""


@dataclass
class Sample:
    """One look at a process."""

    t: float
    """Seconds since it began."""
    rss: int
    """Resident memory, in bytes."""
    handles: int
    """Open files."""
    threads: int
    cpu: float
    """Processor time so far, in seconds."""
    work: int
    """Units of work so far."""
    yardstick: float
    """Processor time of the yardstick, in seconds."""


def look(pid: int, began: float, work: int) -> Sample:
    """At a running process, through /proc."""
    proc = Path(f"/proc/{pid}")
    fields = (proc / "stat").read_text().rpartition(")")[2].split()
    rss = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    threads, handles = len(list((proc / "task").iterdir())), len(list((proc / "fd").iterdir()))
    return Sample(time.monotonic() - began, rss, handles, threads, cpu, work, yardstick())


@torch.no_grad()
def yardstick() -> float:
    """Processor time of a fixed convolution, in seconds: the median of five."""
    torch.set_num_threads(1)
    x, weight = torch.ones(1, 64, 48, 48), torch.ones(64, 64, 3, 3)
    times = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(4):
            torch.nn.functional.conv2d(x, weight)
        times.append(time.process_time() - start)
    return statistics.median(times)


# ---- the work -------------------------------------------------------------------------------------------------------


def decode_for_ever(model: str, seed: int, counter: Path) -> None:
    """Decode, and append a line to `counter` for each million pixels, until killed."""
    tokenizer = Tokenizer.from_pretrained(model)
    pixels = 0
    for number in range(sys.maxsize):
        rng = rng_of(seed, number)
        h, w = (int(side) for side in 2 ** rng.uniform(2, 6, size=2))
        z = torch.from_numpy(rng.standard_normal((int(rng.integers(1, 3)), tokenizer.config.encoder.latent_channels,
                                                  h, w), dtype="float32"))  # fmt: skip
        output = ("tensor", "uint8", "pil")[number % 3]
        if number % 7 == 6:
            list(tokenizer.decode_progressive(z, seed=number, output=output))
        else:
            tokenizer.decode(z, seed=number, tile=256 if number % 5 == 4 else None, output=output)
        pixels += z[:, 0].numel() * tokenizer.factor**2
        if pixels >= 10**6:
            pixels -= 10**6
            with open(counter, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": number}) + "\n")


def training_command(folder: Path, minutes: float) -> list[str]:
    """`monobath train` of a tiny model."""
    recipe = {
        "model": {
            "encoder": {"base": 16, "multipliers": [1, 1], "patch": 4, "blocks": 1, "middle_attention": False},
            "decoder": {"size": "custom", "patch": 4, "channels": [32, 32], "middle_blocks": 1, "heads": 2},
        },
        "data": {"size": 64, "workers": 0, "source": sorted({str(path.parent) for path in sample_paths()})},
        "loss": {"perceptual": 0.05},
        "optimizer": {"schedule": "constant"},
        "training": {"steps": 10**9, "batch_size": 2, "log_every": 10, "sample_every": 200, "samples": 4,
                     "checkpoint_every": 200, "minutes": minutes},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [sys.executable, "-m", "monobath", "train", str(folder / "recipe.yaml"), "--run", str(folder / "run")]


def lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def watched(command: list[str], counter: Path, minutes: float, every: float) -> Iterator[Sample]:
    """Samples of a command, for so long; then it is told to stop."""
    began = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    try:
        while (left := began + 60 * minutes - time.monotonic()) > 0:
            time.sleep(min(every, left))
            if process.poll() is not None:
                assert process.stderr is not None
                raise Loss(f"{' '.join(command)} ended with {process.returncode}: {process.stderr.read().decode()}")
            yield look(process.pid, began, lines_in(counter))
    finally:
        process.terminate()  # an interrupt is ignored where the shell started us in the background
        process.communicate()


# ---- the judgement --------------------------------------------------------------------------------------------------


def slope(samples: list[Sample], block: float) -> tuple[float, float]:
    """Of resident memory, in MB an hour, and its upper 95 % bound: a line through the means of blocks."""
    from scipy.stats import linregress, t

    blocks: dict[int, list[Sample]] = {}
    for sample in samples:
        blocks.setdefault(int(sample.t // block), []).append(sample)
    hours = [statistics.mean(s.t for s in part) / 3600 for part in blocks.values()]
    megabytes = [statistics.mean(s.rss for s in part) / 1e6 for part in blocks.values()]
    if len(blocks) < 4:
        raise Loss(f"{len(blocks)} blocks of {block:.0f} s after the warm-up are too few: give it more --minutes")
    fit = linregress(hours, megabytes)
    return fit.slope, fit.slope + t.ppf(0.95, len(blocks) - 2) * fit.stderr


def drift(samples: list[Sample]) -> float:
    """How much slower the last third is than the first: median processor time a unit, in yardsticks, minus 1."""
    third = len(samples) // 3
    costs = []
    for part in (samples[: third + 1], samples[-third - 1 :]):
        pace = (part[-1].cpu - part[0].cpu) / max(1, part[-1].work - part[0].work)
        costs.append(pace / statistics.median(s.yardstick for s in part))
    return costs[1] / costs[0] - 1


def judge(name: str, samples: list[Sample], minutes: float, block: float) -> int:
    """Print the line; a `Loss` for what grew."""
    kept = [sample for sample in samples if sample.t > 10 * minutes]
    growth, bound = slope(kept, block)
    slower, third = drift(kept), len(kept) // 3
    more = {what: max(getattr(s, what) for s in kept[-third:]) - max(getattr(s, what) for s in kept[:third])
            for what in ("handles", "threads")}  # fmt: skip
    sys.stdout.write(
        f"long run, {name}: {minutes:g} minutes, {kept[-1].work:,} units of work, {kept[-1].rss / 1e6:.0f} MB, growing "
        f"{growth:+.2f} MB an hour (95 % below {bound:+.2f}), handles {more['handles']:+d}, threads "
        f"{more['threads']:+d}, {100 * slower:+.1f} % slower\n"
    )
    if bound >= GROWTH or slower > SLOWER or max(more.values()) > 0:
        raise Loss(f"long run, {name}: above {GROWTH:g} MB an hour, {100 * SLOWER:g} % slower, or something was left")
    return 0


def main(arguments: list[str]) -> int:
    parser = parser_of(__doc__ or "")
    parser.add_argument("what", choices=["decode", "train", "decode-for-ever"], help=argparse.SUPPRESS)
    parser.add_argument("--model", default="default", help="for decode")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks")
    parser.add_argument("--block", type=float, default=BLOCK, help="seconds of a block of samples")
    parser.set_defaults(minutes=120.0)
    options = parser.parse_args(arguments)
    folder = options.work / f"long-run-{options.what.removesuffix('-for-ever')}"
    counter = folder / "work.jsonl"
    if options.what == "decode-for-ever":
        decode_for_ever(options.model, options.seed, counter)
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / "journal.jsonl"
    samples = [Sample(**row) for row in rows_of(journal)]
    if not samples or samples[-1].t < 59 * options.minutes:  # a long run is one process: half of one counts for nothing
        journal.unlink(missing_ok=True)
        if options.what == "decode":
            counter.unlink(missing_ok=True)
            command = [sys.executable, __file__, "decode-for-ever", "--model", options.model, "--seed",
                       str(options.seed), "--work", str(options.work)]  # fmt: skip
        else:
            command, counter = training_command(folder, options.minutes + 1), folder / "run" / "metrics.jsonl"
        samples = []
        for sample in watched(command, counter, options.minutes, options.every):
            samples.append(sample)
            with open(journal, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(sample)) + "\n")
    return judge(options.what, samples, options.minutes, options.block)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
