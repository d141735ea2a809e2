"""Memory format, arithmetic and compilation: the same decoder under each, side by side.

    python benchmarks/formats.py --decoders CM/4 S/2 [--size 256] [--repeats 7] [--compile]

One step from zero noise, random weights, batch 1, one process, interleaved, median. Differences are to float32 in
PyTorch's own memory format, in parts of the picture's standard deviation. Compilation takes a minute a decoder.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from command import exit_code
from rich.console import Console
from rich.table import Table

from monobath.evaluation.bench import FACTOR, random_latents
from monobath.evaluation.throughput import measure
from monobath.models.decoder import Decoder, DecoderConfig
from monobath.models.one_step import OneStepDecoder


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoders", nargs="+", default=["CM/4", "S/2"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    table = Table("decoder", "form", "ms", "times as fast", "difference")
    z = random_latents(1, args.size, device=args.device)
    start = torch.zeros(1, 3, z.shape[2] * FACTOR, z.shape[3] * FACTOR, device=args.device)
    for name in args.decoders:
        torch.manual_seed(0)
        decoder = Decoder(DecoderConfig(size=name)).to(args.device).eval()
        for parameter in decoder.parameters():  # what starts at zero would hide what is computed before it
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        folded = OneStepDecoder(decoder, "zero")
        works = {"as trained, eager float32": partial(decoder, start, torch.ones(1, device=args.device), z)}
        works["folded"] = partial(folded, z)
        last = OneStepDecoder(decoder, "zero").to(memory_format=torch.channels_last)
        works["folded, channels-last"] = partial(last, z.contiguous(memory_format=torch.channels_last))
        half = OneStepDecoder(decoder, "zero").bfloat16()
        works["folded, bfloat16"] = partial(half, z.bfloat16())
        half_last = OneStepDecoder(decoder, "zero").bfloat16().to(memory_format=torch.channels_last)
        works["folded, channels-last, bfloat16"] = partial(half_last, z.bfloat16())
        if args.compile:
            compiled = torch.compile(OneStepDecoder(decoder, "zero").to(memory_format=torch.channels_last))
            works["folded, channels-last, compiled"] = partial(compiled, z)
        outs = {form: work().float() for form, work in works.items()}
        times = measure(works, repeats=args.repeats, warmup=2, device=torch.device(args.device))
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
