"""Encoders cut into units over ranks, against plain transformers, bit by bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaModel

import shardit
from shardit import DiffusionParallelConfig, UnsupportedError
from shardit.api import load_parallel
from shardit.core.comm.mesh import init_mesh
from shardit.core.components.layerwise import cut_layerwise
from shardit.core.components.owned import LazyBroadcast
from shardit.core.modules.units import Unit, find_units
from shardit.core.placement.balance import Loads, distribute, in_runs
from shardit.core.placement.slices import even
from shardit.core.stages.transformer_stages import Runtime
from shardit.loading.safetensors_file import Reads
from shardit.models import tiny
from tests.support import brought
from tests.support.ranks import run_ranks

NAMES = ("wan2.2-t2v", "flux", "z-image", "qwen-image-edit")


def join(rank: int, count: int, method: str, **axes: int) -> DiffusionParallelConfig:
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    return DiffusionParallelConfig(**(axes or {"pipeline_parallel_size": count}))


def prompt(length: int) -> dict[str, torch.Tensor]:
    """Two prompts; the second is padded."""
    ids = torch.arange(2 * length).view(2, length) + 5
    mask = torch.ones_like(ids)
    mask[1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def calls(encoder: Any) -> list[dict[str, Any]]:
    """Text of several lengths; for a model that sees, a picture, too."""
    made: list[dict[str, Any]] = [prompt(7), prompt(12), prompt(7)]
    if hasattr(encoder.config, "vision_config"):
        ids = torch.tensor(
            [[11, encoder.config.vision_start_token_id] + [encoder.config.image_token_id] * 4 + [12, 13]]
        )
        kinds = (ids == encoder.config.image_token_id).int()
        seen = {
            "pixel_values": torch.linspace(-1, 1, 16 * 1176).view(16, 1176),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **seen})
    return made


def compare(encoder: Any, plain: Any) -> None:
    for call in calls(plain):
        with torch.no_grad():
            expected, out = (model(**call, output_hidden_states=True) for model in (plain, encoder))
        assert len(expected.hidden_states) == len(out.hidden_states)
        assert torch.equal(out.hidden_states[-2], expected.hidden_states[-2])  # the first that anyone looks at
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(out[key], value), key
        assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, expected.hidden_states, strict=True))


def encoders(rank: int, count: int, method: str, names: tuple[str, ...], dtype: Any) -> None:
    config = join(rank, count, method)
    for name in names:
        plain = brought.pipeline(name, dtype)
        pipe, assignment, _ = load_parallel(f"tiny/{name}", config, init_mesh(config), dtype=dtype)
        assert assignment.layerwise, name
        for part, found in assignment.layerwise.items():
            encoder = getattr(pipe, part)
            compare(encoder, getattr(plain, part))
            mine = {i for i, owner in enumerate(found.owners) if owner == rank}
            assert set(encoder.shardit_layerwise.ran) <= mine
            assert len(mine) < len(found.owners)
            assert encoder.device == torch.device("cpu")


def compare_on(count: int, names: tuple[str, ...], dtype: str | None) -> None:
    for name in names:
        tiny.resolve(f"tiny/{name}")
    run_ranks(count, encoders, names, dtype)


def test_every_hidden_state_is_the_same() -> None:
    compare_on(2, NAMES, None)


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_more_ranks_and_types(count: int, dtype: str) -> None:
    compare_on(count, (*NAMES, "sd3.5", "ovis-image", "longcat-image"), dtype)


def text_is_written(rank: int, count: int, method: str) -> None:
    config = join(rank, count, method)
    plain = brought.pipeline("qwen-image-edit").text_encoder
    encoder = shardit.load("tiny/qwen-image-edit", config).text_encoder
    for call in calls(plain)[1::2]:
        wanted = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(encoder.generate(**call, **wanted), plain.generate(**call, **wanted))


def test_generate_keeps_the_caches_where_the_layers_are() -> None:
    tiny.resolve("tiny/qwen-image-edit")
    run_ranks(2, text_is_written)


def states_are_kept(rank: int, count: int, method: str) -> list[bool]:
    """States of linear attention lie in dicts of the cache; return of each layer whether another rank has them."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=128, state_size=4, num_hidden_layers=4)
    encoder: Any = MambaModel(config).eval()
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        plain: Any = encoder(ids, use_cache=True)
        parallel = join(rank, count, method)
        pipe = brought.pipeline("flux")
        pipe.register_modules(text_encoder_2=encoder)
        shardit.parallelize(pipe, parallel, timeout_s=20)
        got: Any = pipe.text_encoder_2(ids, use_cache=True)
    assert torch.equal(plain[0], got[0])
    layers = got.cache_params.layers
    return [all(state.is_meta for state in layer.recurrent_states.values()) for layer in layers]


def test_states_of_linear_attention_stay_where_the_layers_are() -> None:
    first, second = run_ranks(2, states_are_kept, timeout=60)
    assert second == [not absent for absent in first]
    assert set(first) == {True, False}


def parts_are_read(rank: int, count: int, method: str) -> tuple[int, int]:
    config, reads = join(rank, count, method), Reads()
    pipe, found, _ = load_parallel("tiny/wan2.2-t2v", config, init_mesh(config), reads=reads)
    units = found.layerwise["text_encoder"]
    mine = tuple(f"{unit}." for unit, owner in zip(units.units, units.owners, strict=True) if owner == rank)
    for name, parameter in own_parameters(pipe.text_encoder):
        assert parameter.is_meta != name.startswith(mine), name
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    here = {parameter for module in modules for _, parameter in own_parameters(module) if not parameter.is_meta}
    return reads.bytes, sum(parameter.numel() * 4 for parameter in here)


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters as they are on this rank: `named_parameters()` lists those of other ranks, too."""
    return module._named_members(lambda part: part._parameters.items(), remove_duplicate=False)


def test_no_rank_reads_the_layers_of_another() -> None:
    for read, held in run_ranks(3, parts_are_read):
        assert held <= read <= 1.02 * held


def tied_parameters(rank: int, count: int, method: str) -> None:
    """The embedding of T5 is tied to another name: each is listed once, on ranks that do not have it, too."""
    config = join(rank, count, method)
    plain, pipe = brought.pipeline("flux").text_encoder_2, brought.pipeline("flux")
    assert plain.shared.weight is plain.encoder.embed_tokens.weight
    encoder = shardit.parallelize(pipe, config, timeout_s=60).text_encoder_2
    assert hasattr(encoder, "shardit_layerwise")
    with torch.no_grad():
        expected = [(name, float(parameter.norm())) for name, parameter in plain.named_parameters()]
        assert [(name, float(parameter.norm())) for name, parameter in encoder.named_parameters()] == expected


def test_tied_parameters_stay_tied() -> None:
    tiny.resolve("tiny/flux")
    run_ranks(2, tied_parameters)


def broken(rank: int, count: int, method: str) -> None:
    config = join(rank, count, method)
    plain = brought.pipeline("wan2.2-t2v").text_encoder
    encoder = shardit.load("tiny/wan2.2-t2v", config).text_encoder
    LazyBroadcast.provide = lambda self, member: self.holders.append(member)  # nothing is sent on
    with torch.no_grad():
        expected, out = (model(**prompt(7)).last_hidden_state for model in (plain, encoder))
    assert not torch.equal(out, expected)


def test_missing_relay_is_detected() -> None:
    tiny.resolve("tiny/wan2.2-t2v")
    run_ranks(2, broken)


def whole_pipeline(rank: int, count: int, method: str, axes: dict[str, int], close: bool) -> None:
    config = join(rank, count, method, **axes)
    call = {**tiny.defaults("wan2.2-t2v"), "prompt": "a cat", "output_type": "latent"}
    pipes = brought.pipeline("wan2.2-t2v"), shardit.load("tiny/wan2.2-t2v", config)
    assert hasattr(pipes[1].text_encoder, "shardit_layerwise")
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    expected, out = (pipe(**call, generator=torch.Generator("cpu").manual_seed(1)).frames for pipe in pipes)
    error = float((out - expected).norm() / expected.norm())
    assert error <= (1e-5 if close else 0), error


@pytest.mark.parametrize(
    ("axes", "close"),
    [
        ({"cfg_parallel_size": 2, "pipeline_parallel_size": 2}, False),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, True),
        pytest.param({"ulysses_degree": 2, "pipeline_parallel_size": 2}, True, marks=pytest.mark.full),
    ],
)
def test_with_other_axes(axes: dict[str, int], close: bool) -> None:
    tiny.resolve("tiny/wan2.2-t2v")
    run_ranks(4, whole_pipeline, axes, close)


class Layer(nn.Module):
    """Writes to its second argument, and gives back the third as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, total: torch.Tensor, shared: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        x = self.linear(x)
        total += x
        return x, x.sum(1, keepdim=True) if shared is None else shared


class Odd(nn.Module):
    """An encoder whose layers write to their arguments; `peeks`: it reads a weight of a layer outside of it."""

    def __init__(self, peeks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.peeks = peeks

    def forward(self, x: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
        total, shared = torch.zeros_like(x), None
        for layer in self.layers:
            x, shared = layer(x, total, shared)
        assert shared is not None
        return x * self.layers[0].linear.weight[0] if self.peeks else x, total, shared


def odd(rank: int, count: int, method: str) -> None:
    comm = Runtime.of(init_mesh(join(rank, count, method))).replica
    x = torch.arange(8.0).view(2, 4)
    for peeks in (False, True):
        model, plain = Odd(peeks), Odd(peeks)
        made = cut_layerwise(model, comm, [f"layers.{i}" for i in range(4)], [0, 0, 1, 0])
        with torch.no_grad():
            if peeks:
                with pytest.raises(UnsupportedError, match="outside of them rank 1 fails"):
                    model(x)
                continue
            for a, b in zip(model(x), plain(x), strict=True):
                assert torch.equal(a, b)
        with pytest.raises(UnsupportedError, match="output_attentions"):
            model(x, output_attentions=True)
        with pytest.raises(RuntimeError, match="shapes"):  # what the owner raises, all raise
            model(torch.zeros(2, 3))
        assert sum(made.ran.values()) == (3, 1)[rank]
        with torch.no_grad():
            out = model(x)
        memory = weakref.ref(out[0]._source.memory)
        gc.disable()
        del out
        assert memory() is None  # what nobody has used does not wait for the garbage collector


def test_awkward_layers_and_refusals() -> None:
    run_ranks(2, odd)


def test_units() -> None:
    model = nn.ModuleDict({"stack": Odd(False), "table": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["table"].weight  # pyright: ignore[reportArgumentType]
    units = find_units(model)
    assert [unit.names for unit in units] == [*((f"stack.layers.{i}",) for i in range(4)), ("table", "head")]
    assert units[-1].nbytes == 8 * 4 * 4


def test_balance() -> None:
    layers = [Unit((f"layers.{i}",), 10, ((f"layers.{i}.a", 4), (f"layers.{i}.b", 6))) for i in range(11)]
    loads = Loads([0.0] * 4, 1)
    wholes, layerwise = distribute(loads, {"vae": 12}, {"text": [Unit(("table",), 30), *layers]}, frozenset())
    assert sum(loads.bytes) == 152
    assert max(loads.bytes) - min(loads.bytes) <= 4
    owners = layerwise["text"].owners
    assert sum(a != b for a, b in pairwise(owners)) <= 7
    assert wholes["vae"] in range(4)
    sliced = Loads([0.0] * 4, 2)
    distribute(sliced, {"vae": 12}, {"text": layers}, frozenset({"text"}))
    assert sliced.bytes[0] + sliced.bytes[1] + sliced.bytes[2] + sliced.bytes[3] == 122


def test_runs() -> None:
    assert in_runs([5, 5, 5, 5, 5, 0.001], [0, 1, 0, 1, 0, 1]) == [0, 0, 0, 1, 1, 1]
    assert in_runs([9, 5, 5, 5], [1, 0, 1, 0]) == [1, 1, 0, 0]


def test_uneven_slices() -> None:
    assert even(64, (0.1, 0.3, 0.3, 0.3)).lengths == (7, 19, 19, 19)
    assert even(4, (0.1, 0.3, 0.3, 0.3)).lengths == (1, 1, 1, 1)
    assert even(8, (0.0, 1.0)).lengths == (1, 7)
