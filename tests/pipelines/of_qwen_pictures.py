"""Picture models with Qwen3-VL or another large text encoder: DreamLite, Ernie, Ideogram 4, JoyImage, Krea 2."""

from __future__ import annotations

from typing import Any

from tests.pipelines import of_flux2, parts, parts_vision
from tests.pipelines.entry import PipelineEntry


def _qwen_picture_vae() -> Any:
    from shardit.models.tiny.recipes.vaes import QWEN_VAE

    return parts.model(QWEN_VAE.cls, **QWEN_VAE.config)


def dreamlite() -> dict[str, Any]:
    """Return the components of the pipelines of DreamLite."""
    unet = parts.model(
        "diffusers.models.unets.unet_dreamlite:DreamLiteUNetModel",
        sample_size=8,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        block_out_channels=(32, 64),
        cross_attention_dim=parts.WIDTH,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
    )
    vae = parts.model(
        "AutoencoderTiny",
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": parts_vision.qwen3_vl(),
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        "processor": parts_vision.qwen_processor("Qwen3VLProcessor", patch_size=16),
        "scheduler": parts.flow(),
    }


def ernie() -> dict[str, Any]:
    """Return the components of `ErnieImagePipeline`."""
    encoder = parts.text_model(
        "Mistral3Model",
        text_config={**parts.DECODER, "model_type": "mistral", "sliding_window": None},
        vision_config=of_flux2.PIXTRAL,
        spatial_merge_size=1,
        image_token_index=6,
    )
    return {
        "transformer": parts.like(
            "ErnieImageTransformer2DModel", in_channels=16, out_channels=16, text_in_dim=parts.WIDTH
        ),
        "vae": of_flux2.vae(),
        "text_encoder": encoder,
        "tokenizer": parts.tokenizer("qwen", "qwen3", length=64),
        "scheduler": parts.flow(),
    }


def ideogram() -> dict[str, Any]:
    """Return the components of `Ideogram4Pipeline`: two transformers, and text from 13 layers."""
    from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS

    width = len(QWEN3_VL_ACTIVATION_LAYERS) * parts.WIDTH
    made = [parts.like("Ideogram4Transformer2DModel", in_channels=16, llm_features_dim=width) for _ in range(2)]
    return {
        "transformer": made[0],
        "unconditional_transformer": made[1],
        "vae": of_flux2.vae(),
        "text_encoder": parts_vision.qwen3_vl(layers=max(QWEN3_VL_ACTIVATION_LAYERS) + 1).model,
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        "scheduler": parts.flow(),
    }


def joy(plus: bool = False) -> dict[str, Any]:
    """Return the components of the pipelines of JoyImage."""
    cls = "JoyImageEditPlusTransformer3DModel" if plus else "JoyImageEditTransformer3DModel"
    return {
        "transformer": parts.like(cls, in_channels=16, text_dim=parts.WIDTH),
        "vae": parts.wan_vae(),
        "text_encoder": parts_vision.qwen3_vl(),
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        "processor": parts_vision.qwen_processor("Qwen3VLProcessor", patch_size=16),
        "scheduler": parts.flow(),
    }


def krea() -> dict[str, Any]:
    """Return the components of `Krea2Pipeline`."""
    return {
        "transformer": parts.like(
            "Krea2Transformer2DModel",
            num_key_value_heads=2,
            text_num_key_value_heads=2,
            in_channels=64,
            text_hidden_dim=parts.WIDTH,
        ),
        "vae": _qwen_picture_vae(),
        "text_encoder": parts_vision.qwen3_vl(layers=4).model,
        "tokenizer": parts.tokenizer("qwen", "qwen2_vl"),
        "scheduler": parts.flow(),
        "text_encoder_select_layers": (1, 2, 3),
    }


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that these pipelines share."""
    return {
        "prompt": parts.PROMPT,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "output_type": "np",
        **changes,
    }


def _entry(name: str, make: Any, **arguments: Any) -> PipelineEntry:
    return parts.entry(name, make, call, **arguments)


def _square() -> Any:
    return parts.picture(32, 32)


NEGATIVE = {"negative_prompt": "blue"}


def _joy_entry(name: str, plus: bool = False, **arguments: Any) -> PipelineEntry:
    def build() -> Any:
        from diffusers.pipelines.joyimage import image_processor

        image_processor.BUCKETS.setdefault(32, [(32, 32)])  # instead of sizes of a megapixel
        pipe = parts.pipeline(name, **joy(plus))
        sizes = pipe.image_processor if plus else pipe.vae_image_processor
        sizes.register_to_config(basesize=32)
        return pipe

    return PipelineEntry(name, build, lambda: call(height=32, width=32, **NEGATIVE, **parts.fresh(arguments)))


ENTRIES = (
    _entry("DreamLitePipeline", dreamlite, image=_square, image_guidance_scale=1.5, height=32, width=32, **NEGATIVE),
    _entry("DreamLiteMobilePipeline", dreamlite, height=32, width=32),
    _entry("ErnieImagePipeline", ernie, **NEGATIVE),
    _entry("Ideogram4Pipeline", ideogram, guidance_schedule=None, max_sequence_length=64),
    _joy_entry("JoyImageEditPipeline", image=_square),
    _joy_entry("JoyImageEditPlusPipeline", plus=True, images=lambda: [[_square()]]),
    _entry("Krea2Pipeline", krea, max_sequence_length=32, **NEGATIVE),
)
