"""Changes after `parallelize`: each works, or is refused on all ranks."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from transformers.models.t5.modeling_t5 import T5Block

import shardit
from shardit import DiffusionParallelConfig, InputError, UnsupportedError
from shardit.core.modules.fingerprint import Fingerprint
from shardit.core.modules.patching import subclass_in_place
from shardit.models import tiny
from tests.diffusion.test_parallelize import join
from tests.pipelines.entry import entries
from tests.support.brought import copied, pipeline
from tests.support.ranks import run_ranks

CONFIGS = {
    "stages": DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False),
    "slices": DiffusionParallelConfig(tensor_parallel_size=2),
    "ulysses": DiffusionParallelConfig(ulysses_degree=2),
}
Shard = Callable[[Any], Any]


@functools.cache
def _cut(blocks: int) -> Any:
    pipe = pipeline("flux")
    del pipe.transformer.transformer_blocks[blocks:], pipe.transformer.single_transformer_blocks[blocks:]
    pipe.transformer.register_to_config(num_layers=blocks, num_single_layers=blocks)
    del pipe.text_encoder.encoder.layers[2:]
    pipe.text_encoder.config.num_hidden_layers = 2
    return pipe


def flux(blocks: int = 2) -> Any:
    """A fresh pipeline with a few blocks of each kind: compiling twelve takes long."""
    return copied(_cut(blocks))


def run(pipe: Any, output_type: str = "latent") -> torch.Tensor:
    call = {**tiny.defaults("flux"), "prompt": "a cat", "output_type": output_type}
    return pipe(**call, generator=torch.Generator().manual_seed(3)).images


def compiled(thing: Any) -> Any:
    return torch.compile(thing, backend="eager")


# Supported changes: each function returns tensors; with an identity function as `shard`, those of plain diffusers.


def compiled_before(shard: Shard) -> list[torch.Tensor]:
    pipe = flux(blocks=1)
    pipe.transformer = compiled(pipe.transformer)
    pipe.text_encoder, pipe.vae = compiled(pipe.text_encoder), compiled(pipe.vae)
    return [run(shard(pipe))]


def compiled_after(shard: Shard) -> list[torch.Tensor]:
    pipe = shard(flux(blocks=1))
    outs = [run(pipe)]
    pipe.transformer = compiled(pipe.transformer)
    return [*outs, run(pipe), run(pipe)]


def blocks_compiled(shard: Shard) -> list[torch.Tensor]:
    pipe = shard(flux())
    outs = [run(pipe)]
    blocks = pipe.transformer.transformer_blocks
    for number in range(len(blocks)):
        blocks[number] = compiled(blocks[number])
    return [*outs, run(pipe)]


def lora(pipe: Any, broken: str = "", seed: int = 1, **options: Any) -> None:
    draw, layers = torch.Generator().manual_seed(seed), {}
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("attn.to_q", "attn.to_v")) and hasattr(module, "in_features"):
            rows = module.in_features
            layers[f"transformer.{name}.lora_A.weight"] = torch.randn(4, rows, generator=draw)
            layers[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=draw) * 0.1
            if name == broken:
                layers[f"transformer.{name}.lora_B.weight"][0, 0] = torch.nan
    pipe.load_lora_weights(layers, **options)


def swapped(shard: Shard) -> list[torch.Tensor]:
    """An adapter in the place of another one; of padded ones the first was there before."""
    pipe = shard(flux())
    lora(pipe, adapter_name="one")
    outs = [run(pipe)]
    lora(pipe, seed=2, adapter_name="one", hotswap=True)
    outs.append(run(pipe))
    pipe = flux()
    pipe.enable_lora_hotswap(target_rank=8)
    lora(pipe, adapter_name="one")
    outs.append(run(shard(pipe)))
    lora(pipe, seed=2, adapter_name="one", hotswap=True)
    return [*outs, run(pipe)]


def fused_safely(shard: Shard) -> list[torch.Tensor]:
    pipe = shard(flux())
    outs = [run(pipe)]
    lora(pipe)
    outs.append(run(pipe))
    pipe.fuse_lora(safe_fusing=True)
    outs.append(run(pipe))
    pipe.unfuse_lora()
    pipe.transformer.fuse_lora(safe_fusing=True, lora_scale=0.5)
    return [*outs, run(pipe)]


def new_scheduler(shard: Shard) -> list[torch.Tensor]:
    pipe = shard(flux())
    outs = [run(pipe)]
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=2.0)
    return [*outs, run(pipe)]


def unet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=16,
        norm_num_groups=4,
    ).eval()


def step(model: Any, image: bool = False) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    given = torch.randn(1, 4, 8, 8, generator=draw), 500, torch.randn(1, 5, 16, generator=draw)
    more = {"added_cond_kwargs": {"image_embeds": [torch.randn(1, 1, 8, generator=draw)]}} if image else {}
    with torch.no_grad():
        return model(*given, **more).sample + 0


def ip_adapter(model: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    layers: dict[str, Any] = {}
    names = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    for number in range(len(names)):
        made = IPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=16, scale=1.0).state_dict()
        layers[f"{2 * number + 1}.to_k_ip.weight"] = made["to_k_ip.0.weight"]
        layers[f"{2 * number + 1}.to_v_ip.weight"] = made["to_v_ip.0.weight"]
    made = ImageProjection(cross_attention_dim=16, image_embed_dim=8, num_image_text_embeds=4).state_dict()
    projection = {key.replace("image_embeds", "proj"): value for key, value in made.items()}
    return {"image_proj": projection, "ip_adapter": layers}


def adapted(shard: Shard) -> list[torch.Tensor]:
    """Other processors, then an IP-Adapter, then none."""
    model = shard(unet())
    outs = [step(model)]
    model.set_attn_processor(AttnProcessor())
    outs.append(step(model))
    model._load_ip_adapter_weights([ip_adapter(model)])
    outs.append(step(model, image=True))
    model.encoder_hid_proj, model.config.encoder_hid_dim_type = None, None
    model.set_default_attn_processor()
    return [*outs, step(model)]


def other_format(shard: Shard) -> list[torch.Tensor]:
    model = shard(unet())
    outs = [step(model)]
    model.to(memory_format=torch.channels_last)
    outs.append(step(model))
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return [*outs, step(model)]


def joined_projections(shard: Shard) -> list[torch.Tensor]:
    model = shard(unet())
    outs = [step(model)]
    model.fuse_qkv_projections()
    return [*outs, step(model)]


def other_weights(shard: Shard) -> list[torch.Tensor]:
    model = shard(unet())
    outs = [step(model)]
    model.conv_out = unet(5).conv_out
    return [*outs, step(model)]


def hooked_later(shard: Shard) -> list[torch.Tensor]:
    """The output of a block then lies in other memory than in the first call."""
    model = shard(unet())
    outs = [step(model)]
    for block in (*model.down_blocks, *model.up_blocks):
        block.register_forward_hook(lambda *_: None)
    hook = model.down_blocks[0].register_forward_hook(lambda _, __, out: (out[0] * 1.5, out[1]))
    outs.append(step(model))
    hook.remove()
    return [*outs, step(model)]


def adapted_encoder(shard: Shard) -> list[torch.Tensor]:
    pipe = shard(flux())
    outs = [run(pipe)]
    draw, layers = torch.Generator().manual_seed(1), {}
    width = pipe.text_encoder.config.hidden_size
    for name, _ in pipe.text_encoder.named_modules():
        if name.endswith(("q_proj", "out_proj")):
            layers[f"text_encoder.{name}.lora_A.weight"] = torch.randn(4, width, generator=draw)
            layers[f"text_encoder.{name}.lora_B.weight"] = torch.randn(width, 4, generator=draw) * 0.1
    pipe.load_lora_weights(layers, adapter_name="words")
    return [*outs, run(pipe)]


def cast_with_lora(shard: Shard) -> list[torch.Tensor]:
    """Weights that layers keep in another dtype, before and after adapters come, also on linears cut by inputs."""
    outs = []
    for cast_first in (True, False):
        pipe = shard(pipeline("flux"))
        linear = pipe.transformer.transformer_blocks[0].attn.to_out[0]
        draw, width = torch.Generator().manual_seed(1), linear.out_features
        name = "transformer.transformer_blocks.0.attn.to_out.0"
        layers = {f"{name}.lora_A.weight": torch.randn(4, width, generator=draw)}
        layers[f"{name}.lora_B.weight"] = torch.randn(width, 4, generator=draw) * 0.1
        acts = [
            lambda pipe=pipe: pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32),
            lambda pipe=pipe, layers=layers: pipe.load_lora_weights(layers),
        ]
        for act in acts if cast_first else reversed(acts):
            act()
        outs.append(run(pipe))
    return outs


def moved_adapters(shard: Shard) -> list[torch.Tensor]:
    pipe = shard(flux())
    lora(pipe)
    pipe.set_lora_device(list(pipe.get_active_adapters()), "cpu")
    return [run(pipe)]


def turned_by_a_setting(shard: Shard) -> list[torch.Tensor]:
    """A plain attribute that the code between the blocks follows."""
    pipe = flux()
    plain: Any = type(pipe.transformer)

    class Turning(plain):
        backwards = False

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            blocks, order = self.transformer_blocks, dict(self.transformer_blocks._modules)
            if self.backwards:
                blocks._modules = dict(reversed(order.items()))
            try:
                return plain.forward(self, *args, **kwargs)
            finally:
                blocks._modules = order

    pipe.transformer.__class__ = Turning
    pipe = shard(pipe)
    outs = [run(pipe)]
    pipe.transformer.backwards = True
    return [*outs, run(pipe)]


def patched_class(shard: Shard) -> list[torch.Tensor]:
    """As step caches and token mergers are installed: the forward of a class of blocks is replaced."""
    pipe, plain = shard(flux()), FluxTransformerBlock.forward
    outs = [run(pipe)]

    def forward(self: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **more: Any) -> Any:
        text, image = plain(self, hidden_states, encoder_hidden_states, **more)
        return text, image + 0.3 * image.mean(1, keepdim=True)

    FluxTransformerBlock.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return [*outs, run(pipe), run(pipe)]
    finally:
        FluxTransformerBlock.forward = plain


def derived_blocks(shard: Shard) -> list[torch.Tensor]:
    pipe = shard(flux())
    outs = [run(pipe)]
    for block in pipe.transformer.transformer_blocks:
        block.__class__ = _merging(type(block))
    return [*outs, run(pipe), run(pipe)]


def one_class_for_all(shard: Shard) -> list[torch.Tensor]:
    """Blocks get a class derived from that of another block."""
    pipe = shard(flux())
    outs = [run(pipe)]
    blocks = pipe.transformer.transformer_blocks
    derived = _merging(type(blocks[0]))
    for block in blocks:
        block.__class__ = derived
    return [*outs, run(pipe)]


def _merging(base: type) -> type:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        return base.forward(self, hidden_states + 0.3 * hidden_states.mean(1, keepdim=True), *args, **more)

    return type(base.__name__, (base,), {"forward": forward})


WORKS: dict[str, tuple[Callable[[Shard], list[torch.Tensor]], ...]] = {
    "stages": (
        *(compiled_before, compiled_after, blocks_compiled, fused_safely),
        *(new_scheduler, adapted, other_format, joined_projections, other_weights),
        *(turned_by_a_setting, hooked_later, adapted_encoder, moved_adapters, patched_class, derived_blocks),
        *(one_class_for_all, swapped),
    ),
    "slices": (
        compiled_before,
        compiled_after,
        fused_safely,
        other_format,
        hooked_later,
        adapted_encoder,
        cast_with_lora,
        patched_class,
        derived_blocks,
    ),
    "ulysses": (compiled_after, fused_safely, derived_blocks),
}

# What is refused.


def replaced_block(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0] = flux().transformer.transformer_blocks[0]
    run(pipe)


def compiled_forward(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")
    run(pipe)


def compiled_on_one_rank(pipe: Any) -> None:
    if torch.distributed.get_rank() == 0:
        pipe.transformer.compile(backend="eager")
    run(pipe)


def hook_on_one_rank(pipe: Any) -> None:
    if torch.distributed.get_rank() == 0:
        pipe.vae.decoder.register_forward_hook(lambda *_: None)
    run(pipe, "pt")


def processor_on_one_rank(pipe: Any) -> None:
    if torch.distributed.get_rank() == 0:
        pipe.vae.set_attn_processor(AttnProcessor())
    run(pipe, "pt")


def switched_hook(pipe: Any) -> None:
    """A hook that was there in the first call, and gives something else later."""
    block, on = pipe.transformer.transformer_blocks[0], []
    plain_forward = block.forward

    def forward(hidden_states: Any, encoder_hidden_states: Any, **kwargs: Any) -> Any:
        out = plain_forward(hidden_states, encoder_hidden_states, **kwargs)
        return (out[0], out[1] * 1.5) if on else (out[0], encoder_hidden_states)

    block.forward = forward
    run(pipe)
    on.append(True)
    run(pipe)


def compiled_decode(pipe: Any) -> None:
    pipe.vae.decode = compiled(pipe.vae.decode)
    run(pipe, "pt")


def new_tokens(pipe: Any) -> None:
    pipe.text_encoder.resize_token_embeddings(2000)


def broken_adapter(pipe: Any) -> None:
    lora(pipe, broken="transformer_blocks.0.attn.to_q")
    pipe.fuse_lora(safe_fusing=True)


def padded_adapters(pipe: Any) -> None:
    pipe.enable_lora_hotswap(target_rank=8)


def padded_adapters_of_a_component(pipe: Any) -> None:
    pipe.vae.enable_lora_hotswap(target_rank=8)
    pipe.vae.load_lora_adapter({})


def replaced_linear(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].attn.to_q = torch.nn.Linear(64, 64)
    run(pipe)


def class_of_another_model(pipe: Any) -> None:
    """A block gets a class derived from that of another sharded model, with the interceptor of that."""
    other = shardit.parallelize(flux(), CONFIGS["stages"], timeout_s=60)
    pipe.transformer.transformer_blocks[1].__class__ = _merging(type(other.transformer.transformer_blocks[1]))
    run(pipe)


def other_forward_of_a_class(pipe: Any) -> None:
    """Of an encoder's layers, which several ranks share."""
    run(pipe)
    plain = T5Block.forward
    T5Block.forward = lambda self, *args, **kwargs: plain(self, *args, **kwargs)
    try:
        run(pipe)
    finally:
        T5Block.forward = plain


def replaced_forward(pipe: Any) -> None:
    linear = pipe.transformer.transformer_blocks[0].attn.to_out[0]
    linear.forward = lambda x: torch.nn.functional.linear(x, linear.weight, linear.bias)
    run(pipe)


def other_forward(pipe: Any) -> None:
    """As some loaders of LoRA do it."""
    linear = pipe.transformer.transformer_blocks[0].attn.to_q
    plain = linear.forward
    linear.forward = lambda x: plain(x) * 2
    run(pipe)


def other_class_of_a_linear(pipe: Any) -> None:
    linear = pipe.transformer.transformer_blocks[0].attn.to_q
    linear.__class__ = type("Louder", (type(linear),), {})
    run(pipe)


def other_class_of_a_block(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].__class__ = _merging(FluxTransformerBlock)
    run(pipe)


def parametrized_block(pipe: Any) -> None:
    """Only the rank with the block can do that; the others go on."""
    with contextlib.suppress(UnsupportedError):
        torch.nn.utils.parametrizations.weight_norm(pipe.transformer.transformer_blocks[0].attn.to_q)
    run(pipe)


REFUSED: dict[str, dict[Callable[[Any], None], str]] = {
    "stages": {
        replaced_block: r"transformer_blocks\.0 was replaced after parallelize",
        compiled_forward: r"transformer is compiled.*compile_repeated_blocks\(\)",
        compiled_on_one_rank: r"ranks differ in parts \(transformer is compiled.*\) of FluxPipeline",
        hook_on_one_rank: r"ranks differ in changes of vae \(.*\), hooks of vae of FluxPipeline: make the same",
        processor_on_one_rank: r"ranks differ in changes of vae \(.*processor.*\) of FluxPipeline: make the same",
        parametrized_block: r"changes of transformer \(transformer_blocks\.0\.attn\.to_q\..*: make the same changes on",
        compiled_decode: "vae.decode was replaced on the object after parallelize",
        new_tokens: "resize_token_embeddings cannot be combined.*before parallelize",
        broken_adapter: "NaNs detected",
        padded_adapters: "transformer: enable_lora_hotswap pads adapters.*before parallelize",
        padded_adapters_of_a_component: "vae: enable_lora_hotswap pads adapters.*before parallelize",
        class_of_another_model: r"transformer_blocks\.1 was given another class after parallelize",
        other_forward_of_a_class: r"text_encoder_2\.encoder\.block\.0: the forward of its class was replaced after",
        other_class_of_a_block: r"transformer_blocks\.0 was given another class after parallelize",
    },
    "slices": {
        other_class_of_a_linear: r"transformer_blocks\.0\.attn\.to_q\.class was changed after parallelize",
        replaced_linear: r"transformer_blocks\.0\.attn\.to_q became Linear after parallelize",
        replaced_forward: r"transformer_blocks\.0\.attn\.to_out\.0\.forward was replaced after parallelize",
        other_forward: r"transformer_blocks\.0\.attn\.to_q\.forward was replaced after parallelize",
        broken_adapter: "NaNs detected",
    },
    "ulysses": {
        replaced_block: r"transformer_blocks\.0 was replaced after parallelize",
    },
}


def on_ranks(rank: int, count: int, method: str) -> Any:
    join(rank, count, method)
    return {axis: on_axis(axis) for axis in CONFIGS}


def on_axis(axis: str) -> Any:
    torch._dynamo.reset()  # it compiles the code of a class for so many kinds of calls only
    outs: dict[str, Any] = {}
    for act in WORKS[axis]:
        try:
            outs[act.__name__] = act(lambda pipe: shardit.parallelize(pipe, CONFIGS[axis], timeout_s=60))
        except Exception as error:  # all cases are told of at once
            outs[act.__name__] = f"{type(error).__name__}: {error}"
    said = {}
    for act in REFUSED[axis]:
        pipe = shardit.parallelize(flux(), CONFIGS[axis], timeout_s=60)
        with pytest.raises(ValueError) as caught:
            act(pipe)
        assert isinstance(caught.value, InputError) or act is broken_adapter
        said[act.__name__] = str(caught.value)
    return outs, said


@functools.cache
def expected(act: Callable[[Shard], list[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the result of plain diffusers."""
    return act(lambda pipe: pipe)


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    """Return the results of one group of ranks on all axes: the first use of a compiler takes longest."""
    return run_ranks(2, on_ranks)


@pytest.mark.parametrize("axis", CONFIGS)
def test_changes(axis: str, by_rank: list[dict[str, Any]]) -> None:
    results = [of_rank[axis] for of_rank in by_rank]
    for act in WORKS[axis]:
        for outs, _ in results:
            assert isinstance(outs[act.__name__], list), (act.__name__, outs[act.__name__])
            for number, (wanted, got) in enumerate(zip(expected(act), outs[act.__name__], strict=True)):
                assert (number, torch.isfinite(got).all()) == (number, True)
                if axis == "stages":
                    assert torch.equal(wanted, got), (act.__name__, number)
                # An adapter that comes after the cast computes in bfloat16: slices round the summands of each rank.
                bound = 1e-4 if act is cast_with_lora else 1e-5
                assert float((wanted - got).norm() / wanted.norm()) < bound, (act.__name__, number)
    for act, pattern in REFUSED[axis].items():
        for _, said in results:
            assert re.search(pattern, said[act.__name__]), said[act.__name__]


def perturbed(shard: Shard) -> list[torch.Tensor]:
    """A pipeline that sets attention processors in its call: they take batches of three, which cannot be split."""
    pipe = shard(entries()["StableDiffusionPipeline"].build())
    other = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True, pag_applied_layers=["mid"])
    call = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    outs = []
    for one, more in ((pipe, {}), (other, {"pag_scale": 2.0}), (other, {"pag_scale": 2.0}), (pipe, {})):
        outs.append(one(**call, **more, generator=torch.Generator().manual_seed(3)).images)
    return outs


def perturbed_on_ranks(rank: int, count: int, method: str) -> list[torch.Tensor]:
    join(rank, count, method)
    return perturbed(lambda pipe: shardit.parallelize(pipe, DiffusionParallelConfig(pipeline_parallel_size=2)))


def test_processors_that_a_call_sets() -> None:
    """Batches are split where that changes only last bits, as documented."""
    plain = perturbed(lambda pipe: pipe)
    for outs in run_ranks(2, perturbed_on_ranks):
        for wanted, got in zip(plain, outs, strict=True):
            assert float((wanted - got).norm() / wanted.norm()) < 1e-5
    assert not torch.equal(plain[0], plain[1])


def test_the_fingerprint_sees_what_computes() -> None:
    model = unet()
    taken = Fingerprint(model, [""])
    assert not taken.changed()
    assert taken.hooked() == []
    model.mid_block.register_forward_pre_hook(torch.nn.functional.relu)  # a library's
    assert taken.hooked() == []
    model.mid_block.register_forward_pre_hook(lambda *_: None)
    assert taken.hooked() == ["mid_block"]
    taken = Fingerprint(model)
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    model.conv_in.weight = torch.nn.Parameter(model.conv_in.weight + 1)
    model.some_number = 1
    assert not taken.changed()
    subclass_in_place(model.conv_in, {})  # as this package does, later than it takes a fingerprint
    assert taken.changes() == []
    assert not taken.changed()
    for act in (
        lambda: setattr(model, "conv_out", torch.nn.Conv2d(16, 4, 3)),
        lambda: model.set_attn_processor(AttnProcessor()),
        lambda: setattr(model.conv_in, "forward", lambda x: x),
        lambda: model.mid_block.compile(),
        lambda: setattr(model, "another", torch.nn.Identity()),
        lambda: delattr(model, "another"),
    ):
        act()
        assert taken.changed()
        assert taken.changes()
        taken = Fingerprint(model)
