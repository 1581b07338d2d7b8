"""Runs of training in tests: on ranks of this machine, or in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from shardit.config import DiffusionParallelConfig
from shardit.training.run.launch import LocalRun
from shardit.training.run.messages import SESSION, TrainSpec
from shardit.training.settings import TrainSettings

TOY = "tests.training.run.toy"
PARALLEL = (
    "pipeline_parallel_size",
    "tensor_parallel_size",
    "data_parallel_size",
    "pipeline_chunks",
    "layer_partition",
)


def spec(output: Path, **given: Any) -> TrainSpec:
    """What the ranks of a run of the toy recipe start with."""
    config = DiffusionParallelConfig(**{name: given.pop(name) for name in PARALLEL if name in given})
    chosen = {"model": "toy", "data": "toy:6", "full": True, "learning_rate": 1e-2, "timeout_s": 30.0}
    settings = TrainSettings(**{**chosen, "output": output, **given})
    return TrainSpec(
        settings.model, config, timeout_s=settings.timeout_s, session=SESSION, settings=settings, recipe=TOY
    )


def run(output: Path, **given: Any) -> bool:
    """Run on ranks of this machine."""
    return LocalRun(spec(output, **given)).run()


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without times."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The saved weights of all models."""
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(output.glob("*/model.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal bit by bit."""
    assert one
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[n].double() - other[n].double()).norm() / one[n].double().norm()) for n in one)
