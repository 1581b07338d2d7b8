"""Steps of training over two ranks against one rank and two copies of it at once.

A step is forward and backward of all micro-batches, without an optimizer. One rank accumulates over them; the ceiling
is two copies that do so at the same time. The bound of a schedule is its speedup without communication,
2 m / (m + 1 / chunks) for m micro-batches, times the ceiling / 2. Runs of all kinds take turns; the result is the
median of the ratios of one turn. For its memory every kind runs in processes of its own: the most that a rank held in a
step, above what it had without a model.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bench.hand_cut import HandCut
from shardit import training
from tests.support.ranks import run_ranks

SCHEDULES = {"1f1b": 1, "interleaved": 2, "interleaved-zb": 2, "zbv": 2}
"""Chunks of each rank."""

ONE, COPIES, REPLICAS, TENSOR = "one rank", "two copies", "2 replicas", "2 tensor ranks"
TORCH = "torch's 1f1b, cut by hand"


@dataclass(frozen=True)
class Size:
    """Layers of width `heads` x 64, and the work of one step; a micro-batch has `tokens` tokens, a multiple of 64."""

    layers: int = 8
    heads: int = 8
    tokens: int = 256
    micro_batches: int = 8


FULL, SMALL = Size(), Size(layers=4, heads=1, tokens=64, micro_batches=2)


def llama(size: Size) -> nn.Module:
    """Return a random language model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64 * size.heads,
        intermediate_size=176 * size.heads,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
    )
    return AutoModelForCausalLM.from_config(config)


def wan(size: Size) -> nn.Module:
    """Return a random video model."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=64,
        text_dim=64,
        freq_dim=64,
        ffn_dim=176 * size.heads,
        num_layers=size.layers,
    )


def texts(size: Size) -> list[Any]:
    """Return micro-batches of tokens."""
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 512, (1, size.tokens), generator=draw)} for _ in range(size.micro_batches)]


def clips(size: Size) -> list[Any]:
    """Return micro-batches of latents, noise and the embeddings of a prompt."""
    draw = torch.Generator().manual_seed(1)
    clip = (1, 16, size.tokens // 64, 16, 16)  # 2 x 2 latents are a token
    shapes = {"latents": clip, "noise": clip, "text": (1, 16, 64)}
    return [
        {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()} for _ in range(size.micro_batches)
    ]


def loss_of_text(model: Any, batch: Any) -> torch.Tensor:
    """Return the cross-entropy of the next token."""
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss


def loss_of_clip(model: Any, batch: Any) -> torch.Tensor:
    """Return the loss of flow matching in the middle of the path."""
    noised = (batch["latents"] + batch["noise"]) / 2
    made = model(noised, timestep=torch.tensor([500.0]), encoder_hidden_states=batch["text"]).sample
    return nn.functional.mse_loss(made, batch["noise"] - batch["latents"])


TASKS = {"llama": (llama, texts, loss_of_text), "wan": (wan, clips, loss_of_clip)}


def accumulating(model: nn.Module, loss: Any, batches: list[Any]) -> Callable[[], torch.Tensor]:
    """Return a step of one rank."""

    def step() -> torch.Tensor:
        values = []
        for batch in batches:
            value = loss(model, batch) / len(batches)
            value.backward()
            values.append(value.detach())
        return torch.stack(values).sum()

    return step


def step_of(kind: str, task: str, rank: int, size: Size, made: nn.Module | None = None) -> Callable[[], Any] | None:
    """Return a step of a kind on this rank; None if the rank has nothing to do. made: the model, in place of another
    one."""
    make, data, loss = TASKS[task]
    model, batches = made or make(size), data(size)
    if kind in (ONE, COPIES):
        return accumulating(model, loss, batches) if rank == 0 or kind == COPIES else None
    if kind == TORCH:
        return HandCut(model, rank, size.micro_batches).step(batches)
    if kind == TENSOR:
        slices = training.stages(model, loss, tensor_parallel_size=2)
        return lambda: slices.step(batches)
    if kind == REPLICAS:
        replicas = training.stages(model, loss, data_parallel_size=2)
        return lambda: replicas.step(batches[rank::2])
    stages = training.stages(model, loss, pipeline_parallel_size=2, schedule=kind)
    return lambda: stages.step(batches)


def kinds_of(task: str) -> list[str]:
    """Return all kinds of steps of a task."""
    return [ONE, COPIES, *SCHEDULES, REPLICAS, TENSOR, *([TORCH] if task == "llama" else [])]


def timed(rank: int, ranks: int, method: str, size: Size, task: str, turns: int) -> dict[str, Any]:
    """Return seconds of each step by kind, and the losses of the first ones."""
    _join(rank, ranks, method)
    steps = {kind: step_of(kind, task, rank, size) for kind in kinds_of(task)}
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(2):  # the first one is watched, the second one is the first with early sums
        losses = {kind: step().item() for kind, step in steps.items() if step is not None}
    for _ in range(turns):
        for kind, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            if step is not None:
                step()
            dist.barrier()
            seconds[kind].append(time.perf_counter() - begin)
    return {"seconds": seconds, "losses": losses}


def memory(rank: int, ranks: int, method: str, size: Size, task: str, kind: str) -> int:
    """Return the most bytes that this rank held in a step, above what it had before it made the model."""
    _join(rank, ranks, method)
    make, data, loss = TASKS[task]
    loss(make(SMALL), data(SMALL)[0]).backward()  # what libraries load at their first call
    _return_freed_memory()
    before = _resident("VmRSS")
    model = make(size)
    step = step_of(kind, task, rank, size, model)
    if step is None:
        return 0
    step()  # the watched one, with the whole model
    for parameter in model.parameters():
        parameter.grad = None
    del model
    _return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    return _resident("VmHWM") - before


def _return_freed_memory() -> None:
    """Give freed memory back to the kernel, so that it does not count as held. Ranks make malloc keep it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def _join(rank: int, ranks: int, method: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks)


def bound_of(kind: str, count: int) -> float:
    """Return the speedup of a kind over one rank, without communication, if two ranks are twice as fast as one."""
    return 2.0 if kind in (REPLICAS, TENSOR) else 2 * count / (count + 1 / SCHEDULES.get(kind, 1))


def measure(size: Size, turns: int) -> dict[str, Any]:
    """Measure all kinds of steps of all tasks."""
    return {task: _of_task(task, size, turns) for task in TASKS}


def _of_task(task: str, size: Size, turns: int) -> dict[str, Any]:
    found, _ = run_ranks(2, timed, size, task, turns, timeout=1800)
    seconds, losses = found["seconds"], found["losses"]
    ceiling = statistics.median(2 * a / b for a, b in zip(seconds[ONE], seconds[COPIES], strict=True))
    cases = []
    for kind, own in seconds.items():
        speedup = statistics.median(a / b for a, b in zip(seconds[ONE], own, strict=True))
        bound = bound_of(kind, size.micro_batches) * ceiling / 2
        case: dict[str, Any] = {"name": kind, "seconds": own, "loss": losses[kind] if kind != TORCH else None}
        if kind not in (ONE, COPIES):
            case |= {"speedup": speedup, "bound": bound, "share": speedup / bound}
        if kind != COPIES:
            case["peak_bytes"] = run_ranks(2, memory, size, task, kind, timeout=600)
        cases.append(case)
    return {"micro_batches": size.micro_batches, "ceiling": ceiling, "cases": cases}
