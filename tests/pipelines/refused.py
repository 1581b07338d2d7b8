"""Pipelines that are refused on an axis, with a part of the error: the survey expects these, and no others."""

from __future__ import annotations

_STATE = "in each of its calls, of which stages and guidance ranks run a part"
_GRADIENTS = "UNet2DConditionModel is called for its gradients, but it runs without them over these ranks"
_WRITES = "writes to its arguments"
_NO_WAY = "no way was found to shard the tokens of"
_NO_SLICES = "has no attention or feed-forward that tensor parallelism knows"


def _tokens(text: str) -> dict[str, str]:
    return {"ulysses 2": text, "ring 2": text}


REFUSED: dict[str, dict[str, str]] = {
    "AnyFlowFARPipeline": {
        "pp 2": "the forward writes into one of its arguments",
        "cfg 2": "the forward writes into one of its arguments",
        "ulysses 2": _WRITES,
        "ring 2": _NO_WAY,  # its attention is causal in blocks, by flex attention
    },
    "DanceDiffusionPipeline": {"tp 2": _NO_SLICES},
    "Flux2KleinKVPipeline": {
        "pp 2": "ranks found different plans",
        "cfg 2": "returns a Flux2KVCache, of which each rank would fill a part",
    },
    "Kandinsky6SRPipeline": _tokens(_NO_WAY),  # its tokens are in the batch: windows of a picture
    "LEditsPPPipelineStableDiffusion": {"pp 2": _STATE, "cfg 2": _STATE},
    "RFD4ProteinaPipeline": {"tp 2": _NO_SLICES},
    "StableDiffusionAttendAndExcitePipeline": {
        "pp 2": _GRADIENTS,
        "cfg 2": _GRADIENTS,
        "tp 2": "tensor parallelism is for inference",
        **_tokens(_GRADIENTS),
    },
    "StableDiffusionControlNetXSPipeline": _tokens(_WRITES),
    "StableDiffusionSAGPipeline": {"pp 2": _STATE, "cfg 2": _STATE, **_tokens(_NO_WAY)},  # it reads attention maps
    "StableDiffusionXLControlNetXSPipeline": _tokens(_WRITES),
}
"""By class and axis."""
