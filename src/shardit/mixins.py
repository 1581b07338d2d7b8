"""For pipelines whose denoise loop is written by hand: guidance and scheduler steps that keep every rank busy.

They are optional: `shardit.parallelize` also takes a loop that calls its transformer directly. The mixins add the right
order: all branches of a step start before the first result is used. So stages overlap them and guidance ranks share
them.

    class MyPipeline(nn.Module, PipelineParallelMixin, CFGParallelMixin): ...
"""

from __future__ import annotations

from typing import Any

import torch

from shardit.core.runtime.pending import materialize


class CFGParallelMixin:
    """Predictions of one step, with or without guidance. The pipeline sets both attributes."""

    transformer: Any
    """Model that `predict_noise` calls."""
    scheduler: Any
    """Scheduler of diffusers that `scheduler_step` calls."""

    def predict_noise(self, **kwargs: Any) -> torch.Tensor:
        """One call of the transformer; override it for another way of calling."""
        out = self.transformer(**kwargs)
        return out if isinstance(out, torch.Tensor) else out[0]

    def predict_noise_maybe_with_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float,
        positive_kwargs: dict[str, Any],
        negative_kwargs: dict[str, Any] | None = None,
        cfg_normalize: bool = True,
        output_slice: int | None = None,
    ) -> torch.Tensor:
        """Return the prediction of one step, the same on every rank: both branches combined, or the positive one alone.

        output_slice: how many tokens (dimension 1) of each prediction count. Raises ValueError for guidance without
        negative_kwargs.
        """
        if do_true_cfg and negative_kwargs is None:
            raise ValueError("do_true_cfg needs negative_kwargs")
        # Both calls start here; slices do not wait, combining does.
        positive = self.predict_noise(**positive_kwargs)[:, :output_slice]
        if not do_true_cfg or negative_kwargs is None:
            return positive
        negative = self.predict_noise(**negative_kwargs)[:, :output_slice]
        return self.combine_cfg_noise(positive, negative, true_cfg_scale, cfg_normalize)

    def combine_cfg_noise(
        self,
        noise_pred: torch.Tensor,
        neg_noise_pred: torch.Tensor,
        true_cfg_scale: float,
        cfg_normalize: bool = False,
    ) -> torch.Tensor:
        """Return negative + scale * (positive - negative); with cfg_normalize, of the length of the positive one along
        the last dimension, as in Qwen-Image."""
        combined = neg_noise_pred + true_cfg_scale * (noise_pred - neg_noise_pred)
        if not cfg_normalize:
            return combined
        return combined * (noise_pred.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def scheduler_step(self, noise_pred: torch.Tensor, t: Any, latents: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the latents after a step; every rank takes it, so nothing is sent. kwargs go to the scheduler."""
        return self.scheduler.step(noise_pred, t, latents, return_dict=False, **kwargs)[0]


class PipelineParallelMixin:
    """Stages: predictions are there when a scheduler sees them, which may not be made for tensors on the wire.

    It stands before CFGParallelMixin, on which it builds; other bases raise TypeError when the class is made.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if CFGParallelMixin not in order or order.index(CFGParallelMixin) < order.index(PipelineParallelMixin):
            missing = "needs CFGParallelMixin, too" if CFGParallelMixin not in order else "comes before it"
            raise TypeError(
                f"{cls.__name__}: PipelineParallelMixin builds on CFGParallelMixin and {missing}: write "
                f"class {cls.__name__}(nn.Module, PipelineParallelMixin, CFGParallelMixin)"
            )

    def scheduler_step(self, noise_pred: torch.Tensor, t: Any, latents: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """See `CFGParallelMixin.scheduler_step`."""
        materialize(noise_pred)
        return super().scheduler_step(noise_pred, t, latents, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
