"""Prompts over two ranks against one rank, two copies of it at once and transformers' own: `python -m bench.language`.

Stages run prompts in batches, as `LLM` does; slices run `generate`. The ceiling is two copies, each of which continues
all prompts, so it has twice the work in the time that is measured.
Runs of all kinds take turns; the result is the median of the ratios of one turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bench.language_peers import peer_of
from shardit import DiffusionParallelConfig, SamplingParams
from shardit.core.comm.mesh import init_mesh
from shardit.core.stages.runtime import Runtime
from shardit.language.request.rows import PromptRow
from shardit.language.sharding import lay_out_decoder, shard_decoder
from tests.language.batched import batcher_of, run
from tests.support.ranks import run_ranks

PEERS = {"pipeline_parallel_size": "pp_size", "tensor_parallel_size": "tp_size"}
"""The name of each axis in transformers."""


def wide() -> Any:
    """A random model: 8 layers of 1,024."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    )
    return AutoModelForCausalLM.from_config(config).eval()


def named(name: str) -> Any:
    """The model of a folder, a GGUF file or a short name, in float32."""
    from shardit.language.loading.prepared import PreparedDecoder
    from shardit.language.loading.source import decoder_source
    from shardit.loading.safetensors_file import Reads

    prepared = PreparedDecoder(decoder_source(name), torch.float32)
    layout = lay_out_decoder(prepared.module, DiffusionParallelConfig(), None)
    return prepared.load(layout, {"pp": 0, "tp": 0}, torch.device("cpu"), Reads())


def rows(arguments: argparse.Namespace) -> list[PromptRow]:
    """Return prompts of equal length."""
    generator = torch.Generator().manual_seed(5)
    params = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
    ids = torch.randint(10, 2000, (arguments.prompts, arguments.length), generator=generator).tolist()
    return [PromptRow(tuple(one), params, 0) for one in ids]


def measure(rank: int, count: int, method: str, arguments: argparse.Namespace, axis: str) -> dict[str, Any]:
    """Return seconds of each run by kind, and whether the tokens are those of `generate`. axis: of ParallelConfig."""
    partition = arguments.partition if axis == "pipeline_parallel_size" else None
    config = DiffusionParallelConfig(**{axis: count}, layer_partition=partition)
    mesh = init_mesh(config, device="cpu", timeout_s=300, rank=rank, init_method=method)
    make = (lambda: named(arguments.model)) if arguments.model else wide
    plain, model, todo = make(), make(), rows(arguments)
    runtime = Runtime.of(mesh, split_batch=False)
    shard_decoder(model, runtime, lay_out_decoder(model, config), config)
    ids = torch.tensor([one.prompt for one in todo])
    options = {"max_new_tokens": arguments.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(by: Any) -> list[tuple[int, ...]]:
        made = by.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return [tuple(one) for one in made[:, arguments.length :].tolist()]

    kinds: dict[str, Callable[[], Any]] = {"generate": lambda: generate(plain) if rank == 0 else None}
    if axis == "pipeline_parallel_size":
        kinds |= staged(rank, plain, model, runtime, todo, arguments)
    else:
        kinds |= {"copies": lambda: generate(plain), "2 slices": lambda: generate(model)}
    if arguments.peers:
        peer = peer_of(make, rank, count, PEERS[axis])
        kinds[f"transformers, {PEERS[axis]}"] = lambda: generate(peer)
    found: dict[str, Any] = {name: [] for name in kinds}
    results = {name: kind() for name, kind in kinds.items()}  # first calls
    for _ in range(arguments.runs):
        for name, kind in kinds.items():
            dist.barrier()
            start = time.perf_counter()
            kind()
            found[name].append(time.perf_counter() - start)
    expected = generate(plain)
    found["same"] = {name: made == expected for name, made in results.items() if made is not None}
    return found


def staged(
    rank: int, plain: Any, model: Any, runtime: Runtime, todo: list[PromptRow], arguments: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """Return runs of the batches of `LLM`: on one rank, two copies of it, and over the stages."""
    count = runtime.mesh.pp_size

    def batches(of: Any, groups: int, runtime: Runtime | None = None) -> Callable[[], Any]:
        batcher = batcher_of(of, runtime, rows=arguments.prompts // groups, groups=groups, tokens=arguments.chunk)
        return lambda: [result[0] for result in run(batcher, todo, runtime)]

    own = batches(plain, count)
    kinds = {"one rank": lambda: own() if rank == 0 else None, "copies": own}
    return kinds | {f"{groups} groups": batches(model, groups, runtime) for groups in arguments.groups}


def main() -> None:
    """Measure and print rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="folder, file or name [default: random, 8 layers of 1,024]")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=64, help="max_num_batched_tokens")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--axes", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="transformers' own, too")
    parser.add_argument("--partition", type=lambda text: [int(one) for one in text.split(",")], help='such as "19,11"')
    arguments = parser.parse_args()
    for axis in arguments.axes:
        report(axis, run_ranks(2, measure, arguments, axis, timeout=1800)[0], arguments)


def report(axis: str, found: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the rates of one axis."""
    print(f"{axis}=2")
    tokens = arguments.prompts * arguments.tokens
    same = found.pop("same")
    for name, seconds in found.items():
        ratios = [copies / 2 / own for copies, own in zip(found["copies"], seconds, strict=True)]
        share = "" if name == "copies" else f", {statistics.median(ratios):.2f} of the ceiling"
        rate = tokens * (2 if name == "copies" else 1) / statistics.median(seconds)
        print(f"  {name}: {rate:.1f} tokens/s{share}{'' if same.get(name, True) else ', OTHER TOKENS'}", flush=True)


if __name__ == "__main__":
    main()
