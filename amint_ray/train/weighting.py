"""The scales s of the two losses in L = λ₁·s₁·L_task + λ₂·s₂·L_MINT.

Scales are constants to the model's gradient and the same on all ranks: they follow from the means
over the global batch. Those of step t are set before it runs, so that a batch may be computed in
parts. In the equations ℓ_t is a loss of step t, and index i stands for either of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from amint_ray.config.schema import Loss


class Weighting(Protocol):
    """What all weightings have in common. Tensors are (2,): task, MINT."""

    reads_first_losses: bool
    """Whether `start` must be called before the first step."""
    reads_gradients: bool
    """Whether `update` needs gradient norms."""

    def start(self, losses: torch.Tensor) -> None:
        """Take the losses of the first batch, ℓ₀, before it changes anything."""

    def scales(self) -> torch.Tensor:
        """(2,) scales of the step to come."""

    def update(self, losses: torch.Tensor, gradient_norms: torch.Tensor) -> None:
        """Take the losses and ‖∂L_i/∂z‖, z being the last tap's output, of the step just done."""

    def state_dict(self) -> dict[str, list[float]]:
        """All that `update` changed, as plain numbers."""

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Go on with what `state_dict` gave."""


class Constant:
    """s_i = 1 (`none`)."""

    reads_first_losses = reads_gradients = False

    def __init__(self) -> None:
        self._ones = torch.ones(2)

    def start(self, losses: torch.Tensor) -> None:
        """Nothing to be taken."""

    def scales(self) -> torch.Tensor:
        """Ones."""
        return self._ones

    def update(self, losses: torch.Tensor, gradient_norms: torch.Tensor) -> None:
        """Nothing to be learned, but where the losses are."""
        self._ones = self._ones.to(losses.device)

    def state_dict(self) -> dict[str, list[float]]:
        """Nothing to be kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Nothing to be taken back."""


class RunningMean:
    """s_i = 1/m_i with m₀ = ℓ₀ and m_{t+1} = β·m_t + (1 − β)·ℓ_t.

    `initial` is β = 1: the loss in the first batch, as in the notebooks of DeAlcala et al. (ICCV
    2025); `ema` is β < 1. A loss that is exactly zero has nothing to be divided by and keeps the
    scale 1.
    """

    reads_first_losses, reads_gradients = True, False

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._mean = torch.ones(2)

    def start(self, losses: torch.Tensor) -> None:
        """m₀ = ℓ₀."""
        self._mean = losses

    def scales(self) -> torch.Tensor:
        """1/m."""
        return 1 / torch.where(self._mean > 0, self._mean, 1.0)

    def update(self, losses: torch.Tensor, gradient_norms: torch.Tensor) -> None:
        """The running mean moves."""
        self._mean = self._decay * self._mean.to(losses) + (1 - self._decay) * losses

    def state_dict(self) -> dict[str, list[float]]:
        """The running mean."""
        return {"mean": self._mean.tolist()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """The running mean."""
        self._mean = torch.tensor(state["mean"])


class Uncertainty:
    """s_i = exp(−v_i), v_i the learned log-variance of loss i.

    Kendall, Gal and Cipolla 2018 (arXiv 1705.07115, in the form with log-variances) minimise
    Σ_i exp(−v_i)·L_i + v_i/2 over model and v together. Here v takes plain gradient steps,
    v_i ← v_i − η·(1/2 − exp(−v_i)·ℓ_i), from v_i = 0. At rest exp(−v_i) = 1/(2ℓ_i): as under
    `ema`, a loss is divided by its own size, which it follows at the rate η.
    """

    reads_first_losses = reads_gradients = False

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._log_variance = torch.zeros(2)

    def start(self, losses: torch.Tensor) -> None:
        """Nothing to be taken."""

    def scales(self) -> torch.Tensor:
        """exp(−v)."""
        return torch.exp(-self._log_variance)

    def update(self, losses: torch.Tensor, gradient_norms: torch.Tensor) -> None:
        """One gradient step of v."""
        v = self._log_variance.to(losses)
        self._log_variance = v - self._learning_rate * (0.5 - torch.exp(-v) * losses)

    def state_dict(self) -> dict[str, list[float]]:
        """The log-variances."""
        return {"log_variance": self._log_variance.tolist()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """The log-variances."""
        self._log_variance = torch.tensor(state["log_variance"])


class GradNorm:
    """s_i = 2·q_i/Σ_j q_j with q_i = r_i^α/g_i: equal gradients where the two tasks part.

    Chen et al. 2018 (GradNorm, arXiv 1711.02257) ask for ‖∂(s_i·L_i)/∂W‖ = ḡ·r_i^α at the last
    shared layer, with Σ s_i = 2 and the relative inverse training rate
    r_i = (ℓ_i/ℓ_{i,0})/mean_j(ℓ_j/ℓ_{j,0}), and approach it by gradient steps on s. For two losses
    the equation has the solution above, so it is solved instead, with running means (decay β) of
    g_i = ‖∂L_i/∂z‖ and ℓ_i. z is the last tap's output rather than its weights: there the two
    gradients arrive apart in the one backward pass that is run anyway, so that measuring them
    needs no further pass. What the head sends through the shallower tap is not counted.
    """

    reads_first_losses = reads_gradients = True

    def __init__(self, alpha: float, decay: float) -> None:
        self._alpha, self._decay = alpha, decay
        self._first = self._loss = torch.ones(2)
        self._norm = torch.zeros(2, dtype=torch.float64)

    def start(self, losses: torch.Tensor) -> None:
        """ℓ₀."""
        self._first = self._loss = losses
        self._norm = self._norm.to(losses.device)

    def scales(self) -> torch.Tensor:
        """2·q/Σq; ones until the first gradients are known."""
        rate = self._loss / self._first.clamp_min(_TINY)
        rate = (rate / rate.mean().clamp_min(_TINY)).clamp_min(_TINY)
        pull = rate**self._alpha / self._norm.clamp_min(_TINY)
        return torch.where(self._norm.any(), 2 * pull / pull.sum(), 1.0)

    def update(self, losses: torch.Tensor, gradient_norms: torch.Tensor) -> None:
        """The running means move; the first gradient norms are taken as they are.

        Norms that are not finite are passed over: under `float16` such a step is left out.
        """
        self._first, loss = self._first.to(losses), self._loss.to(losses)
        self._loss = self._decay * loss + (1 - self._decay) * losses
        norm = self._norm.to(gradient_norms)
        before = torch.where(norm.any(), norm, gradient_norms)
        after = self._decay * before + (1 - self._decay) * gradient_norms
        self._norm = torch.where(gradient_norms.isfinite().all(), after, norm)

    def state_dict(self) -> dict[str, list[float]]:
        """First losses, and the running means."""
        return {
            "first": self._first.tolist(),
            "loss": self._loss.tolist(),
            "norm": self._norm.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """First losses, and the running means."""
        self._first, self._loss = torch.tensor(state["first"]), torch.tensor(state["loss"])
        self._norm = torch.tensor(state["norm"], dtype=torch.float64)


_TINY = 1e-12


def create_weighting(config: Loss) -> Weighting:
    """The weighting that the configuration names."""
    match config.weighting:
        case "initial":
            return RunningMean(decay=1.0)
        case "ema":
            return RunningMean(decay=config.ema_decay)
        case "uncertainty":
            return Uncertainty(config.uncertainty_lr)
        case "gradnorm":
            return GradNorm(config.gradnorm_alpha, config.ema_decay)
        case _:
            return Constant()
