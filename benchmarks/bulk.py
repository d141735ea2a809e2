"""Bulk encoding on Ray beside a plain loop, and through faults: figures of docs/scale.md.

    python benchmarks/bulk.py speed PHOTOS --out runs/bulk --limit 48 --repeats 5
    python benchmarks/bulk.py faults PHOTOS --out runs/bulk

PHOTOS are .tar shards or folders; `--limit` takes the first so many pictures. `speed` times the plain loop, one and two
workers in turns, one thread each, from the start of the first shard to the end of the last: Ray's own start, which a
large job pays once, is told apart. `faults` encodes on a cluster of three nodes of which one is killed, and through a
kill -9 of the driver, and compares every byte with the plain loop's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

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
    shutil.rmtree(given.out, ignore_errors=True)
    photos = unpacked(given.photos, given.out / "photos", given.limit)
    result = speed(given, photos) if given.what == "speed" else faults(given, photos)
    text = json.dumps(result, indent=2)
    (given.out / f"{given.what}.json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


def unpacked(source: list[str], folder: Path, limit: int | None) -> Path:
    """The pictures as files, so that shards are small enough to share out."""
    folder.mkdir(parents=True)
    for number, sample in enumerate(find_samples(source)[:limit]):
        (folder / f"{number:06d}{Path(sample.name).suffix}").write_bytes(sample.read())
    return folder


def work_of(given: argparse.Namespace, photos: Path, name: str) -> EncodingWork:
    folder = given.out / name
    shutil.rmtree(folder, ignore_errors=True)
    # As the command names it.
    how = BulkEncoding(pictures_a_shard=given.shard, model=resources.versioned_name(given.model) or given.model)
    return EncodingWork(Tokenizer.from_pretrained(given.model), str(photos), folder, how)


# ---- speed ------------------------------------------------------------------------------------------------------


def plain(work: EncodingWork) -> list[Report]:
    with claimed(work) as missing:
        for number in missing:
            run_shard(work, number)
        return finish(work)


def speed(given: argparse.Namespace, photos: Path) -> dict:
    from monobath.integrations.ray import Cluster, connected, run

    seconds: dict[str, list[float]] = {"plain": [], "1 worker": [], "2 workers": []}
    starts, shares = [], []
    count = len(list(photos.iterdir()))
    start = time.perf_counter()
    with connected(Cluster(workers=2), 1):
        starts.append(time.perf_counter() - start)
        for _ in range(given.repeats):
            for name, times in seconds.items():
                work, ends = work_of(given, photos, name), []
                begun = time.perf_counter()
                if name == "plain":
                    reports = plain(work)
                    times.append(time.perf_counter() - begun)
                    spent = {
                        what: sum(r.seconds.get(what, 0.0) for r in reports) for what in ("read", "network", "write")
                    }
                    shares.append(spent["network"] / sum(spent.values()))
                    continue

                def tell(report: Report, total: int, ends: list = ends) -> None:
                    ends.append((time.perf_counter(), sum(report.seconds.values())))

                run(work, Cluster(workers=int(name[0])), tell)
                times.append(ends[-1][0] - (ends[0][0] - ends[0][1]))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "pictures": count,
        "seconds": {name: [round(t, 2) for t in times] for name, times in seconds.items()},
        "pictures_per_second": {name: round(count / median, 2) for name, median in medians.items()},
        "overhead_of_1_worker": round(medians["1 worker"] / medians["plain"] - 1, 3),
        "speedup_of_2_workers": round(medians["1 worker"] / medians["2 workers"], 2),
        "share_of_the_network": round(statistics.median(shares), 3),
        "ray_start_seconds": round(starts[0], 1),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


# ---- faults -----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


def faults(given: argparse.Namespace, photos: Path) -> dict:
    alone = work_of(given, photos, "alone")
    reports = plain(alone)
    expected = contents(alone.out)
    return {
        "pictures": sum(report.pictures for report in reports),
        "shards": len(reports),
        "a lost node": contents(lost_node(given, photos)) == expected,
        "a killed driver": contents(killed_driver(given, photos)) == expected,
    }


def lost_node(given: argparse.Namespace, photos: Path) -> Path:
    import ray
    from ray.cluster_utils import Cluster as Machines

    from monobath.integrations.ray import Cluster, run

    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    others = [machines.add_node(num_cpus=1) for _ in range(2)]
    work, seen = work_of(given, photos, "lost-node"), []

    def lose(report: Report, total: int) -> None:
        seen.append(report.number)
        if len(seen) == max(1, total // 3):
            machines.remove_node(others[0], allow_graceful=False)

    try:
        ray.init(address=machines.address, log_to_driver=False)
        run(work, Cluster(workers=3), lose)
    finally:
        ray.shutdown()
        machines.shutdown()
    return work.out


def killed_driver(given: argparse.Namespace, photos: Path) -> Path:
    out = given.out / "killed-driver"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "monobath", "encode-dataset", str(photos), "--out", str(out), "--device", "cpu"]
    command += ["--model", given.model, "--shard_pictures", str(given.shard)]
    driver = subprocess.Popen(command)
    total = -(-len(list(photos.iterdir())) // given.shard)
    while len(list(out.glob("done/*.json"))) < max(1, total // 3) and driver.poll() is None:
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    subprocess.run(command, check=True)
    return out


if __name__ == "__main__":
    main()
