"""Load a folder that `monobath export --for diffusers` wrote where monobath is not installed, and use it.

python scripts/try_remote.py FOLDER EXPECTED.safetensors     # what monobath makes of a picture
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from diffusers import AutoModel
from safetensors.torch import load_file


def main() -> int:
    folder, expected = sys.argv[1:]
    assert importlib.util.find_spec("monobath") is None, "monobath is installed here"
    vae, known = AutoModel.from_pretrained(folder, trust_remote_code=True), load_file(expected)
    with torch.no_grad():
        z = vae.encode(known["image"]).latent_dist.mode()
        picture = vae.decode(known["latent"]).sample.clamp(-1, 1)
    worst = [float((a - b).abs().max()) for a, b in ((z, known["latent"]), (picture, known["picture"]))]
    sys.stdout.write(f"{type(vae).__name__} without monobath: latents within {worst[0]:.1e}, pictures {worst[1]:.1e}\n")
    return 0 if max(worst) < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
