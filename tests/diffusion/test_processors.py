"""Attention processors that a pipeline's call sets for its own length."""

from __future__ import annotations

from typing import Any

import pytest

from shardit.core.runtime.program import Interrupted
from shardit.diffusion.run.processors import processors_put_back
from tests.pipelines.entry import entries


@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"])
def test_processors_are_restored_after_an_interrupt(name: str) -> None:
    entry = entries()[name]
    pipe = entry.build()
    model = getattr(pipe, "unet", None) or pipe.transformer
    plain = dict(model.attn_processors)

    def interrupt(*_: Any) -> dict[str, Any]:
        assert dict(model.attn_processors) != plain
        raise Interrupted

    with pytest.raises(Interrupted), processors_put_back(pipe):
        pipe(**entry.call(), callback_on_step_end=interrupt)
    assert dict(model.attn_processors) == plain
