"""Extensions that users bring: each function applies one to a pipeline, before and after `shard` makes it parallel, and
returns the resulting tensors. With an identity function as `shard` it is plain diffusers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from shardit.models import tiny
from tests.support.whole_pipelines import pictures

Shard = Callable[[Any], Any]
TARGETS = {
    "flux": ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out", "proj_mlp", "proj_out", "norm1.linear"],
    "sd3.5": ["to_q", "to_v", "to_out.0", "add_q_proj", "net.0.proj", "net.2"],
    "wan2.2-ti2v": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
    "wan2.2-t2v": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
    "qwen-image": ["to_q", "add_v_proj", "to_out.0", "to_add_out", "img_mlp.net.2", "img_mod.1"],
    "z-image": ["to_q", "to_v", "to_out.0", "w1", "w2"],
}
"""Linears that get an adapter: cut by columns, by rows and gathered, uneven heads (Z-Image has five)."""


@functools.lru_cache(maxsize=8)
def _loaded(name: str, dtype: str | None) -> Any:
    pipe = tiny.load_plain(tiny.resolve(f"tiny/{name}"), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(name: str, dtype: str | None = None) -> Any:
    """A fresh tiny pipeline: a copy, which takes less time than to load it again."""
    return copied(_loaded(name, dtype))


def mapped(name: str) -> Any:
    """Load a tiny pipeline: its weights lie in memory as in the file, like those that shardit loads. Kernels of some
    CPUs give other last bits for a copy, which begins at other addresses (docs/numerics.md)."""
    pipe = tiny.load_plain(tiny.resolve(f"tiny/{name}"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def copied(pipe: Any) -> Any:
    """Copy a pipeline with modules and a scheduler of its own; tokenizers, which are never changed, are shared."""
    parts = pipe.components.values()
    kept = [part for part in parts if not isinstance(part, (torch.nn.Module, SchedulerMixin))]
    return copy.deepcopy(pipe, {id(part): part for part in kept})


def run(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    """One call with a fixed seed; its latents, or pixels as a tensor."""
    call = {**tiny.defaults(name), "output_type": "latent", **more}
    if "prompt_embeds" not in call:
        call["prompt"] = "a cat on a mat"
    out = pipe(**call, generator=torch.Generator("cpu").manual_seed(3))
    made = out.frames if hasattr(out, "frames") else out.images
    if isinstance(made, torch.Tensor):
        return made
    if isinstance(made, list):
        made = np.stack([np.asarray(m) for m in made])
    return torch.as_tensor(np.asarray(made))


GUIDED = {"flux": {"negative_prompt": "blurry", "true_cfg_scale": 3.0}, "z-image": {"guidance_scale": 2.0}}


def guided(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    """The same with guidance in two calls, or one batch, as the pipeline has it."""
    return run(pipe, name, **{**GUIDED.get(name, {}), **more})


# Adapters.


def write_lora(name: str, folder: Path, seed: int, encoder: bool = False) -> None:
    """An adapter with weights that make a difference."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline(name)
    targets = TARGETS[name] if seed == 5 else TARGETS[name][:2]
    parts = {"transformer": (pipe.transformer, targets)}
    if encoder:
        parts["text_encoder"] = (pipe.text_encoder, ["q_proj", "out_proj", "fc1"])
    torch.manual_seed(seed)
    layers = {}
    for part, (model, names) in parts.items():
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=3, target_modules=names), model)
        for key, parameter in model.named_parameters():
            if "lora" in key:
                parameter.data = torch.randn_like(parameter) * 0.1
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
    type(pipe).save_lora_weights(str(folder), **layers)


def lora_before(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    pipe.load_lora_weights(f"{folder}/{name}-5", adapter_name="one")
    shard(pipe)
    return [guided(pipe, name), guided(pipe, name)]


def lora_after(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    shard(pipe)
    without = guided(pipe, name)
    pipe.load_lora_weights(f"{folder}/{name}-5", adapter_name="one")
    return [without, guided(pipe, name), guided(pipe, name)]


def lora_scale(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """Weights of adapters, and two at once."""
    shard(pipe)
    pipe.load_lora_weights(f"{folder}/{name}-5", adapter_name="one")
    pipe.load_lora_weights(f"{folder}/{name}-6", adapter_name="two")
    outs = []
    for adapters, weights in ((["one"], [0.5]), (["one", "two"], [0.7, 0.4]), (["two"], [1.0])):
        pipe.set_adapters(adapters, weights)
        outs.append(guided(pipe, name))
    return outs


def lora_call_scale(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """The scale of one call."""
    key = "joint_attention_kwargs" if name in ("flux", "sd3.5") else "attention_kwargs"
    pipe.load_lora_weights(f"{folder}/{name}-5")
    shard(pipe)
    return [guided(pipe, name, **{key: {"scale": scale}}) for scale in (0.5, 1.0, 0.5)]


def lora_unload(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """Off, on, deleted, unloaded, loaded again."""
    pipe.load_lora_weights(f"{folder}/{name}-5", adapter_name="one")
    shard(pipe)
    pipe.load_lora_weights(f"{folder}/{name}-6", adapter_name="two")
    outs = []
    for act in (
        pipe.disable_lora,
        pipe.enable_lora,
        lambda: pipe.set_adapters(["one"]),
        lambda: pipe.delete_adapters("two"),
        pipe.unload_lora_weights,
        lambda: pipe.load_lora_weights(f"{folder}/{name}-6", adapter_name="two"),
    ):
        act()
        outs.append(run(pipe, name))
    return outs


def lora_fused(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """Merged into the weights, and taken out again."""
    shard(pipe)
    pipe.load_lora_weights(f"{folder}/{name}-5")
    pipe.fuse_lora(lora_scale=0.5)
    fused = run(pipe, name)
    pipe.unfuse_lora()
    return [fused, run(pipe, name)]


def lora_fused_before(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """Merged and unloaded before: these are plain weights."""
    pipe.load_lora_weights(f"{folder}/{name}-5")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    shard(pipe)
    return [run(pipe, name)]


def lora_of_encoder(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    shard(pipe)
    pipe.load_lora_weights(f"{folder}/{name}-encoder")
    return [run(pipe, name)]


def lora_of_encoder_before(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    pipe.load_lora_weights(f"{folder}/{name}-encoder")
    shard(pipe)
    return [run(pipe, name)]


# ControlNets.


def controlnet(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """A ControlNet over the same components, with weights that make a difference."""
    import diffusers

    made, cls, key, more = {
        "flux": ("FluxControlNetModel", "FluxControlNetPipeline", "control_image", {"num_single_layers": 2}),
        "sd3.5": ("SD3ControlNetModel", "StableDiffusion3ControlNetPipeline", "control_image", {}),
        "qwen-image": ("QwenImageControlNetModel", "QwenImageControlNetPipeline", "control_image", {}),
    }[name]
    torch.manual_seed(7)
    config = {**pipe.transformer.config, "num_layers": 2, **more}
    net = getattr(diffusers, made).from_config({k: v for k, v in config.items() if not k.startswith("_")}).eval()
    for parameter in net.parameters():
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    parts = {k: v for k, v in pipe.components.items() if v is not None}
    other = getattr(diffusers, cls)(**parts, controlnet=net)
    other.set_progress_bar_config(disable=True)
    shard(other)
    size = {k: tiny.defaults(name)[k] for k in ("width", "height")}
    picture = pictures(1)[0].resize((size["width"], size["height"]))
    outs = [guided(other, name, **{key: picture}, controlnet_conditioning_scale=scale) for scale in (1.0, 0.3)]
    return [*outs, guided(other, name, **{key: picture})]


# Arguments of a call.


def prompt_embeds(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """Made before; and made by the parallel pipeline's own encoders."""
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt("a red fox", "a red fox", max_sequence_length=48)
        shard(pipe)
        again = pipe.encode_prompt("a red fox", "a red fox", max_sequence_length=48)[0] + 0
    return [again, run(pipe, name, prompt_embeds=embeds, pooled_prompt_embeds=pooled)]


def given_latents(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    shard(pipe)
    latents = torch.randn(1, 80, 64, generator=torch.Generator().manual_seed(4))
    return [guided(pipe, name, latents=latents), guided(pipe, name, latents=latents, num_inference_steps=2)]


def output_types(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    shard(pipe)
    return [run(pipe, name, output_type=kind) for kind in ("latent", "np", "pt", "pil")]


def batch(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    shard(pipe)
    return [guided(pipe, name, num_images_per_prompt=2), guided(pipe, name, num_images_per_prompt=2)]


def schedulers(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """Another one before, and others after."""
    import diffusers

    config, outs = pipe.scheduler.config, []
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True),
        diffusers.FlowMatchLCMScheduler.from_config(config),
        diffusers.UniPCMultistepScheduler.from_config(config, **flow),
        diffusers.DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++", **flow),
    ):
        pipe.scheduler = scheduler
        if not outs:
            shard(pipe)
        torch.manual_seed(11)
        outs.append(guided(pipe, name))
    return outs


def bfloat16(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    pipe.to(torch.bfloat16)
    shard(pipe)
    return [guided(pipe, name), guided(pipe, name)]


# Callbacks.


def ranks() -> tuple[int, int]:
    """This rank and their number, among the ranks of one request."""
    if torch.distributed.is_initialized() and together:
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


together = True
"""Whether all ranks work on the same request (copies do not)."""


def callback(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """Changes latents and embeddings; only the changes of rank 0 count."""
    seen = []

    def change(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        assert type(given["latents"]) is torch.Tensor
        given["latents"] = given["latents"] * 0.9 + 0.01 * step + 100 * ranks()[0]
        if step == 1:
            given["prompt_embeds"] = given["prompt_embeds"] * 1.1
        return given

    shard(pipe)
    keys = ["latents", "prompt_embeds"]
    made = guided(pipe, name, callback_on_step_end=change, callback_on_step_end_tensor_inputs=keys)
    assert seen == [0, 1, 2]
    return [made, guided(pipe, name)]


def interrupt(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """Any rank stops all at the same step: here the last one alone, then the first one alone."""
    shard(pipe)
    outs = []
    for who in (ranks()[1] - 1, 0):
        steps = []

        def stop(pipe: Any, step: int, time: Any, given: dict[str, Any], who: int = who, to: Any = steps) -> Any:
            to.append(step)
            if step == 1 and ranks()[0] == who:
                pipe._interrupt = True
            return given

        outs.append(guided(pipe, name, callback_on_step_end=stop, num_inference_steps=4))
        assert steps == [0, 1]
    return [*outs, guided(pipe, name)]


# What is done to modules.


def attributes(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """Attributes that steer code, on the model and in a block."""
    shard(pipe)
    first = run(pipe, name)
    pipe.transformer.transformer_blocks[0].attn.norm_q.eps = 0.5
    pipe.transformer.single_transformer_blocks[3].norm.norm.eps = 0.5
    return [first, run(pipe, name)]


def compiled(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="aot_eager")
    shard(pipe)
    return [run(pipe, name), run(pipe, name)]


def compiled_after(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    torch._dynamo.reset()
    shard(pipe)
    pipe.transformer.compile_repeated_blocks(backend="aot_eager")
    return [run(pipe, name), run(pipe, name)]


def back_end(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    """Chosen before, changed after."""
    pipe.transformer.set_attention_backend("_native_math")
    shard(pipe)
    first = guided(pipe, name)
    pipe.transformer.set_attention_backend("native")
    return [first, guided(pipe, name)]


def fused_projections(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    pipe.transformer.fuse_qkv_projections()
    shard(pipe)
    return [run(pipe, name)]


def fused_projections_after(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    shard(pipe)
    pipe.transformer.fuse_qkv_projections()
    return [run(pipe, name)]


def tiling(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    shard(pipe)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    return [run(pipe, name, output_type="np", num_images_per_prompt=2)]


# Step caches.


def cache_config(kind: str, pipe: Any) -> Any:
    import diffusers

    current = {"current_timestep_callback": lambda: pipe._current_timestep}
    more = {
        "FirstBlockCacheConfig": {"threshold": 0.6},
        "TaylorSeerCacheConfig": {"cache_interval": 2, "disable_cache_before_step": 1, "max_order": 1},
        "PyramidAttentionBroadcastConfig": {
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_timestep_skip_range": (10, 990),
            "spatial_attention_block_identifiers": ["transformer_blocks"],
            **current,
        },
        "FasterCacheConfig": {
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_timestep_skip_range": (10, 990),
            "tensor_format": "BCHW",
            "is_guidance_distilled": True,
            **current,
        },
        "MagCacheConfig": {"threshold": 0.9, "num_inference_steps": 6, "retention_ratio": 0.2, "mag_ratios": [0.9] * 6},
    }[kind]
    return getattr(diffusers, kind)(**more)


def cache(kind: str, before: bool) -> Callable[..., list[torch.Tensor]]:
    def row(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
        if not before:
            shard(pipe)
        pipe.transformer.enable_cache(cache_config(kind, pipe))
        if before:
            shard(pipe)
        outs = [guided(pipe, name, num_inference_steps=6)]
        pipe.transformer.disable_cache()
        return [*outs, guided(pipe, name)]

    return row


# Quantised and offloaded.


def layerwise_casting(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    shard(pipe)
    return [run(pipe, name)]


def layerwise_casting_after(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    shard(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    outs = [run(pipe, name)]
    with torch.inference_mode():  # replaces the data of weights by tensors without versions
        return [*outs, guided(pipe, name).clone()]


def dynamic_quantisation(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
    pipe.transformer = torch.ao.quantization.quantize_dynamic(pipe.transformer, {torch.nn.Linear}, dtype=torch.qint8)
    shard(pipe)
    return [run(pipe, name)]


def offload(method: str, before: bool) -> Callable[..., list[torch.Tensor]]:
    def row(pipe: Any, name: str, shard: Shard, folder: str) -> list[torch.Tensor]:
        more = {}
        if method == "enable_group_offload":
            kinds = {"offload_type": "block_level", "num_blocks_per_group": 1}
            more = {"onload_device": torch.device("cpu"), **kinds}
        if not before:
            shard(pipe)
        if method == "cpu_offload":  # what the pipelines' methods come to
            import accelerate

            accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
        elif method == "apply_group_offloading":
            from diffusers.hooks import apply_group_offloading

            apply_group_offloading(pipe.transformer, torch.device("cpu"), offload_type="leaf_level")
        else:
            getattr(pipe, method)(**more)
        if before:
            shard(pipe)
        return [run(pipe, name)]

    return row
