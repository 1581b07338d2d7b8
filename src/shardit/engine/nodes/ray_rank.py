"""A rank in an actor of Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping

from shardit.engine.nodes.handshake import Endpoint

CONNECT_TIMEOUT_S = 60.0


class RayRank:
    """Ray actor for one start of one rank."""

    def run(
        self,
        rank: int,
        world_size: int,
        per_node: int,
        model: str,
        endpoint: Endpoint,
        has_gpu: bool,
        environment: Mapping[str, str],
    ) -> int:
        """Connect to the supervisor and work until it closes the channel; returns the rank's exit code."""
        from ray.util import get_node_ip_address

        os.environ.update(environment)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it logs every optional package that is missing
        # Ray shows an actor only its own GPU, whose number is then 0.
        os.environ["LOCAL_RANK"] = "0" if has_gpu else str(rank % per_node)
        os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
        from shardit.engine.nodes.remote_rank import RemoteRank
        from shardit.engine.process.process import threads_per_rank

        here = RemoteRank(rank, model, address=get_node_ip_address())
        here.arrive(endpoint, CONNECT_TIMEOUT_S)
        return here.work(world_size, threads_per_rank(per_node))
