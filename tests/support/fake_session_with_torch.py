"""The stand-in session with a process group, for tests in which ranks use torch."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import fake_session
import torch
import torch.distributed as dist

from shardit.core.comm.mesh import init_mesh


class Session(fake_session.Session):
    def __init__(self, spec: Any, *, rank: int, world_size: int, init_method: str):
        timeout = timedelta(seconds=30)
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
        self.mesh = init_mesh(spec.config, device="cpu", timeout_s=30)
        super().__init__(spec, rank=rank, world_size=world_size, init_method=init_method)

    def generate(self, requests: list[Any], on_progress: Any) -> dict[int, Any]:
        total = torch.tensor([self.rank + 1.0])
        dist.all_reduce(total)
        outputs = super().generate(requests, on_progress)
        found = {"sum": total.item(), "torch_threads": torch.get_num_threads()}
        return {
            index: dataclasses.replace(output, metrics={"pid": output.metrics["pid"], **found})
            for index, output in outputs.items()
        }

    def close(self) -> None:
        dist.destroy_process_group()
