"""The same with the mixins: the pipeline is a module, and branches and steps are methods that can be overridden.

torchrun --nproc-per-node=2 examples/custom_pipeline/with_mixins.py --pipeline_parallel_size=2
"""

import sys

import torch
from custom_pipeline import DIM, Transformer, config_of, words
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

import shardit
from shardit.mixins import CFGParallelMixin, PipelineParallelMixin


class Pipeline(nn.Module, PipelineParallelMixin, CFGParallelMixin):
    """As in custom_pipeline.py, with a scheduler of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text_encoder, self.transformer = nn.Embedding(1000, DIM), Transformer()
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def forward(self, prompt: str, negative_prompt: str = "", steps: int = 4, scale: float = 3.0) -> torch.Tensor:
        texts = [self.text_encoder(words(text)) for text in (prompt, negative_prompt)]
        latents = torch.randn(1, 21, 16, generator=torch.Generator().manual_seed(1))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            wanted, unwanted = ({"latents": latents, "text": text, "t": t / 1000} for text in texts)
            noise = self.predict_noise_maybe_with_cfg(scale > 1, scale, wanted, unwanted)
            latents = self.scheduler_step(noise, t, latents)
        return latents


if __name__ == "__main__":
    pipe = shardit.parallelize(Pipeline(), config_of(sys.argv[1:]))
    print(f"sum of the result: {float(pipe('a red fox').sum()):.4f}")
