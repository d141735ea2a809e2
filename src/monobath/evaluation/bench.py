"""Decoding speed of networks with random weights, in ratio to two peers: which decoder is worth training.

Peers: diffusers' `AutoencoderKL` in Stable Diffusion's shape and `AutoencoderTiny` in its default one (TAESD's), both
for the same latents (factor 8, 4 channels). Decoders draw Gaussian noise and take one Euler step; the noise counts.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..decoders import PixelDecoder, decoder_config, make_decoder
from ..decoding import Decoding, SamplerConfig, pictures
from ..errors import UserError, check_least
from ..sampling import draw_noise
from ..tokenizer import Tokenizer
from .facts import machine
from .peers import coding_parts, placed, random_autoencoder
from .results import Cost
from .speed import Work, conditions, costs
from .tables import NONE, parameters

logger = logging.getLogger(__name__)

DECODERS = [f"{size}/{patch}" for size in ("XS", "S", "B", "M") for patch in (1, 2, 4)] + ["CS/4", "CM/4", "CL/4"]
FACTOR, CHANNELS = 8, 4
KL, TINY = "AutoencoderKL", "AutoencoderTiny"

Maker = Callable[[int, int], Work]
"""(batch, side) → a call that decodes that."""


@dataclass(kw_only=True)
class BenchRow(Cost):
    """One decoder at one size."""

    name: str
    size: int
    """Side of the decoded square, in pixels."""
    parameters: int
    speed_to_kl: float
    """Median time of `AutoencoderKL` over this one's: above 1 is faster."""
    speed_to_tiny: float
    """Median time of `AutoencoderTiny` over this one's."""
    gflop_per_second: float | None = field(init=False)
    """Operations a second that were achieved, in 10⁹."""

    def __post_init__(self) -> None:
        self.gflop_per_second = None if self.gflop is None else 1000 * self.gflop / self.ms


def _text(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


_COLUMNS: dict[str, Callable[[BenchRow], str]] = {
    "decoder": lambda row: row.name,
    "parameters": lambda row: parameters(row.parameters),
    "GFLOP": lambda row: _text(row.gflop, ".4g"),
    "ms": lambda row: f"{row.ms:.4g}",
    "quartiles, ms": lambda row: f"{row.ms_low:.4g}–{row.ms_high:.4g}",
    "GFLOP/s": lambda row: _text(row.gflop_per_second, ".3g"),
    "peak MB": lambda row: _text(row.peak_mb, ".0f"),
    f"speed ÷ {KL}": lambda row: f"{row.speed_to_kl:.3g}×",
    f"speed ÷ {TINY}": lambda row: f"{row.speed_to_tiny:.3g}×",
}
"""The table: headings, and what stands below them."""
HEAD = list(_COLUMNS)


@dataclass(kw_only=True)
class Bench:
    """A whole benchmark; `rows()` under `HEAD` are its tables, one a size."""

    command: str
    batch: int
    repeats: int
    conditions: dict[str, Any]
    machine: dict[str, Any]
    results: list[BenchRow]
    seconds: float

    def rows(self) -> dict[int, list[list[str]]]:
        """By size, in the order given: the table's rows under `HEAD`, peers first."""
        found: dict[int, list[list[str]]] = {}
        for row in self.results:
            found.setdefault(row.size, []).append([cell(row) for cell in _COLUMNS.values()])
        return found

    @property
    def notes(self) -> list[str]:
        """What the figures hold for, a sentence each."""
        c = self.conditions
        where = self.machine.get("gpu") or f"{self.machine.get('cpu')}, threads: {c['threads']}"
        return [
            f"Batch {self.batch}, {c['dtype']}, {c['device']} ({where}), torch {self.machine['torch']}.",
            f"Median and quartiles of {self.repeats} interleaved rounds after a warm-up, in one process.",
            f"Decoders: random weights, factor {FACTOR}, {CHANNELS} latent channels, one step from Gaussian noise; "
            "named models decode as they were made to; a name after a comma is the engine (none: eager PyTorch).",
            f"{KL}: Stable Diffusion's shape; {TINY}: default shape (TAESD); random weights, decoders only.",
            "GFLOP: convolutions, matrix products and attention as executed; a multiply-add counts two.",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"notes": self.notes}

    def markdown(self) -> str:
        """Command, conditions and tables for a document."""
        parts = [f"```bash\n{self.command}\n```", "\n".join(f"- {note}" for note in self.notes)]
        for size, rows in self.rows().items():
            lines = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1), *rows]
            parts.append(f"### {size} × {size}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        return "\n\n".join(parts) + "\n"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is timed, and how.

    Raises:
        UserError: a size, batch, number of rounds or number type that cannot be.
    """

    device: str = "cpu"
    """cpu, cuda …"""
    dtype: str = "float32"
    """float32, bfloat16 or float16, of weights and arithmetic."""
    sizes: Sequence[int] = (256, 512)
    """Sides of the decoded squares, in pixels, multiples of 8."""
    decoders: Sequence[str] = tuple(DECODERS)
    """`SIZE/PATCH`, with random weights."""
    models: Sequence[str] = ()
    """Packaged names, folders or Hub ids of tokenizers whose decoder is timed too."""
    repeats: int = 5
    """Timed rounds."""
    batch: int = 1
    """Pictures a call."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype {self.dtype!r} is unknown: choose float32, bfloat16 or float16")
        for size in self.sizes:
            if size < FACTOR or size % FACTOR:
                raise UserError(f"size {size} cannot be benchmarked: give multiples of {FACTOR} pixels")
        check_least(1, {"batch": self.batch, "repeats": self.repeats})


def run_bench(
    plan: Plan,
    *,
    extra: Mapping[str, tuple[nn.Module, Maker]] | None = None,
    progress: Callable[[str], None] = logger.info,
    command: str = "",
) -> Bench:
    """Time the decoders next to diffusers' `AutoencoderKL` and `AutoencoderTiny`, all in this process, interleaved.

    Args:
        plan: what is timed, and how.
        extra: further decoders by name: the network whose parameters count, and how it is called.
        progress: told in words what comes next.
        command: what the user typed, kept with the results.

    Raises:
        UserError: diffusers is not installed, or an unknown name.
    """
    start = time.perf_counter()
    place, kind = torch.device(plan.device), getattr(torch, plan.dtype)
    networks = _networks(plan, place, kind) | dict(extra or {})
    results: list[BenchRow] = []
    for size in plan.sizes:
        works = {name: (make(plan.batch, size), place) for name, (_, make) in networks.items()}
        found = costs(works, f"{size} × {size}", repeats=plan.repeats, progress=progress)
        for name, cost in found.items():
            parameters = sum(p.numel() for p in networks[name][0].parameters())
            ratios = {"speed_to_kl": found[KL]["ms"] / cost["ms"], "speed_to_tiny": found[TINY]["ms"] / cost["ms"]}
            results.append(BenchRow(name=name, size=size, parameters=parameters, **ratios, **cost))
    return Bench(
        command=command,
        batch=plan.batch,
        repeats=plan.repeats,
        conditions=conditions(place, kind),
        machine=machine(place),
        results=results,
        seconds=time.perf_counter() - start,
    )


def _networks(plan: Plan, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[nn.Module, Maker]]:
    """Each network whose parameters count, and how it is called; peers first."""
    found: dict[str, tuple[nn.Module, Maker]] = {}
    for name, kind in ((KL, "kl"), (TINY, "tiny")):
        peer = placed(random_autoencoder(kind), device, dtype)
        decode = partial(peer.decode, return_dict=False)
        found[name] = (coding_parts(peer)[1], maker(decode, device=device, dtype=dtype))
    for name in plan.decoders:
        config = decoder_config({"size": name, "factor": FACTOR, "latent_channels": CHANNELS})
        decoder = make_decoder(config).to(device, dtype).eval()
        found[name] = (decoder, maker(partial(_one_step, decoder), device=device, dtype=dtype))
    for name in plan.models:
        if name in found:
            raise UserError(f"{name!r} names two of the benchmark's decoders: give each once")
        tokenizer = Tokenizer.from_pretrained(name, device=device, dtype=dtype)
        found[name] = (tokenizer.decoder, tokenizer_maker(tokenizer))
    return found


def _one_step(decoder: PixelDecoder, z: Tensor) -> list[Tensor]:
    """One step from Gaussian noise."""
    return list(pictures(decoder, z, Decoding().checked(decoder, SamplerConfig(), z)))


def random_latents(
    batch: int,
    side: int,
    channels: int = CHANNELS,
    factor: int = FACTOR,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Seeded Gaussian latents for pictures of `side`², `(batch, channels, ⌈side/factor⌉, ⌈side/factor⌉)`."""
    shape = (channels, -(-side // factor), -(-side // factor))
    return draw_noise(shape, range(batch)).to(device, dtype)


def maker(decode: Callable[[Tensor], object], **latents: Any) -> Maker:
    """Decoding of `random_latents`, which take channels, factor, device and dtype."""

    def make(batch: int, side: int) -> Work:
        return partial(decode, random_latents(batch, side, **latents))

    return make


def tokenizer_maker(tokenizer: Tokenizer) -> Maker:
    """Decoding by the public `Tokenizer.decode`."""
    channels, place = tokenizer.config.encoder.latent_channels, {"device": tokenizer.device, "dtype": tokenizer.dtype}
    return maker(tokenizer.decode, channels=channels, factor=tokenizer.factor, **place)
