"""Steps of training over two ranks against one rank and two copies of it at once: `python -m bench.training`.

A step is forward and backward of all micro-batches, without an optimizer. One rank accumulates over them; the ceiling
is two copies that do so at the same time. The bound of a schedule is its speedup without communication,
2 m / (m + 1 / chunks) for m micro-batches, times the ceiling / 2. Runs of all kinds take turns; the result is the
median of the ratios of one turn. For its memory every kind runs in processes of its own: the most that a rank held in a
step, above what it had without a model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
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

ONE, COPIES, REPLICAS, TORCH = "one rank", "two copies", "2 replicas", "torch, cut by hand, 1f1b"


def llama() -> nn.Module:
    """A random language model: 8 layers of 512."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
    )
    return AutoModelForCausalLM.from_config(config)


def wan() -> nn.Module:
    """A random video model: 8 blocks of 512."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=64, text_dim=64, freq_dim=64, ffn_dim=1408, num_layers=8
    )


def texts(count: int) -> list[Any]:
    """Return micro-batches of 256 tokens."""
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 512, (1, 256), generator=draw)} for _ in range(count)]


def clips(count: int) -> list[Any]:
    """Return micro-batches of 256 tokens: latents and noise, and the embeddings of a prompt."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"latents": (1, 16, 4, 16, 16), "noise": (1, 16, 4, 16, 16), "text": (1, 16, 64)}
    return [{name: torch.randn(shape, generator=draw) for name, shape in shapes.items()} for _ in range(count)]


def loss_of_text(model: Any, batch: Any) -> torch.Tensor:
    """Cross-entropy of the next token."""
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss


def loss_of_clip(model: Any, batch: Any) -> torch.Tensor:
    """Flow matching in the middle of the path."""
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


def step_of(kind: str, task: str, rank: int, count: int) -> Callable[[], Any] | None:
    """Return a step of a kind on this rank; None where the rank has nothing to do."""
    make, data, loss = TASKS[task]
    batches = data(count)
    if kind in (ONE, COPIES):
        return accumulating(make(), loss, batches) if rank == 0 or kind == COPIES else None
    if kind == TORCH:
        return HandCut(make(), rank, count).step(batches)
    if kind == REPLICAS:
        replicas = training.stages(make(), loss, data_parallel_size=2)
        return lambda: replicas.step(batches[rank::2])
    stages = training.stages(make(), loss, pipeline_parallel_size=2, schedule=kind)
    return lambda: stages.step(batches)


def rates(rank: int, ranks: int, method: str, arguments: argparse.Namespace, task: str) -> dict[str, Any]:
    """Return seconds of each step by kind, and the losses of the first ones."""
    _join(rank, ranks, method)
    kinds = [ONE, COPIES, *SCHEDULES, REPLICAS, *([TORCH] if task == "llama" else [])]
    steps = {kind: step_of(kind, task, rank, arguments.micro_batches) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    losses = {kind: step().item() for kind, step in steps.items() if step is not None}
    for _ in range(arguments.runs):
        for kind, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            if step is not None:
                step()
            dist.barrier()
            seconds[kind].append(time.perf_counter() - begin)
    return {"seconds": seconds, "losses": losses}


def memory(rank: int, ranks: int, method: str, arguments: argparse.Namespace, task: str, kind: str) -> int:
    """Return the most bytes that this rank held in two steps, above what it had before it made the model."""
    _join(rank, ranks, method)
    TASKS[task][2](TASKS[task][0](), TASKS[task][1](1)[0])  # what libraries load at their first call
    before = _resident("VmRSS")
    step = step_of(kind, task, rank, arguments.micro_batches)
    if step is None:
        return 0
    step()  # the watched one, with the whole model
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def _join(rank: int, ranks: int, method: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks)


def bound_of(kind: str, count: int) -> float:
    """Return the speedup of a kind over one rank, without communication, where two ranks are twice as fast as one."""
    return 2.0 if kind == REPLICAS else 2 * count / (count + 1 / SCHEDULES.get(kind, 1))


def report(task: str, found: dict[str, Any], held: dict[str, list[int]], count: int) -> None:
    """Print a table."""
    seconds, losses = found["seconds"], found["losses"]
    ceiling = statistics.median(2 * a / b for a, b in zip(seconds[ONE], seconds[COPIES], strict=True))
    print(f"\n{task}: {count} micro-batches; two copies at once do {ceiling:.3f} times the work of one\n")
    print("| kind | s per step | speedup | bound | share of the bound | peak MiB of each rank | loss |")
    print("|---|---|---|---|---|---|---|")
    for kind, own in seconds.items():
        speedup = statistics.median(a / b for a, b in zip(seconds[ONE], own, strict=True))
        bound = bound_of(kind, count) * ceiling / 2
        rate = "| | | " if kind in (ONE, COPIES) else f"| {speedup:.3f} | {bound:.3f} | {speedup / bound:.3f} "
        peaks = ", ".join(f"{bytes_ / 2**20:.0f}" for bytes_ in held.get(kind, []) if bytes_)
        print(f"| {kind} | {statistics.median(own):.2f} {rate}| {peaks} | {losses.get(kind, 0):.6f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    for task in arguments.tasks:
        found = run_ranks(2, rates, arguments, task, timeout=1800)[0]
        kinds = [kind for kind in found["seconds"] if kind not in (COPIES, TORCH)]
        held = {kind: run_ranks(2, memory, arguments, task, kind, timeout=600) for kind in kinds}
        report(task, found, held, arguments.micro_batches)


if __name__ == "__main__":
    main()
