"""Host time of a decode step over two stages, in `generate` of many small layers: `python -m bench.decode_host`.

The layers compute nearly nothing, so their time is that of the host. Times exclude waiting for messages.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from shardit import DiffusionParallelConfig
from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.mesh import init_mesh
from shardit.core.decoder.decoder_stages import DecoderStages
from shardit.core.stages.runtime import Runtime
from shardit.language.sharding import lay_out_decoder, shard_decoder
from tests.support.ranks import run_ranks

LAYERS, STEPS, RUNS = 30, 64, 5

spent: defaultdict[str, float] = defaultdict(float)
"""Seconds by kind, in this process."""


def small() -> Any:
    """A random model of many layers of width 32."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=LAYERS
    )
    return AutoModelForCausalLM.from_config(config).eval()


def timed(kind: str, function: Any) -> Any:
    """Return the function, which adds its time to `spent`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[kind] += time.perf_counter() - start

    return call


def per_step(model: Any) -> dict[str, float]:
    """Generate, and return milliseconds per step by kind, and of a whole step."""
    ids = torch.randint(3, 256, (4, 9), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    model.generate(ids, **options)
    spent.clear()
    whole = timed("step", model.generate)
    for _ in range(RUNS):
        whole(ids, **options)
    return {kind: 1e3 * seconds / STEPS / RUNS for kind, seconds in spent.items()}


def alone(rank: int, count: int, method: str) -> dict[str, float]:
    """Measure plain `generate`."""
    model = small()
    for layer in (*model.model.layers, model.model.embed_tokens, model.lm_head):
        layer.forward = timed("blocks", layer.forward)
    return per_step(model)


def staged(rank: int, count: int, method: str) -> dict[str, float]:
    """Measure one of the stages."""
    config = DiffusionParallelConfig(pipeline_parallel_size=count)
    mesh = init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method)
    model = small()
    shard_decoder(model, Runtime.of(mesh, split_batch=False), lay_out_decoder(model, config), config)
    GroupCoordinator.wait = timed("waiting", GroupCoordinator.wait)
    block_call = DecoderStages.block_call

    def by_owner(self: DecoderStages, index: int, call: Any, args: Any, kwargs: Any) -> Any:
        kind = "calls of own blocks" if self.owners[index] == rank else "calls of other blocks"
        waited = spent["waiting"]
        out = timed(kind, block_call)(self, index, timed("blocks", call), args, kwargs)
        spent[kind] -= spent["waiting"] - waited
        return out

    DecoderStages.block_call = by_owner
    return per_step(model)


def main() -> None:
    """Measure and print."""
    plain = run_ranks(1, alone)[0]
    print(f"ms per step, {LAYERS} layers of width 32")
    print(f"one rank: {plain['step']:.1f}, of that blocks {plain['blocks']:.1f}")
    for rank, found in enumerate(run_ranks(2, staged)):
        own, other = found["calls of own blocks"] - found["blocks"], found["calls of other blocks"]
        outside = found["step"] - found["waiting"] - found["calls of own blocks"] - other
        more = outside - (plain["step"] - plain["blocks"])
        share = (own + other + more) / plain["step"]
        print(
            f"stage {rank}: own blocks {found['blocks']:.1f}, waiting {found['waiting']:.1f}; "
            f"on top: calls of own blocks {own:.1f}, calls of other blocks {other:.1f}, outside of blocks {more:.1f}: "
            f"{share:.0%} of one rank's step"
        )


if __name__ == "__main__":
    main()
