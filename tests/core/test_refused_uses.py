"""Uses that a sharded model does not allow: gradients, copies, weights of parts, compiled callers, a second thread."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetModel
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoModelForCausalLM

import shardit
from shardit import DiffusionParallelConfig, InputError, UnsupportedError
from shardit.core.runtime.no_gradients import refuse_gradients
from shardit.models import tiny
from shardit.models.tiny.language import language_folder
from tests.core.test_held_state import latents
from tests.diffusion.test_parallelize import join
from tests.support.brought import pipeline
from tests.support.ranks import run_ranks

AXES = {
    "stages": {"pipeline_parallel_size": 2},
    "guidance": {"cfg_parallel_size": 2},
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "slices": {"tensor_parallel_size": 2},
}


def differentiate(model: Any, arguments: dict[str, Any]) -> None:
    given = arguments["hidden_states"].clone().requires_grad_()
    with torch.enable_grad():
        out = model(**{**arguments, "hidden_states": given})[0]
        (out.sum() + given.square().sum()).backward()  # a detached result would leave half of the gradient


def called(pipe: Any, arguments: dict[str, Any], said: list[str]) -> None:
    for use in (
        lambda: latents(pipe, 4),
        lambda: pipe.transformer(**arguments),
        lambda: pipe.vae.decode(torch.zeros(1, 16, 4, 4)),
    ):
        try:
            use()
        except InputError as error:
            said.append(str(error))


def otherwise(rank: int, count: int, method: str, axis: str) -> tuple[list[bool], list[str]]:
    join(rank, count, method)
    arguments: dict[str, Any] = {}
    before = pipeline("flux")
    before.transformer.register_forward_pre_hook(lambda _, __, given: arguments.update(given), with_kwargs=True)
    plain = latents(before)
    pipe = shardit.parallelize(pipeline("flux"), DiffusionParallelConfig(**AXES[axis]), timeout_s=60)
    same = [torch.allclose(latents(pipe), plain, atol=1e-5)]
    said = []
    compiled, decode = (torch.compile(one, backend="eager") for one in (pipe.transformer, pipe.vae.decode))
    for use in (
        lambda: differentiate(pipe.transformer, arguments),
        lambda: copy.deepcopy(pipe),
        lambda: compiled(**arguments),
        lambda: decode(torch.zeros(1, 16, 4, 4)),
    ):
        with pytest.raises(UnsupportedError) as refused:
            use()
        said.append(str(refused.value))
    other: list[str] = []
    inside = threading.Event()

    def in_the_middle(*_: Any) -> dict[str, Any]:
        if not inside.is_set():
            inside.set()
            one = threading.Thread(target=called, args=(pipe, arguments, other))
            one.start()
            one.join()
        return {}

    call = {**tiny.defaults("flux"), "prompt": "a cat", "output_type": "latent"}
    made = pipe(**call, generator=torch.Generator().manual_seed(3), callback_on_step_end=in_the_middle).images
    same += [torch.allclose(made, plain, atol=1e-5), torch.allclose(latents(pipe), plain, atol=1e-5)]
    return same, [*said, *other]


@pytest.mark.parametrize("axis", list(AXES))
def test_gradients_copies_and_threads(axis: str) -> None:
    tiny.resolve("tiny/flux")
    for same, (gradients, copied, compiled, decoded, *threads) in run_ranks(2, otherwise, axis):
        assert same == [True] * 3
        assert "no backward" in gradients if axis == "slices" else "is called for its gradients" in gradients
        assert "cannot be deep-copied: each rank holds only its own part" in copied
        assert "FluxTransformer2DModel is called from compiled code" in compiled
        assert "AutoencoderKL.decode is called from compiled code" in decoded
        assert len(threads) == 3
        assert all(one.startswith("another thread makes a call over the same ranks") for one in threads)


def embedded(rank: int, count: int, method: str, axis: str) -> bool:
    join(rank, count, method)
    folder = language_folder("tiny/llama")
    assert folder is not None
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = model.get_input_embeddings()(torch.arange(1, 9)[None]).detach()
    with torch.no_grad():
        plain = model(inputs_embeds=inputs).logits
    shardit.parallelize(model, **AXES[axis])
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM is called for its gradients"):
        model(inputs_embeds=inputs.clone().requires_grad_())
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM is called from compiled code"):
        compiled(inputs_embeds=inputs)
    return torch.allclose(model(inputs_embeds=inputs).logits, plain, atol=1e-5)


@pytest.mark.parametrize("axis", ["stages", "slices"])
def test_gradients_of_language_models(axis: str) -> None:
    assert run_ranks(2, embedded, axis) == [True, True]


def test_missing_gradients_are_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(torch.nn.Linear):
        pass

    model = Odd(2, 2)
    with torch.no_grad():
        refuse_gradients(model, [torch.ones(2)])
    assert not caplog.messages
    for _ in range(2):
        refuse_gradients(model, [torch.ones(2)])
    assert caplog.messages == ["Odd runs without gradients: its results have none outside of torch.no_grad(), either"]


def partial(rank: int, count: int, method: str, axis: str) -> list[str]:
    """Take the weights of parts of models; return the errors."""
    join(rank, count, method)
    pipe = shardit.parallelize(pipeline("flux"), **AXES[axis])
    folder = language_folder("tiny/llama")
    assert folder is not None
    decoder = shardit.parallelize(AutoModelForCausalLM.from_pretrained(folder), **AXES[axis])
    config, blocks = pipe.transformer.config, pipe.transformer.transformer_blocks
    heads = {name: config[name] for name in ("attention_head_dim", "num_attention_heads")}
    said = []
    for use in (
        lambda: blocks.state_dict(),
        lambda: torch.save(blocks[0].attn.state_dict(), io.BytesIO()),
        lambda: FluxControlNetModel.from_transformer(pipe.transformer, num_layers=1, num_single_layers=0, **heads),
        lambda: decoder.model.layers[1].mlp.state_dict(),
    ):
        with pytest.raises(UnsupportedError) as refused:
            use()
        said.append(str(refused.value))
    assert pipe.transformer.norm_out.norm.state_dict() == {}
    assert len(blocks[0].state_dict(keep_vars=True)) == len(list(blocks[0].named_parameters()))
    assert len(pipe.vae.decoder.state_dict()) == len(list(pipe.vae.decoder.named_parameters()))
    return said


@pytest.mark.parametrize("axis", ["stages", "slices"])
def test_weights_of_parts_are_refused(axis: str) -> None:
    first, second = run_ranks(2, partial, axis)
    assert first == second
    assert all(one.startswith("state_dict() of a ") for one in first)
    assert all("make another model from it, before parallelize" in one for one in first)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def parametrized(rank: int, count: int, method: str) -> list[str]:
    """Give parts that one rank owns another class; return the errors of the next calls."""
    join(rank, count, method)
    said = []
    pipe = shardit.parallelize(pipeline("flux"), pipeline_parallel_size=2, timeout_s=60)
    register_parametrization(pipe.vae.decoder.conv_in, "weight", Doubled())
    with pytest.raises(InputError) as refused:
        pipe.vae.decode(torch.zeros(1, 16, 4, 4))
    said.append(str(refused.value))
    pipe = shardit.parallelize(pipeline("flux"), pipeline_parallel_size=2, timeout_s=60)
    register_parametrization(pipe.text_encoder.encoder.layers[0].self_attn.q_proj, "weight", Doubled())
    with pytest.raises(InputError) as refused:
        latents(pipe)
    said.append(str(refused.value))
    return said


def test_parametrized_parts_of_a_component_are_refused() -> None:
    first, second = run_ranks(2, parametrized, timeout=120)
    assert first == second
    assert all("another class" in text for text in first), first
