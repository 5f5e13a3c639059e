"""The joint loss: L = λ₁·s₁·L_task + λ₂·s₂·L_MINT (DeAlcala et al., ICCV 2025, with s = 1/‖L‖)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from amint_ray.train.weighting import Constant, Weighting


class Objective:
    """Weighs the two losses, and keeps what that needs from one step to the next.

    With λ₂ = 0 there is one loss and nothing to balance: the objective is L_task itself.

    Args:
        lambda_task: λ₁.
        lambda_mint: λ₂.
        weighting: gives the scales s; by default 1.
        warmup_steps: λ₂ is multiplied by (t + 1)/warmup_steps in step t, counted from 0, and by no
            more than 1.
        plain_task: leave L_task as it is, without λ₁ and s₁: what `mint.detach` promises.
    """

    def __init__(
        self,
        *,
        lambda_task: float = 1.0,
        lambda_mint: float = 1.0,
        weighting: Weighting | None = None,
        warmup_steps: float = 0.0,
        plain_task: bool = False,
    ) -> None:
        self._lambda_task, self._lambda_mint = lambda_task, lambda_mint
        self._weighting = weighting or Constant()
        self._warmup_steps = warmup_steps
        self._plain_task = plain_task
        self._step = 0
        self._squares: dict[int, torch.Tensor] = {}

    @property
    def uses_mint(self) -> bool:
        """Whether the MINT loss counts at all."""
        return self._lambda_mint > 0

    @property
    def reads_gradients(self) -> bool:
        """Whether `record` wants the gradients at the last tap."""
        return self.uses_mint and self._weighting.reads_gradients

    @property
    def wants_first_losses(self) -> bool:
        """Whether `start` must be called before the next step."""
        return self.uses_mint and self._step == 0 and self._weighting.reads_first_losses

    def start(self, losses: torch.Tensor) -> None:
        """Take the mean losses over the first global batch, (2,), before it changes anything."""
        self._weighting.start(losses)

    def weights(self) -> torch.Tensor:
        """(2,) λ_i·s_i of the step to come."""
        task, mint = self._weighting.scales()
        warm = min(1.0, (self._step + 1) / self._warmup_steps) if self._warmup_steps else 1.0
        task = torch.ones_like(task) if self._plain_task else self._lambda_task * task
        return torch.stack([task, self._lambda_mint * warm * mint])

    def __call__(self, task_loss: torch.Tensor, mint_loss: torch.Tensor | None) -> torch.Tensor:
        """The scalar to differentiate.

        Args:
            task_loss: this rank's share of the global mean (scaled so that the ranks' mean is it).
            mint_loss: likewise; None exactly where λ₂ = 0.
        """
        if mint_loss is None:
            return task_loss
        task, mint = self.weights().to(task_loss)
        total: torch.Tensor = task * task_loss + mint * mint_loss
        return total

    def record(self, which: int, gradient: torch.Tensor) -> None:
        """Take what reaches the last tap from the task (0) or from the head (1)."""
        square = gradient.detach().float().square().sum()
        self._squares[which] = self._squares[which] + square if which in self._squares else square

    def recorded(self, like: torch.Tensor) -> torch.Tensor:
        """(2,) squared norms of what was recorded since the last call; of this rank's rows.

        Args:
            like: tells device and type.
        """
        none = like.new_zeros(())
        squares = torch.stack([self._squares.get(which, none).to(like) for which in (0, 1)])
        self._squares = {}
        return squares

    def update(self, losses: torch.Tensor, squares: torch.Tensor) -> None:
        """Take the step that was just done.

        Args:
            losses: (2,) mean losses over the global batch.
            squares: (2,) what `recorded` gave, summed over the ranks. Only the two norms' ratio is
                used, so that a factor common to both does no harm.
        """
        if self.uses_mint:
            self._weighting.update(losses, squares.sqrt() / self.weights().to(squares))
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as plain numbers."""
        return {"step": self._step, "weighting": self._weighting.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state_dict` gave."""
        self._step = state["step"]
        self._weighting.load_state_dict(state["weighting"])
