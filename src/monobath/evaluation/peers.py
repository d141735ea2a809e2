"""Other people's autoencoders: diffusers' classes and the TAESD family. Tiling and slicing stay off."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from ..models import taesd
from ..tiling import pad_to_multiple
from .systems import Code, System


@dataclass(frozen=True)
class Architecture:
    """A class of diffusers and its standard shape, for random weights."""

    name: str
    """The class."""
    shape: dict[str, Any] = field(default_factory=dict)
    """Arguments that differ from the class's own defaults."""
    what: str = ""
    """Whose shape it is."""


_SANA_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3

ARCHITECTURES = {
    "kl": Architecture(
        "AutoencoderKL",
        {
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 4,
        },
        "Stable Diffusion's",
    ),
    "tiny": Architecture("AutoencoderTiny", {}, "TAESD's"),
    "dc": Architecture(
        "AutoencoderDC",
        {
            "encoder_block_types": _SANA_BLOCKS,
            "decoder_block_types": _SANA_BLOCKS,
            "upsample_block_type": "interpolate",
            "downsample_block_type": "conv",
        },
        "Sana's, factor 32",
    ),
    "consistency": Architecture("ConsistencyDecoderVAE", {}, "the published one's"),
    "flux2": Architecture("AutoencoderKLFlux2", {}, "FLUX.2's"),
}


class DiffusersSystem(System):
    """An autoencoder of diffusers: mode of the posterior in, its plain `decode` out.

    Images are padded by reflection to multiples of the factor and cropped back.

    Args:
        kind: key of `ARCHITECTURES`.
        where: a folder that `save_pretrained` wrote (or one that holds it as `vae`), `user/repository` on the Hub
            (`user/repository/subfolder` works too), or "random": the standard shape with random weights, of which
            only the speed means anything.

    Raises:
        UserError: diffusers is not installed, nothing of that name, or another architecture.
    """

    def __init__(
        self, kind: str, where: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if where == "random":
            vae, self.weights = random_autoencoder(kind), "random"
            self.name = f"{ARCHITECTURES[kind].name}, random weights"
        else:
            vae, self.weights = _load(kind, where), where
            self.name = f"{ARCHITECTURES[kind].name} ({where.rstrip('/').rpartition('/')[2]})"
        self.vae = placed(vae, device, dtype)
        self.kind = self.family = ARCHITECTURES[kind].name
        self.device, self.dtype = torch.device(device), dtype
        self.factor = autoencoder_factor(vae)
        self.encoder, self.decoder = coding_parts(vae)
        self.consistency = kind == "consistency"
        if self.consistency:
            self.steps = 2  # the published decoder's, and diffusers' default

    @torch.no_grad()
    def encode(self, images: Tensor) -> Code:
        """Float images `(B, 3, H, W)` in [-1, 1] → raw latents (no scaling factor)."""
        size = (images.shape[2], images.shape[3])
        x = pad_to_multiple(images.to(self.device), self.factor).to(self.dtype)
        coded = self.vae.encode(x, return_dict=False)[0]
        z = coded if isinstance(coded, Tensor) else coded.mode()
        return Code(payload=z, size=size, bits=latent_bits(z))

    @torch.no_grad()
    def decode(self, code: Code, seeds: Sequence[int]) -> Tensor:
        """Latents → float images `(B, 3, H, W)` in [-1, 1]. Only the consistency decoder draws noise."""
        options: dict[str, Any] = {}
        if self.consistency:  # a generator a sample, on the CPU: a picture depends on neither batch nor device
            options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = self.vae.decode(code.payload, return_dict=False, **options)[0]
        return x[:, :, : code.size[0], : code.size[1]].float().clamp(-1, 1)


class TaesdSystem(System):
    """A tiny autoencoder of the TAESD family from two files of one folder.

    Args:
        family: start of the files' names: `{family}_encoder.safetensors`, `{family}_decoder.safetensors`.
        folder: where they are.

    Raises:
        UserError: a file is missing, unreadable or of another architecture.
    """

    def __init__(
        self, family: str, folder: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        files = [Path(folder) / f"{family}_{part}.safetensors" for part in ("encoder", "decoder")]
        encoder = taesd.encoder_from_state(_read(files[0]), str(files[0]))
        decoder = taesd.decoder_from_state(_read(files[1]), str(files[1]))
        self.encoder, self.decoder = encoder.to(device, dtype), decoder.to(device, dtype)
        self.name = self.kind = self.family = family.upper()
        self.weights, self.device, self.dtype = folder, torch.device(device), dtype

    @torch.no_grad()
    def encode(self, images: Tensor) -> Code:
        """Float images `(B, 3, H, W)` in [-1, 1] → raw latents."""
        assert self.encoder is not None
        size = (images.shape[2], images.shape[3])
        x = pad_to_multiple(images.to(self.device), taesd.FACTOR).to(self.dtype)
        z = self.encoder((x + 1) / 2)  # the network takes [0, 1]
        return Code(payload=z, size=size, bits=latent_bits(z))

    @torch.no_grad()
    def decode(self, code: Code, seeds: Sequence[int]) -> Tensor:
        """Latents → float images `(B, 3, H, W)` in [-1, 1]."""
        assert self.decoder is not None
        x = 2 * self.decoder(code.payload).float() - 1
        return x[:, :, : code.size[0], : code.size[1]].clamp(-1, 1)


def latent_bits(z: Tensor) -> list[int]:
    """Bits of each sample's latent `(B, c, h, w)`: 16 a value, the precision that latents are stored in."""
    return [16 * z[0].numel()] * len(z)


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
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError:
        raise UserError(f"{name} needs diffusers: pip install 'monobath[diffusers]'") from None
    try:
        return getattr(diffusers, name)
    except (AttributeError, ImportError, RuntimeError) as error:
        raise UserError(
            f"diffusers {diffusers.__version__} has no {name} ({error}): pip install --upgrade diffusers"
        ) from None


def _load(kind: str, where: str) -> Any:
    cls = _class(ARCHITECTURES[kind].name)
    path, options = _place(where)
    try:
        config = cls.load_config(path, **options)
        found = config.get("_class_name", cls.__name__)
        if found != cls.__name__:
            near = [key for key, architecture in ARCHITECTURES.items() if architecture.name == found]
            remedy = f"write {near[0]}={where}" if near else f"only {', '.join(ARCHITECTURES)} are read"
            raise UserError(f"{kind}={where} holds an {found}, not an {cls.__name__}: {remedy}")
        vae, loaded = cls.from_pretrained(path, **options, output_loading_info=True, low_cpu_mem_usage=False)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{kind}={where} could not be loaded as an {cls.__name__} ({reason}): give a folder that save_pretrained "
            f'wrote or a Hub id (offline, one that is in the cache); "{kind}=random" measures the speed alone'
        ) from None
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


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"{file} does not exist: give the folder that holds {file.name}")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}): fetch it again") from None
