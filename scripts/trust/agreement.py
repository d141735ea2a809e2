"""The same seed gives the same picture: across threads, batches and memory formats to 1e-5, across engines to 1e-4.

    python scripts/trust/agreement.py [--pictures 100] [--models default f8c4]

Each case is a latent of its own size (32 to 256 pixels a side) and seed, decoded alone by one thread of torch, in
values of [-1, 1]; then with two threads, as the last of a batch of four, in channels-last format, folded into one step
(`optimize`), by ONNX Runtime and by OpenVINO. The table is of the largest difference of a value.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from trial import Loss, Trial, exit_code, parser_of, rng_of

from monobath import Tokenizer
from monobath.export.engines import Engine, with_engine

MOST = {"2 threads": 1e-5, "batch of 4": 1e-5, "channels-last": 1e-5, "optimized": 1e-4, "onnxruntime": 1e-4,
        "openvino": 1e-4}  # fmt: skip

ENGINES: tuple[Engine, ...] = ("onnxruntime", "openvino")


class Forms:
    """One model in all its forms."""

    def __init__(self, name: str, engines: Sequence[Engine] = ENGINES) -> None:
        self.plain = Tokenizer.from_pretrained(name)
        last = Tokenizer.from_pretrained(name)
        last.decoder.to(memory_format=torch.channels_last)
        self.others = {"channels-last": last, "optimized": self.plain.optimize()}
        self.others |= {engine: with_engine(self.plain, engine) for engine in engines}

    def differences(self, seed: int, case: int) -> dict[str, float]:
        """Largest difference of a value to the plain form's, by form."""
        rng, channels = rng_of(seed, case), self.plain.config.encoder.latent_channels
        h, w = (int(side) for side in 2 ** rng.uniform(2, 5, size=2))
        z = torch.from_numpy(rng.standard_normal((4, channels, h, w), dtype="float32"))
        torch.set_num_threads(1)
        plain = self.plain.decode(z[3:], seed=[case])
        found: dict[str, Tensor] = {"batch of 4": self.plain.decode(z, seed=[1, 2, 3, case])[3:]}
        found |= {form: model.decode(z[3:], seed=[case]) for form, model in self.others.items()}
        torch.set_num_threads(2)
        found["2 threads"] = self.plain.decode(z[3:], seed=[case])
        torch.set_num_threads(1)
        return {form: (picture - plain).abs().max().item() for form, picture in found.items()}


def main(arguments: list[str]) -> int:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--pictures", type=int, default=100, help="of each model")
    parser.add_argument("--models", nargs="+", default=["default", "f8c4"], help="names or folders")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=ENGINES, help="default: both")
    options = parser.parse_args(arguments)
    trial = Trial("agreement", options.work, options.minutes)
    forms = {name: Forms(name, options.engines) for name in options.models}
    todo = [f"{name}|{number}" for number in range(options.pictures) for name in options.models]
    for case in trial.pending(todo):
        name, _, number = case.rpartition("|")
        differences = forms[name].differences(options.seed, int(number))
        for form, difference in differences.items():
            if not difference <= MOST[form]:  # written so that NaN fails too
                raise Loss(f"agreement, {case}, {form}: {difference:.2e}, above {MOST[form]:.0e}")
        trial.record(case, **differences)
    lines = ["| model | " + " | ".join(MOST) + " |", "|---" * (1 + len(MOST)) + "|"]
    for name in options.models:
        rows = [row for row in trial.rows if row["case"].startswith(f"{name}|")]
        cells = [f"{max((row.get(form, 0) for row in rows), default=0):.1e}" for form in MOST]
        lines.append(f"| {Path(name).name} | " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")
    worst = max((max(row.get(form, 0) for form in MOST) for row in trial.rows), default=0)
    return trial.end(len(todo), largest_difference=f"{worst:.1e}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
