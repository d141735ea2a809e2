"""The sections of recipes, as keyword-only dataclasses. `recipe.py` says which kind of recipe has which."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError, check_choices, check_least
from ..images import MAX_PIXELS


def at_least(minimum: int, section: str, config: Any, *names: str) -> None:
    """Raise `UserError` where one of these values is smaller."""
    check_least(minimum, {f"{section}.{name}": getattr(config, name) for name in names})


def fractions(section: str, config: Any, *names: str, below_one: bool = False) -> None:
    """Raise `UserError` where one of these values is not in [0, 1], or [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1 or (below_one and value == 1):
            raise UserError(f"{section}.{name} is {value}: it is a fraction, in [0, 1{')' if below_one else ']'}")


@dataclass(kw_only=True)
class DataConfig:
    """Where pictures come from and how they are cropped."""

    source: list[str] = field(default_factory=list)
    """Folders, .tar shards or URLs of shards. `monobath train --data` sets it."""
    validation: list[str] = field(default_factory=list)
    """Held-out pictures for the sample grids and validation figures; default: the first training pictures."""
    size: int = 128
    """Side of the square crops, in pixels."""
    scale: list[int] = field(default_factory=list)
    """The short side is resized to a random length in [low, high] pixels before cropping; default [size, 2·size]."""
    flip: bool = True
    """Mirror half of the crops."""
    cache: bool | Literal["device"] = False
    """Keep decoded pictures in memory, their short side at most the high end of `scale`. device: in the GPU's, where
    they are cropped too: for GPUs that learn faster than `workers` can crop."""
    latents: bool = False
    """`source` is what `monobath cache-latents` wrote: crops that are encoded already. Needs a frozen encoder."""
    workers: int = 2
    """Loader processes; 0 decodes in the training process. The crops are the same for any number."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are skipped, in pixels."""
    min_side: int = 16
    """Pictures with a shorter side are skipped, in pixels."""

    def __post_init__(self) -> None:
        if self.latents and self.cache == "device":
            raise UserError('data.cache is "device", which is for photos: with data.latents, set it to true or false')
        at_least(1, "data", self, "size")
        self.scale = self.scale or [self.size, 2 * self.size]
        if len(self.scale) != 2 or not self.size <= self.scale[0] <= self.scale[1]:
            raise UserError(f"data.scale is {self.scale}: give [low, high] with data.size={self.size} ≤ low ≤ high")


@dataclass(kw_only=True)
class TimesConfig:
    """Which times and noises are trained on."""

    ones: float = 0.0
    """Fraction of the samples at t = 1 exactly; the rest is logit-normal."""
    mean: float = 0.0
    """Mean of logit t of that rest. Below 0 trains more where little noise is left, which is where details are made."""
    std: float = 1.0
    """Its standard deviation."""
    zero_noise: float = 0.0
    """Fraction of the samples at t = 1 that start from ε = 0 instead of Gaussian noise."""

    def __post_init__(self) -> None:
        fractions("times", self, "ones", "zero_noise")
        at_least(0, "times", self, "std")


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the objective: SSDD section 3, flow + perceptual + REPA + KL."""

    flow: float = 1.0
    """Weight of the flow-matching loss."""
    space: Literal["", "v", "x"] = ""
    """Space the flow loss is measured in; default: what the decoder predicts."""
    time_power: float = 0.0
    """A sample's flow loss is weighted by t^-p, so that small errors at low noise still count; in x-space, 2 is the
    velocity's own weight."""
    perceptual: float = 0.5
    """Weight of the perceptual distance between the predicted clean image and the image."""
    perceptual_backbone: Literal["efflite", "lpips-vgg"] = "efflite"
    """efflite (EfficientNet-Lite0) works offline; lpips-vgg is the paper's."""
    pooled: float = 0.0
    """Weight of the squared distance between pooled features of both (EfficientNet-Lite0's last): it keeps texture,
    which the other two smooth. 0.003 is much: the distance itself is near 20."""
    grid: float = 0.0
    """Weight of the energy of the error that repeats with every latent position (`losses/grid.py`): without it, patched
    decoders leave a faint screen in flat areas. It is about the squared error where there is none; 0.2 is enough."""
    kl: float = 1e-6
    """Weight of the KL term, summed over a latent's dimensions; counts only while the encoder trains."""
    repa: float = 0.0
    """Weight of the cosine distance between hidden tokens and frozen features of the image; the paper's is 0.25."""
    repa_features: Literal["efflite", "dinov2"] = "efflite"
    """efflite (EfficientNet-Lite0) works offline; dinov2 is the paper's and needs the extra `repa`."""
    repa_model: str = "facebook/dinov2-base"
    """DINOv2 weights: a Hub id or a local folder."""
    repa_block: int = 0
    """Transformer block that is aligned, counted from 1; 0: block 5 of more than eight, else block 4, or the middle one
    of fewer."""
    repa_hidden: int = 2048
    """Width of the hidden layer between tokens and features; 0: as wide as the tokens, as SSDD's."""
    adversarial: float = 0.0
    """Weight of a discriminator's opinion, relative to the other losses at the last layer. SSDD does without; KL-VAEs
    take 0.5."""
    adversarial_start: float = 0.5
    """The adversarial loss starts after this fraction of the run; the discriminator learns from step 0."""
    adversarial_lr: float = 1e-4
    """The discriminator's learning rate."""

    def __post_init__(self) -> None:
        weights = ("flow", "time_power", "perceptual", "pooled", "grid", "kl", "repa", "adversarial", "adversarial_lr")
        at_least(0, "loss", self, *weights, "repa_hidden")
        fractions("loss", self, "adversarial_start")
        check_choices("loss", self)


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to zero, or schedule-free RAdam at a constant rate."""

    kind: Literal["adamw", "radam_schedulefree"] = "adamw"
    """radam_schedulefree is the paper's: no warm-up, no decay; what it averages is what is evaluated and saved."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """The optimizer's decay rates."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices and convolutions only (not on biases, norms and relative-position tables)."""
    warmup: int = 100
    """Steps of linear warm-up (adamw)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up (adamw)."""
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""


@dataclass(kw_only=True)
class TrainingConfig:
    """The loop."""

    steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 16
    """Images per step, over all processes and accumulation steps."""
    accumulation: int = 1
    """Gradient accumulation: forward passes per step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks (autocast); weights, losses and the EMA stay float32."""
    compile: bool = False
    """torch.compile for encoder and decoder."""
    shard: bool = False
    """Spread weights, optimizer and average over the processes (FSDP2), for networks that one GPU cannot hold."""
    channels_last: bool = True
    """Memory format of images and convolutions: faster on CPU, and on GPU in half precision."""
    checkpointing: bool = False
    """Activation checkpointing: less memory, about a third more time."""
    train_encoder: bool = True
    """False freezes the encoder: its bytes do not change."""
    ema: float = 0.999
    """Decay of the averaged weights, warmed up as (1 + n) / (10 + n)."""
    ema_warmup: bool = True
    """False: constant decay. With `ema_start` 0 the weights that the run starts from then keep a share of ema^steps in
    the average: where they learned from more pictures than the run has, it is worth keeping some (WiSE-FT, Wortsman et
    al. 2022, arXiv 2109.01903)."""
    ema_start: float = 0.1
    """The average starts after this fraction of the run; before that it copies the weights."""
    ema_start_steps: int = 0
    """It starts after this many steps of the run instead, as SSDD's does after 50 000 of each stage; 0: the fraction
    says."""
    seed: int = 0
    """Decides initial weights, order of the data, crops and noise."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_every: int = 500
    """Steps between sample grids; 0: none."""
    samples: int = 8
    """Pictures in a sample grid."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept."""
    max_bad: int = 10
    """Stop after this many non-finite steps in a row; each is skipped."""
    minutes: float = 0.0
    """Stop after so many minutes, as Ctrl-C does: saved, and the same command goes on. 0: no limit."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep", "max_bad")
        at_least(1, "training", self, *counts)
        at_least(0, "training", self, "ema_start_steps", "minutes")
        fractions("training", self, "ema", below_one=True)
        fractions("training", self, "ema_start")


@dataclass(kw_only=True)
class DistillConfig:
    """Distillation: the student learns what a frozen teacher samples in many steps (SSDD, section 3.3)."""

    teacher: str = ""
    """The teacher: a packaged name, a path such as runs/stage2/model, or a Hub id."""
    steps: int = 12
    """Euler steps of the teacher, N."""
    power: float = 0.0
    """Exponent of the teacher's time grid; 0: what its checkpoint says."""
    student_steps: int = 1
    """Steps that the student is made for."""
    student_guidance: float = 1.0
    """Guidance that the student takes its steps with, in training and decoding. 1, none, is enough: the student of a
    guided teacher learns the guided pictures. Another needs `model.decoder.null_latent`."""
    perceptual_to: Literal["", "teacher", "image"] = ""
    """What the student's perceptual distance is taken to: the teacher's sample (SSDD's; default of a single scale) or
    the real image (MSD's; the only one of several stages)."""
    cache: str = ""
    """Folder to keep the teacher's samples in: a second student on the same images, draws and teacher finds them there.
    Empty: none are kept. A sample takes 2 bytes a number, 24 KiB for 64² pixels."""

    def __post_init__(self) -> None:
        at_least(1, "distill", self, "steps", "student_steps")
        at_least(0, "distill", self, "power")


@dataclass(kw_only=True)
class ScalesConfig:
    """Training of multi-scale decoders, `model.decoder.stages` above 1 (MSD, arXiv 2603.19570). Times are each stage's
    own, from 1 at its start to 0 at its end: `times.ones` of the samples are at a stage's start."""

    times: Literal["logit-normal", "uniform"] = "logit-normal"
    """How the other times are drawn."""
    weighting: Literal["none", "sigmoid", "sigmoid-local"] = "none"
    """The flow loss of a sample counts e^b·sigmoid(λ−b)/(t(1−t)) with λ = 2·log((1−t)/t). sigmoid-local (MSD's): t is
    its stage's own time, and nothing is left at a stage's start. sigmoid: t is its noise level, and nothing is left at
    1, where the first stage takes its only step, if it takes one."""
    bias: float = -3.0
    """b of that weighting."""
    drop: float = 0.0
    """Fraction of the samples whose latent is the null latent, for guidance; MSD's is 0.1. Needs
    `model.decoder.null_latent`."""
    union: float = 0.0
    """Above 0: train one step and one step a stage at once, without a teacher. This fraction of the samples runs
    through all stages from the first, as in decoding; the rest takes the last stage's step from t = 1, at full
    resolution. Needs `times.ones` 1. With `model.sampler.stages` 1 the model decodes at full resolution, and
    `decode_progressive` gives its previews."""
    renoise: bool = False
    """In a distillation: MSD's published form. The student's finished picture is noised to one level u per batch, and
    the teacher goes on from there through all stages that are left; see `StagedDistillation`."""

    def __post_init__(self) -> None:
        fractions("scales", self, "drop", "union", below_one=True)
        if self.union and (self.times, self.weighting, self.drop) != ("logit-normal", "none", 0):
            raise UserError(
                f"scales.union is {self.union}: it knows no other times than 1 and drops no latents; leave out "
                "scales.times, scales.weighting and scales.drop"
            )
