"""Parity with the published SSDD decoder: same outputs, same names and shapes, same parameter counts.

    python benchmarks/parity.py --reference ../shared/reference

The reference folder holds numbers only (outputs of the published network for random weights and inputs, names and
shapes of its state dict); its README describes them. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from monobath.decoders.uvit import UViT, UViTConfig
from monobath.errors import UserError
from monobath.integrations.diffusers import encoder_from_diffusers
from monobath.integrations.ssdd import decoder_from_ssdd

TOLERANCE = 1e-4
"""Largest accepted relative error (norm of the difference over norm of the reference)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reference", type=Path, default=Path("../shared/reference"), help="folder of numbers")
    folder: Path = parser.parse_args().reference
    table = Table("check", "ours", "reference", "result", title="Parity with the published SSDD decoder")
    passed = []
    for what, ours, expected, good in [*outputs(folder), *structure(folder)]:
        table.add_row(what, ours, expected, "[green]same" if good else "[red]DIFFERENT")
        passed.append(good)
    Console().print(table)
    return 0 if all(passed) else 1


def outputs(folder: Path) -> list[tuple[str, str, str, bool]]:
    decoder = decoder_from_ssdd(load_file(folder / "ssdd_decoder_weights.safetensors"))
    cases = load_file(folder / "ssdd_decoder_cases.safetensors")
    rows = []
    for name in sorted({key.split(".")[0] for key in cases}):
        x_t, t, z, expected = (cases[f"{name}.{part}"].float() for part in ("x_t", "t", "z", "velocity"))
        with torch.no_grad():
            error = ((decoder(x_t, t, z) - expected).norm() / expected.norm()).item()
        shape = "×".join(map(str, x_t.shape))
        rows.append((f"{name} {shape}", f"error {error:.1e}", f"≤ {TOLERANCE:.0e}", error <= TOLERANCE))
    return rows


def structure(folder: Path) -> list[tuple[str, str, str, bool]]:
    published = json.loads((folder / "ssdd_f8c4_S_state_dict.json").read_text(encoding="utf-8"))
    rows = []
    with torch.device("meta"):
        for size, expected in published["decoder_parameters"].items():
            ours = sum(p.numel() for p in UViT(UViTConfig(size=f"{size}/1")).parameters())
            rows.append((f"{size}/1 parameters", f"{ours:,}", f"{expected:,}", ours == expected))
    state = {name: torch.zeros(shape) for name, shape in published["full_model_f8c4_S"].items()}
    count = sum(name.startswith("decoder.") for name in state)
    try:
        config = decoder_from_ssdd(state, prefix="decoder.").config
        same = [getattr(config, name) for name in ("channels", "middle_blocks", "heads", "reach", "down_blocks")]
        paper = UViTConfig(size="S/1")
        good = same == [paper.channels, paper.middle_blocks, paper.heads, paper.reach, paper.down_blocks]
        rows.append(("decoder S names and shapes", f"{count} entries, {same}", f"{count} entries", good))
    except UserError as error:
        rows.append(("decoder S names and shapes", str(error), f"{count} entries", False))
    count = sum(name.startswith("encoder.") for name in state)
    try:
        name = encoder_from_diffusers(state).config.name
        rows.append(("encoder names and shapes", f"{count} entries, {name}", "f8c4", name == "f8c4"))
    except UserError as error:
        rows.append(("encoder names and shapes", str(error), "f8c4", False))
    return rows


if __name__ == "__main__":
    sys.exit(main())
