"""What ranks do in tests of recipes: steps over stages, compared with one plain rank."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardit import InputError, training
from shardit.config import DiffusionParallelConfig
from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.mesh import init_mesh
from shardit.training.diffusion import samples
from shardit.training.diffusion.cache import Entry, SampleCache
from shardit.training.diffusion.recipe import recipe
from shardit.training.recipe import MicroBatch, TrainingRecipe
from tests.training.diffusion.folders import samples_of, settings_of, stir
from tests.training.models import accumulate, worst
from tests.training.runs import join

STAGES = "pipeline_parallel_size"


def staged_recipe(name: str, folder: str, size: int, axis: str = STAGES, **more: Any) -> TrainingRecipe:
    """The recipe on one of `size` stages, or ranks of another axis."""
    mesh = init_mesh(DiffusionParallelConfig(**{axis: size}))
    made = recipe(settings_of(name, folder, **more), mesh)
    for model in made.models.values():
        stir(model)
    return made


def of_models(batches: list[MicroBatch]) -> dict[str, list[MicroBatch]]:
    """The micro-batches of each model."""
    return {name: [one for one in batches if one.model == name] for name in dict.fromkeys(b.model for b in batches)}


def accumulated(loss: Any, model: Any, batches: list[MicroBatch]) -> float:
    """Forward and backward of one rank over the micro-batches; the mean loss."""
    return accumulate(model, loss, [one.data for one in batches], [one.weight for one in batches])


def gradients(
    rank: int, size: int, method: str, names: list[str], folders: dict[str, str], more: Any = (), axis: str = STAGES
) -> Any:
    """Return for each family how the gradients of a step over ranks differ from those of one rank."""
    join(rank, size, method)
    return {name: _one(name, folders.get(name, ""), size, dict(more), axis) for name in names}


def _one(name: str, model: str, size: int, more: dict[str, Any], axis: str) -> dict[str, Any]:
    kind = "moving" if name.startswith("wan") else "still"
    given = {"model": model, "batch_size": 2, "accumulation": 3, "data": f"shapes:{kind}:5", **more}
    with tempfile.TemporaryDirectory() as folder:
        made = staged_recipe(name, folder, size, axis, **given)
        found = {}
        for part, batches in of_models(made.micro_batches(0, 0, 1)).items():
            plain = copy.deepcopy(made.models[part])
            expected = accumulated(made.loss, plain, batches)
            staged = training.stages(made.models[part], made.loss, timeout_s=60, **{axis: size})
            value = staged.step([one.data for one in batches], [one.weight for one in batches])
            largest, compared, only = worst(staged.named_parameters(), plain, staged.slices)
            relative = abs(float(value) - expected) / expected
            text = [name for name, one in staged.named_parameters() if name.startswith("text") and one.grad is not None]
            bound = 2e-6 if largest < 2e-6 else 2 * noise(made.loss, plain, batches)
            found[part] = {"worst": largest, "bound": bound, "compared": compared, "only": only, "loss": relative}
            found[part]["of_text"] = len(text)
        return found


def noise(loss: Any, plain: Any, batches: list[MicroBatch]) -> float:
    """Return how far one rank's gradients are from those for latents of which each has another last bit."""
    other = copy.deepcopy(plain)
    other.zero_grad()
    for number, one in enumerate(batches):
        latents = one.data["latents"]
        signs = torch.randn(latents.shape, generator=torch.Generator().manual_seed(number)).sign()
        one.data["latents"] = torch.nextafter(latents, latents + signs)
    accumulated(loss, other, batches)
    return worst(other.named_parameters(), plain)[0]


def late(rank: int, size: int, method: str, cases: list[tuple[bool, float]]) -> list[dict[str, Any]]:
    """Compare a step with one rank where adapters are in the last two of eight blocks."""
    join(rank, size, method)
    found = []
    for checkpointing, dropout in cases:
        with tempfile.TemporaryDirectory() as folder:
            options = {"gradient_checkpointing": checkpointing, "lora_dropout": dropout, "accumulation": 3}
            targets = (r"blocks\.[67]\.attn1\.to_q",)
            made = staged_recipe("wan2.2-ti2v", folder, size, lora_targets=targets, **options)
            model = made.models["transformer"]
            plain = copy.deepcopy(model)
            batches = made.micro_batches(0, 0, 1)

            def loss(model: Any, data: Any, own: Any = made.loss) -> torch.Tensor:
                """Seeds by the micro-batch, so that dropout is the same in any order."""
                torch.manual_seed(int(data["seeds"][0]))
                return own(model, data)

            value = accumulated(loss, plain, batches)
            staged = training.stages(model, loss, pipeline_parallel_size=size, timeout_s=60)
            staged.step([one.data for one in batches])
            own = [parameter for parameter in staged.parameters() if parameter.requires_grad]
            largest, compared, only = worst(staged.named_parameters(), plain)
            zero = sum(parameter.grad is None or not parameter.grad.abs().max() > 0 for parameter in own)
            found.append({"worst": largest, "compared": compared, "only": only, "zero": zero, "loss": value})
            found[-1]["trained"] = len(own)
    return found


def shared_cache(rank: int, size: int, method: str) -> dict[str, Any]:
    """Fill a cache together, and meet an error of one rank."""
    join(rank, size, method)
    ranks = GroupCoordinator.of_mesh(init_mesh(DiffusionParallelConfig(pipeline_parallel_size=size)))["world"]
    folder = ranks.broadcast_object(tempfile.mkdtemp() if rank == 0 else None)
    cache, calls = SampleCache(Path(folder)), []
    entries = [Entry("latents", {"item": number}, f"item-{number}") for number in range(8)]

    def make(entry: Entry) -> dict[str, torch.Tensor]:
        calls.append(entry.name)
        if entry.name == "item-7":
            raise ValueError("broken")
        return {"latents": torch.full((3,), float(entry.made_of["item"]))}

    cache.fill(entries[:5], make, ranks)
    found = {"made": list(calls), "read": [float(cache.read(one)["latents"][0]) for one in entries[:5]]}
    try:
        cache.fill(entries, make, ranks)
    except InputError as error:
        found["error"] = str(error)
    return found


def raw_video(frames: Any, path: Path, *_: Any) -> None:
    """In place of `write_video`: encoders do not write the same bytes each time."""
    with path.open("wb") as file:
        np.save(file, np.stack([np.asarray(frame) for frame in frames]))


def sampled(rank: int, size: int, method: str, name: str, folder: str, stages: int) -> list[str]:
    """Train for a step over stages and write samples; return their files."""
    join(rank, size, method)
    made = staged_recipe(name, folder, stages, sample_prompts=("a red cat on a boat",), accumulation=24)
    staged = {}
    for part, batches in of_models(made.micro_batches(0, 0, 1)).items():
        staged[part] = training.stages(made.models[part], made.loss, pipeline_parallel_size=stages, timeout_s=60)
        staged[part].step([one.data for one in batches])
        torch.optim.SGD(staged[part].parameters(), lr=1e-3).step()
    assert len(staged) == len(made.models)
    samples.write_video = raw_video
    return [str(path) for path in samples_of(made, Path(folder) / "samples")]


def saved(rank: int, size: int, method: str, folder: str, stages: int, full: bool) -> None:
    """Train two experts for a step over stages and save the result."""
    join(rank, size, method)
    made = staged_recipe("wan2.2-t2v", f"{folder}/run", stages, accumulation=16, full=full)
    staged = {
        part: training.stages(model, made.loss, pipeline_parallel_size=stages, timeout_s=60)
        for part, model in made.models.items()
    }
    for part, batches in of_models(made.micro_batches(0, 0, 1)).items():
        staged[part].step([one.data for one in batches])
        torch.optim.SGD(staged[part].parameters(), lr=1e-2).step()
    made.save(staged, Path(folder) / "out")
