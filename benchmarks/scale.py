"""Bulk encoding of 10⁸ pictures on 1 to 1 000 workers, simulated: the plot and the table of docs/scale.md.

    python benchmarks/scale.py --out runs/scale

A discrete-event simulation of what `monobath encode-dataset` does: workers take one shard after the other, in the
driver's order; fetch it through storage that all share, read its pictures, run the network, write. The next one is
fetched while the network has one. Stragglers: the time
of a shard is log-normal around its mean. Failures: a worker is lost at a constant rate with what it has of its shard,
which is done again, and its place is empty until another starts. The driver gives out a shard in a fixed time. What
bounds the whole is then seen, not assumed. Rates are measured ones or, for GPUs, assumptions: all are arguments.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rates are per worker unless they say otherwise."""

    pictures: float = 1e8
    shard: int = 10_000
    """Pictures in a shard."""
    picture_bytes: float = 110e3
    """Of a JPEG of about half a megapixel."""
    read: float = 0.011
    """Seconds of one core to decode a picture."""
    readers: int = 1
    """Cores that decode for a worker."""
    network: float = 0.41
    """Seconds for a picture."""
    overlapped: bool = False
    """Pictures are decoded while the network runs, as on a GPU."""
    storage: float = 1.25e9
    """Bytes a second that the storage gives, to all workers together."""
    link: float = 1.25e8
    """Bytes a second to one worker."""
    dispatch: float = 0.02
    """Seconds of the driver for a shard."""
    start: float = 30.0
    """Seconds until a worker has its networks."""
    spread: float = 0.15
    """Standard deviation of the logarithm of a shard's time."""
    lifetime: float = 200 * 3600.0
    """Mean seconds until a worker is lost."""
    replace: float = 300.0
    """Seconds until another is in its place."""

    @property
    def compute(self) -> float:
        """Seconds of a worker for a picture, without fetching it."""
        read = self.read / self.readers
        return max(read, self.network) if self.overlapped else read + self.network


def simulate(plan: Plan, workers: int, seed: int = 0) -> dict[str, float]:
    """One run: hours, pictures a second, share of the workers' time that they compute, shards done twice."""
    rng = np.random.default_rng((seed, workers))
    left = int(-(-plan.pictures // plan.shard))
    size = plan.shard * plan.picture_bytes
    ready = [(plan.start, number) for number in range(workers)]
    heapq.heapify(ready)
    free = np.zeros(workers)  # when a worker's network has done what it has
    lost_at = rng.exponential(plan.lifetime, workers)
    driver, storage, busy, again, end = 0.0, 0.0, 0.0, 0, 0.0
    while left:
        now, number = heapq.heappop(ready)
        driver = max(driver, now) + plan.dispatch
        # A shard is fetched whole, then read: at the worker's own speed, or when the storage comes to it.
        storage = max(storage, driver) + size / plan.storage
        fetched = max(driver + size / plan.link, storage)
        seconds = plan.shard * plan.compute * rng.lognormal(-(plan.spread**2) / 2, plan.spread)
        begun = max(fetched, free[number])
        done = begun + seconds
        if lost_at[number] < done:
            gone = max(lost_at[number], driver)
            lost_at[number] = gone + plan.replace + plan.start + rng.exponential(plan.lifetime)
            heapq.heappush(ready, (gone + plan.replace + plan.start, number))
            again += 1
            continue
        busy += seconds
        left -= 1
        end = max(end, done)
        free[number] = done
        heapq.heappush(ready, (begun, number))
    return {
        "workers": workers,
        "hours": end / 3600,
        "pictures_per_second": plan.pictures / end,
        "busy": busy / (end * workers),
        "worker_hours": end * workers / 3600,
        "again": again,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="where to put the plot; default: OUT/scale.png")
    parser.add_argument(
        "--gpu_network", type=float, default=0.002, help="seconds of a GPU for a picture: an assumption"
    )
    parser.add_argument("--gpu_readers", type=int, default=16, help="cores beside each GPU")
    for field in fields(Plan):
        if isinstance(field.default, float):
            parser.add_argument(f"--{field.name}", type=float, default=field.default)
    given = vars(parser.parse_args())
    cpu = replace(Plan(), **{f.name: given[f.name] for f in fields(Plan) if f.name in given})
    gpu = replace(cpu, network=given["gpu_network"], readers=given["gpu_readers"], overlapped=True)
    counts = [1, 3, 10, 30, 100, 300, 1000]
    found = {name: [simulate(plan, n) for n in counts] for name, plan in (("CPU cores", cpu), ("GPUs", gpu))}
    given["out"].mkdir(parents=True, exist_ok=True)
    plans = {"CPU cores": asdict(cpu), "GPUs": asdict(gpu)}
    (given["out"] / "scale.json").write_text(json.dumps({"plans": plans, "found": found}, indent=2) + "\n")
    for name, rows in found.items():
        sys.stdout.write(f"\n{name}\n\n| workers | hours | pictures/s | busy | worker-hours | shards again |\n")
        sys.stdout.write("|--:|--:|--:|--:|--:|--:|\n")
        for row in rows:
            sys.stdout.write(
                f"| {row['workers']:,} | {row['hours']:,.1f} | {row['pictures_per_second']:,.0f} | {row['busy']:.2f} | "
                f"{row['worker_hours']:,.0f} | {row['again']} |\n"
            )
    _plot(found, plans, given["plot"] or given["out"] / "scale.png")


def _plot(found: dict[str, list[dict[str, float]]], plans: dict[str, dict], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name, rows in found.items():
        x = [row["workers"] for row in rows]
        (line,) = axes.loglog(x, [row["pictures_per_second"] for row in rows], marker="o", label=name)
        first = rows[0]["pictures_per_second"]
        axes.loglog(x, [first * n for n in x], ls=":", color=line.get_color(), label=f"{name}, ideal")
    storage = plans["GPUs"]["storage"] / plans["GPUs"]["picture_bytes"]
    axes.axhline(storage, color="gray", ls="--", label="storage")
    axes.set(xlabel="workers", ylabel="pictures a second", title="10⁸ pictures, simulated")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
