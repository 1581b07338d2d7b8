"""VAEs whose tiles are assigned to ranks, against diffusers' own tiling on one."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from shardit.api import parallelize
from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import init_mesh
from shardit.core.comm.p2p import Comm
from shardit.core.comm.wire import ALIGN
from shardit.core.modules.attributes import Attributes
from shardit.core.modules.small_tensors import ReplicatedTensors
from shardit.core.placement.assignment import assign
from shardit.core.runtime.pending import materialize
from shardit.diffusion.roles import roles_of
from shardit.engine.inspect import inspect_model
from shardit.errors import InputError, UnsupportedError
from shardit.models import tiny
from shardit.parallel.vae.plan import assign_tiles
from shardit.parallel.vae.tiles import Tiles, shard_tiles
from tests.support.ranks import run_ranks
from tests.support.vae_models import ENTRIES, Entry, inputs, outputs
from tests.support.whole_pipelines import Case, difference, joined, staged
from tests.support.whole_pipelines import plain as plain_pipeline

MODEL_TABLE = ("wan2.1", "wan2.2", "qwen", "kl", "kl without quant", "flux2")
"""The VAEs of the models that the project names."""


def comm_of(rank: int, size: int, method: str) -> Comm:
    config = DiffusionParallelConfig(ulysses_degree=size)
    mesh = init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method)
    return Comm(mesh.replica)


def run_sharded(rank: int, size: int, method: str, names: list[str], ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return, on every rank, the output of each VAE, and the tiles and bytes of this rank."""
    comm, found = comm_of(rank, size, method), []
    for entry in (ENTRIES[name] for name in names):
        vae = entry.build()
        tiles = shard_tiles(vae, comm, ranks)
        entry.switch_on(vae)
        result = {}
        for name, call in entry.calls(vae).items():
            tiles.ran.clear()
            before = comm.sent_bytes
            out = call()
            materialize(out)
            result[name] = {"out": out, "ran": dict(tiles.ran), "sent": comm.sent_bytes - before}
        plans = {key[0]: plan for key, plan in tiles._plans.items() if not isinstance(plan, str)}
        assigned = {name: ([call.tile for call in plan.calls], plan.owners) for name, plan in plans.items()}
        found.append(
            {"calls": result, "assigned": assigned, "why not": [p for p in tiles._plans.values() if p is str(p)]}
        )
    return found


def plain(entry: Entry) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Return the result of diffusers on one rank, and the bytes of each output of the encoder or decoder."""
    vae = entry.build()
    entry.switch_on(vae)
    sizes: list[int] = []

    def note(module: Any, args: Any, out: Any) -> None:
        sizes.append((out if isinstance(out, torch.Tensor) else out[0]).nbytes)

    vae.decoder.register_forward_hook(note)
    vae.encoder.register_forward_hook(note)
    made, noted = {}, {}
    for name, call in entry.calls(vae).items():
        sizes.clear()
        made[name], noted[name] = call(), list(sizes)
    return made, noted


def compare(names: tuple[str, ...], size: int, ranks: tuple[int, ...]) -> None:
    """Same bits on every rank; each tile computed by one; each tile is sent once, to the first."""
    results = run_ranks(size, run_sharded, names, ranks, timeout=400)
    for number, name in enumerate(names):
        made, sizes = plain(ENTRIES[name])
        first = results[ranks[0]][number]
        assert first["why not"] == [], name
        for method, expected in made.items():
            where = (name, method)
            of_ranks = [result[number]["calls"][method] for result in results]
            assert torch.isfinite(expected).all(), where
            assert all(torch.equal(expected, r["out"]) for r in of_ranks), where
            tile_of, owners = first["assigned"][method]
            assert len(tile_of) == len(sizes[method]), where
            assert len(set(owners)) == min(len(ranks), len(owners)), where  # fewer tiles than ranks: the rest idle
            for place, rank in enumerate(ranks):
                assert set(of_ranks[rank]["ran"]) == {t for t, owner in enumerate(owners) if owner == place}, where
                mine = [nbytes for tile, nbytes in zip(tile_of, sizes[method], strict=True) if owners[tile] == place]
                padded = sum(-(-nbytes // ALIGN) * ALIGN for nbytes in mine)
                assert of_ranks[rank]["sent"] == (padded if place else 0), where
            assert all(not r["ran"] and not r["sent"] for i, r in enumerate(of_ranks) if i not in ranks), where


def test_two_of_three_ranks() -> None:
    compare(("wan2.2", "qwen", "kl"), 3, (2, 0))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ENTRIES)
def test_every_class(name: str) -> None:
    compare((name,), 2, (0, 1))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [3, 4])
def test_more_ranks(size: int) -> None:
    compare(MODEL_TABLE, size, tuple(range(size)))


def test_largest_tiles_go_first_to_the_least_loaded_rank() -> None:
    assert assign_tiles([4, 4, 4, 4], 2) == (1, 0, 1, 0)
    assert assign_tiles([1, 5, 1, 1, 1, 1], 2) == (0, 1, 0, 0, 0, 0)
    assert assign_tiles([1], 3) == (0,)
    assert assign_tiles([], 2) == ()


class Heard(logging.Handler):
    """Collects warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("shardit").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@torch.no_grad()
def switched(rank: int, size: int, method: str) -> dict[str, Any]:
    """One VAE whose tiling is changed between calls; then broken messages, wrong arguments, ranks that differ."""
    comm, heard, entry = comm_of(rank, size, method), Heard(), ENTRIES["qwen"]
    vae = entry.build()
    shard_tiles(vae, comm, (0, 1))
    found: dict[str, Any] = {"outs": [], "ran": []}
    for change in CHANGES:
        change(vae)
        for _ in range(2):
            vae.shardit_tiles.ran.clear()
            found["outs"].append(outputs(entry, vae)["decode"])
            materialize(found["outs"])
            found["ran"].append(len(vae.shardit_tiles.ran))
    found["warned"] = heard.lines
    entry.switch_on(vae)
    send = Comm.send
    with mock.patch.object(Comm, "send", lambda self, m, *a, **k: send(self, torch.zeros_like(m), *a, **k)):
        found["zeros"] = outputs(entry, vae)["decode"]
        materialize(found)
    wrong = torch.zeros(1, 3, 1, 8, 10)  # channels
    for name, act in {"wrong": lambda: vae.decode(wrong), "differ": lambda: differ(vae)}.items():
        try:
            act()
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
    return found


def differ(vae: Any) -> None:
    """The two ranks ask for tiles of different sizes."""
    vae.tile_sample_min_height += 8 * vae.shardit_tiles.comm.rank
    outputs(ENTRIES["qwen"], vae)


CHANGES = (
    lambda vae: ENTRIES["qwen"].switch_on(vae),
    lambda vae: vae.disable_tiling(),
    lambda vae: vae.enable_tiling(tile_sample_min_width=64, tile_sample_stride_width=48, tile_sample_stride_height=32),
    lambda vae: vae.enable_tiling(tile_sample_min_width=128, tile_sample_min_height=128),
)
"""Many tiles; none; tiles of another size; a tile that is larger than the picture."""


def test_tiling_can_be_changed_and_idle_ranks_are_logged() -> None:
    entry = ENTRIES["qwen"]
    vae = entry.build()
    expected = []
    for change in CHANGES:
        change(vae)
        expected += [outputs(entry, vae)["decode"]] * 2
    first, second = run_ranks(2, switched)
    for result in (first, second):
        assert [torch.equal(a, b) for a, b in zip(expected, result["outs"], strict=True)] == [True] * 8
        assert [bool(ran) for ran in result["ran"]] == [True, True, False, False, True, True, False, False]
        assert not torch.equal(expected[0], result["zeros"])  # the comparison can fail
        kind, text = result["wrong"]
        assert kind == "RuntimeError"
        assert "channels" in text
        assert result["differ"][0] == "InputError"
        assert "falls into different tiles on different ranks: call enable_tiling" in result["differ"][1]
    vae = "AutoencoderKLQwenImage"
    assert [line.split(";")[0] for line in first["warned"]] == [  # once each
        f"{vae}.decode runs on 1 of 2 ranks: its tiling is off",
        f"{vae}.encode runs on 1 of 2 ranks: its tiling is off",
        f"{vae}.decode: number of tiles 1, ranks 2: some idle",
        f"{vae}.encode: number of tiles 1, ranks 2: some idle",
    ]
    assert "lower vae_patch_parallel_size, or set smaller tiles of the VAE" in first["warned"][2]
    assert "tile_sample_min_height=" in first["warned"][2]
    assert second["warned"] == []


def test_indistinguishable_tiles_run_on_one_rank() -> None:
    """A decoder that draws random numbers, and one that keeps something in itself: found on shapes, without a rank."""
    for change, reason in ((_draws, "it draws random numbers"), (_remembers, "a part of it keeps state")):
        vae = ENTRIES["kl"].build()
        ENTRIES["kl"].switch_on(vae)
        change(vae.decoder)
        tiles = Tiles(vae, mock.Mock(rank=0), (0, 1), ReplicatedTensors(vae), Attributes(list))
        z = inputs(ENTRIES["kl"])["decode"]
        assert str(tiles._plan("decode", vae.decode, (z,), {})).startswith(reason)


def _draws(decoder: Any) -> None:
    decoder.conv_in.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))


def _remembers(decoder: Any) -> None:
    decoder.conv_in.register_forward_hook(lambda module, args, out: setattr(module, "last", out))


def test_refusals() -> None:
    from diffusers import AsymmetricAutoencoderKL, AutoencoderKL

    with pytest.raises(InputError, match=r"vae_patch_parallel_size=3 .* it must be from 1 to 2"):
        DiffusionParallelConfig(vae_patch_parallel_size=3, pipeline_parallel_size=2)
    with pytest.raises(InputError, match="it must be 1, or raise another degree"):
        DiffusionParallelConfig(vae_patch_parallel_size=2, data_parallel_size=2)
    assert DiffusionParallelConfig(vae_patch_parallel_size=4, cfg_parallel_size=2, ring_degree=2).world_size == 4
    with pytest.raises(InputError, match="a transformer alone has no VAE"):
        parallelize(torch.nn.Linear(1, 1), DiffusionParallelConfig(vae_patch_parallel_size=2, ring_degree=2))
    with torch.device("meta"):
        without, tiled = AsymmetricAutoencoderKL(), AutoencoderKL()
    config = DiffusionParallelConfig(vae_patch_parallel_size=2, cfg_parallel_size=2)
    cannot = "AsymmetricAutoencoderKL of .* cannot decode in tiles"
    for modules, why in (({"vae": without}, cannot), ({}, "has no VAE of")):
        with pytest.raises(UnsupportedError, match=rf"{why}.*; use vae_patch_parallel_size=1"):
            assign(modules, roles_of(modules), config, environ={})
    assert roles_of({"vae": tiled, "other": without}).tiled == ("vae",)


def test_inspect_shows_the_owners_of_the_vae() -> None:
    config = DiffusionParallelConfig(ulysses_degree=3, vae_patch_parallel_size=2)
    found = inspect_model("tiny/flux", config)
    held = [rank["components"].get("vae", {}).get("bytes", 0) for rank in found["ranks"]]
    assert sorted(held)[0] == 0
    assert sorted(held)[1] == sorted(held)[2] > 0
    assert "vae: its tiles are shared by 2 ranks" in found["notes"]


SMALL = {"tile_sample_min_height": 64, "tile_sample_min_width": 64}
SMALL |= {"tile_sample_stride_height": 48, "tile_sample_stride_width": 48}


def whole(name: str, pp: int = 1, shares: int = 2, requests: int = 1, with_image: bool = False, **axes: Any) -> Case:
    """A tiny pipeline whose VAE is shared."""
    call = {"num_inference_steps": 2}
    axes["vae_patch_parallel_size"] = shares
    tiling = {} if name in ("flux", "sd3.5", "z-image", "qwen-image-edit") else SMALL
    more: Any = {
        "dtype": axes.pop("dtype", None),
        "in_flight": requests,
        "requests": requests,
        "with_image": with_image,
    }
    return Case(name, pp, call=call, axes=axes, tiling=tiling, **more)


def compare_whole(case: Case, close: float) -> None:
    tiny.resolve(f"tiny/{case.name}")
    results = [r[0] for r in run_ranks(case.config().world_size, staged, [case], timeout=400)]
    assert joined(results, "errors") == [None] * case.requests
    for expected, got in zip(plain_pipeline(case), joined(results, "arrays"), strict=True):
        assert np.isfinite(expected).all()
        assert difference(expected, got) <= close
    assert (
        sum(bool(r["tiles"]) for r in results)
        == case.axes["vae_patch_parallel_size"] * case.config().data_parallel_size
    )


FAST = [
    (whole("wan2.2-ti2v", pp=2, with_image=True), 0.0),
    (whole("flux", cfg_parallel_size=2), 0.0),
    (whole("qwen-image", pp=2, requests=3), 0.0),
    (whole("flux", ulysses_degree=2), 1e-5),
    (whole("qwen-image", tensor_parallel_size=2), 1e-5),
]
LONG = [
    (whole("wan2.2-t2v", pp=2, shares=4, cfg_parallel_size=2), 0.0),
    (whole("wan2.2-ti2v", pp=2, shares=3, ulysses_degree=2), 1e-5),
    (whole("wan2.2-ti2v", tensor_parallel_size=2, cfg_parallel_size=2), 1e-5),
    (whole("wan2.2-i2v", pp=2, with_image=True), 0.0),
    (whole("flux", pp=3, shares=2, requests=3), 0.0),
    (whole("flux", pp=2, requests=2, data_parallel_size=2), 0.0),
    (whole("z-image", ring_degree=2), 1e-5),
    (whole("sd3.5", pp=2), 0.0),
    (whole("wan2.2-ti2v", pp=2, with_image=True, dtype="bfloat16"), 0.0),
    (whole("qwen-image-edit", pp=2, with_image=True), 0.0),
]


def named(value: Any) -> str:
    """The id of a test."""
    if not isinstance(value, Case):
        return ""
    return f"{value.name}-" + "-".join(f"{axis.split('_')[0]}{n}" for axis, n in {"pp": value.pp, **value.axes}.items())


@pytest.mark.parametrize(("case", "close"), FAST, ids=named)
def test_whole_pipelines(case: Case, close: float) -> None:
    compare_whole(case, close)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("case", "close"), LONG, ids=named)
def test_more_whole_pipelines(case: Case, close: float) -> None:
    compare_whole(case, close)
