"""The cache: made once, shared by ranks, right after any end of its process, and made again for other contents."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from shardit import InputError
from shardit.training.diffusion import sized
from shardit.training.diffusion.cache import Entry, SampleCache, digest_of_files
from tests.support.ranks import run_ranks
from tests.training.diffusion.folders import alone, recipe_of
from tests.training.diffusion.runs import shared_cache

RANKS = alone().replica


def entries(*names: str) -> list[Entry]:
    return [Entry("latents", {"item": name, "size": (2, 3)}, name) for name in names]


def made(entry: Entry) -> dict[str, torch.Tensor]:
    return {"latents": torch.full((2, 3), float(ord(entry.name[0])))}


def test_an_entry_is_made_once_and_knows_what_it_is_of(tmp_path: Path) -> None:
    cache, calls = SampleCache(tmp_path), []

    def make(entry: Entry) -> dict[str, torch.Tensor]:
        calls.append(entry.name)
        return made(entry)

    both = entries("a", "b", "a")
    cache.fill(both, make, RANKS)
    cache.fill([*both, *entries("c")], make, RANKS)
    assert sorted(calls) == ["a", "b", "c"]
    assert torch.equal(cache.read(both[1])["latents"], torch.full((2, 3), 98.0))
    with safe_open(str(cache.path(both[0])), "pt") as file:
        assert json.loads(file.metadata()["made_of"]) == {"format": 1, "kind": "latents", "item": "a", "size": [2, 3]}
    assert len(list(tmp_path.rglob("*"))) == 4  # a folder and three files


def test_a_damaged_or_foreign_entry_is_made_again(tmp_path: Path) -> None:
    cache, (one, other) = SampleCache(tmp_path), entries("a", "b")
    cache.fill([one, other], made, RANKS)
    whole = cache.path(one).read_bytes()
    for contents in (whole[:-4], b"", cache.path(other).read_bytes()):
        cache.path(one).write_bytes(contents)
        with pytest.raises(InputError, match=r"delete it, and it is made again"):
            cache.read(one)
        cache.fill([one], made, RANKS)
        assert cache.path(one).read_bytes() == whole


def test_an_error_names_the_item_and_leaves_nothing(tmp_path: Path) -> None:
    def make(entry: Entry) -> dict[str, torch.Tensor]:
        if entry.name == "b":
            raise OSError("disk full")
        return made(entry)

    with pytest.raises(InputError, match=r"latents of b cannot be made \(OSError: disk full\)"):
        SampleCache(tmp_path).fill(entries("b"), make, RANKS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_ranks_share_the_work_and_errors() -> None:
    of_ranks = run_ranks(2, shared_cache, timeout=60)
    assert sorted(of_ranks[0]["made"] + of_ranks[1]["made"]) == [f"item-{n}" for n in range(5)]
    assert {len(one["made"]) for one in of_ranks} == {2, 3}
    assert of_ranks[0]["read"] == of_ranks[1]["read"]
    assert [one["error"] for one in of_ranks] == ["latents of item-7 cannot be made (ValueError: broken)"] * 2


def counted(monkeypatch: Any) -> list[Any]:
    """Count what is encoded."""
    calls: list[Any] = []
    for name in ("encoded", "embedded"):
        own = getattr(sized, name)
        monkeypatch.setattr(sized, name, lambda *a, own=own, name=name: (calls.append(name), own(*a))[1])
    return calls


def test_what_changes_is_made_again_and_nothing_else(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    from PIL import Image

    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 10, 20)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    calls = counted(monkeypatch)

    def run(**more: Any) -> tuple[int, int]:
        calls.clear()
        given = {"data": str(folder), "cache": tmp_path / "cache", "resolution": "64x64", **more}
        recipe_of("flux", tmp_path / "out", **given)
        return calls.count("encoded"), calls.count("embedded")

    assert run() == (2, 2)
    assert run() == (0, 0)
    assert run(caption_dropout=0.5) == (0, 1)  # the empty caption
    (folder / "1.txt").write_text("another caption")
    assert run() == (0, 1)
    Image.new("RGB", (64, 64), (0, 200, 0)).save(folder / "0.png")
    assert run() == (1, 0)
    assert run(resolution="64x32") == (2, 0)
    assert run(max_length=8) == (0, 2)
    assert run(dtype="bfloat16") == (0, 2)
    assert run(seed=5, lora_rank=2, batch_size=2) == (0, 0)


def test_a_digest_is_of_the_contents(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "sub" / "weights").write_bytes(b"1234")
    first = digest_of_files(tmp_path / "one")
    assert first == digest_of_files(tmp_path / "other")
    (tmp_path / "other" / "sub" / "weights").write_bytes(b"1235")
    assert digest_of_files(tmp_path / "other") != first
    (tmp_path / "one" / "sub" / "weights").rename(tmp_path / "one" / "weights")
    assert digest_of_files(tmp_path / "one") != first


def test_encoders_are_freed_before_training(tmp_path: Path) -> None:
    """Neither text encoders nor, without samples, the VAE hold memory any more."""

    def held(kind: str) -> int:
        gc.collect()
        modules = [one for one in gc.get_objects() if isinstance(one, torch.nn.Module) and kind in type(one).__name__]
        return sum(any(not p.is_meta for p in one.parameters(recurse=False)) for one in modules)

    t5, vae = held("T5"), held("WanCausal")
    made = recipe_of("wan2.2-ti2v", tmp_path / "one")
    assert (held("T5"), held("WanCausal")) == (t5, vae)
    seen = recipe_of("wan2.2-ti2v", tmp_path / "two", sample_prompts=("a red cat",))
    assert held("T5") == t5
    assert held("WanCausal") > vae
    del made, seen
