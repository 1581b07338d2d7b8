"""`parallelize` and `load` on a live process group: modules alone, whole pipelines, LoRA, and refusals."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import shardit
from shardit import DiffusionParallelConfig
from shardit.core.modules.absent import AbsentParameter
from shardit.models import tiny
from tests.support import brought
from tests.support.ranks import run_ranks

CALL = {"prompt": "a cat", "output_type": "latent"}


def join(rank: int, count: int, method: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=count)


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(3)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    out = pipe(**{**tiny.defaults(name), **CALL, **more}, generator=generator())
    return out.frames if hasattr(out, "frames") else out.images


def whole_pipeline(rank: int, count: int, method: str, name: str) -> None:
    join(rank, count, method)
    pipe = quiet(brought.pipeline(name))
    expected = run(pipe, name)
    same = shardit.parallelize(pipe, DiffusionParallelConfig(pipeline_parallel_size=count))
    assert same is pipe
    for _ in range(2):
        out = run(pipe, name)
        assert type(out) is torch.Tensor
        assert torch.equal(out, expected)
    held = [p for b in pipe.transformer.shardit_stages.cut.blocks for p in b[1].parameters() if not p.is_meta]
    everything = [p for b in pipe.transformer.shardit_stages.cut.blocks for p in b[1].parameters()]
    assert len(held) * count == len(everything)
    loaded = quiet(shardit.load(f"tiny/{name}", DiffusionParallelConfig(pipeline_parallel_size=count)))
    assert torch.equal(run(loaded, name), run(brought.mapped(name), name))


@pytest.mark.parametrize("name", ["wan2.2-t2v", "flux"])
def test_pipeline_in_place_and_loaded(name: str) -> None:
    tiny.resolve(f"tiny/{name}")
    run_ranks(2, whole_pipeline, name)


def module_alone(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    model = brought.pipeline("sd3.5").transformer
    torch.manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(1, model.config.in_channels, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim),
        "timestep": torch.tensor([7.0]),
    }
    with torch.no_grad():
        expected = model(**arguments).sample
        assert shardit.parallelize(model, DiffusionParallelConfig(pipeline_parallel_size=count)) is model
        for inference in (False, False, True):
            with torch.inference_mode(inference):
                assert torch.equal(model(**arguments).sample, expected)
                assert torch.equal(model(**arguments, return_dict=False)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.isfinite(model(**arguments).sample).all()
    with pytest.raises(shardit.UnsupportedError, match="cache"):
        model.enable_cache(None)


def test_module_alone() -> None:
    tiny.resolve("tiny/sd3.5")
    run_ranks(2, module_alone)


def write_lora(folder: Path) -> None:
    """A LoRA of Flux with weights that make a difference."""
    from diffusers import FluxPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = brought.pipeline("flux")
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_mlp"]))
    torch.manual_seed(5)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    FluxPipeline.save_lora_weights(str(folder), transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))


def with_lora(rank: int, count: int, method: str, folder: str, when: str) -> None:
    join(rank, count, method)
    plain = quiet(brought.pipeline("flux"))
    without = run(plain, "flux")
    plain.load_lora_weights(folder)
    scaled = {"joint_attention_kwargs": {"scale": 0.5}}
    expected, expected_scaled = run(plain, "flux"), run(plain, "flux", **scaled)
    assert not torch.equal(without, expected)
    pipe = quiet(brought.pipeline("flux"))
    if when == "before":
        pipe.load_lora_weights(folder)
    shardit.parallelize(pipe, DiffusionParallelConfig(pipeline_parallel_size=count))
    if when == "after":
        assert torch.equal(run(pipe, "flux"), without)
        pipe.load_lora_weights(folder)
    for _ in range(2):
        assert torch.equal(run(pipe, "flux"), expected)
        assert torch.equal(run(pipe, "flux", **scaled), expected_scaled)
    guided = {"true_cfg_scale": 3.0, "negative_prompt": "blurry", **scaled}
    assert torch.equal(run(pipe, "flux", **guided), run(plain, "flux", **guided))


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when: str, tmp_path: Path) -> None:
    write_lora(tmp_path)
    run_ranks(2, with_lora, str(tmp_path), when)


def inputs_of_flux() -> dict[str, torch.Tensor]:
    """Arguments of a small call of the tiny Flux transformer."""
    config = brought.pipeline("flux").transformer.config
    return {
        "hidden_states": torch.zeros(1, 4, config.in_channels),
        "encoder_hidden_states": torch.zeros(1, 3, config.joint_attention_dim),
        "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        "timestep": torch.ones(1),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "guidance": torch.ones(1),
    }


def refused(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    two = DiffusionParallelConfig(pipeline_parallel_size=2)
    with pytest.raises(shardit.InputError, match="2 ranks, but the configuration needs 3"):
        shardit.parallelize(torch.nn.Linear(2, 2), DiffusionParallelConfig(pipeline_parallel_size=3))
    with pytest.raises(shardit.UnsupportedError, match="no block lists"):
        shardit.parallelize(torch.nn.Linear(2, 2), two)
    with pytest.raises(shardit.InputError, match="not int"):
        shardit.parallelize(5, two)
    pipe = brought.pipeline("flux")
    cached = brought.pipeline("flux").transformer
    from diffusers import FirstBlockCacheConfig

    cached.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(shardit.UnsupportedError, match="disable_cache"):
        shardit.parallelize(cached, two)
    shardit.parallelize(pipe, two)
    with pytest.raises(shardit.UnsupportedError, match="enable_model_cpu_offload"):
        pipe.enable_model_cpu_offload()
    with pytest.raises(shardit.UnsupportedError, match="cannot be moved"):
        pipe.to("meta")
    assert pipe.to("cpu", silence_dtype_warnings=True) is pipe
    with pytest.raises(shardit.UnsupportedError, match=r"FluxTransformer2DModel.state_dict\(\): each rank holds only"):
        pipe.transformer.state_dict()
    with pytest.raises(shardit.UnsupportedError, match=r"transformer_blocks.\d is on another rank: call"):
        pipe.transformer.forward(**inputs_of_flux())
    for thing in (pipe, pipe.transformer):
        with pytest.raises(shardit.UnsupportedError, match=r"cannot be pickled: each rank holds only its own part"):
            pickle.dumps(thing)
    absent = [parameter for parameter in pipe.transformer.parameters() if type(parameter) is AbsentParameter]
    assert absent
    for read in (torch.abs, torch.randn_like, torch.nn.init.zeros_):
        with pytest.raises(shardit.UnsupportedError, match="a parameter that is on another rank is read"):
            read(absent[0])
    assert absent[0].numel() > 0
    assert absent[0].device.type == "cpu"
    assert pipe.transformer.half().dtype == torch.float16


def test_refused() -> None:
    tiny.resolve("tiny/flux")
    run_ranks(2, refused)


def test_one_rank_changes_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    assert shardit.parallelize(model, DiffusionParallelConfig()) is model
    assert type(model) is torch.nn.Linear
