"""Pipelines other than text to picture through `Omni`: arguments and results, against plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardit import Omni
from tests.pipelines.entry import entries
from tests.pipelines.runs import arrays_of
from tests.support.fork_servers import kept_fork_server

KINDS = ("MarigoldDepthPipeline", "FluxPriorReduxPipeline", "KandinskyV22CombinedPipeline")
"""A progress bar of its own, a call without generator, a pipeline of pipelines."""


def returned(output: Any) -> list[Any]:
    found = [output.images, output.frames, output.latents, output.audio, output.extra]
    return [array for value in found if value is not None for array in arrays_of(value)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", KINDS)
def test_a_kind(name: str, tmp_path: Path) -> None:
    entry = entries()[name]
    pipe = entry.build()
    pipe.save_pretrained(tmp_path)
    # Kernels of some CPUs give other last bits for weights that begin at other addresses than in the file.
    pipe = type(pipe).from_pretrained(str(tmp_path))
    call = entry.call()
    output_type = {"output_type": "np"} if "output_type" in call else {}
    generator = {"generator": torch.Generator().manual_seed(5)} if entry.generator else {}
    expected = arrays_of(pipe(**{**call, **output_type, **generator}))
    call = {**entry.call(), **output_type}
    pictures = {"pil_image": call.pop("image")} if "image" in call else {}
    with kept_fork_server(), Omni(str(tmp_path), pipeline_parallel_size=2, split_batch=False, timeout_s=100) as omni:
        (output,) = omni.generate(call.pop("prompt", None), seed=5, **pictures, **call)
    assert output.error is None
    got = returned(output)
    assert len(got) == len(expected)
    for one, other in zip(expected, got, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
