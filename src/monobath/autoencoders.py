"""Other people's autoencoders from files, and their encoders in the place of ours.

    encoder = as_encoder("kl=stable-diffusion")        # also flux2=…, tiny=…, dc=…, taef2=FOLDER, custom=MODULE:NAME
    encoder = as_encoder(pipeline.vae)
    encoder = as_encoder(my_function)                  # images in [-1, 1] → latents, or their mean and log-variance

`FOLDER`s are what `save_pretrained` wrote; a Hub id works too. Only encoders are taken, see `models/foreign.py`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import TokenizerConfig
from .errors import UserError, explained_as, imported
from .models import taesd
from .models.encoder import FAMILIES, EncoderConfig
from .models.frozen import Encoding, ForeignEncoder, GaussianMoments, UnitRange

Foreign = str | ForeignEncoder | Callable[[Tensor], Encoding]
"""What `as_encoder` takes; an autoencoder of diffusers is a callable too."""
PROBE = (128, 256)
"""(H, W) of the picture that tells a callable's factor and channels."""


# ---- encoders ---------------------------------------------------------------------------------------------------


def as_encoder(source: Foreign) -> ForeignEncoder:
    """A frozen encoder from what the user has.

    Args:
        source: "KIND=WHERE" (see `FAMILIES` and `load_autoencoder`; custom=MODULE:NAME imports a callable); an
            autoencoder of diffusers; a `ForeignEncoder`; or a callable: images `(B, 3, H, W)` in [-1, 1] → latents
            `(B, c, H/f, W/f)`, or a tuple of their mean and log-variance. Its factor and channels are found by calling
            it once; if it has attributes scaling_factor and shift_factor, they are published with the model.

    Raises:
        UserError: an unknown kind, nothing there, or a callable that gives something else.
    """
    if isinstance(source, ForeignEncoder):
        return source
    if isinstance(source, str):
        return _from_spec(*split_spec(source))
    for kind in FAMILIES:
        if kind in ARCHITECTURES and type(source).__name__ == ARCHITECTURES[kind].name:
            return _of_autoencoder(kind, source, "")
    if not callable(source):
        known = ", ".join(FAMILIES)
        raise UserError(f"encoder is {type(source).__name__}: give KIND=WHERE, KIND of {known}, or a callable")
    return _of_callable(source)


def fitting_encoder(source: Foreign, model: TokenizerConfig) -> ForeignEncoder:
    """`as_encoder(source)` for a model of that configuration.

    Raises:
        UserError: as `as_encoder`; or other factors or channels; or raw latents where the model decodes normalised
            ones, or the other way round; or the model has an encoder of its own.
    """
    own = model.encoder
    if not own.family:
        raise UserError(f"this model has an encoder of its own ({own.name}): leave the other encoder out")
    found = as_encoder(source)
    given = source if isinstance(source, str) else FAMILIES[found.config.family]
    if found.config.name != own.name:
        raise UserError(f"encoder {given} makes {found.config.name} latents, and this model decodes {own.name}")
    wanted = "normalised" if model.takes_normalised else "raw"
    made = found.published.get("latents", wanted)
    if made != wanted:
        raise UserError(
            f"encoder {given} makes {made} latents of FLUX.2's, and this model decodes {wanted} ones: give "
            f"{'taef2' if model.takes_normalised else 'flux2'}=WHERE"
        )
    return found


def split_spec(spec: str) -> tuple[str, str]:
    """(kind, where) of "KIND=WHERE".

    Raises:
        UserError: an unknown kind (the message names the nearest), or nothing behind it.
    """
    kind, separator, where = (part.strip() for part in spec.partition("="))
    if kind in FAMILIES and where:
        return kind, where
    if kind in FAMILIES:
        raise UserError(f"encoder {spec!r} lacks what follows {kind}=: {_where(kind)}")
    before, colon, behind = spec.partition(":")
    if not separator and colon and before in FAMILIES:
        raise UserError(f"encoder {spec!r} is not KIND=WHERE: write {before}={behind}")
    near = difflib.get_close_matches(kind, FAMILIES, n=1) if separator else []
    hint = f"did you mean {near[0]}={where}?" if near else f"choose a KIND of {', '.join(FAMILIES)}"
    raise UserError(f"encoder {spec!r} is not KIND=WHERE of a known kind: {hint}")


def _where(kind: str) -> str:
    others = {"custom": "MODULE:NAME of a callable", "taef2": "the folder with taef2_encoder.safetensors"}
    return others.get(kind, "a folder or a Hub id")


def _from_spec(kind: str, where: str) -> ForeignEncoder:
    if kind == "custom":
        return _of_callable(_imported(where), where)
    if kind == "taef2":
        encoder = read_taesd(kind, where, "encoder")
        channels = encoder[-1].out_channels
        config = EncoderConfig(family=kind, source=where, factor=taesd.FACTOR, latent_channels=int(channels))  # type: ignore[arg-type]
        return ForeignEncoder(config, UnitRange(encoder), {"latents": "normalised"})
    if where == "random":
        raise UserError(f"encoder {kind}=random: random weights have no latents worth decoding; give {_where(kind)}")
    return _of_autoencoder(kind, load_autoencoder(kind, where), where)


def _of_autoencoder(kind: str, vae: Any, source: str) -> ForeignEncoder:
    """The encoder of a diffusers autoencoder, with what its configuration publishes."""
    values = vae.config
    config = EncoderConfig(
        family=kind, source=source, factor=autoencoder_factor(vae), latent_channels=values["latent_channels"]
    )
    published: dict[str, Any] = {
        "scaling_factor": float(values.get("scaling_factor") or 1.0),
        "shift_factor": float(values.get("shift_factor") or 0.0),
    }
    for ours, theirs in (("latent_mean", "latents_mean"), ("latent_std", "latents_std")):
        if values.get(theirs) and len(values[theirs]) == config.latent_channels:
            published[ours] = [float(value) for value in values[theirs]]
    if kind == "flux2":
        published |= _flux2_statistics(vae)
    # The tiny and the deep-compression autoencoder take [-1, 1] and are deterministic.
    gaussian = kind in ("kl", "flux2")
    network = GaussianMoments(vae.encoder, vae.quant_conv) if gaussian else vae.encoder
    return ForeignEncoder(config, network, published)


def _flux2_statistics(vae: Any) -> dict[str, Any]:
    """Statistics of FLUX.2's 2×2 patches of latents, and mean and standard deviation of each channel, from those.

    Its pipelines pack 2×2 positions into 4c channels and normalise these by `vae.bn`; what `vae.encode` gives and
    `vae.decode` takes, and so ours, is neither packed nor normalised: `(B, c, H/8, W/8)`.
    """
    mean, variance = (
        statistic.detach().double().reshape(vae.config["latent_channels"], -1)  # channel by channel: see the pipeline
        for statistic in (vae.bn.running_mean, vae.bn.running_var)
    )
    overall = variance.mean(1) + mean.var(1, correction=0)
    return {
        "latent_mean": mean.mean(1).tolist(),
        "latent_std": overall.sqrt().tolist(),
        "latents": "raw",
        "packed_mean": mean.flatten().tolist(),
        "packed_variance": variance.flatten().tolist(),
        "packed_eps": float(vae.config["batch_norm_eps"]),
    }


def _of_callable(call: Callable[[Tensor], Encoding], source: str = "") -> ForeignEncoder:
    name = source or getattr(call, "__qualname__", type(call).__name__)
    weights = next(call.parameters(), None) if isinstance(call, nn.Module) else None
    probe = torch.zeros(1, 3, *PROBE) if weights is None else weights.new_zeros(1, 3, *PROBE)
    if isinstance(call, nn.Module):
        call.eval()
    with torch.no_grad():
        encoded = call(probe)
    mean = encoded[0] if isinstance(encoded, tuple) and len(encoded) == 2 else encoded
    shape = tuple(mean.shape) if isinstance(mean, Tensor) else None
    factor = PROBE[0] // shape[2] if shape is not None and len(shape) == 4 and shape[2] else 0
    if shape is None or not factor or shape != (1, shape[1], PROBE[0] // factor, PROBE[1] // factor):
        found = type(encoded).__name__ if shape is None else str(shape)
        raise UserError(
            f"encoder {name} gave {found} for an image {tuple(probe.shape)}: expected latents (1, c, H/f, W/f) with f "
            "a power of two, or a tuple of their mean and log-variance"
        )
    published = {key: float(getattr(call, key)) for key in ("scaling_factor", "shift_factor") if hasattr(call, key)}
    config = EncoderConfig(family="custom", source=source, factor=factor, latent_channels=shape[1])
    return ForeignEncoder(config, call, published)


def _imported(where: str) -> Callable[[Tensor], Encoding]:
    """The callable MODULE:NAME. Only what the user names is imported, never what a model's configuration names."""
    module, _, name = where.partition(":")
    remedy = "give MODULE:NAME of a callable, with the module's folder in PYTHONPATH"
    errors = (ImportError, AttributeError, ValueError)
    with explained_as(f"encoder custom={where} could not be imported", remedy, errors):
        found = getattr(importlib.import_module(module), name)
    if not callable(found) or isinstance(found, type):
        raise UserError(f"encoder custom={where} is {found!r}: name a callable that takes images, such as a function")
    return found


# ---- files ------------------------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """A class of diffusers and its standard shape, for random weights."""

    name: str
    """The class."""
    shape: dict[str, Any]
    """Arguments that differ from the class's own defaults."""


_SANA_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3

ARCHITECTURES = {
    "kl": Architecture(  # Stable Diffusion's
        "AutoencoderKL",
        {
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 4,
        },
    ),
    "tiny": Architecture("AutoencoderTiny", {}),
    "dc": Architecture(  # Sana's, factor 32
        "AutoencoderDC",
        {
            "encoder_block_types": _SANA_BLOCKS,
            "decoder_block_types": _SANA_BLOCKS,
            "upsample_block_type": "interpolate",
            "downsample_block_type": "conv",
        },
    ),
    "consistency": Architecture("ConsistencyDecoderVAE", {}),
    "flux2": Architecture("AutoencoderKLFlux2", {}),
}


def random_autoencoder(kind: str) -> Any:
    """diffusers' autoencoder of that kind in its standard shape, random weights, evaluation mode."""
    architecture = ARCHITECTURES[kind]
    return _class(architecture.name)(**architecture.shape).eval()


def placed(vae: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    """The autoencoder on that device and in that type, in evaluation mode."""
    return nn.Module.to(vae, device, dtype).eval()  # diffusers' own warns of modules to keep in float32: none here


def autoencoder_factor(vae: Any) -> int:
    """f of a diffusers autoencoder: side of the pixel square behind one latent position."""
    config = vae.config
    widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(widths) - 1)


def coding_parts(vae: Any) -> tuple[nn.Module, nn.Module]:
    """The modules that encode and those that decode, with their 1×1 convolutions beside the latent."""

    def gather(*names: str) -> nn.Module:
        found = [getattr(vae, name, None) for name in names]
        return nn.ModuleList(module for module in found if isinstance(module, nn.Module))

    return gather("encoder", "quant_conv"), gather("decoder", "decoder_unet", "post_quant_conv")


def _class(name: str) -> Any:
    diffusers = imported("diffusers", f"{name} needs diffusers: pip install 'monobath[diffusers]'")
    with explained_as(f"diffusers {diffusers.__version__} has no {name}", "pip install --upgrade diffusers"):
        return getattr(diffusers, name)


def load_autoencoder(kind: str, where: str) -> Any:
    """diffusers' autoencoder of that kind, on the CPU in float32.

    Args:
        kind: key of `ARCHITECTURES`.
        where: a folder that `save_pretrained` wrote (or one that holds it as `vae`), or `user/repository` on the Hub
            (`user/repository/subfolder` works too).

    Raises:
        UserError: diffusers is not installed, nothing of that name, or another architecture.
    """
    cls = _class(ARCHITECTURES[kind].name)
    path, options = _place(where)
    remedy = (
        "give a folder that save_pretrained wrote or a Hub id (offline, one that is in the cache); "
        f'"{kind}=random" measures the speed alone'
    )
    with explained_as(f"{kind}={where} could not be loaded as an {cls.__name__}", remedy):
        config = cls.load_config(path, **options)
        found = config.get("_class_name", cls.__name__)
        if found != cls.__name__:
            near = [key for key, architecture in ARCHITECTURES.items() if architecture.name == found]
            remedy = f"write {near[0]}={where}" if near else f"only {', '.join(ARCHITECTURES)} are read"
            raise UserError(f"{kind}={where} holds an {found}, not an {cls.__name__}: {remedy}")
        vae, loaded = cls.from_pretrained(path, **options, output_loading_info=True, low_cpu_mem_usage=False)
    wrong = [f"{key.removesuffix('_keys')}: {', '.join(map(str, names[:4]))}" for key, names in loaded.items() if names]
    if wrong:  # diffusers would go on with random values
        raise UserError(f"{kind}={where} does not fit the {cls.__name__} of its configuration: {'; '.join(wrong)}")
    return vae


def _place(where: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: a path or a Hub id, and a subfolder."""
    path = Path(where).expanduser()
    if path.exists():
        inside = not (path / "config.json").is_file() and (path / "vae" / "config.json").is_file()
        return str(path), {"subfolder": "vae"} if inside else {}
    parts = where.split("/")
    looks_local = where.startswith((".", "~")) or Path(where).is_absolute()
    if looks_local or not 1 < len(parts) < 4 or not all(parts):
        raise UserError(f"{where} does not exist: give a folder, a Hub id such as user/repository, or random")
    return "/".join(parts[:2]), {"subfolder": parts[2]} if len(parts) == 3 else {}


def read_taesd(family: str, folder: str, part: Literal["encoder", "decoder"]) -> nn.Sequential:
    """The encoder or decoder of a TAESD autoencoder: `{family}_{part}.safetensors` in a folder.

    Raises:
        UserError: the file is missing, unreadable or of another architecture.
    """
    file = Path(folder).expanduser() / f"{family}_{part}.safetensors"
    if not file.is_file():
        raise UserError(f"{file} does not exist: give the folder that holds {file.name}")
    with explained_as(f"{file} is not a readable safetensors file", "fetch it again"):
        state = load_file(file)
    return taesd.from_state(part, state, str(file))
