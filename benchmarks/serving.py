"""Load, bad input, memory and failing replicas of `monobath serve`: on this machine's loopback alone, and bounded.

    python benchmarks/serving.py load                # throughput, p50 and p99 at 1, 8 and 64 clients
    python benchmarks/serving.py mutated             # 10 000 mutated requests
    python benchmarks/serving.py memory              # 10 000 requests, and the server's memory
    python benchmarks/serving.py kill                # kill -9 of a Ray Serve replica under load

Each prints rows of Markdown; `kill` needs the extra ray. docs/serve.md has what they gave.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from monobath import Tokenizer

Answer = tuple[int, bytes, dict[str, str]]
CHANNELS = 16


@contextmanager
def server(*options: str) -> Iterator[tuple[int, int]]:
    """`monobath serve` on a free port: (port, process id)."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "monobath",
        "serve",
        "--port",
        "0",
        "--no_page",
        "--model",
        "default",
        *options,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline().rpartition(":")[2]), process.pid
        finally:
            process.terminate()
            process.wait(60)


class Client:
    """One connection that is kept open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> Answer:
        """(status, body, headers by lower-case name); after an error of the connection the next call opens another."""
        try:
            self._connection.request("POST", path, body, headers or {})
            reply = self._connection.getresponse()
            return reply.status, reply.read(), {name.lower(): value for name, value in reply.getheaders()}
        except Exception:
            self._connection.close()
            raise


def decoding(side: int, number: int = 0) -> tuple[str, bytes]:
    """A request for a picture of `side`² pixels that no other number asks for: (path, body)."""
    z = torch.randn(1, CHANNELS, side // 8, side // 8, generator=torch.Generator().manual_seed(number)) / 4
    query = urlencode({"shape": list(z.shape), "output_type": "pt", "partial_postprocess": True}, doseq=True)
    return f"/decode?{query}", z.numpy().tobytes()


def resident(pid: int) -> float:
    """Memory of a process, in MiB."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def together(clients: int, work: Callable[[int], Any]) -> float:
    """Seconds until `work(0)` … `work(clients - 1)`, all at once, are done."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


# ---- load ----


def load(port: int, clients: int, requests: int, side: int) -> tuple[list[float], float, Counter]:
    """(milliseconds of each picture, seconds in all, statuses). After 503 a client comes again.

    Each picture is checked to be the asker's own. `requests` are those of all clients together.
    """
    tokenizer = Tokenizer.from_pretrained("default")
    kinds = [decoding(side, number) for number in range(4)]
    expected = []
    for _, body in kinds:
        z = torch.frombuffer(bytearray(body), dtype=torch.float32).reshape(1, CHANNELS, side // 8, side // 8)
        expected.append(tokenizer.decode(z, output="uint8").permute(0, 2, 3, 1).flatten().int())
    times: list[float] = []
    statuses: Counter[str] = Counter()

    def work(client: int) -> None:
        connection = Client(port)
        for number in range(client, requests, clients):
            path, body = kinds[number % 4]
            while True:
                begin = time.perf_counter()
                status, found, headers = connection.post(path, body)
                statuses[str(status)] += 1
                if status != 503:
                    times.append((time.perf_counter() - begin) * 1000)
                    break
                assert json.loads(found)["detail"]
                time.sleep(float(headers["retry-after"]) / 4)
            if status == 200:
                pixels = torch.frombuffer(bytearray(found), dtype=torch.uint8).int()
                if (pixels - expected[number % 4]).abs().max() > 1:
                    statuses["not its own"] += 1

    return times, together(clients, work), statuses


def percentile(times: list[float], part: float) -> float:
    """Of a list, by the nearest rank."""
    return sorted(times)[min(len(times) - 1, int(part * len(times)))]


def overhead(port: int, requests: int, side: int) -> tuple[list[float], list[float]]:
    """Milliseconds of `Tokenizer.decode` in this process, and of a request for the same, in turns."""
    tokenizer, client = Tokenizer.from_pretrained("default"), Client(port)
    path, body = decoding(side)
    z = torch.frombuffer(bytearray(body), dtype=torch.float32).reshape(1, CHANNELS, side // 8, side // 8)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: tokenizer.decode(z, output="uint8"),
        lambda: client.post(path, body),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(requests):
        for call, found in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            found.append((time.perf_counter() - begin) * 1000)
    return times[0][3:], times[1][3:]  # the first are slow


def run_load(given: argparse.Namespace) -> Iterator[str]:
    """Rows of the table."""
    yield "| clients | batches up to | pictures / s | p50, ms | p99, ms | 200 | 503 | wrong |"
    yield "|---|---|---|---|---|---|---|---|"
    for batch in (8, 1):
        with server("--max_batch", str(batch), "--max_queue", "48") as (port, _):
            if batch == 8:
                alone, asked = overhead(port, given.requests // 4, given.side)
                for name, times in (("`Tokenizer.decode`, in turns with", alone), ("1, in turns with that", asked)):
                    rate, p50, p99 = 1000 / statistics.mean(times), percentile(times, 0.5), percentile(times, 0.99)
                    yield f"| {name} | {batch} | {rate:.1f} | {p50:.1f} | {p99:.1f} | {len(times)} | 0 | 0 |"
            for clients in (1, 8, 64):
                times, seconds, statuses = load(port, clients, given.requests, given.side)
                done = statuses.pop("200")
                assert done == given.requests, "a request was lost"
                yield (
                    f"| {clients} | {batch} | {done / seconds:.1f} | {percentile(times, 0.5):.1f} | "
                    f"{percentile(times, 0.99):.1f} | {done} | {statuses.pop('503', 0)} | {dict(statuses) or 0} |"
                )


def run_memory(given: argparse.Namespace) -> Iterator[str]:
    """Rows of the table."""
    yield "| requests | memory, MiB |"
    yield "|---|---|"
    with server("--max_queue", "48") as (port, pid):
        for part in range(6):
            yield f"| {part * given.count // 5:,} | {resident(pid):.0f} |"
            if part < 5:
                _, _, statuses = load(port, 16, given.count // 5, 32)
                assert set(statuses) <= {"200", "503"}, statuses


# ---- bad input ----

NUMBERS = st.one_of(st.integers(-3, 70), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4))
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "shape": st.one_of(
        st.just([1, CHANNELS, 2, 3]),
        st.just([1, 6, 4 * CHANNELS]),
        st.just([1, 3, 8, 9]),
        st.lists(NUMBERS, max_size=6),
    ),
    "dtype": st.sampled_from(["float32", "float16", "bfloat16", "uint8", "float64", ""]),
    "output_type": st.sampled_from(["pt", "pil", "mp4", "np"]),
    "image_format": st.sampled_from(["png", "jpg", "gif"]),
    "partial_postprocess": st.sampled_from(["True", "False", "perhaps"]),
    "do_scaling": st.sampled_from(["True", "False", "2"]),
    "scaling_factor": NUMBERS,
    "shift_factor": NUMBERS,
    "height": st.one_of(st.just(32), NUMBERS),
    "width": st.one_of(st.just(48), NUMBERS),
    "steps": st.one_of(st.integers(0, 3), NUMBERS),
    "seed": NUMBERS,
    "progressive": st.booleans(),
    "colour": st.just("blue"),
}


@st.composite
def mutated(draw: st.DrawFn, picture: bytes) -> tuple[str, bytes, dict[str, str]]:
    """(path and query, body, headers): a right request with some of its parts wrong."""
    route = draw(st.sampled_from(["/decode", "/encode", "/reconstruct", "/models/default/decode", "/models/x/decode"]))
    chosen = draw(st.lists(st.sampled_from(list(VALUES)), max_size=4, unique=True))
    query = {"shape": [1, CHANNELS, 2, 3], "output_type": "pt"} if route.endswith("decode") else {}
    query |= {name: draw(VALUES[name]) for name in chosen}
    size = 4 * CHANNELS * 6
    body = draw(
        st.one_of(
            st.just(bytes(size)), st.just(picture), st.binary(max_size=64), st.binary(min_size=size, max_size=size),
            st.integers(0, len(picture)).map(lambda cut: picture[:cut]),
            st.tuples(st.integers(0, len(picture) - 1), st.integers(0, 255)).map(
                lambda change: picture[: change[0]] + bytes([change[1]]) + picture[change[0] + 1 :]
            ),
        )
    )  # fmt: skip
    accept = draw(st.sampled_from(["*/*", "tensor/binary", "image/png", ""]))
    return f"{route}?{urlencode(query, doseq=True)}", body, {"Accept": accept}


def check_mutated(post: Callable[[str, bytes, dict[str, str]], Answer], picture: bytes, count: int) -> Counter:
    """Send mutated requests: each gets a right answer, or an error below 500 with one line of JSON.

    Returns:
        How many of each status.
    """
    statuses: Counter[int] = Counter()

    @seed(0)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(mutated(picture))
    def check(request: tuple[str, bytes, dict[str, str]]) -> None:
        status, body, headers = post(*request)
        statuses[status] += 1
        if status == 200:
            if "shape" in headers:
                width = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}[headers["dtype"]]
                assert len(body) == width * torch.Size(json.loads(headers["shape"])).numel(), request
            else:
                assert headers["content-type"].startswith(("image/", "multipart/")), request
        else:
            assert 400 <= status < 500, (status, request)
            detail = json.loads(body)["detail"]
            assert detail, request
            assert "\n" not in detail, request
            assert "Traceback" not in detail, request

    check()
    return statuses


def run_mutated(given: argparse.Namespace) -> Iterator[str]:
    """Rows of the table."""
    from monobath import resources

    picture = resources.sample_paths()[0].read_bytes()[:20_000]
    with server() as (port, pid):
        client = Client(port)
        check_mutated(client.post, picture, 200)
        before, begin = resident(pid), time.perf_counter()
        statuses = check_mutated(client.post, picture, given.count)
        yield "| status | requests |"
        yield "|---|---|"
        for status, count in sorted(statuses.items()):
            yield f"| {status} | {count:,} |"
        seconds = time.perf_counter() - begin
        yield f"\n{seconds:.0f} s; memory {before:.0f} MiB before, {resident(pid):.0f} MiB after."


# ---- Ray ----


def run_kill(given: argparse.Namespace) -> Iterator[str]:
    """Rows of the table."""
    # Ray's own limits are for machines of their own; its clusters are of this process alone.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"}
    os.environ["RAY_SERVE_HTTP_PROXY_TIMEOUT_S"] = "240"
    import ray
    from ray import serve

    from monobath.app.ray import Settings, app

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    port = given.port
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(Settings(models="default", min_replicas=2, max_replicas=2)), name="monobath")
        path, body = decoding(given.side)
        statuses: Counter[str] = Counter()

        def work(client: int) -> None:
            connection = Client(port)
            for _ in range(given.requests // 8):
                try:
                    status, found, headers = connection.post(path, body)
                    whole = status != 200 or len(found) == 3 * given.side**2
                    kind = headers.get("content-type", "") if status != 200 else ""
                    statuses[f"{status} {kind} {'' if whole else 'cut short'}".strip()] += 1
                except Exception as error:
                    statuses[type(error).__name__] += 1

        def kill(_: int) -> None:
            time.sleep(given.after)
            os.kill(victim, signal.SIGKILL)

        victim = replicas()[0]
        together(9, lambda i: work(i) if i < 8 else kill(i))
        yield "| answer | requests |"
        yield "|---|---|"
        for name, count in sorted(statuses.items()):
            yield f"| {name} | {count} |"
        yield f"\nOf {given.requests // 8 * 8} requests, {sum(statuses.values())} were answered."
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[int]:
    """Process ids of this cluster's replicas, which descend from this process."""
    parents, names = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
                with open(f"/proc/{entry}/cmdline") as file:
                    names[int(entry)] = file.read()
            except OSError:
                continue  # it has just ended

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return [pid for pid, name in names.items() if name.startswith("ray::ServeReplica") and ours(pid)]


def main(argv: list[str] | None = None) -> None:
    """Run one of them, and print its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("load", "mutated", "memory", "kill"))
    parser.add_argument("--side", type=int, default=256, help="of a picture, in pixels")
    parser.add_argument("--requests", type=int, default=256, help="of load and kill, in each row")
    parser.add_argument("--count", type=int, default=10_000, help="of mutated and memory")
    parser.add_argument("--port", type=int, default=8765, help="of Ray Serve")
    parser.add_argument("--after", type=float, default=3, help="seconds until the replica is killed")
    given = parser.parse_args(argv)
    rows = {"load": run_load, "mutated": run_mutated, "memory": run_memory, "kill": run_kill}[given.what](given)
    for row in rows:
        sys.stdout.write(row + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
