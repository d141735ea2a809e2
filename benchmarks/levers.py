"""What each idea for a faster decoder costs in quality: the same encoder, crops, order and noise, one idea changed.

    python benchmarks/levers.py train --data PHOTOS.tar --out runs/levers [--only base conv-only …] [--seeds 0 1 2]
    python benchmarks/levers.py score --data HELD-OUT.tar --out runs/levers [--metrics psnr efflite fd_efflite]
    python benchmarks/levers.py time --out runs/levers
    python benchmarks/levers.py show --out runs/levers
    python benchmarks/levers.py save --out runs/levers --only CM/4

`train` fits a decoder from random weights to the latents of a frozen encoder (8 000 crops of 64² by default) for each
idea and keeps its averaged weights; what is there already is left alone, so that the same command goes on. Decoders are
padded as the encoder is. `score` decodes held-out photos (short side resized to 256, centre crop) in one step, and the
centres of the size trained on; `time` measures decoding, all levers interleaved in one process; `show` prints
the table; `save` writes presets as models. Ideas that lost live here only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command import exit_code
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from monobath import Tokenizer, UserError
from monobath.data import Crops, make_dataset, make_loader
from monobath.decoders import decoder_config
from monobath.decoders.unet import Level, ResBlock, modulate
from monobath.decoders.uvit import TransformerBlock
from monobath.evaluation.compare import Settings, evaluate
from monobath.evaluation.speed import system_speeds
from monobath.evaluation.system import Code, System
from monobath.files import write_file, write_text
from monobath.images import to_float
from monobath.models.encoder import EncoderConfig
from monobath.tokenizer import SamplerConfig, TokenizerConfig
from monobath.training.config import LossConfig, OptimizerConfig, TimesConfig
from monobath.training.ema import EMA
from monobath.training.objectives.base import AutoencoderObjective, Batch, Draws, draw_seed
from monobath.training.optimizers import learning_rate

CROP, BATCH, SIDE = 64, 16, 256


@dataclass(kw_only=True)
class Lever:
    """One idea: a decoder's shape, a change of its modules, and what it trains on."""

    what: str
    decoder: dict[str, Any] = field(default_factory=dict)
    """Differences to BASE; a `size` replaces it whole."""
    change: Callable[[nn.Module], None] = lambda decoder: None
    ones: float = 0.75
    zero: float = 0.667
    noise: str = "zero"
    lr: float = 6e-4
    perceptual: float = 0.02


BASE = {
    "size": "custom", "patch": 4, "channels": [64, 128], "down_blocks": 1, "middle_blocks": 4, "heads": 4,
    "prediction": "x", "linear_skip": True,
}  # fmt: skip
LEAN = {"norm": "local", "modulation": False, "middle_blocks": 0, "down": [0, 2], "up": [2, 3]}


class PixelNorm(nn.Module):
    """RMS norm over the channels of each pixel: bounded reach, no statistics over the picture."""

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
        return x if self.weight is None else torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


class Affine(nn.Module):
    """What is left of a norm that does not normalise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


def pixel_norms(decoder: nn.Module) -> None:
    """Every GroupNorm becomes a norm of single pixels."""
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, PixelNorm(child.num_channels, child.affine))


def no_fine_norms(decoder: nn.Module) -> None:
    """No norm at the finest level."""
    for level in (decoder.down[0], decoder.up[-1]):
        for block in level.blocks:
            block.norm1 = nn.Identity()
            block.norm2 = Affine(block.norm2.num_channels)
    decoder.norm_out = Affine(decoder.norm_out.num_channels)


class PlainBlock(ResBlock):
    """A residual block that the latent does not modulate: it reaches the network through its input only."""

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class SingleBlock(ResBlock):
    """A residual block merged into one convolution, modulated by the latent; it does not see the time."""

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv1(F.silu(modulate(self.norm1(x), self.context(context))))


def blocks_as(kind: type[ResBlock]) -> Callable[[nn.Module], None]:
    """Residual blocks of another kind."""

    def change(decoder: nn.Module) -> None:
        for module in decoder.modules():
            if isinstance(module, ResBlock):
                module.__class__ = kind
                unused = ["context"] if kind is PlainBlock else ["norm2", "time", "conv2"]
                for name in unused:
                    delattr(module, name)
                if kind is SingleBlock:
                    nn.init.zeros_(module.conv1.weight)
                    nn.init.zeros_(module.conv1.bias)

    return change


class DepthwiseBlock(TransformerBlock):
    """A transformer block whose attention is a 7×7 convolution of each channel by itself."""

    def forward(self, x: Tensor, context: Tensor, grid: tuple[int, int]) -> Tensor:
        h = self.norm1(x).transpose(1, 2).unflatten(2, grid)
        x = x + self.out(self.depthwise(h).flatten(2).transpose(1, 2))
        value, gate = self.mlp_in(self.norm2(x)).chunk(2, dim=-1)
        return x + self.mlp_out(value * F.gelu(gate))


def depthwise(decoder: nn.Module) -> None:
    """Depthwise convolutions for attention; the latent does not modulate them."""
    for block in decoder.middle.blocks:
        dim = block.out.in_features
        block.__class__ = DepthwiseBlock
        block.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        for name in ("context", "q", "k", "v", "bias"):
            delattr(block, name)
    decoder.context = nn.Identity()


def no_fine_blocks(decoder: nn.Module) -> None:
    """The finest level keeps its input and output convolutions only: all work at 8×8 pixels."""
    _without_blocks(decoder.down[0])
    _without_blocks(decoder.up[-1])


def no_fine_down_blocks(decoder: nn.Module) -> None:
    """No residual block at the finest level on the way down: with zero noise it sees an enlarged latent only."""
    _without_blocks(decoder.down[0])


def no_residual_norms(decoder: nn.Module) -> None:
    """No norm in any residual block: the transformer's own norms remain."""
    for level in (*decoder.down, *decoder.up):
        for block in level.blocks:
            block.norm1, block.norm2 = nn.Identity(), Affine(block.norm2.num_channels)
    decoder.norm_out = Affine(decoder.norm_out.num_channels)


def all_of(*changes: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Several changes, one after the other."""

    def change(decoder: nn.Module) -> None:
        for each in changes:
            each(decoder)

    return change


def quiet_output(decoder: nn.Module) -> None:
    """The last convolution starts at zero: training begins at the linear skip."""
    nn.init.zeros_(decoder.conv_out.weight)
    nn.init.zeros_(decoder.conv_out.bias)


def usual_weights(decoder: nn.Module) -> None:
    """PyTorch's first weights, where `norm: local` has such as keep the scale of activations."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith(("conv2", "linear_skip")):
            module.reset_parameters()


def he_weights(decoder: nn.Module) -> None:
    """He's first weights throughout, and the latent heard as loudly as it is."""
    latent = decoder.conv_in.weight[:, 3 * decoder.config.patch**2 :].detach().clone()
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith(("conv2", "conv_out", "linear_skip")):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    decoder.conv_in.weight.data[:, 3 * decoder.config.patch**2 :] = latent


def _without_blocks(level: Level) -> None:
    for block in level.blocks:
        block.__class__ = _Shortcut
        for name in ("norm1", "context", "conv1", "norm2", "time", "conv2"):
            delattr(block, name)


class _Shortcut(ResBlock):
    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        return self.shortcut(x)


LEVERS: dict[str, Lever] = {
    "base": Lever(what="patch 4, channels 64-128, 4 transformer blocks, x-prediction, linear skip"),
    "no-linear-skip": Lever(what="without the linear skip", decoder={"linear_skip": False}),
    "conv-only": Lever(
        what="no transformer, 2 residual blocks a level", decoder={"middle_blocks": 0, "down_blocks": 2}
    ),
    "reach-3": Lever(what="attention reaches 3 tokens instead of 7", decoder={"reach": 3}),
    "patch-2": Lever(what="patch 2, channels 32-64-128", decoder={"patch": 2, "channels": [32, 64, 128]}),
    "patch-8": Lever(what="patch 8, 192 channels, 6 transformer blocks: all on the 8×8 grid",
                     decoder={"patch": 8, "channels": [192], "heads": 6, "middle_blocks": 6}),
    "deeper": Lever(what="channels 64-192, 6 transformer blocks",
                    decoder={"channels": [64, 192], "heads": 6, "middle_blocks": 6}),
    "wider": Lever(what="channels 96-192", decoder={"channels": [96, 192], "heads": 6}),
    "pixel-norm": Lever(what="RMS norm of single pixels instead of GroupNorm", change=pixel_norms),
    "no-fine-norm": Lever(what="no norm at the finest level", change=no_fine_norms),
    "no-modulation": Lever(what="latent at the input only, no modulation of blocks", change=blocks_as(PlainBlock)),
    "single-conv": Lever(what="one convolution a residual block, without the time", change=blocks_as(SingleBlock)),
    "no-fine-blocks": Lever(what="no residual blocks at the finest level", change=no_fine_blocks),
    "gaussian-noise": Lever(what="Gaussian noise only, in training and decoding", zero=0.0, noise="gaussian"),
    "zero-noise-only": Lever(what="t = 1 and zero noise only: a plain regression", ones=1.0, zero=1.0),
    "few-ones": Lever(what="a quarter of the samples at t = 1 instead of three", ones=0.25),
    "no-res-norm": Lever(what="no norm in any residual block", change=no_residual_norms),
    "up-only": Lever(what="no residual blocks at the finest level on the way down", change=no_fine_down_blocks),
    "no-res-norm+up-only": Lever(
        what="no-res-norm and up-only together", change=all_of(no_residual_norms, no_fine_down_blocks)
    ),
    "no-fine-norm+single-conv": Lever(
        what="no norm at the finest level, one convolution a residual block",
        change=all_of(no_fine_norms, blocks_as(SingleBlock)),
    ),
    "no-fine-norm+deeper": Lever(
        what="no norm at the finest level, channels 64-192, 6 transformer blocks",
        decoder={"channels": [64, 192], "heads": 6, "middle_blocks": 6}, change=no_fine_norms,
    ),
    "no-fine-norm+up-only+deeper": Lever(
        what="the same without residual blocks at the finest level on the way down",
        decoder={"channels": [64, 192], "heads": 6, "middle_blocks": 6},
        change=all_of(no_fine_norms, no_fine_down_blocks),
    ),
    "local+usual": Lever(
        what="`norm: local` with PyTorch's first weights", decoder={"norm": "local"}, change=usual_weights
    ),
    "local+deeper+usual": Lever(
        what="the same, channels 64-192, 6 transformer blocks", change=usual_weights,
        decoder={"norm": "local", "channels": [64, 192], "heads": 6, "middle_blocks": 6},
    ),
    "local+wider+usual": Lever(
        what="the same, channels 96-192", change=usual_weights,
        decoder={"norm": "local", "channels": [96, 192], "heads": 6},
    ),
    "local+shuffle+quiet+usual": Lever(
        what="the same, shuffled upsampling, the last convolution starts at zero",
        decoder={"norm": "local", "upsampling": "shuffle"}, change=all_of(usual_weights, quiet_output),
    ),
    "lean+usual": Lever(
        what="lean: local, no transformer, no modulation, no fine blocks on the way down; PyTorch's first weights",
        decoder=LEAN, change=usual_weights,
    ),
    "lean+modulation+usual": Lever(
        what="the same, blocks modulated by the latent", decoder=LEAN | {"modulation": True}, change=usual_weights
    ),
    "lean+transformer+usual": Lever(
        what="lean+usual, 4 transformer blocks for 2 of 5 coarse residual blocks",
        decoder=LEAN | {"middle_blocks": 4, "down": [0, 1], "up": [2, 2]}, change=usual_weights,
    ),
    "lean-deep+usual": Lever(
        what="lean+usual, 9 instead of 5 coarse residual blocks",
        decoder=LEAN | {"down": [0, 3], "up": [2, 6]}, change=usual_weights,
    ),
    "lean-wide+usual": Lever(
        what="lean+usual, channels 96-192", decoder=LEAN | {"channels": [96, 192]}, change=usual_weights
    ),
    "lean-patch-2+usual": Lever(
        what="lean+usual, patch 2, channels 32-64-128", change=usual_weights,
        decoder=LEAN | {"patch": 2, "channels": [32, 64, 128], "down": [0, 0, 2], "up": [2, 2, 3]},
    ),
    "lean+he": Lever(what="lean with He's first weights", decoder=LEAN, change=he_weights),
    "lean": Lever(what="lean with first weights that keep the scale of activations", decoder=LEAN),
    "lean-deep": Lever(what="lean, 9 instead of 5 coarse blocks", decoder=LEAN | {"down": [0, 3], "up": [2, 6]}),
    "lean-wide": Lever(what="lean, channels 96-192", decoder=LEAN | {"channels": [96, 192]}),
    "lean+transformer": Lever(
        what="lean, 4 transformer blocks for 2 of 5 coarse residual blocks",
        decoder=LEAN | {"middle_blocks": 4, "down": [0, 1], "up": [2, 2]},
    ),
    "lean+depthwise": Lever(
        what="the same, depthwise 7×7 convolutions for attention", change=depthwise,
        decoder=LEAN | {"middle_blocks": 4, "down": [0, 1], "up": [2, 2]},
    ),
    "lean-patch-8": Lever(what="lean, patch 8, 192 channels, 8 residual blocks: all on the 8×8 grid",
                          decoder=LEAN | {"patch": 8, "channels": [192], "down": [0], "up": [8]}),
    "lean-patch-2": Lever(what="lean, patch 2, channels 32-64-128",
                          decoder=LEAN | {"patch": 2, "channels": [32, 64, 128], "down": [0, 0, 2], "up": [2, 2, 3]}),
    "lean-shuffle": Lever(what="lean, shuffled upsampling: preset CS/4", decoder=LEAN | {"upsampling": "shuffle"}),
    "CS/4": Lever(what="preset CS/4: lean, shuffled upsampling", decoder={"size": "CS/4"}),
    "CM/4": Lever(what="preset CM/4: the same, channels 96-192", decoder={"size": "CM/4"}),
    "CL/4": Lever(what="preset CL/4: channels 128-256, 3 blocks down, 7 up", decoder={"size": "CL/4"}),
    "CM/4-no-skip": Lever(
        what="CM/4 without the linear skip",
        decoder=LEAN | {"channels": [96, 192], "upsampling": "shuffle", "linear_skip": False},
    ),
    "CM/4-norms": Lever(
        what="CM/4 with GroupNorm", decoder=LEAN | {"channels": [96, 192], "upsampling": "shuffle", "norm": "group"}
    ),
    "CM/4+zero-noise-only": Lever(what="CM/4, t = 1 and zero noise only", decoder={"size": "CM/4"}, ones=1.0, zero=1.0),
    "XS/4": Lever(what="preset XS/4, x-prediction", decoder={"size": "XS/4"}),
    "XS/2": Lever(what="preset XS/2, x-prediction", decoder={"size": "XS/2"}),
    "S/2": Lever(what="preset S/2, x-prediction", decoder={"size": "S/2"}),
    "XS/1": Lever(what="preset XS/1, x-prediction", decoder={"size": "XS/1", "prediction": "x"}),
    "XS/1-v": Lever(what="preset XS/1, velocity prediction (the paper's)", decoder={"size": "XS/1", "prediction": "v"}),
}  # fmt: skip


def build(lever: Lever, source: Tokenizer, seed: int) -> Tokenizer:
    """The frozen encoder of `source` with a new decoder."""
    shape = lever.decoder if "size" in lever.decoder else BASE | lever.decoder
    encoder: EncoderConfig = source.config.encoder
    torch.manual_seed(seed)
    config = TokenizerConfig(
        encoder=encoder,
        decoder=decoder_config(
            {"factor": encoder.factor, "latent_channels": encoder.latent_channels, "padding": encoder.padding} | shape
        ),
        sampler=SamplerConfig(steps=1, noise=lever.noise),  # type: ignore[arg-type]
    )
    tokenizer = Tokenizer(config)
    lever.change(tokenizer.decoder)
    tokenizer.encoder.load_state_dict(source.encoder.state_dict())
    return tokenizer


def train(lever: Lever, source: Tokenizer, loader_for: Callable[[int], Any], seed: int, crops: int) -> tuple[Any, dict]:
    """(averaged tokenizer, facts): our objective and draws, one process, bfloat16 autocast."""
    tokenizer = build(lever, source, seed).train()
    loss = LossConfig(perceptual=lever.perceptual)
    objective = AutoencoderObjective(tokenizer, loss, train_encoder=False).to(memory_format=torch.channels_last)
    parameters = [p for p in tokenizer.decoder.parameters() if p.requires_grad]
    rates, times = OptimizerConfig(lr=lever.lr, warmup=50), TimesConfig(ones=lever.ones, zero_noise=lever.zero)
    optimizer = torch.optim.AdamW(parameters, lr=lever.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema, steps, history = EMA(tokenizer, 0.99), crops // BATCH, []
    batches = iter(loader_for(seed))
    clock, cpu = time.perf_counter(), time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(rates, step, steps)
        x = to_float(next(batches)["image"]).contiguous(memory_format=torch.channels_last)
        latent = (BATCH, tokenizer.config.encoder.latent_channels, *(s // tokenizer.factor for s in x.shape[2:]))
        draws = Draws.make(draw_seed(seed, step), tuple(x.shape), latent, times, device=x.device)
        with torch.autocast("cpu", torch.bfloat16):
            losses = objective(Batch(images=x, draws=draws))
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        ema.update(tokenizer)
        history.append(losses.parts["flow"].item())
    facts = {
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
        "crops": steps * BATCH,
        "lr": lever.lr,
        "last_flow_loss": sum(history[-50:]) / 50,
    }
    return ema.model, facts


def place(out: Path, name: str, seed: int, crops: int) -> Path:
    """Folder of one training."""
    return out / f"{name.replace('/', '-')}-{crops}-seed{seed}"


def run_training(args: argparse.Namespace) -> None:
    source = Tokenizer.from_pretrained(args.encoder)
    dataset = make_dataset(args.data, Crops(size=CROP, scale=(CROP, 3 * CROP)), cache=True)
    for seed in args.seeds:
        for name in args.only or LEVERS:
            lever, folder = LEVERS[name], place(args.out, name, seed, args.crops)
            if args.lr:
                lever = dataclasses.replace(lever, lr=args.lr)
                folder = folder.with_name(f"{folder.name}-lr{args.lr:g}")
            if (folder / "facts.json").exists():
                continue
            model, facts = train(
                lever, source, lambda s: make_loader(dataset, batch_size=BATCH, seed=s), seed, args.crops
            )
            state = {k: v.contiguous() for k, v in model.decoder.state_dict().items()}
            write_file(folder / "decoder.safetensors", lambda partial, state=state: save_file(state, partial))
            write_text(folder / "facts.json", json.dumps({"lever": name, "seed": seed, **facts}, indent=2) + "\n")
            Console().print(f"{folder.name}: {facts['seconds']:.0f} s, flow loss {facts['last_flow_loss']:.4f}")


class Trained(System):
    """A lever's tokenizer in an evaluation, decoding in one step."""

    kind = "monobath"

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.encoder, self.decoder = tokenizer.encoder, tokenizer.decoder

    def encode(self, images: Tensor) -> Code:
        posterior = self.tokenizer.encode(images)
        z = posterior.mode()
        return Code(payload=z, size=posterior.size, bits=[16 * z[0].numel()] * len(z))

    def decode(self, code: Code, seeds: Sequence[int]) -> Tensor:
        return self.tokenizer.decode(code.payload, size=code.size, seed=list(seeds))


def load(folder: Path, source: Tokenizer) -> Trained:
    """A finished training."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    tokenizer = build(LEVERS[facts["lever"]], source, 0).eval()
    tokenizer.decoder.load_state_dict(load_file(folder / "decoder.safetensors"))
    return Trained(folder.name, tokenizer)


def run_scoring(args: argparse.Namespace) -> None:
    source = Tokenizer.from_pretrained(args.encoder)
    folders = sorted(path.parent for path in args.out.glob("*/facts.json"))
    if args.only:
        folders = [f for f in folders if json.loads((f / "facts.json").read_text())["lever"] in args.only]
    folders = [f for f in folders if json.loads((f / "facts.json").read_text())["seed"] in args.seeds]
    for size in sorted({CROP, SIDE}):
        waiting: dict[tuple[str, ...], list[Path]] = {}
        for folder in folders:
            missing = tuple(metric for metric in args.metrics if _key(metric, size) not in _scores(folder))
            if missing:
                waiting.setdefault(missing, []).append(folder)
        for missing, group in waiting.items():
            for start in range(0, len(group), 4):  # together: the photos' own features are computed once
                _score(group[start : start + 4], missing, size, source, args.data)


def _score(folders: Sequence[Path], metrics: Sequence[str], size: int, source: Tokenizer, data: Sequence[str]) -> None:
    systems = [load(folder, source) for folder in folders]
    found, _ = evaluate(systems, data, Settings(size=size, short_side=SIDE, metrics=metrics, keep=1))
    for folder, system in zip(folders, found.systems, strict=True):
        scores = _scores(folder)
        for metric in metrics:
            estimate = system.figures[metric]
            scores[_key(metric, size)] = {
                "value": estimate.value, "low": estimate.low, "high": estimate.high,
                "pictures": system.pictures.get(metric),
            }  # fmt: skip
        write_text(folder / "scores.json", json.dumps(scores) + "\n")
        Console().print(folder.name, {metric: round(scores[metric]["value"], 4) for metric in scores})


def _key(metric: str, size: int) -> str:
    """A score's name in scores.json."""
    return metric if size == SIDE else f"{metric}-{size}"


def _scores(folder: Path) -> dict[str, Any]:
    file = folder / "scores.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def run_timing(args: argparse.Namespace) -> None:
    """Decoding times of all trained levers, interleaved."""
    source = Tokenizer.from_pretrained(args.encoder)
    first: dict[str, Path] = {}
    for path in sorted(args.out.glob("*/facts.json")):
        first.setdefault(json.loads(path.read_text(encoding="utf-8"))["lever"], path.parent)
    systems = [load(folder, source) for name, folder in first.items() if not args.only or name in args.only]
    for system, name in zip(systems, [n for n in first if not args.only or n in args.only], strict=True):
        system.name = name
    speeds = system_speeds(systems, (256, 256), parts=("decode",), repeats=args.repeats)
    write_text(
        args.out / "speeds.json",
        json.dumps(
            {name: {"ms": s.ms, "gflop": s.gflop, "peak_mb": s.peak_mb} for name, (s,) in speeds.items()}, indent=2
        )
        + "\n",
    )


def run_saving(args: argparse.Namespace) -> None:
    """Finished trainings as models, for benchmarks/engines.py and `monobath bench --model`."""
    source = Tokenizer.from_pretrained(args.encoder)
    for name in args.only or LEVERS:
        for seed in args.seeds:
            folder = place(args.out, name, seed, args.crops)
            if not (folder / "facts.json").exists():
                continue
            if "size" not in LEVERS[name].decoder:
                raise UserError(f"{name} may have changed modules, which a model cannot hold: save presets only")
            load(folder, source).tokenizer.save_pretrained(folder / "model")
            Console().print(str(folder / "model"))


def show(args: argparse.Namespace) -> None:
    """Every training as a row of a Markdown table; differences are to `base` of the same crops and seed."""
    speeds = json.loads((args.out / "speeds.json").read_text()) if (args.out / "speeds.json").exists() else {}
    head = ["lever", "what", "seed", "CPU s of training a 1000 crops", "decode ms, 256²", "GFLOP"]
    columns = [(_key(metric, size), metric, size) for size in (CROP, SIDE) for metric in FIGURES]
    head += [f"{LABELS[metric]} at {size}²" for _, metric, size in columns]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for path in sorted(args.out.glob("*/facts.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        scores = _scores(path.parent)
        speed = speeds.get(facts["lever"], {})
        cells = [
            facts["lever"] + (f" (lr {facts['lr']:g})" if facts["lr"] != 6e-4 else ""),
            LEVERS[facts["lever"]].what,
        ]
        cells += [str(facts["seed"]), f"{1000 * facts['cpu_seconds'] / facts['crops']:.0f}"]
        cells += [f"{speed['ms']:.0f}" if speed else "", f"{speed['gflop']:.1f}" if speed else ""]
        cells += [f"{scores[k]['value']:.{FIGURES[m]}f}" if k in scores else "" for k, m, _ in columns]
        lines.append("| " + " | ".join(cells) + " |")
    sys.stdout.write("\n".join(lines) + "\n")


FIGURES = {"psnr": 2, "mean_error": 4, "efflite": 4, "fd_efflite": 1}
LABELS = {
    "psnr": "PSNR, dB",
    "mean_error": "mean error",
    "efflite": "EffLite distance (Lite2)",
    "fd_efflite": "FD-EffLite",
}
ACTIONS = {"train": run_training, "score": run_scoring, "time": run_timing, "show": show, "save": run_saving}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--data", nargs="+", default=[], help="folders or shards of photos: to train on, or held out")
    parser.add_argument("--encoder", default="f8c4", help="tokenizer whose encoder is used, frozen")
    parser.add_argument("--only", nargs="+", choices=LEVERS, help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="what train and score take")
    parser.add_argument("--crops", type=int, default=8000)
    parser.add_argument("--lr", type=float, help="another learning rate than the lever's")
    parser.add_argument(
        "--metrics", nargs="+", choices=FIGURES, default=["psnr", "mean_error", "efflite"], help="what score measures"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed decodes a lever")
    args = parser.parse_args()
    ACTIONS[args.action](args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
