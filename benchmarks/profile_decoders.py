"""Where a decoder's time goes: operation by operation, beside the machine's own ceilings.

    python benchmarks/profile_decoders.py --sizes 256 512

Decodes random latents with random weights, one step, float32, eager, batch 1. Times are PyTorch's profiler's own time
of each operation; bytes are what an operation reads and writes if nothing stays in a cache (its tensors' sizes);
operations are counted as in `monobath bench`. Ceilings are measured in the same process: a large matrix product, a
large copy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command import exit_code
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monobath import Tokenizer
from monobath.decoders import decoder_config, make_decoder
from monobath.evaluation.bench import random_latents
from monobath.evaluation.facts import machine
from monobath.evaluation.peers import random_autoencoder
from monobath.evaluation.speed import count_flops
from monobath.files import write_text

# What an operation is for, by the beginning of its name; the first that fits.
GROUPS = {
    "convolution": ("convolution", "mkldnn_convolution", "_slow_conv2d", "slow_conv2d", "thnn_conv", "conv2d"),
    "matrix product": ("addmm", "mm", "bmm", "baddbmm", "linear", "mkldnn_linear", "_mkl_linear", "matmul"),
    "attention": ("_scaled_dot_product", "scaled_dot_product", "_softmax"),
    "normalisation": ("native_group_norm", "native_layer_norm", "var_mean", "mean"),
    "layout and copies": ("copy_", "clone", "contiguous", "cat", "fill_", "constant_pad_nd", "pad", "pixel_shuffle",
                          "pixel_unshuffle", "repeat", "index_select", "_to_copy", "unfold", "empty", "zero"),
    "resampling": ("upsample", "_upsample", "avg_pool", "adaptive_avg_pool"),
}  # fmt: skip
VIEWS = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "expand", "slice", "select", "split", "unsqueeze",
    "squeeze", "t", "as_strided", "unflatten", "flatten", "chunk", "alias", "detach", "unfold", "resize_",
}  # fmt: skip


def group_of(name: str) -> str:
    """The kind of an operation, from a name such as aten::addmm."""
    short = name.removeprefix("aten::").partition(".")[0]
    for group, beginnings in GROUPS.items():
        if any(short == b or (len(b) > 4 and short.startswith(b)) for b in beginnings):
            return group
    return "element by element" if name.startswith("aten::") else "other"


class CountBytes(TorchDispatchMode):
    """Bytes of the tensors that each operation reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.removeprefix("aten::") not in VIEWS:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes[group_of(name)] += sum(x.numel() * x.element_size() for x in tensors)
        return out


def ceilings(repeats: int = 5) -> dict[str, float]:
    """What this machine does at best: GFLOP/s of a matrix product, GB/s (read and written) of a copy."""
    a, b = torch.randn(3072, 3072), torch.randn(3072, 3072)
    source, target = torch.randn(64 * 2**20), torch.empty(64 * 2**20)
    matmul, copy = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ b
        middle = time.perf_counter()
        target.copy_(source)
        matmul.append(middle - start)
        copy.append(time.perf_counter() - middle)
    return {
        "gflop_per_s": 2 * 3072**3 / statistics.median(matmul[1:]) / 1e9,
        "gb_per_s": 2 * 4 * source.numel() / statistics.median(copy[1:]) / 1e9,
    }


def works(names: list[str], side: int) -> dict[str, Callable[[], Any]]:
    """A call for each decoder."""
    torch.manual_seed(0)
    noise, t = torch.randn(1, 3, side, side), torch.ones(1)
    z = torch.randn(1, 4, side // 8, side // 8)
    found: dict[str, Callable[[], Any]] = {}
    for name in names:
        if name in ("kl", "tiny"):
            peer = random_autoencoder(name).eval()
            label = {"kl": "AutoencoderKL", "tiny": "AutoencoderTiny"}[name]
            found[label] = lambda peer=peer: peer.decode(z, return_dict=False)
        elif "/" in name:
            decoder = make_decoder(decoder_config({"size": name})).eval()
            found[name] = lambda decoder=decoder: decoder(noise, t, z)
        else:
            tokenizer = Tokenizer.from_pretrained(name)
            fast, own = tokenizer.optimize(), random_latents(1, side, tokenizer.config.encoder.latent_channels)
            found[name] = lambda tokenizer=tokenizer, own=own: tokenizer.decode(own)
            found[f"{name}, optimized"] = lambda fast=fast, own=own: fast.decode(own)
    return found


@torch.no_grad()
def measure(work: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Wall-clock median, and time and bytes by group."""
    work()
    with CountBytes() as counter:
        work()
    gflop = count_flops(work) / 1e9
    clock = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        clock.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        spent[group_of(event.key)] += event.self_cpu_time_total / 1e3
    total = sum(spent.values())
    groups = {
        name: {"share": ms / total, "ms": ms, "gb": counter.bytes.get(name, 0) / 1e9}
        for name, ms in sorted(spent.items(), key=lambda item: -item[1])
    }
    return {
        "ms": 1000 * statistics.median(clock),
        "gflop": gflop,
        "gb": sum(counter.bytes.values()) / 1e9,
        "groups": groups,
    }


def markdown(report: dict[str, Any]) -> str:
    """The page's table."""
    top = report["ceilings"]
    names = [*GROUPS, "element by element", "other"]
    head = ["decoder", "size", "ms", "GFLOP", "GFLOP/s (of the ceiling)", "GB moved", "GB/s (of the ceiling)", *names]
    lines = [
        f"Ceilings: {top['gflop_per_s']:.0f} GFLOP/s (3072² matrix product), {top['gb_per_s']:.1f} GB/s (256 MB copy).",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in report["rows"]:
        rate, flow = row["gflop"] / row["ms"] * 1e3, row["gb"] / row["ms"] * 1e3
        cells = [row["name"], f"{row['side']}²", f"{row['ms']:.0f}", f"{row['gflop']:.1f}"]
        cells += [f"{rate:.0f} ({rate / top['gflop_per_s']:.0%})", f"{row['gb']:.2f}"]
        cells += [f"{flow:.1f} ({flow / top['gb_per_s']:.0%})"]
        cells += [f"{row['groups'].get(name, {}).get('share', 0):.0%}" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides in pixels, multiples of 16")
    parser.add_argument(
        "--decoders", nargs="+", default=["S/1", "S/2", "B/4", "default", "kl", "tiny"],
        help="SIZE/PATCH, packaged names or folders, kl, tiny",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "ceilings": ceilings(), "rows": []}
    for side in args.sizes:
        for name, work in works(args.decoders, side).items():
            report["rows"].append({"name": name, "side": side, **measure(work, args.repeats)})
            Console(stderr=True).print(f"{name} at {side}²: {report['rows'][-1]['ms']:.0f} ms")
    if args.json:
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    sys.stdout.write(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
