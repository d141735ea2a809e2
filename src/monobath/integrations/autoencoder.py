"""`AutoencoderMonobath`: a tokenizer as a diffusers model, for the place of `AutoencoderKL` in a pipeline.

    pipe.vae = AutoencoderMonobath.from_monobath("default")

Needs diffusers (`pip install 'monobath[diffusers]'`); `monobath.integrations.diffusers` hands the class out. The
network and what pipelines call are in `vae.py`; here is what knows monobath's own files.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from .. import resources
from ..autoencoders import Foreign, fitting_encoder
from ..errors import UserError
from ..tokenizer import Tokenizer
from . import vae
from .vae import ModelMixin as ModelMixin  # pipelines look for it in the module of a class that they load

PUBLISHED = ("scaling_factor", "shift_factor", "normalised", "packed_mean", "packed_variance", "packed_eps")
"""What a tokenizer's configuration says of its latents, for pipelines."""


class AutoencoderMonobath(vae.AutoencoderMonobath):
    __doc__ = vae.AutoencoderMonobath.__doc__

    # ---- from and to files --------------------------------------------------------------------------

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> AutoencoderMonobath:
        """The same network as a diffusers model, of the same type and on the same device; it shares no memory.

        A model of foreign latents takes the encoder along if it is attached; decoding needs none.

        Raises:
            UserError: the tokenizer is optimized; give the original one.
        """
        if tokenizer.config.decoder.kind == "kl" or not tokenizer.decoder.trains:
            why = "with a KL-VAE decoder" if tokenizer.decoder.trains else "that is optimized"
            raise UserError(f"a tokenizer {why} cannot become a diffusers model: give an original monobath one")
        config = tokenizer.config
        own = {name: getattr(config, name) for name in PUBLISHED}
        if not config.packed_mean:  # a model from before they were stored: an encoder that is attached has them
            published = getattr(tokenizer.encoder, "published", {})
            own |= {name: value for name, value in published.items() if name.startswith("packed")}
        model = cls(**vae.network_parts(config), batch_norm_eps=own.pop("packed_eps"), **own)
        model.load_state_dict(tokenizer.state_dict())
        if config.encoder.family:
            model.encoder = copy.deepcopy(tokenizer.encoder)
        model.to(tokenizer.device)
        if tokenizer.dtype != model.dtype:  # diffusers 0.42 warns at every change of type
            model.to(tokenizer.dtype)
        return model.eval()

    @classmethod
    def from_monobath(cls, name: str | os.PathLike[str] = "default", **options: Any) -> AutoencoderMonobath:
        """Load what `Tokenizer.save_pretrained` wrote; names and options are those of `Tokenizer.from_pretrained`."""
        return cls.from_tokenizer(Tokenizer.from_pretrained(name, **options))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> AutoencoderMonobath:
        """Load a model: a packaged monobath name, a folder of either form, or a Hub repository in diffusers form.

        Options are diffusers'. Of them, monobath's own form knows torch_dtype.

        Raises:
            UserError: other options with monobath's own form, or files that cannot be read.
        """
        name = pretrained_model_name_or_path
        if not _in_own_form(name, options.get("subfolder")):
            return super().from_pretrained(name, **options)
        dtype = options.pop("torch_dtype", None)
        if options:
            raise UserError(
                f"{name} is in monobath's form, which does not know {', '.join(sorted(options))}: leave it out, "
                "or use from_monobath"
            )
        return cls.from_monobath(name, dtype=dtype)

    def attach_encoder(self, encoder: Foreign) -> None:
        """Give a model of foreign latents what makes them; see `Tokenizer.attach_encoder`. It is stored with neither.

        Raises:
            UserError: it cannot be read, does not fit, or this model has an encoder of its own.
        """
        self.encoder = fitting_encoder(encoder, self.whole).to(self.device, self.dtype)


def _in_own_form(name: str | os.PathLike[str], subfolder: str | None) -> bool:
    """Whether a name is packaged, or a file or folder that `Tokenizer.save_pretrained` wrote."""
    if resources.weights_path(str(name)) is not None:
        return True
    path = Path(name, subfolder or "")
    return path.is_file() or (path / "model.safetensors").is_file()
