"""Cosmos: text, pictures and videos to worlds."""

from __future__ import annotations

from typing import Any

from shardit.models.tiny.words import VOCAB
from tests.pipelines import parts, parts_vision
from tests.pipelines.entry import PipelineEntry

CHANNELS = 16


class Unchecked:
    """Stands for the safety checker, whose package is not installed: these pipelines insist on one."""

    def to(self, device: Any = None) -> Unchecked:
        """This one holds no tensors."""
        return self

    def check_text_safety(self, prompt: str) -> bool:
        """Whether a prompt may be used."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """The frames that may be shown."""
        return frames


def transformer(channels: int, **changes: Any) -> Any:
    """The transformer of all of them."""
    config: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": CHANNELS,
        "text_embed_dim": parts.WIDTH,
        "concat_padding_mask": False,  # with it, the model needs torchvision
        "max_size": (4, 32, 32),
    }
    return parts.like("CosmosTransformer3DModel", **{**config, **changes})


def first(channels: int) -> dict[str, Any]:
    """Return the components of the pipelines of the first version."""
    vae = parts.model(
        "AutoencoderKLCosmos",
        latent_channels=CHANNELS,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
    )
    scheduler = parts.scheduler(
        "EDMEulerScheduler", sigma_min=0.002, sigma_max=80, sigma_data=0.5, prediction_type="epsilon",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    return {
        "transformer": transformer(channels),
        "vae": vae,
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer("t5"),
        "scheduler": scheduler,
        "safety_checker": Unchecked(),
    }


def second(channels: int) -> dict[str, Any]:
    """Return the components of the pipelines of the second version."""
    changes = {"vae": parts.wan_vae(), "scheduler": parts.flow(use_karras_sigmas=True)}
    return {**first(CHANNELS), "transformer": transformer(channels), **changes}


def third(controlled: bool = False) -> dict[str, Any]:
    """Return the components of the pipelines of version 2.5: text from all layers of Qwen2.5-VL."""
    text = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 64 * 2, "text_embed_dim": parts.WIDTH}
    text["encoder_hidden_states_channels"] = parts.WIDTH
    changes: dict[str, Any] = {"extra_pos_embed_type": None, **text}
    if controlled:
        changes |= {"controlnet_block_every_n": 2, "img_context_dim_in": 16, "img_context_num_tokens": 4}
        changes |= {"img_context_dim_out": parts.WIDTH}
    made: dict[str, Any] = {
        "transformer": transformer(CHANNELS + 1, **changes),
        "vae": parts.wan_vae(),
        "text_encoder": parts_vision.qwen25_vl(),
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        "scheduler": parts.scheduler(
            "UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
        "safety_checker": Unchecked(),
    }
    if controlled:
        made["controlnet"] = parts.model(
            "CosmosControlNetModel",
            n_controlnet_blocks=2,
            in_channels=CHANNELS + 1 + 1 + 1 + 0,
            latent_channels=CHANNELS + 1 + 1,
            model_channels=32,
            num_attention_heads=2,
            attention_head_dim=16,
            text_embed_dim=parts.WIDTH,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            img_context_dim_in=16,
            img_context_dim_out=parts.WIDTH,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=64 * 2,
            encoder_hidden_states_channels=parts.WIDTH,
        )
    return made


def omni() -> dict[str, Any]:
    """Return the components of `Cosmos3OmniPipeline`: one transformer for text and pictures."""
    model = parts.like("Cosmos3OmniTransformer", latent_channel=16, patch_latent_dim=16, vocab_size=VOCAB)
    return {
        "transformer": model,
        "text_tokenizer": parts.tokenizer("qwen", "qwen3"),
        "vae": parts.wan_vae(),
        "scheduler": parts.scheduler("UniPCMultistepScheduler"),
        "enable_safety_checker": False,
    }


def _omni_call(**changes: Any) -> dict[str, Any]:
    switches = {"use_system_prompt": False, "add_resolution_template": False, "add_duration_template": False}
    return {k: v for k, v in {**call(), **switches, **changes}.items() if k != "max_sequence_length"}


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "negative_prompt": "blue",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "max_sequence_length": 16,
        "output_type": "np",
        **changes,
    }


def _entry(name: str, make: Any, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, rounded=True, **arguments)  # for the safety checker


def _square() -> Any:
    return parts.picture(32, 32)


def _clip() -> Any:
    return parts.video(9, 32, 32)


ENTRIES = (
    _entry("CosmosTextToWorldPipeline", lambda: first(CHANNELS), num_frames=9),
    _entry("CosmosVideoToWorldPipeline", lambda: first(CHANNELS + 1), num_frames=9, video=_clip),
    _entry("Cosmos2TextToImagePipeline", lambda: second(CHANNELS)),
    _entry("Cosmos2VideoToWorldPipeline", lambda: second(CHANNELS + 1), num_frames=9, image=_square),
    parts.entry("Cosmos3OmniPipeline", omni, _omni_call, height=16, width=16, num_frames=5),
    _entry("Cosmos2_5_PredictBasePipeline", third, num_frames=9),
    _entry(
        "Cosmos2_5_TransferPipeline",
        lambda: third(controlled=True),
        num_frames=9,
        num_frames_per_chunk=9,
        controls=_clip,
    ),
)
