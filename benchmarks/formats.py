"""Memory format, arithmetic, compilation and padding: the same decoder under each, side by side.

    python benchmarks/formats.py --decoders CM/4 S/2 [--size 256] [--repeats 7] [--compile] [--engines openvino …]
    python benchmarks/formats.py --decoders CM/4 --compare-padding [--engines onnxruntime openvino openvino-bf16 …]

One step from zero noise, random weights, batch 1, one process, interleaved, median. Differences are to float32 in
PyTorch's own memory format, in parts of the picture's standard deviation. Compilation takes a minute a decoder.
`--compare-padding` takes turns between zero and replicate padding instead, form by form; its ratios are medians over
turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from typing import Any, get_args

import torch
from command import exit_code
from rich.console import Console
from rich.table import Table
from torch import Tensor

from monobath.decoders import decoder_config, make_decoder
from monobath.decoders.folded import OneStepCall, folded
from monobath.evaluation.bench import FACTOR, random_latents
from monobath.evaluation.speed import Work, measure
from monobath.export.engines import Engine, engine_call
from monobath.models.blocks import Padding


def forms(name: str, padding: Padding, z: Tensor, args: argparse.Namespace) -> dict[str, Work]:
    """One decoder's call in each form; the first is the one it trains in."""
    torch.manual_seed(0)
    decoder = make_decoder(decoder_config({"size": name, "padding": padding})).to(args.device).eval()
    for parameter in decoder.parameters():  # what starts at zero would hide what is computed before it
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    start = torch.zeros(1, 3, z.shape[2] * FACTOR, z.shape[3] * FACTOR, device=args.device)
    works: dict[str, Work] = {
        "as trained, eager float32": partial(decoder, start, torch.ones(1, device=args.device), z)
    }

    def one_step() -> OneStepCall:
        return OneStepCall(folded(decoder, "zero")).eval()

    works["folded"] = partial(one_step(), z)
    last = one_step().to(memory_format=torch.channels_last)
    works["folded, channels-last"] = partial(last, z.contiguous(memory_format=torch.channels_last))
    half = one_step().bfloat16()
    works["folded, bfloat16"] = partial(half, z.bfloat16())
    half_last = one_step().bfloat16().to(memory_format=torch.channels_last)
    works["folded, channels-last, bfloat16"] = partial(half_last, z.bfloat16())
    if args.compile:
        compiled = torch.compile(one_step().to(memory_format=torch.channels_last))
        works["folded, channels-last, compiled"] = partial(compiled, z)
    for engine in args.engines:
        samples = [{"latent": random_latents(1, args.size).numpy()}]
        example = {"latent": torch.zeros(2, z.shape[1], 18, 26)}
        run = engine_call(one_step().cpu(), example, engine, samples)
        works[engine] = partial(run, {"latent": z.cpu().numpy()})
    return works


def tensor(output: Any) -> Tensor:
    return torch.as_tensor(output).float().cpu()


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoders", nargs="+", default=["CM/4", "S/2"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--engines", nargs="+", choices=get_args(Engine), default=[])
    parser.add_argument("--compare-padding", action="store_true")
    args = parser.parse_args()

    table = Table("decoder", "form", "ms", "times as fast", "difference")
    if args.compare_padding:
        table = Table("decoder", "form", "zeros, ms", "replicate, ms", "replicate ÷ zeros")
    z = random_latents(1, args.size, device=args.device)
    timed = partial(measure, repeats=args.repeats, warmup=2, device=torch.device(args.device))
    for name in args.decoders:
        works = forms(name, "zeros", z, args)
        if args.compare_padding:
            others = forms(name, "replicate", z, args)
            for form, work in works.items():
                zeros, replicate = timed({"zeros": work, "replicate": others[form]}).values()
                ratio = statistics.median(b / a for a, b in zip(zeros.times, replicate.times, strict=True))
                table.add_row(name, form, f"{zeros.median:.1f}", f"{replicate.median:.1f}", f"{ratio:.3f}")
            continue
        outs = {form: tensor(work()) for form, work in works.items()}
        times = timed(works)
        first = next(iter(works))
        for form, timing in times.items():
            far = ((outs[form] - outs[first]).std() / outs[first].std()).item()
            table.add_row(
                name, form, f"{timing.median:.1f}", f"{times[first].median / timing.median:.2f}", f"{far:.1e}"
            )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
