"""Ranks that load only their own blocks: the same bits as if each had the whole model, and no bytes of others."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardit import InputError, training
from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import init_mesh
from shardit.core.modules.blocks import drop_blocks, find_blocks
from shardit.core.training.schedules import owner_of_chunk
from shardit.loading import transformers_model, weights
from shardit.models.tiny.language import tokenizer
from shardit.training.block_chunks import placing
from shardit.training.diffusion.recipe import recipe as diffusion_recipe
from shardit.training.language.recipe import recipe as language_recipe
from shardit.training.recipe import TrainingRecipe
from shardit.training.settings import TrainSettings
from tests.language import families
from tests.support.ranks import RanksFailed, run_ranks
from tests.training.cases import cases
from tests.training.diffusion.folders import model_of, settings_of
from tests.training.models import Task, task
from tests.training.runs import join, one_step
from tests.training.test_refused import _other_order


def keep_share(model: nn.Module, rank: int, size: int, schedule: str = "1f1b") -> None:
    """Put the blocks on meta that other ranks load."""
    blocks, config = find_blocks(model), DiffusionParallelConfig(pipeline_parallel_size=size)
    chunks = placing(model, [block for _, block in blocks], config, schedule)(range(len(blocks)))
    drop_blocks(model, blocks, [owner_of_chunk(chunk, size, schedule) for chunk in chunks], rank, None)


def parted(rank: int, size: int, method: str, names: list[str], schedule: str) -> dict[str, Any]:
    """Compare a step of models of which each rank has its share from the start."""
    join(rank, size, method)
    known: dict[str, Task] = {**cases(), "another order": _other_order()}
    options = {"pipeline_parallel_size": size, "schedule": schedule}
    change = functools.partial(keep_share, rank=rank, size=size, schedule=schedule)
    return {name: one_step(known.get(name) or task(name), 3, options, change) for name in names}


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_gradients_of_parts_are_those_of_one_rank(schedule: str) -> None:
    """Among them blocks that run in another order than they are registered in, tied weights, parameters of blocks that
    are read outside, and random numbers in blocks."""
    others = ["WanTransformer3DModel", "llama", *(["another order"] if schedule == "1f1b" else [])]
    names = [*(name for name in cases() if name != "two calls" or schedule != "zbv"), *others]
    of_ranks = run_ranks(2, parted, names, schedule, timeout=240)
    for name in names:
        for found in of_ranks:
            assert not found[name]["only"], (name, found[name])
            assert max(found[name]["worst"], found[name]["loss"]) < 2e-6, (name, found[name])
            assert found[name]["held"] < found[name]["of"], name
        assert sum(found[name]["compared"] for found in of_ranks) > 0


def lost(rank: int, size: int, method: str, change: Callable[[nn.Module, int], None]) -> None:
    """Start with a model that something is wrong with."""
    join(rank, size, method)
    chosen = task("llama")
    model = chosen.build()
    keep_share(model, rank, size)
    change(model, rank)
    training.stages(model, chosen.loss, pipeline_parallel_size=size, timeout_s=20)


def _no_rank_has_it(model: Any, _: int) -> None:
    model.model.layers[1].to("meta")


def _another_embedding(model: Any, rank: int) -> None:
    model.model.embed_tokens.weight.data += float(rank == 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_no_rank_has_it, "no rank has the weights of model.layers.1"),
        (_another_embedding, r"different weights \(model.embed_tokens.weight\)"),
    ],
)
def test_what_is_missing_or_differs_is_an_error(change: Any, expected: str) -> None:
    with pytest.raises(RanksFailed, match=expected):
        run_ranks(2, lost, change, timeout=60)


def replicas_differ(rank: int, size: int, method: str) -> str:
    """Two replicas of two stages, whose second stages have another weight."""
    join(rank, size, method)
    chosen = task("llama")
    model: Any = chosen.build()
    keep_share(model, rank % 2, 2)
    if not model.model.layers[-1].mlp.up_proj.weight.is_meta and rank == size - 1:
        model.model.layers[-1].mlp.up_proj.weight.data += 1
    try:
        training.stages(model, chosen.loss, pipeline_parallel_size=2, data_parallel_size=2, timeout_s=20)
    except InputError as error:
        return str(error)
    return ""


def test_replicas_compare_what_both_have() -> None:
    for text in run_ranks(4, replicas_differ, timeout=60):
        assert "different weights (model.layers" in text


def _merged_experts(folder: Path) -> str:
    """A folder whose experts are tensors of their own, which the model has merged."""
    letters = tokenizer()
    families.make("mixtral", vocab_size=len(letters), num_local_experts=12).save_pretrained(folder)
    letters.save_pretrained(folder)
    return str(folder)


def _texts(folder: Path) -> str:
    rows = [json.dumps({"text": "the cat sat on the mat " * (1 + number % 3)}) for number in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return str(folder / "rows.jsonl")


class Reading:
    """Counts the bytes of weights that are read from files."""

    def __init__(self) -> None:
        self.bytes, self._own = 0, weights.read_slice

    def __call__(self, path: Any, entry: Any, part: Any, tensor: torch.Tensor, reads: Any) -> None:
        self.bytes += tensor.nbytes
        self._own(path, entry, part, tensor, reads)


def trained(rank: int, size: int, method: str, kind: str, given: dict[str, Any], parts: bool) -> dict[str, Any]:
    """Make a recipe and two steps; return the bytes read and held, and the trained weights of this rank."""
    join(rank, size, method)
    config = DiffusionParallelConfig(pipeline_parallel_size=size)
    settings, make = _settings(kind, given)
    mesh = init_mesh(config)
    torch.manual_seed(0)
    if kind != "language":  # the cache is made before anything is counted
        make(settings, mesh, config)
    reading = Reading()
    weights.read_slice = transformers_model.read_slice = reading
    made: TrainingRecipe = make(settings, mesh, config if parts else None)
    held = sum(one.nbytes for model in made.models.values() for one in model.parameters() if not one.is_meta)
    found: dict[str, Any] = {"read": reading.bytes, "held": held, "weights": {}, "first": {}, "losses": []}
    found["of"] = sum(one.nbytes for model in made.models.values() for one in model.parameters())
    for name, model in made.models.items():
        batches = [one for one in made.micro_batches(0, 0, 1) if one.model == name]
        staged = training.stages(model, made.loss, config, example=batches[0].data, timeout_s=60)
        found["first"] |= {f"{name}/{key}": one.detach().clone() for key, one in staged.named_parameters()}
        for _ in range(2):
            value = staged.step([one.data for one in batches], [one.weight for one in batches])
            found["losses"].append(float(value))
            torch.optim.SGD(staged.parameters(), lr=1e-2).step()
        found["weights"] |= {f"{name}/{key}": one.detach() for key, one in staged.named_parameters()}
    return found


def _settings(kind: str, given: dict[str, Any]) -> tuple[TrainSettings, Any]:
    if kind == "language":
        return TrainSettings(**given), language_recipe
    output = Path(given["output"])
    return settings_of(kind, output, **{k: v for k, v in given.items() if k != "output"}), diffusion_recipe


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("wan2.2-t2v", {"accumulation": 12, "full": True}),
        ("flux", {"accumulation": 2}),
        ("sdxl", {"accumulation": 2, "train_text_encoder": True}),
        ("language", {"model": "tiny/llama", "full": True}),
        ("language", {"model": "tiny/qwen3", "lora_rank": 4}),
        ("language", {"model": "mixtral", "full": True}),
    ],
)
def test_a_rank_reads_its_own_blocks_and_trains_the_same_bits(kind: str, given: dict[str, Any], tmp_path: Path) -> None:
    own = {"output": str(tmp_path / "run"), "model": model_of(kind)} if kind != "language" else {}
    more = own or {"data": _texts(tmp_path)}
    chosen = {**given, **more}
    if chosen["model"] == "mixtral":
        chosen["model"] = _merged_experts(tmp_path / "mixtral")
    parts, whole = (run_ranks(2, trained, kind, chosen, one, timeout=200) for one in (True, False))
    for part, all_of_it in zip(parts, whole, strict=True):
        assert part["held"] < 0.8 * part["of"]
        assert all_of_it["held"] == all_of_it["of"]
        for key in ("first", "weights"):
            assert part[key].keys() == all_of_it[key].keys()
            assert all(torch.equal(one, all_of_it[key][name]) for name, one in part[key].items()), key
        assert part["losses"] == all_of_it["losses"]
    if kind != "sdxl":  # whose encoders are read, too
        both = sum(part["read"] for part in parts)
        assert both < 1.6 * whole[0]["of"]
        assert all(part["read"] <= part["held"] for part in parts)
