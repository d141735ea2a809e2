"""Decoding time and memory against picture size: both must grow with pixels, not with their square.

    python benchmarks/scaling.py --sizes 256 512 1024 2048

Decodes random latents in one step with S/2 (random weights: time and memory do not depend on them), each size in
a fresh process, on the CPU in float32. Two memories are reported: the peak resident memory of the process, and
that minus what it held before the first decode (Python, torch and the weights): the activations. Exponents are
least-squares slopes of log(quantity) over log(pixels): 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

TARGET = 1.15
"""Largest accepted exponent of time and of activation memory."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048], help="sides in pixels")
    parser.add_argument("--decoder", default="S/2", help="SIZE/PATCH (default: %(default)s)")
    parser.add_argument("--repeats", type=int, help="timed decodes a size (default: 5 up to 512², else 3)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # what each fresh process is called with
    args = parser.parse_args()
    if args.measure:
        sys.stdout.write(json.dumps(measure(args.measure, args.decoder, args.repeats)) + "\n")
        return 0
    rows = []
    for side in args.sizes:
        command = [sys.executable, __file__, "--measure", str(side), "--decoder", args.decoder]
        command += ["--repeats", str(args.repeats)] if args.repeats else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{side}² failed with exit code {done.returncode} (negative: a signal; −9: memory)")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    report = {
        "decoder": args.decoder,
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rows": rows,
        "exponents": exponents(rows) if len(rows) > 1 else {},
    }
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(report["exponents"].get(key, 0) > TARGET for key in ("seconds", "activations_gb")))


def measure(side: int, name: str, repeats: int | None) -> dict[str, float]:
    """Decode one `side`² picture a few times, in this process. torch is imported here only: a process inherits
    the peak of the one that started it, so that one must stay small."""
    import torch

    from monobath.decoders import decoder_config, make_decoder
    from monobath.sampling import draw_noise, euler

    torch.manual_seed(0)
    config = decoder_config({"size": name})
    decoder = make_decoder(config).eval()
    noise = draw_noise((3, side, side), [0])
    z = torch.randn(1, config.latent_channels, side // config.factor, side // config.factor)
    before = resident()
    seconds, cpu = [], []
    with torch.no_grad():
        for _ in range(repeats or (5 if side <= 512 else 3)):
            start, cpu_start = time.perf_counter(), time.process_time()
            euler(lambda x_t, t: decoder(x_t, t, z), noise, kind=decoder.prediction)
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "side": side,
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu),
        "threads": torch.get_num_threads(),
        "peak_gb": peak / 1e9,
        "baseline_gb": before / 1e9,
        "activations_gb": (peak - before) / 1e9,
    }


def resident() -> int:
    """Bytes of memory this process holds now (where the system cannot tell: its peak so far)."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def exponents(rows: list[dict[str, float]]) -> dict[str, float]:
    pixels = [math.log(row["side"] ** 2) for row in rows]
    return {
        key: statistics.linear_regression(pixels, [math.log(row[key]) for row in rows]).slope
        for key in ("seconds", "cpu_seconds", "activations_gb", "peak_gb")
    }


def show(report: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    threads = report["rows"][0]["threads"]
    table = Table(title=f"{report['decoder']}, one step, float32, {report['hardware']}, {threads} threads")
    for column in ("size", "seconds", "CPU seconds", "peak GB", "baseline GB", "activations GB"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        figures = (row["peak_gb"], row["baseline_gb"], row["activations_gb"])
        times = (row["seconds"], row["cpu_seconds"])
        table.add_row(f"{row['side']}²", *(f"{x:.2f}" for x in times + figures))
    console = Console()
    console.print(table)
    if report["exponents"]:
        e = report["exponents"]
        console.print(
            f"exponent in pixels: time {e['seconds']:.2f} (CPU time, which a busy machine disturbs less: "
            f"{e['cpu_seconds']:.2f}), activations {e['activations_gb']:.2f} "
            f"(peak minus baseline), raw peak {e['peak_gb']:.2f}; target ≤ {TARGET} for time and activations"
        )


if __name__ == "__main__":
    sys.exit(main())
