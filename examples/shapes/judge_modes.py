"""Measures what lossy and rounding modes cost in quality: a classifier judges clips of tiny/shapes.

    torchrun --nproc-per-node 2 examples/shapes/judge_modes.py [FILE [MODE ...]]

Clips are made for captions that were held out. Both ranks work on each clip of a mode that needs ranks; of the others,
each makes half. FILE gets the numbers as JSON. MODE: a key of MODES; all without one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import classifier
import diffusers
import torch
import torch.distributed as dist
from make import BATCH, clips, marked, share

from shardit import parallelize
from shardit.models import tiny
from shardit.training.data import shapes

SAMPLES = 96
LEVELS = 127.5
"""Levels of 8 bits in one unit of a clip, whose values are in [-1, 1]."""


@dataclass(frozen=True)
class Mode:
    """A way to run the pipeline. change: made to it, after `parallelize`. parallel: degrees for `parallelize`."""

    change: Callable[[Any], object] = lambda pipe: None
    parallel: Mapping[str, int] = field(default_factory=dict)


def cached(kind: str, **options: Any) -> Callable[[Any], object]:
    """Return a change that enables a step cache of diffusers."""
    return lambda pipe: pipe.transformer.enable_cache(getattr(diffusers, kind)(**options))


def attention_cached(kind: str, **options: Any) -> Callable[[Any], object]:
    """Return a change that enables a step cache that skips attention between two timesteps."""
    skipped = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 800)}
    return lambda pipe: cached(kind, **skipped, **options, current_timestep_callback=lambda: pipe.current_timestep)(
        pipe
    )


def cast(storage: torch.dtype) -> Callable[[Any], object]:
    """Return a change that stores the weights of the transformer in a smaller type."""
    return lambda pipe: pipe.transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)


def quantized(pipe: Any) -> None:
    """Let the linears of the blocks compute in int8, with a scale for each weight and for each input."""
    blocks = pipe.transformer.blocks
    pipe.transformer.blocks = torch.ao.quantization.quantize_dynamic(blocks, {torch.nn.Linear}, dtype=torch.qint8)


TENSOR = {"tensor_parallel_size": 2}
TAYLOR = {"cache_identifiers": [r"blocks\.\d+\.attn[12]"]}  # its own patterns miss those of Wan
FASTER = {"is_guidance_distilled": True}  # the branches of guidance are calls of their own
MODES = {
    "plain": Mode(),
    "2 stages": Mode(parallel={"pipeline_parallel_size": 2}),
    "2 tensor ranks": Mode(parallel=TENSOR),
    "Ulysses 2": Mode(parallel={"ulysses_degree": 2}),
    "Ring 2": Mode(parallel={"ring_degree": 2}),
    "bfloat16": Mode(lambda pipe: pipe.to(torch.bfloat16)),
    "bfloat16, 2 tensor ranks": Mode(lambda pipe: pipe.to(torch.bfloat16), TENSOR),
    "VAE tiles of 32x32": Mode(lambda pipe: pipe.vae.enable_tiling(32, 32, 24, 24)),
    "weights in float8 e4m3": Mode(cast(torch.float8_e4m3fn)),
    "weights in float8 e4m3, 2 tensor ranks": Mode(cast(torch.float8_e4m3fn), TENSOR),
    "weights in float8 e5m2": Mode(cast(torch.float8_e5m2)),
    "linears in int8": Mode(quantized),
    "FirstBlockCache 0.1": Mode(cached("FirstBlockCacheConfig", threshold=0.1)),
    "FirstBlockCache 0.1, 2 tensor ranks": Mode(cached("FirstBlockCacheConfig", threshold=0.1), TENSOR),
    "FirstBlockCache 0.2": Mode(cached("FirstBlockCacheConfig", threshold=0.2)),
    "FirstBlockCache 0.4": Mode(cached("FirstBlockCacheConfig", threshold=0.4)),
    "FirstBlockCache 10": Mode(cached("FirstBlockCacheConfig", threshold=10.0)),
    "TaylorSeerCache 2": Mode(cached("TaylorSeerCacheConfig", cache_interval=2, **TAYLOR)),
    "TaylorSeerCache 5": Mode(cached("TaylorSeerCacheConfig", **TAYLOR)),
    "PyramidAttentionBroadcast 2": Mode(attention_cached("PyramidAttentionBroadcastConfig")),
    "PyramidAttentionBroadcast 2, 2 tensor ranks": Mode(attention_cached("PyramidAttentionBroadcastConfig"), TENSOR),
    "FasterCache 2": Mode(attention_cached("FasterCacheConfig", **FASTER)),
    "FasterCache 2, 2 tensor ranks": Mode(attention_cached("FasterCacheConfig", **FASTER), TENSOR),
}


def main(file: str | None = None, *names: str) -> None:
    """Print the numbers of each mode, and write them to `file`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if wrong := [name for name in names if name not in MODES]:
        sys.exit(f"there is no mode {wrong[0]!r}: there are {', '.join(MODES)}")
    if dist.get_world_size() != 2:
        sys.exit(f"{dist.get_world_size()} ranks were started: use torchrun --nproc-per-node 2")
    shared = [classifier.trained() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    (judge,) = shared
    asked = [shapes.drawing(number, seed=5, held_out=True) for number in range(SAMPLES)]
    plain, _ = made(MODES["plain"], asked)
    found: dict[str, Any] = {"samples": SAMPLES, "classifier_on_drawn_clips": classifier.accuracy(judge), "modes": {}}
    for name in names or MODES:
        frames, seconds = made(MODES[name], asked)
        found["modes"][name] = {**compared(judge, asked, plain, frames), "cpu_seconds_per_clip": seconds}
        if dist.get_rank() == 0:
            print(name, json.dumps(found["modes"][name]), flush=True)
    if file is not None and dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def made(mode: Mode, asked: Sequence[shapes.Drawing]) -> tuple[torch.Tensor, float]:
    """Make a clip for each caption over the ranks, or without ranks if there are none; return the clips, the same on
    each rank, and the seconds of CPU time of all ranks for one clip."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pipe = tiny.load_plain(tiny.resolve("tiny/shapes"))
    pipe.set_progress_bar_config(disable=True)
    if mode.parallel:
        parallelize(pipe, **mode.parallel)
    mode.change(pipe)
    batches = [asked[first : first + BATCH] for first in range(0, len(asked), BATCH)]
    own = range(len(batches)) if mode.parallel else range(rank, len(batches), size)
    begin = time.process_time()
    here = {number: clips(pipe, batches[number]) for number in own}
    mine = here, time.process_time() - begin
    parts = [mine] * size
    if size > 1:
        dist.all_gather_object(parts, mine)
    every = {number: frames for some, _ in parts for number, frames in some.items()}
    spent = sum(seconds for _, seconds in parts) / len(asked)
    return torch.cat([every[number] for number in sorted(every)]), round(spent, 3)


def compared(
    judge: classifier.Classifier, asked: Sequence[shapes.Drawing], plain: torch.Tensor, frames: torch.Tensor
) -> dict[str, Any]:
    """Return the shares of clips that are right, the share of clips in which the judge finds other attributes than in
    those of the plain pipeline, and the mean absolute difference of pixels from these, in levels of 8 bits."""
    before, found = judge.attributes(plain), judge.attributes(frames)
    right = marked(found, asked)
    return {
        "right": {name: share(right, (name,)) for name in judge.choices},
        "all_right": share(right, tuple(judge.choices)),
        "judged_otherwise": sum(one != other for one, other in zip(found, before, strict=True)) / len(asked),
        "pixel_difference": float(f"{float((frames - plain).abs().mean()) * LEVELS:.3g}"),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
