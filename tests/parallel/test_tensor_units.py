"""Assumptions of tensor ranks about modules are checked; derived, replaced or later modules are right, or whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    IPAdapterAttnProcessor,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.diffusion.family import FAMILY
from shardit.parallel.tensor.planner import plan_tensors
from tests.diffusion.test_parallelize import join
from tests.support import survey_models, units
from tests.support.ranks import run_ranks
from tests.support.survey_models import Draw, randomise

CLOSE = 1e-5
TWO = DiffusionParallelConfig(tensor_parallel_size=2)


def distance(expected: torch.Tensor, got: torch.Tensor) -> float:
    return float((expected - got).norm() / expected.norm())


def seeded(make: Callable[[], Any]) -> Any:
    """A model whose weights are the same each time, and matter."""
    torch.manual_seed(0)
    return randomise(make().eval())


def shard(model: Any) -> Any:
    return shardit.parallelize(model, TWO, timeout_s=60)


# Modules that are not what they look like.


def ids() -> torch.Tensor:
    return (torch.arange(18).view(2, 9) * 53) % units.ROWS


def awkward(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    with torch.no_grad():
        for name, (make, at_plan, at_call) in units.CASES.items():
            expected, model = seeded(make)(ids()), shard(seeded(make))
            checks = model.shardit_checks
            if name == "plain":
                compares(model, expected)
            for _ in range(2):
                assert distance(expected, model(ids())) <= CLOSE, name
            found = {unit.rpartition(".")[2] for unit in checks.whole}
            assert found == set(at_call), (name, checks.whole)
            held = {part for part in ("table", "attn", "ff") if _is_whole(model, part)}
            assert held == {*at_plan, *at_call}, name
            assert all(any(part in note for note in checks.plan.notes) for part in at_plan), name
        handed_out()
        set_later()


def _is_whole(model: nn.Module, part: str) -> bool:
    linear = {"table": "table", "attn": "blocks.1.attn.to_out.0", "ff": "blocks.1.ff.net.2"}[part]
    full = {"table": units.ROWS * units.WIDTH, "attn": units.WIDTH**2, "ff": 4 * units.WIDTH**2}[part]
    return model.get_parameter(f"{linear}.weight").numel() == full


def compares(model: Any, expected: torch.Tensor) -> None:
    """One comparison for each kind of unit, none in later calls; a wrong sum would be seen."""
    assert distance(expected, model(ids())) <= CLOSE
    assert model.shardit_checks.compared == 2  # attention and feed-forward of the first of two blocks
    model(ids())
    model(ids()[:1])
    assert model.shardit_checks.compared == 2
    assert not model.shardit_checks.whole


def handed_out() -> None:
    """Attention maps for other code include all heads."""
    for make in (units.Store, list):
        stores = [make(), make()]
        plain, model = (
            seeded(lambda s=store: units.Model(lambda: units.Block(processor=units.StoringProcessor(s))))
            for store in stores
        )
        shard(model)
        for m in (plain, model):
            m(ids())
        expected, got = (store if isinstance(store, list) else store.maps for store in stores)
        assert len(got) == len(expected) == 2
        assert all(a.shape == b.shape and distance(a, b) <= CLOSE for a, b in zip(expected, got, strict=True))


def set_later() -> None:
    """Processors that come after the model was cut and was called."""
    plain, model = (seeded(lambda: units.Model(units.Block)) for _ in range(2))
    shard(model)
    model(ids())
    for make, whole in ((units.ScaledProcessor, False), (units.MixingProcessor, True)):
        for m in (plain, model):
            for block in m.blocks:
                block.attn.set_processor(make())
        assert distance(plain(ids()), model(ids())) <= CLOSE
        assert _is_whole(model, "attn") == whole
    other = shard(seeded(lambda: units.Model(units.Block)))
    other.blocks[1].attn.set_processor(units.WeightedProcessor())
    with pytest.raises(
        UnsupportedError, match=r"blocks.1.attn is cut .* no rule matches processor of WeightedProcessor"
    ):
        other(ids())


def test_units_with_unusual_code() -> None:
    run_ranks(2, awkward)


def test_derived_units_stay_whole_and_are_noted() -> None:
    for name, (make, at_plan, _) in units.CASES.items():
        plan = plan_tensors(make(), 2, FAMILY)
        assert len(plan.notes) == (0 if not at_plan else 1 if at_plan == ("table",) else 2), (name, plan.notes)
        assert all(" is whole on every rank: " in note for note in plan.notes)
        assert name != "scaled head" or "lm_head.weight" not in plan.cuts


# Processors with weights.


def unet(**more: Any) -> Any:
    config = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
    }
    return seeded(lambda: UNet2DConditionModel(**{**config, **more}))


def ip_adapter(model: Any, seed: int) -> dict[str, Any]:
    """The weights of an IP-Adapter, as files have them."""
    torch.manual_seed(seed)
    layers: dict[str, Any] = {}
    for number in range(sum(name.endswith("attn2.processor") for name in model.attn_processors)):
        made = IPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=16).state_dict()
        layers |= {f"{2 * number + 1}.{k[:7]}.weight": v for k, v in made.items()}
    made = ImageProjection(cross_attention_dim=16, image_embed_dim=8, num_image_text_embeds=4).state_dict()
    projection = {k.replace("image_embeds", "proj"): v for k, v in made.items()}
    return {"image_proj": projection, "ip_adapter": layers}


def denoise(model: Any, images: int = 0, **attention: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    sample, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 5, 16, generator=draw)
    embeds = [torch.randn(1, 1, 8, generator=draw) for _ in range(images)]
    more: dict[str, Any] = {"added_cond_kwargs": {"image_embeds": embeds}} if images else {}
    return model(sample, 500, text, cross_attention_kwargs=attention or None, **more).sample


def scales(model: Any, *values: float) -> None:
    for processor in model.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = list(values)


def image_adapters() -> None:
    """Loaded before and after, two at once, with scales and masks, and unloaded again."""
    plain, before, after = unet(), unet(), unet()
    one, two = ip_adapter(plain, 1), ip_adapter(plain, 2)
    before._load_ip_adapter_weights([one])
    for model in (before, after):
        shard(model)
    assert distance(denoise(plain), denoise(after)) <= CLOSE
    masks = [torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)]
    masks[0][..., :4] = 1
    for weights, values in (([one], (1.0,)), ([one, two], (0.7, 0.4)), ([two], (1.0,)), ([], ())):
        for model in (plain, before, after):
            if weights:
                model._load_ip_adapter_weights(weights)
                scales(model, *values)
            else:
                model.encoder_hid_proj = None
                model.config.encoder_hid_dim_type = None
                model.set_attn_processor({name: AttnProcessor2_0() for name in model.attn_processors})
        given = {"ip_adapter_masks": masks} if len(weights) == 2 else {}
        expected = denoise(plain, len(weights), **given)
        for model in (before, after):
            assert distance(expected, denoise(model, len(weights), **given)) <= CLOSE, values
            assert not model.shardit_checks.whole
            for name, parameter in model.named_parameters():
                assert parameter.shape[0] == 16 or "_ip" not in name, name


def custom_diffusion(model: Any, kind: Any = CustomDiffusionAttnProcessor) -> None:
    made: dict[str, Any] = {}
    for name in model.attn_processors:
        torch.manual_seed(len(made))
        cross = name.endswith("attn2.processor")
        width = 16 if cross else None
        made[name] = kind(cross, cross, hidden_size=32, cross_attention_dim=width)
    model.set_attn_processor(randomise(nn.ModuleDict({k.replace(".", "/"): v for k, v in made.items()})) and made)


def counts_on_all(model: Any) -> None:
    """This one takes the width of a head from all channels: it works on whole attention only."""
    custom_diffusion(model, CustomDiffusionAttnProcessor2_0)


def perturbed(model: Any) -> None:
    """As pipelines with perturbed attention do it, in each call."""
    for name, module in model.named_modules():
        if name.endswith("attn1"):
            guided = "down" in name
            module.set_processor(PAGIdentitySelfAttnProcessor2_0() if guided else PAGCFGIdentitySelfAttnProcessor2_0())


def sliced(model: Any) -> None:
    model.set_attn_processor(SlicedAttnProcessor(2))


def default(model: Any) -> None:
    model.set_default_attn_processor()


def brought() -> None:
    """Other processors, before and after."""
    acts: list[Callable[[Any], None]] = [custom_diffusion, counts_on_all, sliced, default]
    for act in acts:
        plain, before, after = unet(), unet(), unet()
        act(plain)
        act(before)
        for model in (before, after):
            shard(model)
        act(after)
        for model in (before, after):
            assert distance(denoise(plain), denoise(model)) <= CLOSE, act
            assert bool(model.shardit_checks.whole) == (act is counts_on_all), act
    plain, model = unet(), shard(unet())
    batch = torch.Generator().manual_seed(3)
    arguments = (torch.randn(3, 4, 8, 8, generator=batch), 500, torch.randn(3, 5, 16, generator=batch))
    for _ in range(2):
        for m in (plain, model):
            own = dict(m.attn_processors)
            perturbed(m)
            m.perturbed = m(*arguments).sample
            m.set_attn_processor(own)
        assert distance(plain.perturbed, model.perturbed) <= CLOSE
        assert distance(denoise(plain), denoise(model)) <= CLOSE
    assert not model.shardit_checks.whole


def added_keys() -> None:
    """Attention that adds keys and values of text, of Kandinsky 2 and IF."""
    for only in (True, None):
        config = {
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "mid_block_only_cross_attention": only,
            "only_cross_attention": bool(only),
        }
        plain, model = unet(**config), shard(unet(**config))
        assert distance(denoise(plain), denoise(model)) <= CLOSE
        assert any("attentions.0" in note for note in model.shardit_checks.plan.notes)


def flux_images() -> None:
    """Flux adds the output of its image adapters without a linear behind it: its attention becomes whole."""
    entry = survey_models.entry("FluxTransformer2DModel")
    plain: Any = entry.build()
    model: Any = shard(entry.build())
    inputs = entry.inputs(Draw(0, False))
    model(**inputs)
    for m in (plain, model):
        torch.manual_seed(0)
        made = {}
        for name, own in m.attn_processors.items():
            first = name.startswith("transformer_blocks")
            made[name] = FluxIPAdapterAttnProcessor(32, 24) if first else own
        m.set_attn_processor(made)
    tokens = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(1))
    expected, got = (m(**inputs, joint_attention_kwargs={"ip_hidden_states": [tokens]}).sample for m in (plain, model))
    assert distance(expected, got) <= CLOSE
    assert set(model.shardit_checks.whole) == {f"transformer_blocks.{i}.attn" for i in range(3)}


def weighted(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    with torch.no_grad():
        image_adapters()
        brought()
        added_keys()
        flux_images()


def test_processors_with_weights_or_of_others() -> None:
    logging.getLogger("shardit").setLevel(logging.ERROR)
    run_ranks(2, weighted)
