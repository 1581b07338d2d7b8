"""Changes of code and settings after sharding, between calls and within one: applied, or refused on all ranks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.guiders import SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformer2DModel
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

import shardit
from shardit import DiffusionParallelConfig, InputError
from shardit.core.modules.blocks import find_blocks
from shardit.core.modules.fingerprint import Fingerprint
from shardit.core.modules.snapshot import Snapshot
from shardit.core.modules.units import find_units
from shardit.models import tiny
from tests.diffusion.test_changes import flux, lora, run, step, unet
from tests.diffusion.test_parallelize import join
from tests.pipelines.entry import entries
from tests.pipelines.runs import arrays_of, distance
from tests.support.brought import pipeline
from tests.support.ranks import run_ranks

CONFIGS = {
    "stages": DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False),
    "guidance": DiffusionParallelConfig(cfg_parallel_size=2, split_batch=False),
    "slices": DiffusionParallelConfig(tensor_parallel_size=2),
    "ulysses": DiffusionParallelConfig(ulysses_degree=2),
}
BITWISE = ("stages", "guidance")
Shard = Callable[[Any], Any]
GUIDED = {"negative_prompt": "blurry", "true_cfg_scale": 3.0, "num_inference_steps": 3}


def guided(pipe: Any, **more: Any) -> torch.Tensor:
    """Latents of three steps, each with two calls of the transformer."""
    call = {**tiny.defaults("flux"), "prompt": "a cat", "output_type": "latent", **GUIDED, **more}
    return pipe(**call, generator=torch.Generator().manual_seed(3)).images


@contextmanager
def having(cls: Any, name: str, value: Any) -> Iterator[None]:
    """Meanwhile a class has another member."""
    own = vars(cls).get(name)
    setattr(cls, name, value)
    try:
        yield
    finally:
        delattr(cls, name) if own is None else setattr(cls, name, own)


def twice(plain: Any) -> Any:
    """The forward of a model that runs its blocks twice, as step caches replace it."""

    def forward(self: Any, hidden_states: torch.Tensor, **more: Any) -> Any:
        first = plain(self, hidden_states, **{**more, "return_dict": False})[0]
        return plain(self, hidden_states + 0.3 * first, **more)

    return forward


def skipping(plain: Any) -> Any:
    """The forward of a block that gives back what it is given, as one of two outputs."""

    def forward(self: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **more: Any) -> Any:
        return encoder_hidden_states, plain(self, hidden_states, encoder_hidden_states, **more)[1] * 1.1

    return forward


def mixing(plain: Any) -> Any:
    """The forward of an attention module that mixes the tokens."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        return plain(self, hidden_states + 0.3 * hidden_states.mean(1, keepdim=True), *args, **more)

    return forward


# Supported changes: each function returns tensors; with a `shard` that does nothing, those of plain diffusers.


def class_of_the_model(shard: Shard) -> list[torch.Tensor]:
    """Its forward is replaced in the class that the library has, and in that of the object."""
    pipe = shard(flux())
    outs = [guided(pipe)]
    for cls in (FluxTransformer2DModel, type(pipe.transformer)):
        with having(cls, "forward", twice(cls.forward)):
            outs += [guided(pipe), guided(pipe)]
    return [*outs, guided(pipe)]


def turning(shard: Shard) -> list[torch.Tensor]:
    """A forward that turns its blocks round for its own length, while other calls are in flight."""
    pipe, plain = flux(), FluxTransformer2DModel.forward

    class Turning(FluxTransformer2DModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            blocks, order = self.transformer_blocks, dict(self.transformer_blocks._modules)
            blocks._modules, self.turned = dict(reversed(order.items())), True
            try:
                return plain(self, *args, **kwargs)
            finally:
                blocks._modules, self.turned = order, False

    pipe.transformer.__class__ = Turning
    pipe = shard(pipe)
    return [guided(pipe), guided(pipe)]


def class_of_a_block(shard: Shard) -> list[torch.Tensor]:
    pipe = shard(flux())
    outs, cls = [guided(pipe)], type(pipe.transformer.transformer_blocks[1])
    if cls is type(pipe.transformer.transformer_blocks[0]):  # of that block alone, as over ranks
        pipe.transformer.transformer_blocks[1].__class__ = cls = type(cls.__name__, (cls,), {})
    with having(cls, "forward", skipping(cls.forward)):
        outs += [guided(pipe)]
    return [*outs, guided(pipe)]


def class_of_the_decoder(shard: Shard) -> list[torch.Tensor]:
    pipe = shard(flux())
    outs, plain = [run(pipe, "pt")], AutoencoderKL.decode
    with having(AutoencoderKL, "decode", lambda self, z, *args, **more: plain(self, z * 1.3, *args, **more)):
        outs.append(run(pipe, "pt"))
    return [*outs, run(pipe, "pt")]


def class_of_processors(shard: Shard) -> list[torch.Tensor]:
    pipe, plain = shard(flux()), FluxAttnProcessor.__call__

    def call(self: Any, attn: Any, hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        return plain(self, attn, hidden_states * 1.2, *args, **more)

    outs = [guided(pipe)]
    with having(FluxAttnProcessor, "__call__", call):
        outs.append(guided(pipe))
    return [*outs, guided(pipe)]


def mixed_tokens(shard: Shard) -> list[torch.Tensor]:
    """Attention that mixes the tokens: in the class of one object, in that of the library, and in one block alone."""
    pipe = shard(flux())
    outs = [guided(pipe)]
    attention = pipe.transformer.transformer_blocks[1].attn
    bases = type(attention).__mro__
    plain = next(base for base in bases if base.__module__.startswith("diffusers") and "forward" in vars(base))
    for cls in (type(attention), plain):
        with having(cls, "forward", mixing(cls.forward)):
            outs.append(guided(pipe))
        outs.append(guided(pipe))
    attention.forward = functools.partial(mixing(type(attention).forward), attention)
    return [*outs, guided(pipe)]


def one_block_twice(shard: Shard) -> list[torch.Tensor]:
    """Weights that layers share."""
    pipe = flux(3)
    pipe.transformer.transformer_blocks[2] = pipe.transformer.transformer_blocks[0]
    pipe.transformer.single_transformer_blocks[1] = pipe.transformer.single_transformer_blocks[0]
    pipe = shard(pipe)
    return [guided(pipe), guided(pipe)]


def patched_in_a_step(shard: Shard) -> list[torch.Tensor]:
    """The forward of a block is replaced in a callback, and put back in the next one."""
    pipe = shard(flux())
    block = pipe.transformer.transformer_blocks[1]

    def patch(_: Any, number: int, __: Any, given: dict[str, Any]) -> dict[str, Any]:
        if number == 0:
            block.forward = functools.partial(skipping(type(block).forward), block)
        elif number == 1:
            del block.forward
        return given

    return [guided(pipe), guided(pipe, callback_on_step_end=patch), guided(pipe)]


class Switched(FluxAttnProcessor):
    """Heads are independent of each other only while `mix` is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = 0.0

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        if not self.mix:
            return super().__call__(attn, hidden_states, *args, **more)
        out = attn.to_q(hidden_states) + attn.to_v(hidden_states).mean(-1, keepdim=True) * self.mix
        text = args[0] if args else more.get("encoder_hidden_states")
        return out if text is None else (attn.to_out[0](out), text * 0.5)


def switched() -> tuple[Any, list[Switched]]:
    pipe, processors = flux(), []
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        block.attn.processor = Switched()
        processors.append(block.attn.processor)
    return pipe, processors


def setting_of_processors(shard: Shard) -> list[torch.Tensor]:
    pipe, processors = switched()
    pipe = shard(pipe)
    outs = [guided(pipe)]
    for mix in (0.5, 0.0):
        for processor in processors:
            processor.mix = mix
        outs.append(guided(pipe))
    return outs


def setting_in_a_step(shard: Shard) -> list[torch.Tensor]:
    pipe, processors = switched()
    pipe = shard(pipe)

    def turn(_: Any, number: int, __: Any, given: dict[str, Any]) -> dict[str, Any]:
        for processor in processors:
            processor.mix = 0.5 if number == 0 else 0.0
        return given

    return [guided(pipe), guided(pipe, callback_on_step_end=turn), guided(pipe)]


def settings_of_attention(shard: Shard) -> list[torch.Tensor]:
    model = shard(unet())
    outs = [step(model)]
    for name, value in (("scale", 0.7), ("rescale_output_factor", 1.3), ("residual_connection", True)):
        for part in model.modules():
            if hasattr(part, "processor"):
                setattr(part, name, value)
        outs.append(step(model))
    return outs


def adapters_in_a_step(shard: Shard) -> list[torch.Tensor]:
    pipe = flux()
    lora(pipe, adapter_name="one")
    lora(pipe, seed=2, adapter_name="two")
    pipe = shard(pipe)
    pipe.set_adapters(["one"])

    def change(_: Any, number: int, __: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe.transformer.set_adapters(["two"] if number == 0 else ["one"], [0.5 + number])
        return given

    return [guided(pipe), guided(pipe, callback_on_step_end=change), guided(pipe)]


class Own(FluxPipeline):
    """Changes the model between calls, and between a call and the use of its result."""

    def __call__(self) -> Any:
        model: Any = self.transformer
        draw, config = torch.Generator().manual_seed(2), model.config
        x = torch.randn(1, 16, 64, generator=draw)
        given = {
            "encoder_hidden_states": torch.randn(1, 8, config.joint_attention_dim, generator=draw),
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=draw),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(8, 3),
            "guidance": torch.tensor([1.0]) if config.guidance_embeds else None,
            "return_dict": False,
        }
        outs, block = [], model.transformer_blocks[1]
        for number in range(4):
            with torch.no_grad():
                a = model(hidden_states=x, **given)[0]
                if number % 2:
                    block.forward = functools.partial(skipping(type(block).forward), block)
                b = model(hidden_states=x * 0.9, **given)[0]
                if number % 2:
                    del block.forward
                c = model(hidden_states=x * 0.8, **given)[0]
                hook = block.register_forward_pre_hook(lambda _, __, given: None, with_kwargs=True)
                x = x + 0.1 * a + 0.05 * b + 0.02 * c
                hook.remove()
            outs.append(x)
        return SimpleNamespace(images=outs)


def between_branches(shard: Shard) -> list[torch.Tensor]:
    pipe = flux()
    pipe.__class__ = Own
    pipe = shard(pipe)
    return [*pipe().images, *pipe().images]


def skipped_layers(shard: Shard) -> list[torch.Tensor]:
    """A pipeline made of blocks, whose guider puts hooks on blocks of the transformer for one call of each step."""
    parts = pipeline("wan2.2-t2v").components
    pipe: Any = WanBlocks().init_pipeline()
    guider = SkipLayerGuidance(3.0, 2.8, 0.1, 0.8, skip_layer_config=LayerSkipConfig([1]))
    pipe.update_components(**{name: parts[name] for name in pipe._component_specs if parts.get(name)}, guider=guider)
    pipe = shard(pipe)
    sizes = {name: tiny.defaults("wan2.2-t2v")[name] for name in ("height", "width", "num_frames")}
    call = {"prompt": "a cat", "negative_prompt": "blurry", "num_inference_steps": 3, "output": "latents", **sizes}
    return [pipe(**call, generator=torch.Generator().manual_seed(3)) for _ in range(2)]


WORKS: dict[str, tuple[Callable[[Shard], list[torch.Tensor]], ...]] = {
    "stages": (
        turning,
        *(class_of_the_model, class_of_a_block, class_of_the_decoder, class_of_processors, one_block_twice),
        *(patched_in_a_step, setting_of_processors, setting_in_a_step, settings_of_attention, adapters_in_a_step),
        *(between_branches, skipped_layers),
    ),
    "guidance": (turning, class_of_the_model, one_block_twice, patched_in_a_step, between_branches, skipped_layers),
    "slices": (
        turning,
        *(class_of_the_model, class_of_the_decoder, class_of_processors, patched_in_a_step, setting_of_processors),
        *(setting_in_a_step, settings_of_attention, between_branches, skipped_layers),
    ),
    "ulysses": (turning, class_of_the_model, class_of_processors, setting_in_a_step, mixed_tokens),
}

# What is refused.


def member(where: Callable[[Any], Any], name: str, other: Callable[[Any], Any]) -> Any:
    """Replaces a member of the class of something in a pipeline."""

    def act(pipe: Any) -> None:
        guided(pipe)
        cls = type(where(pipe))
        with having(cls, name, other(getattr(cls, name))):
            guided(pipe)

    return act


def plain_call(_: Any) -> Any:
    return lambda self, *args, **kwargs: torch.nn.Module.__call__(self, *args, **kwargs)


def own_call_of_all_modules(pipe: Any) -> None:
    guided(pipe)
    with having(FluxTransformer2DModel, "__call__", plain_call(None)):
        guided(pipe)


def change_on_one_rank(pipe: Any) -> None:
    def change(_: Any, __: int, ___: Any, given: dict[str, Any]) -> dict[str, Any]:
        if torch.distributed.get_rank() == 0:
            pipe.transformer.transformer_blocks[0].attn.processor = FluxAttnProcessor()
        return given

    guided(pipe, callback_on_step_end=change)


def other_number_of_heads(pipe: Any) -> None:
    guided(pipe)
    pipe.transformer.transformer_blocks[0].attn.heads += 1
    guided(pipe)


BLOCK: Callable[[Any], Any] = lambda pipe: pipe.transformer.transformer_blocks[0]  # noqa: E731
REFUSED: dict[str, dict[str, tuple[Callable[[Any], None], str]]] = {
    "stages": {
        "call of the model": (own_call_of_all_modules, "transformer: the __call__ of its class was replaced"),
        "call of a block": (
            member(BLOCK, "__call__", plain_call),
            r"blocks\.0: the __call__ of its class was replaced",
        ),
        "on one rank": (
            change_on_one_rank,
            r"ranks differ in changes of transformer \(.*processor.*\) after callback_on_step_end",
        ),
    },
    "guidance": {
        "call of the model": (own_call_of_all_modules, "transformer: the __call__ of its class was replaced"),
    },
    "slices": {
        "call of the model": (own_call_of_all_modules, "transformer: the __call__ of its class was replaced"),
        "attention": (member(lambda pipe: BLOCK(pipe).attn, "forward", mixing), r"0\.attn: the forward of its class"),
        "heads": (other_number_of_heads, r"attn\.heads was changed after parallelize.*their own part"),
    },
    "ulysses": {
        "call of a block": (
            member(BLOCK, "__call__", plain_call),
            r"blocks\.0: the __call__ of its class was replaced",
        ),
    },
}


def on_ranks(rank: int, count: int, method: str, axis: str) -> Any:
    join(rank, count, method)
    outs: dict[str, Any] = {}
    for act in WORKS[axis]:
        try:
            outs[act.__name__] = act(lambda pipe: shardit.parallelize(pipe, CONFIGS[axis], timeout_s=60))
        except InputError as error:  # all cases are told of at once
            outs[act.__name__] = f"{type(error).__name__}: {error}"
    said = {}
    for name, (act, _) in REFUSED[axis].items():
        pipe = shardit.parallelize(flux(), CONFIGS[axis], timeout_s=60)
        with pytest.raises(InputError) as caught:
            act(pipe)
        said[name] = str(caught.value)
    return outs, said


@functools.cache
def expected(act: Callable[[Shard], list[torch.Tensor]]) -> list[torch.Tensor]:
    """What plain diffusers gives."""
    return act(lambda pipe: pipe)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("axis", CONFIGS)
def test_changes(axis: str) -> None:
    for outs, said in run_ranks(2, on_ranks, axis, timeout=280):
        for act in WORKS[axis]:
            assert isinstance(outs[act.__name__], list), (act.__name__, outs[act.__name__])
            for number, (wanted, got) in enumerate(zip(expected(act), outs[act.__name__], strict=True)):
                assert torch.isfinite(got).all()
                if axis in BITWISE:
                    assert torch.equal(wanted, got), (act.__name__, number)
                assert float((wanted - got).norm() / wanted.norm()) < 1e-5, (act.__name__, number)
        for name, (_, pattern) in REFUSED[axis].items():
            assert re.search(pattern, said[name]), (name, said[name])


def test_a_block_in_lists_twice_is_found_once() -> None:
    model = flux(3).transformer
    model.transformer_blocks[2] = model.transformer_blocks[0]
    names = [name for name, _ in find_blocks(model)]
    assert names[:3] == ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"]
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])
    layers.insert(1, layers[0])
    holder = torch.nn.Module()
    holder.layers = layers
    for unit in find_units(holder):
        assert sum(p.nbytes for name in unit.names for p in holder.get_submodule(name).parameters()) == unit.nbytes
    assert {name for unit in find_units(holder) for name in unit.names} == {"layers.0", "layers.2", "layers.3"}


def test_what_changes_can_be_undone_for_a_while() -> None:
    model, processor = unet(), FluxAttnProcessor()
    attention = next(part for part in model.modules() if hasattr(part, "processor"))
    attention.processor = processor
    processor.weights, plain = [1.0], type(model).forward
    taken = Fingerprint(model, dict(model.named_modules()))
    assert not taken.changed()
    hook = model.mid_block.register_forward_hook(lambda *_: None)
    processor.weights[0], model.training, model.conv_in.forward = 2.0, True, plain
    with having(type(model), "forward", twice(plain)):
        paths = {change.path for change in taken.changes()}
        assert {"forward", "training", "conv_in.forward", "mid_block.hooks"} <= paths
        assert any(path.endswith("processor.weights") for path in paths)
        with taken.undone():
            assert taken.changes() == []
            assert processor.weights == [1.0]
        assert {change.path for change in taken.changes()} == paths
    hook.remove()


def test_settings_that_cannot_be_compared() -> None:
    holder: dict[str, Any] = {"numbers": torch.ones(3), "scale": 1.0, "act": torch.relu}
    snapshot = Snapshot([holder])
    holder["numbers"] = torch.ones(3)
    assert snapshot.differences() == []
    holder.update(scale=2.0, act=torch.tanh, fresh=[1])
    assert [found.name for found in snapshot.differences()] == ["act", "fresh", "scale"]
    snapshot.update()
    assert not snapshot.changed()


def skipped_layers(pipe: Any) -> Any:
    entry = entries()["StableDiffusionXLPipeline"]
    return arrays_of(pipe(**entry.call(), generator=torch.Generator().manual_seed(1)))


SKIP = LayerSkipConfig(indices=[0], fqn="mid_block.attentions.0.transformer_blocks")


def skipping_over_ulysses(rank: int, count: int, method: str) -> Any:
    join(rank, count, method)
    pipe = shardit.parallelize(entries()["StableDiffusionXLPipeline"].build(), CONFIGS["ulysses"], timeout_s=60)
    apply_layer_skip(pipe.unet, SKIP)  # diffusers looks the block up by its class
    return skipped_layers(pipe)


def test_a_layer_that_is_skipped_in_a_partitioned_block() -> None:
    plain = entries()["StableDiffusionXLPipeline"].build()
    before = skipped_layers(plain)
    apply_layer_skip(plain.unet, SKIP)
    expected = skipped_layers(plain)
    assert distance(before, expected) > 1e-4
    for made in run_ranks(2, skipping_over_ulysses):
        assert distance(expected, made) <= 1e-5
