"""Adapters and callbacks under tensor ranks: refusals, and the effect of a missing sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.parallel.tensor import adapters as tensor_adapters
from tests.diffusion.test_parallelize import join
from tests.support import brought
from tests.support.ranks import run_ranks

TWO = DiffusionParallelConfig(tensor_parallel_size=2)


def refusals(rank: int, count: int, method: str, folder: str) -> None:
    join(rank, count, method)
    pipe = brought.pipeline("flux")
    expected = brought.run(pipe, "flux")
    shardit.parallelize(pipe, TWO)
    for act, why in (
        (lambda: pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q"])), "other ones on each rank"),
        (lambda: pipe.transformer.load_lora_adapter(folder, hotswap=True), "hotswap"),
        (lambda: pipe.transformer.save_lora_adapter(folder), "save it before"),
        (lambda: pipe.save_pretrained(folder), "save_pretrained cannot be combined .* before parallelize"),
        (lambda: pipe.transformer.save_pretrained(folder), "save_pretrained cannot be combined"),
        (pipe.enable_model_cpu_offload, "enable_model_cpu_offload cannot be combined"),
        (pipe.enable_sequential_cpu_offload, "enable_sequential_cpu_offload cannot be combined"),
        (lambda: pipe.load_lora_weights(dora(folder)), "the adapter is not plain LoRA, .*: merge it before"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            act()
    # What was refused half-way has left nothing behind.
    assert float((brought.run(pipe, "flux") - expected).norm() / expected.norm()) <= 1e-5


def dora(folder: str) -> dict[str, torch.Tensor]:
    """A state dict of an adapter that also scales whole rows of the weight."""
    name = "transformer.transformer_blocks.0.attn.to_q"
    sizes = {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4), "lora_magnitude_vector": (64,)}
    return {f"{name}.{part}": torch.ones(size) for part, size in sizes.items()}


def refused_before(rank: int, count: int, method: str, folder: str) -> list[float]:
    """An adapter that is refused leaves the pipeline whole, so what the refusal advises works."""
    join(rank, count, method)
    found = []
    for merged in (True, False):
        plain, pipe = brought.pipeline("flux"), brought.pipeline("flux")
        hooked: Any = pipe.transformer.transformer_blocks[1].attn.to_out[0]
        hooked.forward = lambda x: x  # as a hook of a library
        with pytest.raises(UnsupportedError, match=r"attn\.to_out\.0 has a hook in place of its forward"):
            shardit.parallelize(pipe, TWO)
        del hooked.forward
        for one in (plain, pipe):
            one.load_lora_weights(dora(folder))
        with pytest.raises(UnsupportedError, match=r"to_q is cut .* not plain LoRA: merge it .*fuse_lora, unload"):
            shardit.parallelize(pipe, TWO)
        for one in (plain, pipe) if merged else ():
            one.fuse_lora()
            one.unload_lora_weights()
        shardit.parallelize(pipe, TWO if merged else DiffusionParallelConfig(pipeline_parallel_size=2))
        expected, got = brought.run(plain, "flux"), brought.run(pipe, "flux")
        found.append(float((got - expected).norm() / expected.norm()))
    return found


def test_what_is_refused_stays_whole(tmp_path: Path) -> None:
    for merged, staged in run_ranks(2, refused_before, str(tmp_path)):
        assert merged <= 1e-5
        assert staged == 0


def test_refusals(tmp_path: Path) -> None:
    run_ranks(2, refusals, str(tmp_path))


def biased(rank: int, count: int, method: str) -> list[float]:
    """Adapters whose second matrix has a bias, on linears of every kind: loaded after, fused, taken out; and before."""
    join(rank, count, method)
    found, layers = [], with_biases()
    outs = {}
    for title in ("plain", "after", "before"):
        pipe = brought.pipeline("flux")
        if title == "after":
            shardit.parallelize(pipe, TWO)
        pipe.load_lora_weights(dict(layers), adapter_name="one")
        if title == "before":
            shardit.parallelize(pipe, TWO)
        if title != "plain":  # the adapters are cut like the rest
            attention = pipe.transformer.transformer_blocks[0].attn
            assert attention.to_q.base_layer.weight.shape[0] == 64 // count
            assert attention.to_out[0].lora_A["one"].weight.shape[1] == 64 // count
        outs[title] = [brought.run(pipe, "flux")]
        pipe.fuse_lora()
        outs[title].append(brought.run(pipe, "flux"))
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        outs[title].append(brought.run(pipe, "flux"))
        if title != "plain":
            assert not pipe.transformer.shardit_checks.whole
            pairs = zip(outs["plain"], outs[title], strict=True)
            found += [float((a - b).norm() / a.norm()) for a, b in pairs]
    assert float((outs["plain"][0] - outs["plain"][2]).norm()) > 1e-2
    return found


def narrow(rank: int, count: int, method: str) -> float:
    """An adapter for fewer inputs than the linears have, which diffusers fills up with zeros."""
    join(rank, count, method)
    layers = {name: value for name, value in with_biases().items() if not name.endswith("bias")}
    layers = {name: value[:, :7] if "lora_A" in name else value for name, value in layers.items()}
    outs = []
    for sharded in (False, True):
        pipe = brought.pipeline("flux")
        if sharded:
            shardit.parallelize(pipe, TWO)
        outs.append(brought.run(pipe, "flux"))
        pipe.load_lora_weights(dict(layers), adapter_name="one")
        outs.append(brought.run(pipe, "flux"))
    assert (outs[0] - outs[1]).norm() > 1e-2 * outs[0].norm()
    return float((outs[1] - outs[3]).norm() / outs[1].norm())


def test_adapters_that_are_filled_up() -> None:
    assert max(run_ranks(2, narrow)) <= 1e-5


def with_biases() -> dict[str, torch.Tensor]:
    generator, layers = torch.Generator().manual_seed(0), {}
    for name, module in brought.pipeline("flux").transformer.named_modules():
        if name.endswith(("to_q", "to_out.0", "proj_mlp", "proj_out", "net.2", "norm1.linear")) and "." in name:
            for part, shape in (
                ("lora_A.weight", (4, module.in_features)),
                ("lora_B.weight", (module.out_features, 4)),
                ("lora_B.bias", (module.out_features,)),
            ):
                layers[f"transformer.{name}.{part}"] = torch.randn(shape, generator=generator) * 0.1
    return layers


def test_biases_of_adapters() -> None:
    assert max(max(errors) for errors in run_ranks(2, biased)) <= 1e-5


def broken(rank: int, count: int, method: str, folder: str) -> None:
    """Each rank keeps its own part of the adapters: the comparison with whole units finds it."""
    join(rank, count, method)
    pipe = brought.pipeline("flux")
    pipe.load_lora_weights(folder)
    expected = brought.run(pipe, "flux")
    own = tensor_adapters._finish_once
    gathered = lambda layer: layer.base_layer.in_features == 64  # noqa: E731  (it would fail aloud)
    tensor_adapters._finish_once = lambda layer, finish: own(layer, finish) if gathered(layer) else None
    shardit.parallelize(pipe, TWO)
    assert float((brought.run(pipe, "flux") - expected).norm() / expected.norm()) <= 1e-5
    assert "transformer_blocks.0.attn" in pipe.transformer.shardit_checks.whole


@pytest.mark.full
def test_a_missing_sum_is_seen(tmp_path: Path) -> None:
    brought.write_lora("flux", tmp_path, 5)
    run_ranks(2, broken, str(tmp_path))


def uneven(rank: int, count: int, method: str, folder: str) -> list[float]:
    """Four heads over three ranks, stages below: adapters loaded before, and after."""
    join(rank, count, method)
    errors = []
    for before in (True, False):
        plain, pipe = brought.pipeline("flux"), brought.pipeline("flux")
        plain.load_lora_weights(folder)
        if before:
            pipe.load_lora_weights(folder)
        shardit.parallelize(pipe, DiffusionParallelConfig(tensor_parallel_size=3, pipeline_parallel_size=count // 3))
        if not before:
            pipe.load_lora_weights(folder)
        expected, got = brought.guided(plain, "flux"), brought.guided(pipe, "flux")
        held = {n: p.shape for n, p in pipe.transformer.named_parameters() if "lora" in n and "norm" not in n}
        assert held["transformer_blocks.0.attn.to_q.lora_B.default_0.weight"][0] == (32, 16, 16)[rank % 3]
        assert held["single_transformer_blocks.0.proj_out.lora_A.default_0.weight"][1] < 0.5 * (64 + 256)
        errors.append(float((expected - got).norm() / expected.norm()))
    return errors


@pytest.mark.full
@pytest.mark.parametrize("ranks", [3, 6])
def test_uneven_heads(ranks: int, tmp_path: Path) -> None:
    brought.write_lora("flux", tmp_path, 5)
    assert max(max(errors) for errors in run_ranks(ranks, uneven, str(tmp_path))) <= 1e-5


def callbacks(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    pipe = brought.pipeline("flux")
    shardit.parallelize(pipe, DiffusionParallelConfig(pipeline_parallel_size=2), timeout_s=20)

    def fails(pipe: Any, step: int, time: Any, given: Any) -> Any:
        if rank == 1 and step == 1:
            raise KeyError("preview")
        return given

    with pytest.raises(KeyError, match="preview"):
        brought.run(pipe, "flux", callback_on_step_end=fails)

    def unheard(*_: Any) -> None:
        pipe._interrupt = True

    hook = pipe.transformer.register_forward_pre_hook(unheard)
    with pytest.raises(UnsupportedError, match="pass callback_on_step_end"):
        brought.run(pipe, "flux")
    hook.remove()
    brought.run(pipe, "flux")


def test_a_callback_that_fails_on_one_rank_fails_on_all() -> None:
    run_ranks(2, callbacks)
