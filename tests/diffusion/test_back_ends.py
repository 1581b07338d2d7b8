"""`attention_backend`: a back end of diffusers by name, with and without ranks."""

from __future__ import annotations

import pytest
import torch

from shardit import DiffusionParallelConfig, InputError, Omni
from shardit.models import tiny


def test_unknown_name() -> None:
    with pytest.raises(InputError, match=r"no attention back end 'natve'; diffusers has .*native"):
        Omni("tiny/wan2.2-ti2v", attention_backend="natve")


def test_back_end_that_this_machine_lacks() -> None:
    with pytest.raises(InputError, match="attention_backend='sage' needs sageattention"):
        Omni("tiny/wan2.2-ti2v", attention_backend="sage")


@pytest.mark.full
def test_native_math_over_ulysses() -> None:
    call = {**tiny.defaults("wan2.2-ti2v"), "output_type": "latent", "seed": 1}
    with Omni("tiny/wan2.2-ti2v") as one:
        expected = one.generate("a cat", **call)[0].latents
    config = DiffusionParallelConfig(ulysses_degree=2)
    with Omni("tiny/wan2.2-ti2v", parallel_config=config, attention_backend="_native_math") as two:
        output = two.generate("a cat", **call)[0]
    assert output.error is None
    assert float(torch.dist(expected, output.latents) / expected.norm()) <= 1e-5
