"""Groups of prompts over two stages, against one rank and against two copies of it at once: `python -m bench.language`.

The ceiling is two copies, each of which runs all groups, so it has twice the work in the time that is measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from shardit import DiffusionParallelConfig
from shardit.core.comm.mesh import init_mesh
from shardit.core.stages.runtime import Runtime
from shardit.language.sharding import lay_out_decoder, run_interleaved, shard_decoder
from tests.support.ranks import run_ranks

RUNS = 3


def wide() -> Any:
    """A random model: 8 layers of 1,024."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    )
    return AutoModelForCausalLM.from_config(config).eval()


def named(folder: str) -> Any:
    """The model of a folder, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def seconds(run: Callable[[], Any]) -> float:
    """The median time of a function."""
    found = []
    for _ in range(RUNS):
        dist.barrier()
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(rank: int, count: int, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one rank alone, of all ranks with a copy each, and of the stages; whether the tokens are the same."""
    config = DiffusionParallelConfig(pipeline_parallel_size=count, layer_partition=arguments.partition)
    mesh = init_mesh(config, device="cpu", timeout_s=120, rank=rank, init_method=method)
    model: Any = named(arguments.model) if arguments.model else wide()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(10, 2000, (arguments.batch, 16), generator=generator) for _ in range(arguments.groups)]
    options = {"max_new_tokens": arguments.tokens, "do_sample": False}

    def continued(ids: torch.Tensor) -> torch.Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    expected = [continued(ids) for ids in prompts]
    copies = seconds(lambda: [continued(ids) for ids in prompts])
    alone = seconds(lambda: [continued(ids) for ids in prompts] if rank == 0 else None)
    runtime = Runtime.of(mesh, split_batch=False)
    shard_decoder(model, runtime, lay_out_decoder(model, config), config)
    functions = [lambda ids=ids: continued(ids) for ids in prompts]
    made = run_interleaved(runtime, functions, [0] * len(functions))
    stages = seconds(lambda: run_interleaved(runtime, functions, [0] * len(functions)))
    same = all(torch.equal(one, other) for one, other in zip(expected, made, strict=True))
    return {"copies": copies, "alone": alone, "stages": stages, "same": same}


def main() -> None:
    """Measure and print rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="folder of transformers [default: random, 8 layers of 1,024]")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--partition", type=lambda text: [int(one) for one in text.split(",")], help='such as "19,11"')
    arguments = parser.parse_args()
    found = run_ranks(2, measure, arguments, timeout=900)[0]
    tokens = arguments.groups * arguments.batch * arguments.tokens
    ceiling = 2 * tokens / found["copies"]
    for name in ("alone", "stages"):
        print(f"{name}: {tokens / found[name]:.1f} tokens/s, {tokens / found[name] / ceiling:.2f} of the ceiling")
    print(f"ceiling (two copies at once): {ceiling:.1f} tokens/s; same tokens: {found['same']}")


if __name__ == "__main__":
    main()
