"""A model exported for diffusers, where monobath is not installed.

python scripts/try_remote.py write FOLDER [MODEL]      # with monobath: export a model, and what it makes
python scripts/try_remote.py read FOLDER               # with torch and diffusers only: load it and compare
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KNOWN = "known.safetensors"


def write(folder: str, model: str = "default") -> int:
    from monobath import Tokenizer
    from monobath.integrations.remote import write_remote

    tokenizer = Tokenizer.from_pretrained(model)
    write_remote(tokenizer, Path(folder))
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = tokenizer.encode(image).mode().contiguous()
    save_file({"image": image, "latent": latent, "picture": tokenizer.decode(latent)}, Path(folder) / KNOWN)
    return 0


def read(folder: str) -> int:
    from diffusers import AutoModel

    assert importlib.util.find_spec("monobath") is None, "monobath is installed here"
    vae, known = AutoModel.from_pretrained(folder, trust_remote_code=True), load_file(Path(folder) / KNOWN)
    with torch.no_grad():
        z = vae.encode(known["image"]).latent_dist.mode()
        picture = vae.decode(known["latent"]).sample.clamp(-1, 1)
    worst = [float((a - b).abs().max()) for a, b in ((z, known["latent"]), (picture, known["picture"]))]
    sys.stdout.write(f"{type(vae).__name__} without monobath: latents within {worst[0]:.1e}, pictures {worst[1]:.1e}\n")
    return 0 if max(worst) < 1e-4 else 1


if __name__ == "__main__":
    sys.exit({"write": write, "read": read}[sys.argv[1]](*sys.argv[2:]))
