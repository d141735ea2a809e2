"""bfloat16 and float16 against float32: nothing that is not finite, and the same pictures.

    python scripts/trust/half_precision.py --data photos-val.tar photos-train.tar tiny64.tar [--crops 10000]

Crops of 64² are encoded and decoded by each model, in bfloat16 (eager, and the decoder on OpenVINO) and, the first
tenth of them, in float16. Then adversarial pictures (flat, saturated, checkerboards, noise) and latents (up to ±1e4),
in all three. PSNR is that of the worst picture to float32's own, over values in [-1, 1]: at least 40 dB for bfloat16
and 60 dB for float16. Of latents beyond ±10, which no encoder makes, only finite pictures are asked for. Where one is
not finite, the first layer that gave it is named.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trial import Loss, Trial, exit_code, parser_of

from monobath import Tokenizer
from monobath.data import make_dataset
from monobath.data.pictures import Crops
from monobath.export.engines import with_engine
from monobath.images import to_float

LEAST = {"bfloat16": 40.0, "openvino-bf16": 40.0, "float16": 60.0}
"""dB."""
BATCH = 20


def adversarial_pictures() -> dict[str, Tensor]:
    """Name → `(1, 3, 64, 96)` in [-1, 1]."""
    rows, columns = torch.arange(64)[:, None], torch.arange(96)[None]
    generator = torch.Generator().manual_seed(0)
    found = {f"flat {value:g}": torch.full((3, 64, 96), value) for value in (-1.0, 0.0, 0.3, 1.0)}
    found |= {f"primary {c}": torch.eye(3)[c][:, None, None].expand(3, 64, 96) * 2 - 1 for c in range(3)}
    found |= {f"checkerboard {s}": (((rows // s + columns // s) % 2) * 2.0 - 1).expand(3, 64, 96) for s in (1, 2, 5, 8)}
    found["uniform noise"] = torch.rand(3, 64, 96, generator=generator) * 2 - 1
    found["saturated noise"] = torch.randn(3, 64, 96, generator=generator).sign()
    found["one bright pixel"] = ((rows == 31) & (columns == 47)).float().expand(3, 64, 96) * 2 - 1
    found["ramp"] = (columns / 47.5 - 1).expand(3, 64, 96)
    return {name: picture[None].contiguous() for name, picture in found.items()}


def adversarial_latents(channels: int) -> dict[str, Tensor]:
    """Name → `(1, c, 8, 12)`; the number in the name is the largest value."""
    generator = torch.Generator().manual_seed(1)
    noise, found = torch.randn(1, channels, 8, 12, generator=generator), {"zeros 0": torch.zeros(1, channels, 8, 12)}
    for value in (10.0, 100.0, 1000.0, 10000.0):
        found |= {f"all {value:g}": torch.full_like(noise, value), f"all -{value:g}": torch.full_like(noise, -value)}
        found[f"signs {value:g}"] = noise.sign() * value
        found[f"one {value:g}"] = torch.zeros_like(noise).index_put_(tuple(torch.tensor([0, 0, 3, 5])[:, None]),
                                                                     torch.tensor(value))  # fmt: skip
    return found


def psnr(found: Tensor, expected: Tensor) -> list[float]:
    """Of each picture, values in [-1, 1], in dB; infinite where they are equal."""
    errors = (found - expected).double().square().mean((1, 2, 3)).tolist()
    return [10 * math.log10(4 / error) if error else math.inf for error in errors]


def first_overflow(model: nn.Module, call: Callable[[], object]) -> str:
    """The first layer of a model whose output is not finite although its inputs are."""
    found: list[str] = []

    def finite(values: Any) -> bool:
        parts = values if isinstance(values, (tuple, list)) else [values]
        return all(bool(part.isfinite().all()) for part in parts if isinstance(part, Tensor))

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and finite(inputs) and not finite(output):
                found.append(name)

        return look

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if not list(m.children())]
    call()
    for handle in handles:
        handle.remove()
    return found[0] if found else "no layer"


class Halves:
    """One model in several precisions."""

    def __init__(self, name: str, kinds: Sequence[str]) -> None:
        self.name = name
        self.whole = Tokenizer.from_pretrained(name)
        dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        self.models = {k: Tokenizer.from_pretrained(name, dtype=dtypes[k]) for k in kinds if k in dtypes}
        if "openvino-bf16" in kinds:
            self.models["openvino-bf16"] = with_engine(self.whole, "openvino-bf16")
        self.last: tuple[Tensor, Tensor] | None = None  # pictures, and float32's reconstructions of them

    def pictures(self, kind: str, images: Tensor) -> list[float]:
        """PSNR of each reconstruction to float32's, which is kept for the next precision of the same pictures."""
        if self.last is None or not torch.equal(self.last[0], images):
            self.last = (images, self.whole.decode(self.whole.encode(images).mode()))
        return self._judged(kind, self.models[kind].encode(images).mode(), self.last[1])

    def latents(self, kind: str, z: Tensor) -> list[float]:
        """PSNR of each decoded latent to float32's."""
        return self._judged(kind, z, self.whole.decode(z))

    def _judged(self, kind: str, z: Tensor, expected: Tensor) -> list[float]:
        model = self.models[kind]
        if not z.isfinite().all():
            raise Loss(f"half precision: {self.name} in {kind} encodes to latents that are not finite")
        found = model.decode(z)
        if not found.isfinite().all():
            layer = first_overflow(model.decoder, lambda: model.decode(z))
            raise Loss(f"half precision: {self.name} in {kind}, latents up to {z.abs().max():.5g}: {layer} overflows")
        return psnr(found, expected)


def cases(names: list[str], halves: dict[str, Halves], crops: int) -> Iterator[tuple[str, str, str]]:
    """(model, precision, inputs): numbers of a batch of crops, or the name of an adversarial input."""
    for name in names:
        kinds = sorted(halves[name].models)
        for kind in kinds:
            yield from ((name, kind, f"picture {what}") for what in adversarial_pictures())
            channels = halves[name].whole.config.encoder.latent_channels
            yield from ((name, kind, f"latent {what}") for what in adversarial_latents(channels))
    for name in names:
        for first in range(0, crops, BATCH):
            kinds = [kind for kind in sorted(halves[name].models) if kind != "float16" or first < crops // 10]
            yield from ((name, kind, f"crops {first}") for kind in kinds)


def main(arguments: list[str]) -> int:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--data", nargs="+", required=True, help="folders or shards of photos")
    parser.add_argument("--models", nargs="+", default=["default", "f8c4"], help="names or folders")
    parser.add_argument("--precisions", nargs="+", choices=LEAST, default=list(LEAST), help="default: all")
    parser.add_argument("--crops", type=int, default=10_000, help="crops of 64²; float16 takes a tenth of them")
    options = parser.parse_args(arguments)
    trial = Trial("half-precision", options.work, options.minutes)
    dataset = make_dataset(options.data, Crops(size=64, scale=(64, 128), seed=options.seed))
    crops = min(options.crops, len(dataset))  # type: ignore[arg-type]
    halves = {name: Halves(name, options.precisions) for name in options.models}
    todo = list(cases(options.models, halves, crops))
    for case in trial.pending(["|".join(case) for case in todo]):
        name, kind, inputs = case.split("|")
        what, _, key = inputs.partition(" ")
        model = halves[name]
        if what == "picture":
            values = model.pictures(kind, adversarial_pictures()[key])
        elif what == "latent":
            values = model.latents(kind, adversarial_latents(model.whole.config.encoder.latent_channels)[key])
        else:
            numbers = range(int(key), min(int(key) + BATCH, crops))
            values = model.pictures(kind, to_float(torch.stack([dataset[i]["image"] for i in numbers])))
        absurd = what == "latent" and abs(float(key.split()[-1])) > 10
        if not absurd and min(values) < LEAST[kind]:
            raise Loss(f"half precision: {case}: {min(values):.1f} dB to float32, below {LEAST[kind]:g}")
        trial.record(case, pictures=len(values), worst=min(values), sum=sum(min(v, 200.0) for v in values),
                     absurd=absurd, inputs=what)  # fmt: skip
    told: dict[str, str] = {}
    for name in options.models:
        for kind in sorted(halves[name].models):
            rows = [r for r in trial.rows if r["case"].startswith(f"{name}|{kind}|") and not r["absurd"]]
            of_crops = [r for r in rows if r["inputs"] == "crops"]
            if of_crops:
                count = sum(r["pictures"] for r in of_crops)
                told[f"{Path(name).name}_{kind}"] = (
                    f"{count} crops, mean {sum(r['sum'] for r in of_crops) / count:.1f} dB, worst "
                    f"{min(r['worst'] for r in of_crops):.1f} dB (adversarial {min(r['worst'] for r in rows):.1f})"
                )
    return trial.end(len(todo), not_finite=0, **told)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
