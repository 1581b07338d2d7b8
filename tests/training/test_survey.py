"""The survey of gradients: no class is wrong in silence."""

from __future__ import annotations

import pytest

from tests.training import survey

KNOWN = {
    "AnyFlowFARTransformer3DModel": "failed",  # FlexAttention has no backward on a CPU
    "Kandinsky6SRTransformer3DModel": "failed",
    "UNet2DConditionModel-sdxl-controlnet-adapter": "refused",
    "transformers:Qwen3Model-hidden": "refused",
}


KNOWN_ON_SLICES = {
    **dict.fromkeys(("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel"), "failed"),
    **dict.fromkeys(("RFD4ProteinaTransformer", "UNet1DModel"), "refused"),  # they have no linears to cut
}


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("axis", "known"), [(survey.STAGES, KNOWN), (survey.TENSOR, KNOWN_ON_SLICES)])
def test_every_class_is_right_but_those_that_are_known(axis: str, known: dict[str, str]) -> None:
    found = survey.outcomes([], axis)
    wrong = {name: text for name, text in found.items() if text.partition(":")[0] != known.get(name, "right")}
    assert not wrong
    assert len(found) > 100


def test_outcomes_of_a_few() -> None:
    found = survey.outcomes(["PriorTransformer", "transformers:Qwen3Model-hidden"])
    assert [text.partition(":")[0] for text in found.values()] == ["right", "refused"]
    found = survey.outcomes(["PriorTransformer", "UNet1DModel"], survey.TENSOR)
    assert [text.partition(":")[0] for text in found.values()] == ["right", "refused"]
