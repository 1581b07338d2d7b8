"""`python -m tests.pipelines.random_programs --first 0 --count 20`: random programs of a user on two ranks, against
plain diffusers.

A program calls a pipeline and changes it in turn: adapters, hooks, processors, schedulers, callbacks, compiled blocks.
It runs on plain diffusers and on two ranks of a random axis. A line for each program has what differs first. "refused"
is to be read by a person: the error should name what to change.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.distributed as dist

import shardit
from shardit.errors import InputError, UnsupportedError
from shardit.models import tiny
from tests.pipelines.entry import entries
from tests.pipelines.runs import NotSame, arrays_of, built, distance
from tests.support.brought import TARGETS, mapped, write_lora
from tests.support.ranks import RanksFailed, run_ranks

AXES = (
    {"pipeline_parallel_size": 2, "split_batch": False},
    {"tensor_parallel_size": 2},
    {"cfg_parallel_size": 2},
    {"ulysses_degree": 2},
    {"ring_degree": 2},
)
BOUND = 1e-4
"""Largest relative distance to plain diffusers: of several steps with random changes."""

MODELS = ("flux", "sd3.5", "wan2.2-ti2v", "qwen-image", "z-image")
WORDS = ("a", "cat", "dog", "red", "blue", "house", "on", "the", "moon", "tree", "with", "snow", "small", "bright")
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

Step = tuple[str, float, dict[str, Any]]
"""A step of a program: the name of an action, a number from 0 to 1 for it, and the arguments of a call."""


@dataclass
class State:
    """The pipeline of a run. adapters: folder of the adapters' files. hooks: handles. loaded: number of adapters."""

    name: str
    pipe: Any
    adapters: str
    hooks: list[Any] = field(default_factory=list)
    loaded: int = 0

    @property
    def model(self) -> Any:
        """The model that denoises."""
        parts = self.pipe.components
        return next(parts[name] for name in ("transformer", "unet", "prior") if parts.get(name) is not None)

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The longest list of modules in it."""
        return max((list(one) for one in self.model.modules() if isinstance(one, torch.nn.ModuleList)), key=len)


def call(state: State, values: dict[str, Any], **more: Any) -> list[np.ndarray]:
    """Call the pipeline with those of the values that it takes."""
    values, taken = copy.deepcopy(values), inspect.signature(state.pipe.__call__).parameters
    given = dict(tiny.defaults(state.name) if state.name in MODELS else entries()[state.name].call())
    if state.name in MODELS:
        given = {name: value for name, value in given.items() if "embeds" not in name} | {"prompt": ""}
    prompt, seed = values.pop("prompt"), values.pop("seed")
    given.update((name, value) for name, value in values.items() if name in taken and value is not None)
    if "prompt" in given:
        given["prompt"] = prompt
    if "generator" in taken:
        given["generator"] = None if seed is None else torch.Generator().manual_seed(seed)
    return arrays_of(state.pipe(**{**given, **more}))


Action = Callable[[State, float, dict[str, Any]], list[np.ndarray] | None]
"""What a step does with the pipeline. Returns what is compared, if anything."""


def _in_callback(change: Callable[[Any, dict[str, Any]], None]) -> Action:
    def act(state: State, number: float, values: dict[str, Any]) -> list[np.ndarray]:
        def after(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            change(pipe, tensors)
            return tensors

        return call(state, values, callback_on_step_end=after)

    return act


def _scale_latents(pipe: Any, tensors: dict[str, Any]) -> None:
    tensors["latents"] = tensors["latents"] * 1.1


def _in_inference_mode(state: State, number: float, values: dict[str, Any]) -> list[np.ndarray]:
    with torch.inference_mode():
        return call(state, values)


def _scheduler(state: State, number: float, values: dict[str, Any]) -> None:
    old = state.pipe.scheduler
    names = FLOW_SCHEDULERS if "Flow" in type(old).__name__ else SCHEDULERS
    state.pipe.scheduler = getattr(diffusers, names[int(number * len(names))]).from_config(old.config)


def _hook(state: State, number: float, values: dict[str, Any]) -> None:
    def scaled(module: Any, given: Any, out: Any) -> Any:
        return out * (1 + number / 10) if isinstance(out, torch.Tensor) else (out[0] * (1 + number / 10), *out[1:])

    block = state.blocks[int(number * len(state.blocks))]
    state.hooks.append(block.register_forward_hook(scaled))


def _unhook(state: State, number: float, values: dict[str, Any]) -> None:
    if state.hooks:
        state.hooks.pop().remove()


def _processor(state: State, number: float, values: dict[str, Any]) -> None:
    state.model.set_attn_processor(next(iter(state.model.attn_processors.values())))


def _from_pipe(state: State, number: float, values: dict[str, Any]) -> None:
    state.pipe = type(state.pipe).from_pipe(state.pipe)


def _adapter(state: State, number: float, values: dict[str, Any]) -> None:
    state.pipe.load_lora_weights(f"{state.adapters}/{state.name}", adapter_name=f"one_{state.loaded}")
    state.loaded += 1


def _casting(state: State, number: float, values: dict[str, Any]) -> None:
    state.model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


ACTIONS: dict[str, Action] = {
    "call": lambda state, _, values: call(state, values),
    "call in inference mode": _in_inference_mode,
    "callback that changes latents": _in_callback(_scale_latents),
    "callback that draws": _in_callback(lambda *_: torch.rand(1) and None),
    "seed": lambda *_: torch.manual_seed(3) and None,
    "scheduler": _scheduler,
    "tiling": lambda state, *_: state.pipe.vae.enable_tiling(),
    "slicing": lambda state, *_: state.pipe.vae.enable_slicing(),
    "hook": _hook,
    "unhook": _unhook,
    "processor": _processor,
    "fuse projections": lambda state, *_: state.model.fuse_qkv_projections(),
    "unfuse projections": lambda state, *_: state.model.unfuse_qkv_projections(),
    "another pipeline": _from_pipe,
    "compile": lambda state, *_: state.model.compile_repeated_blocks(backend="eager"),
    "casting": _casting,
    "load adapter": _adapter,
    "disable adapters": lambda state, *_: state.pipe.disable_lora(),
    "enable adapters": lambda state, *_: state.pipe.enable_lora(),
    "fuse adapters": lambda state, number, _: state.pipe.fuse_lora(lora_scale=0.5 + number),
    "unfuse adapters": lambda state, *_: state.pipe.unfuse_lora(),
    "unload adapters": lambda state, *_: state.pipe.unload_lora_weights(),
}


def program(rng: random.Random) -> list[Step]:
    """Draw a program; every other step is a call."""
    steps = [("call", 0.0, _values(rng))]
    for _ in range(rng.randint(4, 9)):
        steps.append((rng.choice(list(ACTIONS)), rng.random(), _values(rng)))
        steps.append(("call", 0.0, _values(rng)))
    return steps


def _values(rng: random.Random) -> dict[str, Any]:
    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))

    return {
        "prompt": rng.choice([text(), [text(), text()]]),
        "seed": rng.choice([None, rng.randint(0, 99)]),
        "num_inference_steps": rng.randint(1, 3),
        "num_images_per_prompt": rng.choice([None, 2]),
        "guidance_scale": rng.choice([None, 1.0, 3.0]),
        "output_type": rng.choice(["latent", "np", "pt"]),
    }


Outcome = list[np.ndarray] | str | None
"""The arrays that a step gave, or its error."""


def run(name: str, steps: list[Step], adapters: str, shard: Callable[[Any], object]) -> list[Outcome]:
    """Run a program; a step that fails is left out."""
    pipe = mapped(name) if name in MODELS else built(entries()[name])
    pipe.set_progress_bar_config(disable=True)
    shard(pipe)
    state, outcomes = State(name, pipe, adapters), list[Outcome]()
    torch.manual_seed(7)
    for action, number, values in steps:
        try:
            outcomes.append(ACTIONS[action](state, number, values))
        except (InputError, UnsupportedError) as error:
            outcomes.append(f"refused: {error}")
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


def on_ranks(rank: int, count: int, method: str, name: str, steps: list[Step], adapters: str, axis: Any) -> Any:
    """As `run`, over ranks."""
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    return run(name, steps, adapters, lambda pipe: shardit.parallelize(pipe, timeout_s=40, **axis))


def compared(steps: list[Step], plain: list[Outcome], ranks: list[list[Outcome]]) -> str:
    """Return the first difference that is none of plain diffusers; "right" if there is none."""
    for number, (step, expected) in enumerate(zip(steps, plain, strict=True)):
        for rank, outcomes in enumerate(ranks):
            got, place = outcomes[number], f"step {number} ({step[0]}) on rank {rank}"
            if isinstance(expected, str) and "call" in step[0]:
                return f"right up to step {number}, a call that fails in plain diffusers"  # and may have drawn noise
            if isinstance(expected, str):
                continue  # the model lacks such a method
            if isinstance(got, str):
                return f"{place}: {got:.300}"
            try:
                far = distance(expected, got or []) if expected else 0.0
            except NotSame as error:
                return f"{place}: WRONG, {error}"
            if not far <= BOUND:
                return f"{place}: WRONG, {far:.1e} off"
    return "right"


def main() -> None:
    """Run some programs; the same numbers are the same programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    classes = sorted(name for name, entry in entries().items() if "prompt" in entry.call())
    with tempfile.TemporaryDirectory() as adapters:
        for number in range(chosen.first, chosen.first + chosen.count):
            rng = random.Random(number)
            name = rng.choice(rng.choice([MODELS, classes]))
            axis, steps = rng.choice(AXES), program(rng)
            if name in TARGETS and not Path(adapters, name).exists():
                write_lora(name, Path(adapters, name), 5)
            plain = run(name, steps, adapters, lambda pipe: pipe)
            try:
                told = compared(steps, plain, run_ranks(2, on_ranks, name, steps, adapters, axis))
            except RanksFailed as error:
                told = f"RANKS FAILED: {str(error)[-300:]}"
            print(number, name, *(f"{key}={value}" for key, value in axis.items()), told, flush=True)


if __name__ == "__main__":
    main()
