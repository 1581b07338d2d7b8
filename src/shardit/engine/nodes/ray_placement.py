"""Places ranks over nodes with Ray: one actor for each, in a placement group with one bundle per node."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardit.engine.nodes.handshake import Endpoint
from shardit.engine.nodes.node_info import settings
from shardit.engine.nodes.rank_port import RankPort, join_all, listen_for_ranks
from shardit.engine.nodes.ray_connection import RayConnection, one_line
from shardit.engine.nodes.ray_rank import RayRank
from shardit.engine.process.channel import Channel
from shardit.engine.process.messages import SessionSpec
from shardit.engine.process.placement import Report
from shardit.errors import InputError, RankError

RESOURCES_TIMEOUT_S = 60.0
"""Default of SHARDIT_RAY_WAIT: longest wait for Ray to give the CPUs and GPUs, in seconds."""
ARRIVAL_TIMEOUT_S = 300.0
"""Time limit for the actors to start and their ranks to arrive, in seconds. They arrive before they load the model."""
SHUTDOWN_TIMEOUT_S = 3.0


class RayPlacement:
    """See `Placement`. Each start has new actors: those of the previous start may hang.

    num_nodes: number of machines, each with an equal share of the ranks. option: what the user gave to have Ray, for
    the error if it is not installed.
    """

    def __init__(self, num_nodes: int, option: str):
        if importlib.util.find_spec("ray") is None:
            raise InputError(f'{option} needs Ray: pip install "shardit[ray]"')
        self._nodes = num_nodes
        self._wait_s = _resources_wait()
        self._connection = RayConnection()
        self._stopped = False
        self._group: Any = None
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._port: RankPort | None = None

    def start(self, spec: SessionSpec, report: Report) -> list[Channel]:
        """See `Placement`. Processes on other machines are not monitored: only a closed connection is noticed."""
        try:
            return self._start(spec)
        except (InputError, RankError):
            raise
        except Exception as error:
            raise RankError(-1, f"Ray: {one_line(error)}") from error

    def kill(self, grace_s: float = 0.0) -> None:
        """See `Placement`. Actors get no time of grace."""
        if self._port is not None:
            self._port.close()
            self._port = None
        actors, self._actors, self._runs = self._actors, [], []
        group, self._group = self._group, None
        if self._connection.is_open:
            import ray
            from ray.util import remove_placement_group

            for actor in actors:
                with contextlib.suppress(Exception):  # it may be gone, or Ray itself
                    ray.kill(actor)
            if group is not None:
                with contextlib.suppress(Exception):
                    remove_placement_group(group)

    def stop(self, code: int = 0) -> None:
        """See `Placement`."""
        self._stopped = True
        thread = threading.Thread(target=self._shut_down, daemon=True)
        thread.start()
        # Ray may wait for a node that does not answer; the end of this process ends it, too.
        thread.join(SHUTDOWN_TIMEOUT_S)

    def stacks(self) -> dict[int, str]:
        """See `Placement`."""
        return {}

    def _shut_down(self) -> None:
        self.kill()
        self._connection.close()

    def _start(self, spec: SessionSpec) -> list[Channel]:
        ray = self._connection.open()
        size = spec.config.world_size
        per_node, rest = divmod(size, self._nodes)
        if rest:
            raise InputError(
                f"{size} ranks cannot be distributed evenly over {self._nodes} nodes; change either number"
            )
        gpus = _wants_gpus(ray, spec.device)
        self._group = self._reserve(ray, per_node, gpus)
        self._port = RankPort(listen_for_ranks(_own_address(ray)), [(rank, "rank") for rank in range(size)])
        if self._stopped:
            raise RankError(-1, "it has been stopped")
        spec = replace(spec, model=_absolute(spec.model))
        self._run_actors(ray, spec.model, size, per_node, gpus)
        arrived = self._port.collect(ARRIVAL_TIMEOUT_S, lambda: self._check_actors(ray))
        return join_all([arrived[rank, "rank"] for rank in range(size)], spec)

    def _reserve(self, ray: Any, per_node: int, gpus: bool) -> Any:
        from ray.util import placement_group, remove_placement_group

        bundle = {"CPU": float(per_node), **({"GPU": float(per_node)} if gpus else {})}
        strategy = "STRICT_SPREAD" if self._nodes > 1 else "PACK"
        group = placement_group([bundle] * self._nodes, strategy=strategy)
        if not group.wait(self._wait_s):
            remove_placement_group(group)
            raise InputError(
                f"Ray has not given {self._nodes} node{'s' * (self._nodes > 1)} with {_amounts(bundle)} each within "
                f"{self._wait_s:g} s (SHARDIT_RAY_WAIT): {_describe_resources(ray)}"
            )
        return group

    def _run_actors(self, ray: Any, model: str, size: int, per_node: int, gpus: bool) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert self._port is not None
        endpoint: Endpoint = self._port.endpoint(ray.util.get_node_ip_address())
        actor_class = ray.remote(RayRank)
        for rank in range(size):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank // per_node)
            options = {"num_cpus": 1, "num_gpus": int(gpus), "max_restarts": 0, "scheduling_strategy": place}
            self._actors.append(actor_class.options(**options).remote())
        self._runs = [
            actor.run.remote(rank, size, per_node, model, endpoint, gpus, settings())
            for rank, actor in enumerate(self._actors)
        ]

    def _check_actors(self, ray: Any) -> None:
        """Raise the error of an actor that ended before its rank arrived."""
        ended, _ = ray.wait(self._runs, num_returns=1, timeout=0)
        if not ended:
            return
        rank = self._runs.index(ended[0])
        try:
            code = ray.get(ended[0])
        except Exception as error:
            if "No module named 'shardit'" in str(error):
                raise InputError("a node of the Ray cluster has no shardit; install the same on every node") from None
            raise RankError(rank, f"its actor has failed: {one_line(error)}") from None
        if self._port is not None and not self._port.has_arrived(rank):
            raise RankError(rank, f"it has ended before it had arrived, with code {code}")


def _absolute(model: str) -> str:
    """Return the model under a name that is valid in any folder: actors have another working folder."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _resources_wait() -> float:
    text = os.environ.get("SHARDIT_RAY_WAIT", "").strip()
    try:
        seconds = float(text) if text else RESOURCES_TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise InputError(f"SHARDIT_RAY_WAIT must be a number of seconds above 0, got {text!r}")
    return seconds


def _wants_gpus(ray: Any, device: str | None) -> bool:
    """Return whether ranks will pick GPUs: by default, if there are any."""
    if device is not None:
        return device.partition(":")[0] == "cuda"
    return ray.cluster_resources().get("GPU", 0) > 0


def _own_address(ray: Any) -> str:
    """Return the address to listen at: this machine's address alone if all nodes are on it, else all of its
    addresses."""
    own = ray.util.get_node_ip_address()
    return own if all(node["NodeManagerAddress"] == own for node in ray.nodes() if node["Alive"]) else ""


def _describe_resources(ray: Any) -> str:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    each = ", ".join(f"{node['NodeManagerHostname']} ({_amounts(node['Resources'])})" for node in nodes)
    return f"it has {len(nodes)} node{'s' * (len(nodes) != 1)}: {each}; free are {_amounts(ray.available_resources())}"


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU") if name in resources) or "none"
