"""Bulk encoding on Ray beside a plain loop, and through faults: figures of docs/scale.md.

    python benchmarks/bulk.py speed PHOTOS --out runs/bulk-speed --limit 192 --repeats 5
    python benchmarks/bulk.py faults PHOTOS --out runs/bulk-faults

PHOTOS are .tar shards or folders; `--limit` takes the first so many pictures. `speed` times the plain loop, one and two
workers in turns, one thread each, from the start of the first shard to the end of the last: Ray's own start, which a
large job pays once, is told apart. Two plain loops side by side, each with every other shard, say what the machine
itself gives for a second core. `faults` encodes on a cluster of three nodes of which one is killed, and through a
kill -9 of the driver, and compares every byte with the plain loop's.

Each part that is finished is kept in OUT/speed.parts.json or faults.parts.json: the same command goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from monobath import Tokenizer, resources
from monobath.data import find_samples
from monobath.data.bulk import Report, claimed, finish, run_shard
from monobath.data.bulk_encoding import BulkEncoding, EncodingWork


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "faults"])
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="f8c4")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--shard", type=int, default=8, help="pictures in a shard")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts = Parts(given)
    photos = unpacked(given.photos, given.out / "photos", given.limit)
    result = speed(given, photos, parts) if given.what == "speed" else faults(given, photos, parts)
    text = json.dumps(result, indent=2)
    (given.out / f"{given.what}.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


class Parts:
    """What has been measured, kept in a file: a part is done once, however often the command is run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.file = given.out / f"{given.what}.parts.json"
        self.of = {"photos": given.photos, "limit": given.limit, "model": given.model, "shard": given.shard}
        self.found: dict[str, Any] = {}
        if self.file.is_file():
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            if kept.pop("of") != self.of:
                raise SystemExit(f"{given.out} holds parts of another command: choose another --out, or delete it")
            self.found = kept
        given.out.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.found:
            say(name)
            start = time.perf_counter()
            self.found[name] = measure()
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps({"of": self.of, **self.found}, indent=2), encoding="utf-8")
            partial.replace(self.file)
            say(f"{name}: done in {time.perf_counter() - start:.0f} s")
        return self.found[name]


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


class Clock:
    """Called with each report: says how far it is at every tenth, and keeps when shards began and ended.

    When, the workers' files say: the driver hears of a shard later, and of several at once.
    """

    def __init__(self, work: EncodingWork) -> None:
        self.work, self.begun = work, time.perf_counter()
        self.reports: list[Report] = []
        self.times: list[tuple[float, float]] = []

    def __call__(self, report: Report, total: int) -> None:
        end = Path(self.work.folder.join(self.work.file(report.number))).stat().st_mtime
        self.times.append((end - sum(report.seconds.values()), end))
        self.reports.append(report)
        done = len(self.reports)
        if done * 10 // total > (done - 1) * 10 // total:
            say(f"  {done} of {total} shards, {time.perf_counter() - self.begun:.0f} s")

    def figures(self, workers: int) -> dict[str, float]:
        """Seconds from the start of the first shard to the end of the last; which share of it the networks worked."""
        starts, ends = zip(*self.times, strict=True)
        seconds = max(ends) - min(starts)
        network = sum(report.seconds["network"] for report in self.reports)
        return {"seconds": seconds, "network": network / (seconds * workers), "load": os.getloadavg()[0]}


def unpacked(source: list[str], folder: Path, limit: int | None) -> Path:
    """The pictures as files, so that shards are small enough to share out."""
    if not folder.is_dir():
        partial = folder.with_name("photos.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for number, sample in enumerate(find_samples(source)[:limit]):
            (partial / f"{number:06d}{Path(sample.name).suffix}").write_bytes(sample.read())
        partial.rename(folder)
    return folder


def work_of(given: argparse.Namespace, photos: Path, name: str, *, anew: bool = True) -> EncodingWork:
    folder = given.out / name
    if anew:
        shutil.rmtree(folder, ignore_errors=True)
    # As the command names it.
    how = BulkEncoding(pictures_a_shard=given.shard, model=resources.versioned_name(given.model) or given.model)
    return EncodingWork(Tokenizer.from_pretrained(given.model), str(photos), folder, how)


# ---- speed ------------------------------------------------------------------------------------------------------


def plain(work: EncodingWork) -> Clock:
    clock = Clock(work)
    with claimed(work) as missing:
        for number in missing:
            clock(run_shard(work, number), len(missing))
        finish(work)
    return clock


def half(given: argparse.Namespace, photos: Path, which: int, ready: Any, ends: Any) -> None:
    """Every other shard, in a process of its own, from when both are ready."""
    torch.set_num_threads(1)
    work = work_of(given, photos, f"half-{which}")
    with claimed(work) as missing:
        ready.wait()
        start = time.perf_counter()  # CLOCK_MONOTONIC, which processes share
        for number in missing[which::2]:
            run_shard(work, number)
        ends.put((start, time.perf_counter()))


def side_by_side(given: argparse.Namespace, photos: Path) -> dict[str, Any]:
    there = multiprocessing.get_context("spawn")
    ready, ends = there.Barrier(2), there.Queue()
    both = [there.Process(target=half, args=(given, photos, which, ready, ends)) for which in range(2)]
    for process in both:
        process.start()
    found = [ends.get() for _ in both]
    for process in both:
        process.join()
    return {"seconds": max(end for _, end in found) - min(start for start, _ in found)}


def on_ray(given: argparse.Namespace, photos: Path, workers: int) -> dict[str, Any]:
    from monobath.integrations.ray import Cluster, connected, run

    start = time.perf_counter()
    with connected(Cluster(workers=workers), 1):
        begun = time.perf_counter() - start
        work = work_of(given, photos, f"ray-{workers}")
        clock = Clock(work)
        run(work, Cluster(workers=workers), clock)
    return clock.figures(workers) | {"ray_start": begun}


def speed(given: argparse.Namespace, photos: Path, parts: Parts) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": lambda: plain(work_of(given, photos, "plain")).figures(1),
        "1 worker": lambda: on_ray(given, photos, 1),
        "2 workers": lambda: on_ray(given, photos, 2),
        "2 plain loops": lambda: side_by_side(given, photos),
    }
    for number in range(1, given.repeats + 1):
        for name, measure in ways.items():
            rows.setdefault(name, []).append(parts(f"{name}, round {number}", measure))
    medians = {name: statistics.median(row["seconds"] for row in found) for name, found in rows.items()}
    count = len(list(photos.iterdir()))
    return {
        "pictures": count,
        "shards": -(-count // given.shard),
        "seconds": {name: [round(row["seconds"], 2) for row in found] for name, found in rows.items()},
        "pictures_per_second": {name: round(count / median, 2) for name, median in medians.items()},
        "overhead_of_1_worker": round(medians["1 worker"] / medians["plain"] - 1, 3),
        "speedup_of_2_workers": round(medians["1 worker"] / medians["2 workers"], 2),
        "speedup_of_2_plain_loops": round(medians["plain"] / medians["2 plain loops"], 2),
        "share_of_the_network": {
            name: round(statistics.median(row["network"] for row in found), 3)
            for name, found in rows.items() if name != "2 plain loops"
        },
        "ray_start_seconds": round(statistics.median(row["ray_start"] for row in rows["2 workers"]), 1),
        "cores": os.cpu_count(),
        "load": [round(row["load"], 1) for row in rows["plain"]],
    }  # fmt: skip


# ---- faults -----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


def faults(given: argparse.Namespace, photos: Path, parts: Parts) -> dict[str, Any]:
    # The plain loop's folder goes on where it was; a fault must come in the middle, so that theirs begin anew.
    alone = work_of(given, photos, "alone", anew=False)
    parts("plain loop", lambda: len(plain(alone).reports))

    def same(folder: Path) -> bool:
        return contents(folder) == contents(Path(alone.folder.where))

    facts = json.loads(Path(alone.folder.where, "latents.json").read_text(encoding="utf-8"))
    return {
        "pictures": facts["pictures"],
        "shards": len(facts["counts"]),
        "a lost node": parts("a lost node", lambda: same(lost_node(given, photos))),
        "a killed driver": parts("a killed driver", lambda: same(killed_driver(given, photos))),
    }


def lost_node(given: argparse.Namespace, photos: Path) -> Path:
    import ray
    from ray.cluster_utils import Cluster as Machines

    from monobath.integrations.ray import Cluster, run

    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    others = [machines.add_node(num_cpus=1) for _ in range(2)]
    work = work_of(given, photos, "lost-node")
    clock = Clock(work)

    def lose(report: Report, total: int) -> None:
        clock(report, total)
        if len(clock.reports) == max(1, total // 3):
            machines.remove_node(others[0], allow_graceful=False)
            say("  a node is lost")

    try:
        ray.init(address=machines.address, log_to_driver=False)
        run(work, Cluster(workers=3), lose)
    finally:
        ray.shutdown()
        machines.shutdown()
    return Path(work.folder.where)


def killed_driver(given: argparse.Namespace, photos: Path) -> Path:
    out = given.out / "killed-driver"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "monobath", "encode-dataset", str(photos), "--out", str(out), "--device", "cpu"]
    command += ["--model", given.model, "--shard_pictures", str(given.shard)]
    driver = subprocess.Popen(command)
    total = -(-len(list(photos.iterdir())) // given.shard)
    while (done := len(list(out.glob("done/*.json")))) < max(1, total // 3) and driver.poll() is None:
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    say(f"  the driver is killed after {done} of {total} shards")
    subprocess.run(command, check=True, stdout=sys.stderr)
    return out


if __name__ == "__main__":
    main()
