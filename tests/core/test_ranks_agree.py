"""Agreement of ranks: arguments and noise are compared, random numbers of one rank are sent to the others."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import shardit
from shardit import DiffusionParallelConfig, InputError, RankError, UnsupportedError
from shardit.core.runtime.digests import SUMMED, checksum, digests, named
from shardit.core.runtime.randomness import dropout_in_training
from shardit.models import tiny
from tests.diffusion.test_parallelize import join
from tests.support.brought import pipeline
from tests.support.ranks import run_ranks

STAGES = DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False)
SLICES = DiffusionParallelConfig(tensor_parallel_size=2)
GUIDANCE = DiffusionParallelConfig(cfg_parallel_size=2, split_batch=False)


def run(pipe: Any, seed: int | None = 3, **more: Any) -> torch.Tensor:
    """Pixels of one call, without a generator if there is no seed."""
    call = {**tiny.defaults("flux"), "prompt": "a cat on a mat", "output_type": "pt", **more}
    if seed is not None:
        call["generator"] = torch.Generator().manual_seed(seed)
    return pipe(**call).images


def refusal(act: Callable[[], Any]) -> str:
    """The text of the error that an act raises."""
    with pytest.raises(InputError) as caught:
        act()
    return str(caught.value)


def draws_in_decode(pipe: Any) -> Any:
    """A VAE that draws from every global generator, and from the one that it is given."""
    plain = type(pipe.vae)

    class Drawing(plain):
        def decode(self, z: torch.Tensor, return_dict: bool = True, generator: Any = None) -> Any:
            out = plain.decode(self, z, return_dict=False)[0]
            given = torch.rand((), generator=generator)
            out = out + 0.1 * (torch.randn_like(out) + random.random() + np.random.rand() + given)
            return (out,)

    pipe.vae.__class__ = Drawing
    return pipe


def drawing_calls(pipe: Any) -> list[torch.Tensor]:
    """Consecutive calls; each depends on the random numbers of earlier ones."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    outs = [run(pipe, None), run(pipe, None)]
    given = torch.Generator().manual_seed(2)
    decode = pipe.vae.decode
    outs += [decode(torch.ones(1, 16, 8, 8), return_dict=False, generator=given)[0] + 0 for _ in range(2)]
    return [*outs, torch.rand(2), torch.rand(2, generator=given), torch.tensor([random.random(), np.random.rand()])]


def drawing_callback(pipe: Any, draws: bool) -> list[torch.Tensor]:
    """A callback that draws; on the ranks whose callback does not, the generators move all the same."""

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"latents": given["latents"] + torch.rand(())} if draws else given

    torch.manual_seed(1)
    return [run(pipe, None, callback_on_step_end=callback), run(pipe, None)]


def dropping_encoder(pipe: Any) -> Any:
    for part in pipe.text_encoder_2.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1
    pipe.text_encoder_2.train()
    assert dropout_in_training(pipe.text_encoder_2) is not None
    return pipe


def dropping_calls(pipe: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [run(pipe), run(pipe, None)]


def dropping_transformer(pipe: Any) -> Any:
    next(m for m in pipe.transformer.modules() if isinstance(m, torch.nn.Dropout)).p = 0.1
    pipe.transformer.train()
    return pipe


def over_stages(rank: int, count: int, method: str) -> dict[str, Any]:
    join(rank, count, method)
    pipe = shardit.parallelize(pipeline("flux"), STAGES, timeout_s=60)
    said: dict[str, Any] = {"first": run(pipe)}
    said["prompt"] = refusal(lambda: run(pipe, prompt="a cat" if rank else "a dog"))
    said["generator"] = refusal(lambda: run(pipe, seed=rank))
    said["steps"] = refusal(lambda: run(pipe, num_inference_steps=2 + rank))
    said["one callback"] = refusal(lambda: run(pipe, callback_on_step_end=(lambda *a: a[3]) if rank else None))
    torch.manual_seed(rank)
    said["global"] = refusal(lambda: run(pipe, None))
    random.seed(rank)
    said["generator given"] = run(pipe)
    with_noise = type(pipe).prepare_latents
    type(pipe).prepare_latents = lambda self, *a, **k: (
        with_noise(self, *a, **k)[0] + rank,
        with_noise(self, *a, **k)[1],
    )
    said["latents"] = refusal(lambda: run(pipe))
    type(pipe).prepare_latents = with_noise
    step = type(pipe.scheduler).step
    type(pipe.scheduler).step = lambda self, *a, **k: (torch.rand(1), step(self, *a, **k))[1]
    said["drawn"] = refusal(lambda: run(pipe))
    type(pipe.scheduler).step = step
    said["last"] = run(pipe)
    said["encoder alone"] = refusal(lambda: pipe.encode_prompt("a cat" if rank else "a dog", device="cpu"))
    said["decoder alone"] = refusal(lambda: pipe.vae.decode(torch.full((1, 16, 8, 8), float(rank))))
    said["other ones alone"] = refusal(lambda: (pipe.vae.encode if rank else pipe.vae.decode)(torch.ones(1, 16, 8, 8)))

    said["draws"] = drawing_calls(shardit.parallelize(draws_in_decode(pipeline("flux")), STAGES, timeout_s=60))
    pipe = shardit.parallelize(pipeline("flux"), STAGES, timeout_s=60)
    said["callback"] = drawing_callback(pipe, rank == 0)
    said["dropout"] = dropping_calls(shardit.parallelize(dropping_encoder(pipeline("flux")), STAGES, timeout_s=60))
    said["transformer"] = _refused_dropout(STAGES)
    model = pipeline("flux").transformer
    given = {"hidden_states": torch.zeros(1, 4, 64), "guidance": torch.ones(1), "timestep": torch.ones(1)}
    given |= {"encoder_hidden_states": torch.zeros(1, 3, model.config.joint_attention_dim)}
    given |= {"pooled_projections": torch.zeros(1, model.config.pooled_projection_dim)}
    given |= {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    shardit.parallelize(model, STAGES, timeout_s=60)
    said["alone"] = refusal(lambda: model(**{**given, "timestep": torch.full((1,), float(rank))}))
    pipe = shardit.parallelize(pipeline("flux"), STAGES, timeout_s=60)
    with torch.autocast("cpu", torch.bfloat16, enabled=rank == 0):
        said["autocast"] = refusal(lambda: run(pipe))
    with torch.inference_mode(rank == 1):
        said["inference"] = refusal(lambda: run(pipe))
    with torch.profiler.profile():
        said["profiler"] = refusal(lambda: run(pipe))
    with torch.profiler.profile() if rank else nullcontext():
        said["profiler of one"] = refusal(lambda: run(pipe))
    plain = pipe.tokenizer_2.pad_token
    pipe.tokenizer_2.pad_token = "cat" if rank else plain
    said["tokenizer"] = refusal(lambda: run(pipe))
    pipe.tokenizer_2.pad_token = plain
    said["as before"] = run(pipe)
    if rank:
        pipe.vae.to(torch.bfloat16)
    said["number format"] = refusal(lambda: run(pipe))
    return said


def _refused_dropout(config: DiffusionParallelConfig) -> str:
    pipe = shardit.parallelize(dropping_transformer(pipeline("flux")), config, timeout_s=60)
    with pytest.raises(UnsupportedError) as caught:
        run(pipe)
    pipe.transformer.eval()
    run(pipe)
    return str(caught.value)


def test_over_stages() -> None:
    expected = run(pipeline("flux"))
    draws = drawing_calls(draws_in_decode(pipeline("flux")))
    callback = drawing_callback(pipeline("flux"), True)
    dropout = dropping_calls(dropping_encoder(pipeline("flux")))
    assert not torch.equal(dropout[0], expected)
    one, other = run_ranks(2, over_stages)
    for said in (one, other):
        for name in ("first", "generator given", "last", "as before"):
            assert torch.equal(said[name], expected), name
        for name, outs in (("draws", draws), ("callback", callback), ("dropout", dropout)):
            assert all(map(torch.equal, said[name], outs)), name
        for name, pattern in (
            ("prompt", "differ in prompt of FluxPipeline"),
            ("generator", "differ in generator of FluxPipeline.*manual_seed"),
            ("steps", "differ in num_inference_steps of"),
            ("one callback", "differ in callback_on_step_end of"),
            ("global", "differ in hidden_states of FluxTransformer2DModel.*torch.manual_seed"),
            ("latents", "differ in hidden_states of FluxTransformer2DModel in its first step"),
            ("drawn", r"drew from torch's global generator \(torch.manual_seed\)"),
            ("transformer", r"transformer is in training mode, and .* call \.eval\(\)"),
            ("alone", "differ in timestep of FluxTransformer2DModel"),
            ("encoder alone", "differ in input_ids of CLIPTextModel:"),
            ("decoder alone", "differ in z of AutoencoderKL.decode:"),
            ("autocast", "differ in torch.autocast of FluxPipeline:"),
            ("profiler", "torch.profiler cannot follow calls"),
            ("profiler of one", "differ in .*torch.profiler cannot follow calls|^torch.profiler cannot follow calls"),
            ("inference", "differ in torch.inference_mode of FluxPipeline:"),
            ("tokenizer", "differ in what FluxPipeline gave to T5EncoderModel: change tokenizers"),
            ("number format", "differ in number format of vae of FluxPipeline: make the same changes on every rank"),
        ):
            assert re.search(pattern, said[name]), said[name]
    assert "differ in z, x of AutoencoderKL.decode" in one.pop("other ones alone")
    assert "differ in z, x of AutoencoderKL.encode" in other.pop("other ones alone")
    texts = {name for name, value in one.items() if isinstance(value, str)}
    assert {name for name in texts if one[name] != other[name]} == set()


def over_slices(rank: int, count: int, method: str) -> list[Any]:
    join(rank, count, method)
    pipe = shardit.parallelize(dropping_encoder(pipeline("flux")), SLICES, timeout_s=60)
    encoder = refusal(lambda: run(pipe))
    seeds = refusal(lambda: run(pipe, seed=rank))
    pipe.text_encoder_2.eval()
    prompts = refusal(lambda: run(pipe, prompt="a cat" if rank else "a dog"))
    alone = refusal(lambda: pipe.text_encoder_2(torch.full((1, 4), 3 + rank)))
    return [encoder, seeds, prompts, alone, _refused_dropout(GUIDANCE), run(pipe)]


def test_over_slices_and_guidance_ranks() -> None:
    expected = run(pipeline("flux"))
    one, other = run_ranks(2, over_slices)
    assert one[:-1] == other[:-1]
    assert "text_encoder_2 is in training mode" in one[0]
    assert "differ in generator" in one[1]
    assert "differ in prompt" in one[2]
    assert "differ in input_ids of T5EncoderModel: " in one[3]
    assert "transformer is in training mode" in one[4]
    assert float((one[-1] - expected).norm() / expected.norm()) < 1e-5


def test_values_count_and_objects_do_not() -> None:
    tensor, picture = torch.arange(6.0).reshape(2, 3), Image.new("RGB", (4, 4), "red")
    other = picture.copy()
    other.putpixel((3, 3), (0, 0, 0))
    for one, two in (
        (tensor, tensor + 1),
        (tensor, tensor.T),
        (tensor, tensor.bfloat16()),
        (picture, other),
        (np.arange(3), np.arange(3) + 1),
        (["a", "b"], ["a", "c"]),
        ({"a": [tensor]}, {"a": [tensor - 1]}),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
        (1, 1.0),
        (None, test_values_count_and_objects_do_not),
    ):
        assert digests({"x": one}) != digests({"x": two})
        assert digests({"x": one}) == digests({"x": one})
    for one, two in (
        (tensor.clone(), tensor),
        (tensor.T, tensor.T.contiguous()),
        (picture, picture.copy()),
        (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)),
        (lambda: 1, lambda: 2),
        (object(), object()),
    ):
        assert digests({"x": one}) == digests({"x": two})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_a_checksum_sees_each_value(dtype: torch.dtype) -> None:
    large = torch.ones(3, 7001, dtype=dtype)
    for row, column in ((0, 0), (1, 3000), (2, 7000)):
        changed = large.clone()
        changed[row, column] = 0
        assert checksum(changed) != checksum(large)
    assert checksum(large[:, 1:]) == checksum(large[:, 1:].clone())
    assert checksum(large[:1, :1].expand(3, 1)) == checksum(large[:, :1].clone())
    assert checksum(large[0, :1].expand(1)) == checksum(large[0, :1].clone())
    assert checksum(torch.empty(0, dtype=dtype)) == b""


def test_checksums_sample_large_tensors() -> None:
    small, large = torch.rand(1000), torch.rand(400_000)
    for tensor in (small, large):
        assert checksum(tensor, SUMMED) == checksum(tensor.clone(), SUMMED)
        assert checksum(tensor, SUMMED) != checksum(torch.rand_like(tensor), SUMMED)
        one = tensor.clone()
        one[501] += 1
        assert (checksum(one, SUMMED) != checksum(tensor, SUMMED)) == (tensor is small)
        assert checksum(one) != checksum(tensor)


def test_arguments_by_name() -> None:
    class Takes:
        def call(self, a: int, b: int = 1, **more: Any) -> None: ...

    assert named(Takes.call, (1, 2), {"c": 3}) == {"a": 1, "b": 2, "c": 3}
    assert named(Takes.call, (1,), {}) == {"a": 1}
    assert named(Takes.call, (1, 2, 3), {"d": 4}) == {"0": 1, "1": 2, "2": 3, "d": 4}


def called_on_one_rank(rank: int, count: int, method: str) -> str:
    """A pipeline that the first rank alone calls, while the other one waits."""
    join(rank, count, method)
    pipe = shardit.parallelize(pipeline("flux"), STAGES, timeout_s=1)
    pipe.set_progress_bar_config(disable=True)
    if rank == 1:
        time.sleep(4)
        return ""
    with pytest.raises(RankError) as caught:
        run(pipe)
    return str(caught.value)


def test_a_rank_that_does_not_call_is_named() -> None:
    said, _ = run_ranks(2, called_on_one_rank)
    assert re.match(r"rank 1 failed: it makes no call .*; every rank has to call the pipeline or model alike \(", said)
