"""Pipeline and tensor parallelism of transformers itself on the same ranks, for `bench.language`."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch.distributed as dist


def peer_of(make: Any, rank: int, count: int, size: str) -> Any:
    """Return a model that transformers spreads over all ranks. make: makes it whole. size: "pp_size" or "tp_size".

    Collective: the first rank writes a checkpoint, and each rank loads its part of it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    with tempfile.TemporaryDirectory() as own:
        shared: list[Any] = [own]
        dist.broadcast_object_list(shared, src=0)
        if rank == 0:
            make().save_pretrained(shared[0])
        dist.barrier()
        config = DistributedConfig(**{size: count})
        model = AutoModelForCausalLM.from_pretrained(shared[0], distributed_config=config).eval()
        dist.barrier()
    return model
