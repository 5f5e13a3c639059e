"""The joint loss: L = λ₁·L_task/‖L_task‖ + λ₂·L_MINT/‖L_MINT‖ (DeAlcala et al., ICCV 2025)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from amint_ray.config.schema import Loss
from amint_ray.train.reduce import sum_over_ranks


class Objective:
    """Weighs the two losses and remembers their normalisers.

    The normaliser ‖ℓ‖ of a loss ℓ is, by `loss.weighting`,

    - `initial`: ℓ in the first batch, ℓ₀ (the authors' notebooks);
    - `ema`: m_t = β·m_{t−1} + (1 − β)·ℓ_t with m₀ = ℓ₀, the current batch included;
    - `none`: 1.

    Normalisers are constants to the gradient, and of the global batch: all ranks use the same. With
    λ₂ = 0 there is one loss and nothing to balance, so the objective is L_task itself.
    """

    def __init__(self, config: Loss) -> None:
        self._config = config
        self._norms: torch.Tensor | None = None

    @property
    def uses_mint(self) -> bool:
        """Whether the MINT loss counts at all."""
        return self._config.lambda_mint > 0

    def __call__(self, task_loss: torch.Tensor, mint_loss: torch.Tensor | None) -> torch.Tensor:
        """The scalar to differentiate.

        Args:
            task_loss: this rank's share of the global mean (scaled so that the ranks' mean is it).
            mint_loss: likewise; None exactly where λ₂ = 0.
        """
        if mint_loss is None:
            return task_loss
        losses = torch.stack([task_loss, mint_loss])
        norms = self._update(losses.detach())
        task, mint = losses / norms
        total: torch.Tensor = self._config.lambda_task * task + self._config.lambda_mint * mint
        return total

    def _update(self, losses: torch.Tensor) -> torch.Tensor:
        kind = self._config.weighting
        if kind == "none":
            return torch.ones_like(losses)
        if self._norms is None or kind == "ema":
            now, ranks = sum_over_ranks(losses)
            now = now / ranks
            beta = 0.0 if self._norms is None else self._config.ema_decay
            before = now if self._norms is None else self._norms.to(losses.device)
            self._norms = beta * before + (1 - beta) * now
        norms = self._norms.to(losses.device)
        # A loss that is exactly zero has nothing to be divided by.
        return torch.where(norms > 0, norms, torch.ones_like(norms))

    def state_dict(self) -> dict[str, list[float] | None]:
        """The normalisers as plain numbers."""
        return {"norms": None if self._norms is None else self._norms.tolist()}

    def load_state_dict(self, state: Mapping[str, list[float] | None]) -> None:
        """Go on with the normalisers that `state_dict` gave."""
        norms = state["norms"]
        self._norms = None if norms is None else torch.tensor(norms)
