"""A rank of a training run: joins the others, trains, and reports the outcome."""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import Any

import torch.distributed as dist

from shardit.core.comm.mesh import init_mesh
from shardit.engine.process.channel import Channel, Closed
from shardit.engine.rank.command_counts import readable
from shardit.training.run.messages import Began, Ended, TrainSpec
from shardit.training.run.train import train

PRELOAD = ("torch.distributed.pipelining", "transformers.modeling_utils")
"""Imports of the fork server for all ranks."""


def check(spec: TrainSpec) -> None:
    """Import what makes the recipe, so that ranks have it at once."""
    importlib.import_module(spec.recipe)


class TrainSession:
    """One rank. info: nothing; the ranks are up when they have met."""

    info = None

    def __init__(self, spec: TrainSpec, *, rank: int, world_size: int, init_method: str):
        os.environ.setdefault("LOCAL_RANK", str(rank))  # a mesh made later finds its device by this
        self.spec = spec
        self.mesh = init_mesh(spec.config, timeout_s=spec.timeout_s, rank=rank, init_method=init_method)

    def serve(self, channel: Channel) -> None:
        """Train; the user's process may end it with `Stop`, or by closing the channel."""
        asked = False

        def stop() -> bool:
            nonlocal asked
            while readable(channel, 0.0):
                channel.recv()  # there is no other message than Stop; raises Closed
                asked = True
            return asked

        with contextlib.suppress(Closed):
            early = self.run(stop, lambda: channel.send(Began()))
            channel.send(Ended(early))
            while True:
                channel.recv()

    def run(self, stop: Any, began: Any) -> bool:
        """Train; return whether the run was stopped early. stop() returns whether it should be."""
        make = importlib.import_module(self.spec.recipe).recipe
        return train(self.spec.settings, self.spec.config, self.mesh, make, stop, began)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized() and self.mesh.world_size > 1:
            dist.destroy_process_group()
