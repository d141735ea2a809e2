"""Recipes: everything a training run needs, as a union of what it trains.

    TokenizerRecipe       encoder and decoder, from pictures
    DecoderRecipe         a decoder for the latents of a frozen encoder
    DistillationRecipe    such a decoder, from what a teacher samples in many steps
    GeneratorRecipe       a latent generator, in `generation.py`, so that nobody else imports its networks

A recipe is a YAML file under `monobath/recipes/` or anywhere else; `recipes.py` reads it and finds its kind. The
resolved recipe is stored in the run folder and in every model it writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..config import TokenizerConfig
from ..errors import UserError
from ..sampling import time_grid
from ..scales import ScaleSchedule
from . import config


@dataclass(kw_only=True)
class Recipe:
    """What all training runs have.

    Attributes:
        trains: the kind of recipe.
        fixed: keys of its sections that have one value in this kind, and why. They are not shown; a recipe may repeat
            the value. Without a reason, other values were never acted on, and are still accepted.
    """

    trains: ClassVar[str]
    fixed: ClassVar[dict[str, tuple[Any, str]]] = {}

    name: str = "run"
    """Name of the run; also of its folder, unless `run` says another."""
    run: str = ""
    """Run folder; default: runs/NAME. The same command on the same folder resumes."""
    data: config.DataConfig = field(default_factory=config.DataConfig)
    times: config.TimesConfig = field(default_factory=config.TimesConfig)
    optimizer: config.OptimizerConfig = field(default_factory=config.OptimizerConfig)
    training: config.TrainingConfig = field(default_factory=config.TrainingConfig)

    def __post_init__(self) -> None:
        self.run = self.run or f"runs/{self.name}"
        for key, (value, reason) in self.fixed.items():
            section, _, name = key.partition(".")
            part = getattr(self, section)
            if reason and part is not None and getattr(part, name) != value:
                raise UserError(f"{key} is {getattr(part, name)!r}: {reason}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without keys that do not apply."""
        found: dict[str, Any] = {"name": self.name, "trains": self.trains}
        found |= {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        for key in self.fixed:
            section, _, name = key.partition(".")
            found.get(section, {}).pop(name, None)
        return found


_FOR_STUDENTS = "renoise is for distillation: give distill.teacher, or leave it out"


@dataclass(kw_only=True)
class TokenizerRecipe(Recipe):
    """Encoder and decoder learn together, from pictures."""

    trains = "tokenizer"
    fixed: ClassVar[dict[str, tuple[Any, str]]] = {
        "training.train_encoder": (True, "a frozen encoder is for recipes that train a decoder"),
        "data.latents": (
            False,
            "cached latents are those of a frozen encoder; set training.train_encoder to false, or data.latents to "
            "false",
        ),
        "scales.renoise": (False, _FOR_STUDENTS),
    }

    init: str = ""
    """Start from this model (a name or path, such as runs/stage1/model) instead of random weights. A recipe that says
    nothing of `model` takes that model's shape."""
    init_encoder: str = ""
    """Take the encoder alone from this model: the decoder starts anew, whatever its shape (SSDD's stage 1)."""
    first_weights: Literal["pytorch", "published"] = "pytorch"
    """What a decoder that starts anew starts from. published: as SSDD's do, see `published_weights`; for decoders with
    group norms, the paper's."""
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: config.LossConfig = field(default_factory=config.LossConfig)
    scales: config.ScalesConfig | None = None
    """Where `model.decoder.stages` is above 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init and self.init_encoder:
            raise UserError(
                f"init is {self.init} and init_encoder {self.init_encoder}: give init to start from all of a model, "
                "init_encoder to start from its encoder alone"
            )
        decoder = self.model.decoder
        if self.first_weights == "published" and getattr(decoder, "norm", "") != "group":
            what = f"for decoders with group norms, such as S/1; {decoder.title} has weights of its own"
            raise UserError(f"first_weights is published, which is {what}: leave it out")
        if self.loss.adversarial and self.training.precision == "fp16":
            raise UserError('loss.adversarial needs training.precision "bf16" or "fp32"')
        if self.loss.time_power and (what := self._without_times()):
            raise UserError(f"loss.time_power is {self.loss.time_power:g}, which would not act on {what}: leave it out")
        unit = self.model.encoder.factor * ScaleSchedule(decoder.stages).unit(decoder.factor, decoder.token_side)
        if self.data.size % unit:
            at = "" if decoder.stages == 1 else f", at each of {decoder.stages} stages"
            raise UserError(f"data.size={self.data.size} must be divisible by {unit} (latent or token side{at})")
        if decoder.stages > 1:
            self.scales = self.scales or config.ScalesConfig()
            self._check_stages(self.scales)
        elif self.scales in (None, config.ScalesConfig()):
            self.scales = None
        elif self._has_shape():
            raise UserError("scales.* is for multi-scale decoders: set model.decoder.stages, or leave it out")

    def _has_shape(self) -> bool:
        """Whether `model` is final."""
        return True

    @property
    def source(self) -> str:
        """The model that weights come from, all or the encoder's; empty: there is none."""
        return self.init or self.init_encoder

    def _without_times(self) -> str:
        """Why a sample's time does not matter, where it does not."""
        return "a KL-VAE decoder, which has no times" if self.model.decoder.kind == "kl" else ""

    def _check_stages(self, scales: config.ScalesConfig) -> None:
        """What goes together with several stages."""
        decoder = self.model.decoder
        if scales.times == "uniform" and (self.times.mean, self.times.std) != (0, 1):
            raise UserError(
                f"times.mean={self.times.mean:g}, times.std={self.times.std:g} are for logit-normal times, but "
                'scales.times is "uniform": leave them out'
            )
        if self.loss.space not in ("", decoder.prediction):
            raise UserError(
                f"loss.space is {self.loss.space!r}: a multi-scale decoder learns in the space of what it predicts, "
                f"{decoder.prediction!r}; leave it out"
            )
        if scales.union and (self.times.ones != 1 or self.loss.time_power):
            raise UserError(
                f"scales.union is {scales.union}, times.ones {self.times.ones:g} and loss.time_power "
                f"{self.loss.time_power:g}: all steps of the union start at t = 1, so set them to 1 and 0"
            )
        if self.trains == "distillation":
            return
        if not scales.union and self.model.sampler.stages == 1:
            raise UserError(
                f"model.decoder.stages is {decoder.stages} and model.sampler.stages 1: set them equal, or scales.union "
                "to the fraction of the samples that learns the stages"
            )
        if (scales.drop > 0) != decoder.null_latent:
            raise UserError(
                f"scales.drop={scales.drop} and model.decoder.null_latent={decoder.null_latent}: a null latent is "
                "learned where latents are dropped, so give both or neither"
            )


@dataclass(kw_only=True)
class DecoderRecipe(TokenizerRecipe):
    """A decoder learns from the latents of a frozen encoder: a model's, or a foreign one (`model.encoder.family`)."""

    trains = "decoder"
    fixed: ClassVar[dict[str, tuple[Any, str]]] = {
        "training.train_encoder": (False, "the latents stay what they are, so set it to false"),
        "loss.kl": (config.LossConfig.kl, ""),
        "scales.renoise": (False, _FOR_STUDENTS),
    }


@dataclass(kw_only=True)
class DistillationRecipe(DecoderRecipe):
    """A student learns what a frozen teacher samples in many steps; it starts from the teacher, unless `init` says
    another model."""

    trains = "distillation"
    fixed: ClassVar[dict[str, tuple[Any, str]]] = {
        "training.train_encoder": (False, "the latents are the teacher's, so set it to false"),
        "loss.kl": (config.LossConfig.kl, ""),
        **{
            f"scales.{name}": (getattr(config.ScalesConfig, name), "of scales.* only renoise counts in a distillation")
            for name in ("times", "weighting", "bias", "drop", "union")
        },
    }

    distill: config.DistillConfig = field(default_factory=config.DistillConfig)

    def __post_init__(self) -> None:
        self.init = self.init or ("" if self.init_encoder else self.distill.teacher)
        distill = self.distill
        self.model.sampler = dataclasses.replace(
            self.model.sampler, steps=distill.student_steps, guidance=distill.student_guidance
        )
        if distill.student_guidance != 1 and self._has_shape() and not self.model.decoder.null_latent:
            raise UserError(
                f"distill.student_guidance is {distill.student_guidance}, but the student has no null latent "
                "(model.decoder.null_latent): leave it at 1, or name a teacher of several stages that has one"
            )
        super().__post_init__()

    def _has_shape(self) -> bool:
        return bool(self.distill.teacher)  # else the one that is named later has it

    def _without_times(self) -> str:
        return super()._without_times() or ("a student of one step a stage" if self.model.decoder.stages > 1 else "")

    def _check_stages(self, scales: config.ScalesConfig) -> None:
        super()._check_stages(scales)
        if self.distill.perceptual_to == "teacher":
            raise UserError('distill.perceptual_to is "teacher", but several stages learn from the image: leave it out')
        if self.distill.student_steps != 1 or self.distill.cache:
            raise UserError(
                f"distill.student_steps={self.distill.student_steps}, distill.cache={self.distill.cache!r}: a student "
                "of several stages takes 1 step a stage, and its teacher starts where the student is, so that nothing "
                "can be kept; leave both out"
            )


def only_times(recipe: Mapping[str, Any]) -> list[float]:
    """The only times, each stage's own where there are several, that a stored recipe trains at; empty: all of them."""
    distill = recipe.get("distill") or {}
    if distill.get("teacher"):
        power = recipe.get("model", {}).get("sampler", {}).get("power", 2.0)
        return time_grid(distill.get("student_steps", 1), power)[:-1].tolist()
    return [1.0] if recipe.get("times", {}).get("ones") == 1 else []
