"""Target of a model's prediction: flow, noise (epsilon), velocity (v) or the clean sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shardit.errors import UnsupportedError

_PREDICTED = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Objective:
    """An objective, and the noise schedule of the folder's scheduler.

    kind: "flow" or a prediction type of diffusers. steps: timesteps of the schedule. alphas: shares of the clean sample
    in the variance, by timestep; None for a flow.
    """

    kind: str
    steps: int
    alphas: torch.Tensor | None = None

    @property
    def flow(self) -> bool:
        """Whether it is flow matching."""
        return self.kind == "flow"

    def timestep(self, share: float) -> float:
        """Return the timestep at a share of the schedule: of a flow any number that float32 has, else a whole one."""
        if self.flow:
            return float(torch.tensor(share * self.steps, dtype=torch.float32))
        return float(min(int(share * self.steps), self.steps - 1))

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Return samples with the noise of their timesteps; float32."""
        a, b = self._shares(times, clean)
        return (a * clean + b * noise).float()

    def target(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Return the right prediction for noised samples; float32."""
        if self.flow:
            return noise - clean
        if self.kind == "epsilon":
            return noise
        if self.kind == "sample":
            return clean
        a, b = self._shares(times, clean)
        return (a * noise - b * clean).float()

    def _shares(self, times: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the shares of the clean sample and of the noise. In float64: 1000 times the share of the noise is the
        timestep without an error of rounding."""
        if self.alphas is None:
            noise = times.double() / self.steps
            clean = 1 - noise
        else:
            alphas = self.alphas.to(times.device)[times.long()]
            clean, noise = alphas.sqrt(), (1 - alphas).sqrt()
        shape = (-1, *([1] * (like.dim() - 1)))
        return clean.view(shape), noise.view(shape)


def objective_of(scheduler: Any) -> Objective:
    """Return the objective of models with this scheduler. Raises UnsupportedError if there is none."""
    config, name = scheduler.config, type(scheduler).__name__
    steps, predicted = int(config.get("num_train_timesteps", 1000)), config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or predicted == "flow_prediction":
        return Objective("flow", steps)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or predicted not in _PREDICTED:
        what = f"prediction_type={predicted!r}" if alphas is not None else "no alphas_cumprod"
        raise UnsupportedError(f"{name} with {what} cannot be trained: flow matching, {', '.join(_PREDICTED)} can")
    return Objective(predicted, steps, alphas.double())
