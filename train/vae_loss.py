"""The networks in the VAE's loss: LPIPS, and the discriminator with its optimizer.

`model/vae.py` defines the loss; this file owns these networks and their part in one step. The gradients of VAE and
discriminator are taken at the weights before the step, from one reconstruction, so that one sum over ranks serves both
and a step is a pure function of the state. Rejected: a second VAE forward for the discriminator, as with Lightning's
optimizers: a third more work, for reconstructions that are one update newer.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from model.discriminator import PatchDiscriminator, hinge_loss
from model.perceptual import Lpips
from model.vae import VaeLossConfig, vae_loss
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer


class VaeLoss:
    """The loss that a VaeLossConfig describes, with its networks. Every rank holds it whole."""

    def __init__(self, config: VaeLossConfig, optim: OptimConfig, lpips: Lpips | None, device: torch.device) -> None:
        """Build the discriminator, if it has a weight, from torch's global generator. `lpips`: None for weight 0."""
        assert (lpips is not None) == (config.lpips_weight > 0), config
        self.config = config
        self.lpips = lpips.to(device) if lpips is not None else None
        self.discriminator: PatchDiscriminator | None = None
        if config.gan_weight > 0:
            self.discriminator = PatchDiscriminator(config.gan_channels).to(device)
            # The VAE's settings with the discriminator's learning rate and no weight average.
            rate = config.gan_learning_rate or optim.learning_rate
            least = optim.min_learning_rate * (rate / optim.learning_rate if optim.learning_rate > 0 else 0.0)
            own = replace(optim, learning_rate=rate, min_learning_rate=least, ema_half_lives=())
            self.optimizer = Optimizer(self.discriminator, own, GuardConfig())

    def backward(
        self, pixels: Tensor, reconstruction: Tensor, moments: Tensor, step: int, share: float
    ) -> dict[str, Tensor]:
        """Add the gradients of update `step`'s losses to the VAE and the discriminator; return the parts, detached.

        `share`: the fraction of the batch that these pictures are. It scales gradients and parts, so that their sums
        over ranks are the batch's.
        """
        lpips = self.lpips(pixels, reconstruction) if self.lpips is not None else None
        active = self._active(step)
        fake_scores = None
        if active is not None:
            active.requires_grad_(False)  # the VAE's loss must not train the discriminator
            fake_scores = active(reconstruction)
        parts = vae_loss(self.config, pixels, reconstruction, moments, step, lpips=lpips, fake_scores=fake_scores)
        (parts["loss"] * share).backward()
        if active is not None:
            active.requires_grad_(True)
            parts["discriminator_loss"] = hinge_loss(active(pixels), active(reconstruction.detach()))
            (parts["discriminator_loss"] * share).backward()
        return {name: part.detach() * share for name, part in parts.items()}

    def parameters(self, step: int) -> list[nn.Parameter]:
        """Return the discriminator's parameters that update `step` trains."""
        active = self._active(step)
        return list(active.parameters()) if active is not None else []

    def update(self, step: int) -> dict[str, Tensor]:
        """Update the discriminator if this step trains it; return its gradient norm before clipping, by name."""
        if self._active(step) is None:
            return {}
        return {"discriminator_grad_norm": self.optimizer.update(step)}

    @property
    def skipped_in_a_row(self) -> int:
        """Consecutive updates of the discriminator skipped for non-finite gradients, up to the latest."""
        return self.optimizer.guard.in_a_row if self.discriminator is not None else 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; LPIPS is frozen and stays in its own file."""
        if self.discriminator is None:
            return {}
        return {"discriminator": self.discriminator.state_dict(), "adamw": self.optimizer.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.optimizer.adamw.load_state_dict(state["adamw"])

    def _active(self, step: int) -> PatchDiscriminator | None:
        return self.discriminator if self.config.gan_weight_at(step) > 0 else None
