"""The adversarial part of a run: a discriminator, its optimizer, and what it tells the decoder. Off by default.

SSDD needs none; a KL-VAE's recipe does (Rombach et al. 2022, arXiv 2112.10752; the losses are in
`losses/adversarial.py`). The discriminator learns beside the decoder from the first step on; the adversarial loss
starts after `adversarial_start` of the run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...losses.adversarial import PatchDiscriminator, adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from ..config import LossConfig
from ..optimizers import load_state
from .base import Judge, Losses


class Adversary:
    """One discriminator in training.

    Args:
        loss: `adversarial` (weight), `adversarial_start`, `adversarial_lr`.
        accelerator: of the run: it places the discriminator and averages its gradients over processes.
        clip: largest gradient norm; 0: no clipping.
    """

    def __init__(self, loss: LossConfig, accelerator: Any, clip: float) -> None:
        self.loss, self.accelerator, self.clip = loss, accelerator, clip or float("inf")
        self.network = PatchDiscriminator().to(accelerator.device)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=loss.adversarial_lr, betas=(0.5, 0.9), fused=True)
        self.prepared, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.share = 0.0  # of the weight that counts now

    def begin_step(self, step: int, steps: int) -> Judge:
        """Before the batches of step 0 … steps−1; returns what their objective is given."""
        self.share = float(step >= self.loss.adversarial_start * steps)
        self.optimizer.zero_grad(set_to_none=True)
        return self.judge

    def judge(self, generated: Tensor, reconstruction: Tensor, last_layer: Tensor) -> Tensor:
        """The decoder's adversarial loss, weighted: a float32 scalar, 0 before its time.

        Args:
            generated: images `(B, 3, H, W)`, with gradients.
            reconstruction: the other losses of the decoder, to weigh against.
            last_layer: the decoder's last weights.
        """
        if not self.share:
            return generated.new_zeros(())
        self.network.requires_grad_(False)
        try:
            loss = hinge_generator_loss(self.network(generated))
            weight = adaptive_weight(reconstruction, loss, last_layer) if loss.requires_grad else 1.0
        finally:
            self.network.requires_grad_(True)
        return self.loss.adversarial * weight * loss

    def learn(self, losses: Losses, accumulation: int) -> Tensor:
        """Gradients of the discriminator's loss on a batch's images; returns the loss, without gradients."""
        assert losses.real is not None
        assert losses.clean is not None
        # One call for both: DDP expects one forward pass a backward pass.
        scores = self.prepared(torch.cat([losses.real, losses.clean]))
        loss = hinge_discriminator_loss(*scores.chunk(2))
        self.accelerator.backward(loss / accumulation)
        return loss.detach()

    def end_step(self) -> None:
        """Update the discriminator; a non-finite step changes nothing."""
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        network = {name: value.detach().cpu() for name, value in self.network.state_dict().items()}
        return {"network": network, "optimizer": self.optimizer.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.network.load_state_dict(state["network"])
        load_state(self.optimizer.optimizer, state["optimizer"])
