"""Which encoder made some latents: a hash of its weights."""

from __future__ import annotations

import hashlib

from torch import nn

from .frozen import ForeignEncoder


def weights_sha256(module: nn.Module) -> str:
    """Hash of a network's weights: names, shapes and float32 values. What a cache and a run must agree in.

    A foreign encoder's are those of its network; of a callable without weights, where it came from.
    """
    found = hashlib.sha256()
    if isinstance(module, ForeignEncoder):
        if not isinstance(module.network, nn.Module):
            return hashlib.sha256(f"{module.config.family} {module.config.source}".encode()).hexdigest()
        module = module.network
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().float().cpu() + 0.0  # −0 becomes 0: averaging weights may drop the sign of a zero
        found.update(values.contiguous().numpy().tobytes())
    return found.hexdigest()
