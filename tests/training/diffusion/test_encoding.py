"""Encoders over the ranks of a replica while the cache is filled: each holds a part, and entries have the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardit import InputError
from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import init_mesh
from shardit.training.diffusion import sized
from shardit.training.diffusion.encoding import Encoding
from shardit.training.diffusion.recipe import recipe
from tests.support.ranks import run_ranks
from tests.training.diffusion.folders import model_of, recipe_of, settings_of
from tests.training.runs import join


def bytes_of(pipe: Any, names: tuple[str, ...]) -> int:
    """The bytes that this rank holds of components."""
    tensors = {id(p): p for name in names for p in getattr(pipe, name).parameters()}
    return sum(one.nbytes for one in tensors.values() if not one.is_meta)


def filled(rank: int, size: int, method: str, name: str, model: str, folder: str, stages: int, more: Any) -> Any:
    """Make a recipe; return the bytes of encoders and VAE when each was first used, and how much was encoded here."""
    join(rank, size, method)
    config = DiffusionParallelConfig(pipeline_parallel_size=stages, data_parallel_size=size // stages)
    mesh = init_mesh(config)
    found: dict[str, Any] = {"encoded": 0, "embedded": 0, "held": {}}
    for kind in ("encoded", "embedded"):
        _count(kind, found)
    for kind in ("load_vae", "load_encoders"):
        _measure(kind, found)
    recipe(settings_of(name, folder, model, **dict(more)), mesh, config)
    return found


def _count(kind: str, found: dict[str, Any]) -> None:
    own = getattr(sized, kind)

    def counted(*args: Any) -> Any:
        found[kind] += 1
        return own(*args)

    setattr(sized, kind, counted)


def _measure(kind: str, found: dict[str, Any]) -> None:
    own = getattr(Encoding, kind)

    def measured(self: Any) -> None:
        own(self)
        others = tuple(n for n in self.parts.prepared.modules if n not in (*self.parts.trained, "vae"))
        found["held"].setdefault(kind, [bytes_of(self.parts.encoding, one) for one in (("vae",), others)])

    setattr(Encoding, kind, measured)


def contents(folder: Path) -> dict[str, bytes]:
    """The entries of a cache."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("name", ["wan2.2-ti2v", "flux", "sd3.5", "qwen-image", "z-image", "sdxl"])
def test_entries_have_the_same_bits_and_a_rank_has_a_part_of_the_encoders(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    recipe_of(name, tmp_path / "one", model=model)
    one = contents(tmp_path / "one" / "cache")
    of_ranks = run_ranks(2, filled, name, model, str(tmp_path / "two"), 2, {}, timeout=120)
    assert contents(tmp_path / "two" / "cache") == one
    assert sum(found["encoded"] for found in of_ranks) == 4  # items are shared out,
    captions = {found["embedded"] for found in of_ranks}
    assert len(captions) == 1  # and captions encoded together
    for found in of_ranks:
        vae, encoders = found["held"]["load_encoders"]
        assert vae == 0
        assert found["held"]["load_vae"][1] == 0
        assert encoders < 0.75 * sum(other["held"]["load_encoders"][1] for other in of_ranks)


def test_replicas_encode_other_captions(tmp_path: Path) -> None:
    recipe_of("flux", tmp_path / "one")
    of_ranks = run_ranks(4, filled, "flux", "tiny/flux", str(tmp_path / "two"), 2, {}, timeout=120)
    assert contents(tmp_path / "two" / "cache") == contents(tmp_path / "one" / "cache")
    assert sum(found["embedded"] for found in of_ranks) == 2 * len(list((tmp_path / "two").rglob("prompts/*")))


def test_nothing_is_loaded_if_nothing_is_missing(tmp_path: Path) -> None:
    recipe_of("flux", tmp_path)
    for found in run_ranks(2, filled, "flux", "tiny/flux", str(tmp_path), 2, {}, timeout=120):
        assert found == {"encoded": 0, "embedded": 0, "held": {}}


def test_prompts_of_samples_are_encoded_together(tmp_path: Path) -> None:
    more = {"sample_prompts": ("a red cat", "a dog"), "sample_every": 5}
    for found in run_ranks(2, filled, "sd3.5", "tiny/sd3.5", str(tmp_path), 2, more, timeout=120):
        assert found["held"]["load_encoders"][0] > 0  # the VAE stays, for the samples


def broken(rank: int, size: int, method: str, folder: str) -> str:
    """The first rank cannot write what both encode."""
    join(rank, size, method)
    config = DiffusionParallelConfig(pipeline_parallel_size=size)
    mesh = init_mesh(config)
    if rank == 0:
        from shardit.training.diffusion.cache import SampleCache

        own = SampleCache.write

        def write(self: Any, entry: Any, tensors: Any) -> None:
            if entry.kind == "prompts":
                raise OSError("disk full")
            own(self, entry, tensors)

        SampleCache.write = write
    try:
        recipe(settings_of("flux", folder), mesh, config)
    except InputError as error:
        return str(error)
    return ""


def test_a_rank_that_cannot_write_ends_all(tmp_path: Path) -> None:
    for error in run_ranks(2, broken, str(tmp_path), timeout=60):
        assert "cannot be made (OSError: disk full)" in error
