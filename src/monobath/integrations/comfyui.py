"""ComfyUI nodes: load a model as a VAE for every node, decode in tiles and steps, encode, decode coarse to fine.

Imported by ComfyUI only (`integrations/comfyui/` is the folder for its `custom_nodes`). Images there are `(B, H, W, 3)`
in [0, 1]. Latents are raw, `(B, c, H/f, W/f)`, as here, but FLUX.2's packed and normalised, `(B, 4c, H/2f, W/2f)`
(`monobath.config.Packing`). Written against the interface of ComfyUI that tests/fixtures/comfyui.json records.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from .. import resources
from ..errors import UserError
from ..images import tensor_to_pil
from ..tiles import pad_to_multiple
from ..tokenizer import Tokenizer

FOLDER = "monobath"
"""Under ComfyUI's models folder: models of one's own."""
SIZE = "monobath_size"
"""In a latent: height and width of the picture that was encoded, before padding."""
PREVIEW = 512
"""Longest side of a preview, in pixels."""
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


class Network(nn.Module):
    """What ComfyUI moves between devices, and calls: latents as it holds them ↔ images `(B, 3, H, W)` in [-1, 1]."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.packing = tokenizer.config.packing
        packed = 1 if self.packing is None else 2
        self.ratio = tokenizer.factor * packed
        self.channels = tokenizer.config.encoder.latent_channels * packed**2

    def encode(self, x: Tensor, tile: int | None = None) -> Tensor:
        """Images, any height and width → latents. Sides are padded to whole latents."""
        z = self.tokenizer.encode(pad_to_multiple(x.float(), self.ratio).clamp(-1, 1), tile=tile).mode()
        return z if self.packing is None else self.packing.pack(z)

    def decode(self, z: Tensor, **options: Any) -> Tensor:
        """Latents → images; options are those of `Tokenizer.decode`."""
        return self.tokenizer.decode(self.raw(z), **options)

    def decode_tiled(self, z: Tensor, tile_x: int = 64, tile_y: int = 64, overlap: int = 16) -> Tensor:
        """The same in tiles, whose side and overlap are in latents."""
        return self.decode(z, tile=min(tile_x, tile_y) * self.ratio, overlap=overlap * self.ratio)

    def raw(self, z: Tensor) -> Tensor:
        """What `Tokenizer.decode` takes.

        Raises:
            UserError: latents of another number of channels.
        """
        z = z[:, :, 0] if z.ndim == 5 and z.shape[2] == 1 else z
        if z.ndim != 4 or z.shape[1] != self.channels:
            config = self.tokenizer.config.encoder
            found = f"{z.shape[1]} channels" if z.ndim > 1 else f"the shape {tuple(z.shape)}"
            raise UserError(
                f"these latents have {found}, and this monobath model decodes latents of {self.channels} channels: "
                f"those of {config.title}"
            )
        return z if self.packing is None else self.packing.unpack(z)


class MonobathVAE(comfy.sd.VAE):
    """A monobath model as ComfyUI's own type, for every node that takes a VAE."""

    def __init__(self, tokenizer: Tokenizer, dtype: torch.dtype | None = None) -> None:
        shown = logging.root.manager.disable
        logging.disable()  # it warns that there are no weights
        super().__init__(sd={})  # all defaults are set, and no network is made
        logging.disable(shown)
        self.first_stage_model = network = Network(tokenizer).eval()
        self.latent_channels = network.channels
        self.downscale_ratio = self.upscale_ratio = network.ratio
        self.crop_input = False  # sides are padded instead
        self.working_dtypes = [torch.bfloat16, torch.float16, torch.float32]
        self.disable_offload = True  # its parts are no layers of ComfyUI's, which could be moved one by one
        pixels, floats = network.ratio**2, floats_a_pixel(tokenizer)
        self.memory_used_encode = lambda shape, dtype: shape[2] * shape[3] * floats * management.dtype_size(dtype)
        self.memory_used_decode = lambda shape, dtype: (
            shape[-2] * shape[-1] * pixels * floats * management.dtype_size(dtype)
        )
        self.device, self.output_device = management.vae_device(), management.intermediate_device()
        self.vae_dtype = dtype or management.vae_dtype(self.device, self.working_dtypes)
        network.to(self.vae_dtype)
        self.patcher = comfy.model_patcher.ModelPatcher(
            network, load_device=self.device, offload_device=management.vae_offload_device()
        )

    def on_device(self) -> Network:
        """The network, moved to where it works."""
        management.load_models_gpu([self.patcher], force_full_load=True)
        return self.first_stage_model

    def decode_tiled_(self, samples: Tensor, tile_x: int = 64, tile_y: int = 64, overlap: int = 16) -> Tensor:
        # ComfyUI's averages three decodings that see less than ours, and takes three times as long
        images = self.first_stage_model.decode_tiled(samples, tile_x, tile_y, overlap)
        return self.process_output(images.to(self.output_device))

    def encode_tiled_(self, pixel_samples: Tensor, tile_x: int = 512, tile_y: int = 512, overlap: int = 64) -> Tensor:
        pixels = self.process_input(pixel_samples)
        tile = max(min(tile_x, tile_y), 4 * overlap) // self.downscale_ratio * self.downscale_ratio
        return self.first_stage_model.encode(pixels, tile=tile).to(self.output_device)


def floats_a_pixel(tokenizer: Tokenizer) -> int:
    """About how many numbers of activations decoding holds for each pixel: a dozen maps of the finest width."""
    config = tokenizer.config.decoder
    widths = getattr(config, "channels", None) or [64]  # TAEF2's
    return 12 * widths[0] // getattr(config, "patch", 1) ** 2 + 24


class LoadDecoder:
    """A monobath model as a VAE."""

    CATEGORY, FUNCTION, RETURN_TYPES = "monobath", "load", ("VAE",)
    DESCRIPTION = "A packaged monobath model, one of models/monobath, or one from anywhere, as a VAE."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        own = [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")]
        other = "A folder or a Hub id, instead of the name above."
        encoder = "Of a model of other people's latents: what makes them, such as taef2=FOLDER. Decoding needs none."
        return {
            "required": {
                "model": (resources.weights_names() + own, {"default": "default"}),
                "dtype": (list(DTYPES), {"default": "auto"}),
            },
            "optional": {
                "other": ("STRING", {"default": "", "tooltip": other}),
                "encoder": ("STRING", {"default": "", "tooltip": encoder}),
            },
        }

    def load(self, model: str, dtype: str = "auto", other: str = "", encoder: str = "") -> tuple[MonobathVAE]:
        packaged = resources.weights_path(model) is not None
        name = other.strip() or (model if packaged else folder_paths.get_full_path_or_raise(FOLDER, model))
        return (MonobathVAE(Tokenizer.from_pretrained(name, encoder=encoder.strip() or None), DTYPES[dtype]),)


class Decode:
    """Latents → image, in tiles and steps."""

    CATEGORY, FUNCTION, RETURN_TYPES = "monobath", "decode", ("IMAGE",)
    DESCRIPTION = "Decodes with a monobath model. Tiles of a model without statistics over the picture leave no seams."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tile = "Side of the squares to decode one at a time, in pixels; 0: the whole picture at once."
        steps = "Steps of the decoder; 0: what the model was made for."
        return {
            "required": {
                "samples": ("LATENT",),
                "vae": ("VAE",),
                "tile": ("INT", {"default": 0, "min": 0, "max": 8192, "step": 64, "tooltip": tile}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": steps}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**62}),
            }
        }

    def decode(self, samples: dict[str, Any], vae: Any, tile: int = 0, steps: int = 0, seed: int = 0) -> tuple[Tensor]:
        network = ours(vae).on_device()
        options = {"size": size_of(samples, network), "tile": tile or None, "steps": steps or None, "seed": seed}
        return (as_image(self.images(network, samples["samples"], options), vae),)

    def images(self, network: Network, z: Tensor, options: dict[str, Any]) -> Tensor:
        return network.decode(z, **options)


class DecodeProgressive(Decode):
    """Latents → image, each stage shown as soon as it exists."""

    DESCRIPTION = "Decodes through the stages of a multi-scale model, such as progressive, and shows each as a preview."

    def images(self, network: Network, z: Tensor, options: dict[str, Any]) -> Tensor:
        stages = network.tokenizer.decoder.stages
        bar = comfy.utils.ProgressBar(stages)
        for number, images in enumerate(network.tokenizer.decode_progressive(network.raw(z), **options), start=1):
            bar.update_absolute(number, stages, ("JPEG", tensor_to_pil(images[0]), PREVIEW))
        return images


class Encode:
    """Image → latents, any size."""

    CATEGORY, FUNCTION, RETURN_TYPES = "monobath", "encode", ("LATENT",)
    DESCRIPTION = "Encodes with a monobath model, and remembers the picture's size, which the decode nodes crop to."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tile = "Side of the squares to encode one at a time, in pixels; 0: the whole picture at once."
        return {
            "required": {
                "pixels": ("IMAGE",),
                "vae": ("VAE",),
                "tile": ("INT", {"default": 0, "min": 0, "max": 8192, "step": 64, "tooltip": tile}),
            }
        }

    def encode(self, pixels: Tensor, vae: Any, tile: int = 0) -> tuple[dict[str, Any]]:
        network = ours(vae).on_device()
        x = vae.process_input(pixels[..., :3].movedim(-1, 1))
        z = network.encode(x, tile=tile or None)
        return ({"samples": z.to(vae.output_device), SIZE: tuple(pixels.shape[1:3])},)


def ours(vae: Any) -> MonobathVAE:
    """The VAE, which must come from our loader.

    Raises:
        UserError: it does not.
    """
    if not isinstance(vae, MonobathVAE):
        raise UserError(f"this node needs a monobath model, not a {type(vae).__name__}: use Load monobath decoder")
    return vae


def size_of(samples: dict[str, Any], network: Network) -> tuple[int, int] | None:
    """The picture's height and width, where the latents still are of a picture of that size."""
    size, shape = samples.get(SIZE), samples["samples"].shape[-2:]
    fits = size is not None and all(-(-side // network.ratio) == n for side, n in zip(size, shape, strict=True))
    return tuple(size) if size is not None and fits else None


def as_image(images: Tensor, vae: MonobathVAE) -> Tensor:
    """`(B, 3, H, W)` in [-1, 1] → what ComfyUI calls an image."""
    return vae.process_output(images.to(vae.output_device)).movedim(1, -1)


NODES = {
    "MonobathLoad": (LoadDecoder, "Load monobath decoder"),
    "MonobathDecode": (Decode, "Decode (monobath)"),
    "MonobathDecodeProgressive": (DecodeProgressive, "Decode coarse to fine"),
    "MonobathEncode": (Encode, "Encode (monobath)"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in NODES.items()}
